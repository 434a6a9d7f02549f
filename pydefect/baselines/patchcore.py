"""PatchCore: nearest neighbours in a coreset of all normal patches.

Roth et al., Towards total recall in industrial anomaly detection, CVPR 2022; equations are numbered as there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pydefect.baselines.detector import BaselineDetector, Context, PatchModel, each_image
from pydefect.errors import InputError
from pydefect.feature_detector import FeatureConfig
from pydefect.features import FeatureCache, patch_vectors
from pydefect.ops import kcenter_greedy, knn, score_maps

__all__ = ["PatchCore", "PatchCoreConfig", "PatchCoreDetector", "coreset", "reweighted_scores"]


@dataclass(frozen=True)
class PatchCoreConfig(FeatureConfig):
    """Settings of PatchCore; features are averaged over 3x3 neighbourhoods (section 3.1)."""

    TITLE: ClassVar[str] = "PatchCore"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "paper": {"backbone": "wide_resnet50_2", "crop": 224},
    }
    RANGES: ClassVar[Mapping[str, tuple[float, float]]] = {
        **FeatureConfig.RANGES,
        "coreset_ratio": (1e-6, 1),
        "projection_dim": (1, math.inf),
        "neighbors": (1, math.inf),
        "smoothing": (0, 10_000),
    }

    levels: tuple[int, ...] = (2, 3)
    """Backbone levels."""
    coreset_ratio: float = 0.01
    """Share of all patches that the memory bank keeps; the paper compares 0.25, 0.1 and 0.01."""
    projection_dim: int | None = 128
    """Dimensions of the random projection in which the coreset is searched (algorithm 1); None: none."""
    neighbors: int = 9
    """b of (7); 1: the score of (6) as it is."""
    smoothing: float = 4.0
    """Standard deviation of the map's Gaussian in pixels of the network's input."""


class PatchCore(PatchModel):
    """A memory bank of normal patches.

    Attributes
    ----------
    bank
        [M, D] float32.
    """

    def __init__(self, bank: Tensor, config: PatchCoreConfig) -> None:
        self.bank = bank
        self.config = config
        self.found = {}

    @classmethod
    def fit(
        cls, cache: FeatureCache, indices: Sequence[int], config: PatchCoreConfig, context: Context
    ) -> PatchCore:
        """Gather all patches and keep a coreset of them (algorithm 1)."""
        images = each_image(cache, indices, context, "patches")
        patches = torch.cat([patch_vectors(levels)[0] for levels in images])
        return cls(coreset(patches, config.coreset_ratio, config.projection_dim, context), config)

    def score(self, levels: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Score by (6) and (7), and map by the patches' distances (section 3.3)."""
        return score_by_bank(patch_vectors(levels), self.bank, levels[0].shape[2:], size, self.config)

    def state(self) -> dict[str, Tensor]:
        """Return ``bank``."""
        return {"bank": self.bank}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], config: PatchCoreConfig) -> PatchCore:
        """Read what :meth:`state` returned."""
        return cls(state["bank"], config)


def coreset(patches: Tensor, ratio: float, projection_dim: int | None, context: Context) -> Tensor:
    """Choose patches that cover all of them: greedy k-centre after a random projection.

    Parameters
    ----------
    patches
        [N, D] float32.
    ratio
        Share to keep; at least one patch.
    projection_dim
        The Johnson-Lindenstrauss projection of algorithm 1, with Gaussian entries; None, or as many as D: the
        patches themselves.
    context
        Its seed is that of the projection.

    Returns
    -------
    Tensor
        [round(ratio * N), D].

    Notes
    -----
    The choice begins with the first patch, where the published code draws one.
    """
    count = max(1, round(ratio * len(patches)))
    projected = patches
    if projection_dim is not None and projection_dim < patches.shape[1]:
        entries = torch.randn(patches.shape[1], projection_dim, generator=context.generator())
        projected = patches @ (entries / math.sqrt(projection_dim)).to(patches)
    context.report("coreset", 1, 2)
    chosen = patches[kcenter_greedy(projected, count)]
    context.report("coreset", 2, 2)
    return chosen


def score_by_bank(
    patches: Tensor,
    bank: Tensor,
    grid: Sequence[int],
    size: tuple[int, int],
    config: Any,
) -> tuple[Tensor, Tensor]:
    """Score patches by their nearest neighbours in a bank.

    Parameters
    ----------
    patches
        [B, H * W, D] float32.
    bank
        [M, D] float32.
    grid, size
        (H, W), and (height, width) of the network's input.
    config
        With ``neighbors`` and ``smoothing``.

    Returns
    -------
    image_scores, anomaly_maps
        [B] and [B, height, width].
    """
    if patches.shape[2] != bank.shape[1]:
        raise InputError(f"model: the bank has width {bank.shape[1]}, the features {patches.shape[2]}")
    squared, nearest = knn(patches.flatten(0, 1), bank, 1, precision="bf16")
    distances = squared.sqrt().reshape(len(patches), *grid, 1)
    _, maps = score_maps(distances, size, config.smoothing, certainty=False)
    flat = distances.flatten(1)
    scores = reweighted_scores(patches, flat, nearest.reshape(flat.shape), bank, config.neighbors)
    return scores, maps


def reweighted_scores(
    patches: Tensor, distances: Tensor, nearest: Tensor, bank: Tensor, neighbors: int
) -> Tensor:
    """Image scores: the largest patch distance s* (6), weighted by how crowded the bank is there (7).

    s = (1 - exp(s*) / sum over m in N_b(m*) of exp(||m_test - m||)) s*, where m_test is the patch with the
    largest distance, m* its nearest neighbour and N_b(m*) the b members of the bank nearest to m*, itself
    included.

    Parameters
    ----------
    patches
        [B, T, D].
    distances, nearest
        [B, T]: distance to the nearest member of the bank, and its index.
    bank
        [M, D].
    neighbors
        b, at most M count; 1: no weight.

    Returns
    -------
    Tensor
        [B], >= 0.
    """
    largest, where = distances.max(1)
    neighbors = min(neighbors, len(bank))
    if neighbors == 1:
        return largest
    images = torch.arange(len(patches), device=patches.device)
    around = bank[knn(bank[nearest[images, where]], bank, neighbors)[1]]
    to_others = (patches[images, where].unsqueeze(1) - around).square().sum(2).sqrt()
    # exp(s*) over the sum, without overflow: distances of WideResNet features reach hundreds.
    share = torch.exp(largest - torch.logsumexp(to_others, dim=1))
    return (1 - share).clamp_min(0) * largest


class PatchCoreDetector(BaselineDetector):
    """A fitted PatchCore; made by :func:`pydefect.fit` or :func:`pydefect.load`."""

    method: ClassVar[str] = "patchcore"
    config_type: ClassVar[type[FeatureConfig]] = PatchCoreConfig
    model_type: ClassVar[type[PatchModel]] = PatchCore
