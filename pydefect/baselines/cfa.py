"""CFA: patch features adapted to hyperspheres around a bank of fixed size.

Lee, Lee and Song, CFA: Coupled-hypersphere-based feature adaptation for target-oriented anomaly localization,
IEEE Access 10, 2022. It is what ConPatch builds on: its attraction is ConPatch's loss (7), its score is
ConPatch's (9), and ConPatch replaces its repulsion by the contrastive loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pydefect.baselines.detector import BaselineDetector, Context, PatchModel, each_image
from pydefect.baselines.training import train
from pydefect.feature_detector import FeatureConfig
from pydefect.features import FeatureCache
from pydefect.kmeans import kmeans
from pydefect.ops import assign_unique, hypersphere, knn, project_levels, score_maps
from pydefect.randomness import seeded

__all__ = ["Cfa", "CfaConfig", "CfaDetector", "Descriptor", "build_bank", "soft_boundary_loss"]


@dataclass(frozen=True)
class CfaConfig(FeatureConfig):
    """Settings of CFA; features are averaged over 3x3 neighbourhoods."""

    TITLE: ClassVar[str] = "CFA"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "paper": {"backbone": "wide_resnet50_2", "crop": 224},
    }
    RANGES: ClassVar[Mapping[str, tuple[float, float]]] = {
        **FeatureConfig.RANGES,
        "bank_compression": (1, math.inf),
        "bank_momentum": (0, 1),
        "width_compression": (1, math.inf),
        "neighbors": (1, math.inf),
        "hard_negatives": (1, math.inf),
        "radius": (0, math.inf),
        "margin": (0, math.inf),
        "epochs": (0, math.inf),
        "batch_size": (1, math.inf),
        "learning_rate": (0, math.inf),
        "weight_decay": (0, math.inf),
        "smoothing": (0, 10_000),
    }

    levels: tuple[int, ...] = (1, 2, 3)
    """Backbone levels."""
    bank: Literal["position_mean", "ema"] = "position_mean"
    """How the bank is built. ``"position_mean"``: the mean of every position's features over all images, of
    which k-means keeps fewer (the published code); ``"ema"``: k-means of the first image, then for every
    image the exponential moving average with each centre's own nearest patch (the paper's algorithm)."""
    bank_compression: int = 1
    """gamma_c: patches of an image for one centre."""
    bank_momentum: float = 0.1
    """Weight of the new patch in the moving average (``bank="ema"``)."""
    width_compression: int = 1
    """gamma_d: input channels for one channel of the descriptor."""
    neighbors: int = 3
    """K: centres that attract a patch."""
    hard_negatives: int = 3
    """J: the centres after these, which repel it."""
    radius: float = 1e-5
    """r of the hyperspheres, at the beginning."""
    learn_radius: bool = False
    """Train r along, as the published code does; False: it stays."""
    margin: float = 0.1
    """alpha of the repulsion. With the published r and a radius that stays it never acts, as r^2 < alpha."""
    epochs: int = 30
    """Passes over the training images."""
    batch_size: int = 4
    learning_rate: float = 1e-3
    weight_decay: float = 5e-4
    smoothing: float = 4.0
    """Standard deviation of the map's Gaussian in pixels of the network's input."""


class Descriptor(nn.Module):
    """phi: a 1x1 CoordConv of the joined levels, and the radius.

    Parameters
    ----------
    channels
        Channels of every level.
    dimension
        Channels of the result.
    radius
        Of the hyperspheres.
    """

    def __init__(self, channels: Sequence[int], dimension: int, radius: float, learn_radius: bool) -> None:
        super().__init__()
        convolution = nn.Conv2d(sum(channels) + 2, dimension, 1)
        assert convolution.bias is not None
        self.weight = nn.Parameter(convolution.weight.detach()[:, :, 0, 0].clone())
        self.bias = nn.Parameter(convolution.bias.detach().clone())
        self.radius = nn.Parameter(torch.tensor(radius), requires_grad=learn_radius)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Map [B, C_l, H_l, W_l] a level to [B, H_1 * W_1, D]."""
        return project_levels(levels, self.weight, self.bias)


