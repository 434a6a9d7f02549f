"""PaDiM: a Gaussian of normal features at every patch position.

Defard et al., PaDiM: a patch distribution modeling framework for anomaly detection and localization, ICPR
workshops 2021; equations are numbered as there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pydefect.baselines.detector import BaselineDetector, Context, PatchModel
from pydefect.errors import InputError
from pydefect.feature_detector import FeatureConfig
from pydefect.features import FeatureCache, patch_vectors
from pydefect.ops import score_maps

__all__ = ["PaDiM", "PaDiMConfig", "PaDiMDetector", "mean_and_covariance", "whitening"]

# Images at a time while the covariances are gathered, and positions at a time while they are inverted: with
# 100 channels 40 MB in float64.
_BATCH = 8
_POSITIONS = 512


@dataclass(frozen=True)
class PaDiMConfig(FeatureConfig):
    """Settings of PaDiM; features are the backbone's own, coarser levels repeated (section III-A)."""

    TITLE: ClassVar[str] = "PaDiM"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "paper": {"backbone": "wide_resnet50_2", "channels": 550, "crop": 224},
    }
    RANGES: ClassVar[Mapping[str, tuple[float, float]]] = {
        **FeatureConfig.RANGES,
        "channels": (1, math.inf),
        "regularisation": (1e-12, math.inf),
        "smoothing": (0, 10_000),
    }

    levels: tuple[int, ...] = (1, 2, 3)
    """Backbone levels."""
    channels: int | None = 100
    """How many channels are drawn at random (section III-D); the paper takes 100 of ResNet-18, 550 of
    Wide-ResNet-50-2. More than there are, or None: all."""
    regularisation: float = 0.01
    """epsilon of (1), added to the covariances' diagonals."""
    smoothing: float = 4.0
    """Standard deviation of the map's Gaussian in pixels of the network's input."""


class PaDiM(PatchModel):
    """A Gaussian at every position.

    Attributes
    ----------
    channels
        [C] int64: the channels that were drawn.
    mean
        [T, C] float32.
    whitening
        [T, C, C] float32, lower triangular: W with W^T W the inverse of the covariance.
    grid
        (height, width) of the patch grid, T = height * width.
    """

    def __init__(
        self,
        channels: Tensor,
        mean: Tensor,
        whitening: Tensor,
        grid: tuple[int, int],
        config: PaDiMConfig,
    ) -> None:
        self.channels, self.mean, self.whitening, self.grid = channels, mean, whitening, grid
        self.config = config
        self.found = {}

    @classmethod
    def fit(cls, cache: FeatureCache, indices: Sequence[int], config: PaDiMConfig, context: Context) -> PaDiM:
        """Draw the channels and estimate mean and covariance (1) of every position, image after image."""
        total = sum(shape[0] for shape in cache.shapes)
        wanted = total if config.channels is None else min(config.channels, total)
        channels = torch.randperm(total, generator=context.generator())[:wanted].sort().values
        channels = channels.to(context.device)

        def vectors() -> Iterable[Tensor]:
            for start in range(0, len(indices), _BATCH):
                batch = indices[start : start + _BATCH]
                yield patch_vectors(cache.get(batch, context.device), "nearest")[:, :, channels]
                context.report("covariances", start + len(batch), len(indices))

        mean, covariance = mean_and_covariance(vectors())
        return cls(
            channels,
            mean,
            whitening(covariance, config.regularisation),
            (cache.shapes[0][1], cache.shapes[0][2]),
            config,
        )

    def score(self, levels: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Score by the Mahalanobis distance (2); the image score is the map's maximum."""
        batch, _, *grid = levels[0].shape
        if tuple(grid) != self.grid:
            raise InputError(
                f"images: a patch grid of {grid[0]} x {grid[1]}, but PaDiM was fitted on "
                f"{self.grid[0]} x {self.grid[1]}; it needs images of one size (set resize)"
            )
        vectors = patch_vectors(levels, "nearest")[:, :, self.channels]
        # [T, C, C] x [T, C, B]: every position's matrix is read once a batch.
        whitened = self.whitening @ (vectors - self.mean).permute(1, 2, 0)
        distances = whitened.square().sum(1).sqrt().T.reshape(batch, *self.grid, 1)
        _, maps = score_maps(distances, size, self.config.smoothing, certainty=False)
        return maps.flatten(1).amax(1), maps

    def state(self) -> dict[str, Tensor]:
        """Return the channels, the means, the triangles of the whitening matrices and the grid."""
        rows, columns = torch.tril_indices(len(self.channels), len(self.channels), device="cpu").unbind()
        return {
            "channels": self.channels,
            "mean": self.mean,
            "whitening": self.whitening[:, rows, columns],
            "grid": torch.tensor(self.grid, device="cpu"),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], config: PaDiMConfig) -> PaDiM:
        """Read what :meth:`state` returned."""
        mean = state["mean"]
        positions, channels = mean.shape
        rows, columns = torch.tril_indices(channels, channels).unbind()
        whitening = mean.new_zeros(positions, channels, channels)
        whitening[:, rows, columns] = state["whitening"]
        height, width = state["grid"].tolist()
        return cls(state["channels"], mean, whitening, (height, width), config)


def mean_and_covariance(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a stream, without holding it.

    Parameters
    ----------
    batches
        [B, T, C] float32 each, B of any size.

    Returns
    -------
    mean
        [T, C].
    covariance
        [T, C, C]: the sum of (x - mean)(x - mean)^T over N - 1 as in (1), or over 1 for a single x.

    References
    ----------
    Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979:
    deviations are taken from means, so nothing cancels.
    """
    count, mean, scatter = 0, torch.empty(0), torch.empty(0)
    for batch in batches:
        size = len(batch)
        own = batch.mean(0)
        if count == 0:
            mean, scatter = torch.zeros_like(own), own.new_zeros(*own.shape, own.shape[1])
        between = (own - mean) * math.sqrt(count * size / (count + size))
        deviations = torch.cat([batch - own, between.unsqueeze(0)]).transpose(0, 1)
        scatter.baddbmm_(deviations.transpose(1, 2), deviations)
        mean = mean + (own - mean) * (size / (count + size))
        count += size
    return mean, scatter.div_(max(1, count - 1))


def whitening(covariance: Tensor, regularisation: float) -> Tensor:
    """Inverse Cholesky factors of (covariance + regularisation * identity), some positions at a time.

    Parameters
    ----------
    covariance
        [T, C, C] float32, which is overwritten: it may be most of the memory.
    regularisation
        > 0.

    Returns
    -------
    Tensor
        `covariance`, of which every matrix is lower triangular now: ||W (x - mean)|| is the Mahalanobis
        distance (2), and never the root of something negative.
    """
    identity = torch.eye(covariance.shape[1], dtype=torch.float64, device=covariance.device)
    for start in range(0, len(covariance), _POSITIONS):
        part = covariance[start : start + _POSITIONS].double() + regularisation * identity
        triangular = torch.linalg.cholesky(part)
        covariance[start : start + _POSITIONS] = torch.linalg.solve_triangular(
            triangular, identity.expand_as(part), upper=False
        )
    return covariance


class PaDiMDetector(BaselineDetector):
    """A fitted PaDiM; made by :func:`pydefect.fit` or :func:`pydefect.load`."""

    method: ClassVar[str] = "padim"
    config_type: ClassVar[type[FeatureConfig]] = PaDiMConfig
    model_type: ClassVar[type[PatchModel]] = PaDiM
    average: ClassVar[bool] = False
