"""Synthetic anomaly maps with masks, for what is measured on metrics."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray


def draw(images: int, side: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return smooth maps and masks, [images, side, side].

    Every second image has three round defects (of 2 to 12 % of the side in radius), which raise the scores
    around them about as much as the background varies: neither easy nor hopeless, about 2.6 % of the pixels.
    """
    rng = np.random.default_rng(seed)
    maps = np.empty((images, side, side), np.float32)
    masks = np.zeros((images, side, side), bool)
    rows, columns = np.ogrid[:side, :side]
    for index in range(images):
        coarse = rng.random((side // 16, side // 16), dtype=np.float32)
        score = cv2.GaussianBlur(cv2.resize(coarse, (side, side)), (0, 0), side / 128)
        if index % 2:
            for _ in range(3):
                row, column = rng.integers(side // 10, side - side // 10, 2)
                radius = rng.uniform(0.02, 0.12) * side
                disc = (rows - row) ** 2 + (columns - column) ** 2 < radius**2
                masks[index] |= disc
                score += 0.2 * cv2.GaussianBlur(disc.astype(np.float32), (0, 0), side / 64)
        maps[index] = score
    return maps, masks