class Cfa(PatchModel):
    """Descriptor and memory bank.

    Attributes
    ----------
    descriptor
        phi.
    bank
        [M, D] float32.
    """

    def __init__(
        self, descriptor: Descriptor, bank: Tensor, config: CfaConfig, found: dict[str, Any]
    ) -> None:
        self.descriptor, self.bank, self.config, self.found = descriptor, bank, config, found

    @classmethod
    def fit(cls, cache: FeatureCache, indices: Sequence[int], config: CfaConfig, context: Context) -> Cfa:
        """Build the bank with the untrained descriptor, then train the descriptor towards it."""
        channels = [shape[0] for shape in cache.shapes]
        dimension = max(1, sum(channels) // config.width_compression)
        with seeded(context.seed):
            descriptor = Descriptor(channels, dimension, config.radius, config.learn_radius)
        descriptor.to(context.device)
        with torch.inference_mode():
            images = (descriptor(levels)[0] for levels in each_image(cache, indices, context, "memory bank"))
            bank = build_bank(images, config)
        # A tensor of inference mode cannot enter the graph of a loss.
        bank = bank.clone()

        def loss(levels: list[Tensor], generator: torch.Generator) -> Tensor:
            patches = descriptor(levels).flatten(0, 1)
            return soft_boundary_loss(patches, bank, descriptor.radius, config)

        history = train(descriptor, loss, cache, indices, config, context)
        return cls(descriptor, bank, config, {"epochs": len(history), "history": history})

    def score(self, levels: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Score by the distance to the nearest centre times its share in the softmin over K centres.

        That is ConPatch's equation (9); the image score is the maximum of the smoothed map.
        """
        batch, _, height, width = levels[0].shape
        neighbors = min(self.config.neighbors, len(self.bank))
        squared, _ = knn(self.descriptor(levels).flatten(0, 1), self.bank, neighbors, precision="bf16")
        distances = squared.sqrt().reshape(batch, height, width, neighbors)
        _, maps = score_maps(distances, size, self.config.smoothing)
        return maps.flatten(1).amax(1), maps

    def state(self) -> dict[str, Tensor]:
        """Return descriptor and bank."""
        named = {f"descriptor.{name}": value for name, value in self.descriptor.state_dict().items()}
        return {"bank": self.bank, **named}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], config: CfaConfig) -> Cfa:
        """Read what :meth:`state` returned."""
        dimension, inputs = state["descriptor.weight"].shape
        with seeded(0):  # its weights are replaced
            descriptor = Descriptor([inputs - 2], dimension, config.radius, config.learn_radius)
        descriptor.to(state["bank"].device)
        descriptor.load_state_dict(
            {
                name.removeprefix("descriptor."): value
                for name, value in state.items()
                if name.startswith("descriptor.")
            }
        )
        return cls(descriptor, state["bank"], config, {})


def build_bank(images: Iterator[Tensor], config: CfaConfig) -> Tensor:
    """Build the memory bank over a stream of images.

    Parameters
    ----------
    images
        [T, D] float32 each; at least one.
    config
        ``bank``, ``bank_compression``, ``bank_momentum``.

    Returns
    -------
    Tensor
        [max(1, T // gamma_c), D].
    """
    first = next(images)
    count = max(1, len(first) // config.bank_compression)
    if config.bank == "ema":
        centres = _means(first, count)
        for patches in images:
            centres = torch.lerp(centres, patches[assign_unique(centres, patches)], config.bank_momentum)
        return centres
    mean = first
    for number, patches in enumerate(images, start=2):
        mean = torch.lerp(mean, patches, 1 / number)
    return _means(mean, count)


def _means(patches: Tensor, count: int) -> Tensor:
    return patches if count == len(patches) else kmeans(patches, count)[0]


def soft_boundary_loss(patches: Tensor, bank: Tensor, radius: Tensor, config: CfaConfig) -> Tensor:
    """L_att + L_rep over squared distances, as in the published code (which multiplies both by 1000; AdamW's
    steps do not depend on it).

    L_att = 1/(N K) sum of max(0, d(p, c_k) - r^2) over the K nearest centres, and
    L_rep = 1/(N J) sum of max(0, r^2 - d(p, c_j) - alpha) over the J centres after them.

    Parameters
    ----------
    patches
        [N, D] float32.
    bank
        [M, D] float32; a bank of fewer than K + J centres has so many the fewer hard negatives.
    radius
        Scalar r.
    config
        ``neighbors`` K, ``hard_negatives`` J, ``margin`` alpha.

    Returns
    -------
    Tensor
        Scalar >= 0; gradients flow to the patches and, where it wants one, to the radius.
    """
    k = min(config.neighbors, len(bank))
    if not radius.requires_grad and float(radius) ** 2 <= config.margin:
        # No distance is negative: the repulsion is zero everywhere.
        return hypersphere(patches, bank, k, float(radius), distance_power=2)
    total = min(k + config.hard_negatives, len(bank))
    nearest = knn(patches, bank, total, precision="bf16")[1]
    # One centre at a time: [N, D] temporaries instead of [N, K + J, D].
    squared = torch.stack([(patches - bank[column]).square().sum(1) for column in nearest.unbind(1)], dim=1)
    attraction = torch.relu(squared[:, :k] - radius**2).mean()
    if total == k:
        return attraction
    return attraction + torch.relu(radius**2 - squared[:, k:] - config.margin).mean()


class CfaDetector(BaselineDetector):
    """A fitted CFA; made by :func:`pydefect.fit` or :func:`pydefect.load`."""

    method: ClassVar[str] = "cfa"
    config_type: ClassVar[type[FeatureConfig]] = CfaConfig
    model_type: ClassVar[type[PatchModel]] = Cfa
