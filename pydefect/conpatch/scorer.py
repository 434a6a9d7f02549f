"""From patch features to image scores and anomaly maps (section 3.5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pydefect.conpatch.bank import MemoryBank
from pydefect.conpatch.config import ConPatchConfig
from pydefect.conpatch.network import ConPatchNetwork
from pydefect.ops import knn, score_maps

__all__ = ["score_levels"]


def score_levels(
    levels: Sequence[Tensor],
    network: ConPatchNetwork,
    bank: MemoryBank,
    config: ConPatchConfig,
    size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Score patch features against the bank, section 3.5.

    Parameters
    ----------
    levels
        [B, C_l, H_l, W_l] float32 each.
    network, bank, config
        Of the detector.
    size
        (height, width) of the network's input.

    Returns
    -------
    image_scores
        [B]: maximum of the patch scores (9), or of the smoothed map.
    maps
        [B, height, width]: equation (12).
    """
    batch, _, height, width = levels[0].shape
    neighbors = min(config.neighbors, len(bank.centres))
    # One image at a time on the CPU: its representations (7 MB) stay in the cache between projection and
    # search, and memory does not grow with the batch.
    together = 1 if levels[0].device.type == "cpu" else max(1, batch)
    squared = [
        knn(network.representation(part).flatten(0, 1), bank.centres, neighbors, precision="bf16")[0]
        for part in zip(*(level.split(together) for level in levels), strict=True)
    ]
    distances = torch.cat(squared).sqrt_().reshape(batch, height, width, neighbors)
    scores, maps = score_maps(distances, size, config.smoothing, certainty=config.score == "certainty")
    return (scores if config.image_score == "max_patch" else maps).flatten(1).amax(1), maps
