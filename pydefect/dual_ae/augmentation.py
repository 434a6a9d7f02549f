"""The colour-jittered copy of an image for the autoencoders, and images of anything else for L_pen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pydefect.data.ahead import done_ahead
from pydefect.data.images import draw_image, list_image_files
from pydefect.data.textures import texture
from pydefect.errors import InputError
from pydefect.preprocessing import Preprocessing

__all__ = ["PenaltyImages", "jittered"]

Pixels = np.ndarray[Any, Any]

_GREY = (0.299, 0.587, 0.114)
_GREY_SHARE = 0.3


def jittered(
    images: Tensor, preprocessing: Preprocessing, strength: float, rng: np.random.Generator
) -> Tensor:
    """Change one of brightness, contrast and saturation of every image.

    Parameters
    ----------
    images
        [B, 3, H, W] float32, normalised.
    preprocessing
        What normalised them.
    strength
        The factor is drawn from 1 - strength to 1 + strength.
    rng
        Of the draws: two an image.

    Returns
    -------
    Tensor
        [B, 3, H, W] float32, normalised; the memory layout of `images`.

    References
    ----------
    Batzner et al., EfficientAD, WACV 2024, appendix A.1, algorithm 1.
    """
    mean = _channels(preprocessing.mean, images)
    std = _channels(preprocessing.std, images)
    grey_weights = _channels(_GREY, images)
    pixels = images * std + mean
    for image in pixels:
        kind, factor = int(rng.integers(3)), float(rng.uniform(1 - strength, 1 + strength))
        # Away from black, from the mean grey, or from the pixel's own grey.
        if kind == 0:
            image.mul_(factor)
        else:
            grey = (image * grey_weights).sum(0)
            image.mul_(factor).add_(grey.mean() if kind == 1 else grey, alpha=1 - factor)
    return pixels.clamp_(0, 1).sub_(mean).div_(std)


def _channels(values: Iterable[float], like: Tensor) -> Tensor:
    """[C, 1, 1] of these values, filled in where `like` is: to copy them to a card is to wait for it."""
    return torch.stack([like.new_full((1, 1), value) for value in values])


class PenaltyImages:
    """A source of out-of-distribution images, the same for the same seed and step.

    Parameters
    ----------
    source
        ``"procedural"``, or the path of a folder with images, searched recursively.
    preprocessing
        Normalises the images.
    size
        (height, width) of the network's input.
    seed
        Of the run.
    pool
        So many procedural images are drawn, each when it is needed first; then the same ones come again. Of a
        folder's images every one is read anew.

    Raises
    ------
    InputError
        The folder is not there, or holds no images.
    """

    def __init__(
        self, source: str, preprocessing: Preprocessing, size: tuple[int, int], seed: int, pool: int
    ) -> None:
        self._size = size
        self._normalise = Preprocessing(None, None, preprocessing.mean, preprocessing.std)
        self._enlarged = Preprocessing(
            (2 * size[0], 2 * size[1]), size, preprocessing.mean, preprocessing.std
        )
        self._seed = seed
        self._pool = pool
        self._kept: dict[int, Pixels] = {}
        self._files: list[Path] | None = None
        if source != "procedural":
            folder = Path(source)
            if not folder.is_dir():
                raise InputError(
                    f"penalty: {source!r} is no folder; allowed are 'procedural', 'none' and a folder"
                )
            self._files = list_image_files(folder)
            if not self._files:
                raise InputError(f"penalty: {source!r} holds no images")

    @property
    def identity(self) -> str:
        """What the images are, for a checkpoint: ``"procedural"``, or a digest of the files' names."""
        if self._files is None:
            return "procedural"
        return hashlib.sha256("\n".join(path.name for path in self._files).encode()).hexdigest()

    def __call__(self, step: int, count: int) -> Tensor:
        """Return the images of a step.

        Parameters
        ----------
        step
            0, 1, ...
        count
            B.

        Returns
        -------
        Tensor
            [B, 3, H, W] float32, normalised, channels last in memory. Files are enlarged to twice the size,
            made grey with a probability of 0.3 and cropped at the centre, as EfficientAD does with ImageNet.
        """
        (images,) = self.stream(range(step, step + 1), count)
        return images

    def stream(self, steps: range, count: int, workers: int = 0) -> Iterator[Tensor]:
        """Yield the images of one step after the other.

        Parameters
        ----------
        steps
            One after the other.
        count
            B.
        workers
            Processes that draw or read ahead; 0: everything is done here when it is needed.

        Yields
        ------
        Tensor
            As a call with each step.
        """
        draws = range(steps.start * count, steps.stop * count)
        missing: Iterable[int] = draws
        if self._files is None:
            # What comes again within these steps is drawn once.
            first = draws[: self._pool]
            missing = [n for n in (draw % self._pool for draw in first) if n not in self._kept]
        new = done_ahead(self._pixels, missing, workers)
        for step in steps:
            images = []
            for draw in range(step * count, (step + 1) * count):
                if self._files is not None:
                    image = self._enlarged(next(new))
                else:
                    number = draw % self._pool
                    if number not in self._kept:
                        self._kept[number] = next(new)
                    image = self._normalise(self._kept[number])
                images.append(image.permute(1, 2, 0))
            yield torch.stack(images).permute(0, 3, 1, 2)

    def _pixels(self, number: int) -> Pixels:
        """Draw or read the n-th image, before it is normalised."""
        if self._files is None:
            return texture((self._seed, number), self._size)
        rng = np.random.default_rng((self._seed, number))
        pixels = draw_image(self._files, rng)
        if rng.random() < _GREY_SHARE:
            grey = (
                (pixels @ np.array(_GREY)).round() if pixels.dtype == np.uint8 else pixels @ np.array(_GREY)
            )
            pixels = np.repeat(grey.astype(pixels.dtype)[..., None], 3, axis=2)
        return pixels
