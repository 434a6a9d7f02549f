"""ReConPatch: a linear map of the patch features trained by contrast alone, then PatchCore.

Hyun et al., ReConPatch: Contrastive patch representation learning for industrial anomaly detection, WACV
2024 (arXiv 2305.16713). Its loss is what ConPatch's section 3.3 takes over, and is computed by the same
operator: the contextual similarity is ConPatch's (2), without the paper's averaging over the neighbours'
neighbours, and the pairwise one squares its distances. AdamW stands in for AdamP.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pydefect.baselines.detector import BaselineDetector, Context, PatchModel, each_image
from pydefect.baselines.patchcore import coreset, score_by_bank
from pydefect.baselines.training import train
from pydefect.feature_detector import FeatureConfig
from pydefect.features import FeatureCache, patch_vectors
from pydefect.ops import relaxed_contrastive
from pydefect.randomness import seeded

__all__ = ["ReConPatch", "ReConPatchConfig", "ReConPatchDetector", "TwinNetwork"]


@dataclass(frozen=True)
class ReConPatchConfig(FeatureConfig):
    """Settings of ReConPatch; features are averaged over 3x3 neighbourhoods."""

    TITLE: ClassVar[str] = "ReConPatch"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "paper": {"backbone": "wide_resnet50_2", "crop": 224, "epochs": 120},
    }
    RANGES: ClassVar[Mapping[str, tuple[float, float]]] = {
        **FeatureConfig.RANGES,
        "representation_dim": (1, math.inf),
        "projection_dim": (1, math.inf),
        "alpha": (0, 1),
        "sigma": (1e-12, math.inf),
        "context_neighbors": (1, math.inf),
        "margin": (0, math.inf),
        "target_momentum": (0, 1),
        "contrastive_patches": (2, math.inf),
        "epochs": (0, math.inf),
        "batch_size": (1, math.inf),
        "learning_rate": (0, math.inf),
        "weight_decay": (0, math.inf),
        "coreset_ratio": (1e-6, 1),
        "coreset_projection": (1, math.inf),
        "neighbors": (1, math.inf),
        "smoothing": (0, 10_000),
    }

    levels: tuple[int, ...] = (2, 3)
    """Backbone levels."""
    representation_dim: int = 512
    """Width of f, the representation that is kept."""
    projection_dim: int | None = None
    """Width of g, which only the loss sees; None: that of f."""
    alpha: float = 0.5
    """Share of the pairwise similarity in the pseudo label; the contextual one has the rest."""
    sigma: float = 1.0
    """Bandwidth of the pairwise similarity, over squared distances."""
    context_neighbors: int = 5
    """k of the contextual similarity."""
    margin: float = 1.0
    """Relative distance from which dissimilar pairs are left alone."""
    target_momentum: float = 0.9
    """How slowly the twin follows."""
    contrastive_patches: int | None = None
    """At most so many patches of a batch, drawn at random, enter the loss; None: all."""
    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 4
    learning_rate: float = 1e-5
    weight_decay: float = 1e-2
    coreset_ratio: float = 0.01
    """Share of all patches that the memory bank keeps."""
    coreset_projection: int | None = 128
    """Dimensions of the random projection in which the coreset is searched; None: none."""
    neighbors: int = 9
    """b of PatchCore's equation (7)."""
    smoothing: float = 4.0
    """Standard deviation of the map's Gaussian in pixels of the network's input."""


class TwinNetwork(nn.Module):
    """f and g, linear, and their slowly moving twins.

    Parameters
    ----------
    inputs, representation, projection
        Widths.
    """

    def __init__(self, inputs: int, representation: int, projection: int) -> None:
        super().__init__()
        self.representation = nn.Linear(inputs, representation)
        self.projection = nn.Linear(representation, projection)
        self.target_representation = copy.deepcopy(self.representation).requires_grad_(False)
        self.target_projection = copy.deepcopy(self.projection).requires_grad_(False)

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """Move the twins: momentum * theta' + (1 - momentum) * theta."""
        for target, online in (
            (self.target_representation, self.representation),
            (self.target_projection, self.projection),
        ):
            for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
                slow.lerp_(fast, 1 - momentum)


class ReConPatch(PatchModel):
    """The trained f and a coreset of what it makes of the normal patches.

    Attributes
    ----------
    representation
        f.
    bank
        [M, D] float32.
    """

    def __init__(
        self, representation: nn.Linear, bank: Tensor, config: ReConPatchConfig, found: dict[str, Any]
    ) -> None:
        self.representation, self.bank, self.config, self.found = representation, bank, config, found

    @classmethod
    def fit(
        cls, cache: FeatureCache, indices: Sequence[int], config: ReConPatchConfig, context: Context
    ) -> ReConPatch:
        """Train f and g by contrast, then gather f of all patches and keep a coreset."""
        inputs = sum(shape[0] for shape in cache.shapes)
        with seeded(context.seed):
            width = config.representation_dim
            network = TwinNetwork(inputs, width, config.projection_dim or width)
        network.to(context.device)

        def loss(levels: list[Tensor], generator: torch.Generator) -> Tensor:
            patches = patch_vectors(levels).flatten(0, 1)
            if config.contrastive_patches is not None and config.contrastive_patches < len(patches):
                order = torch.randperm(len(patches), generator=generator)
                patches = patches[order[: config.contrastive_patches].to(patches.device)]
            online = network.projection(network.representation(patches))
            target = network.target_projection(network.target_representation(patches))
            return relaxed_contrastive(
                online,
                target,
                alpha=config.alpha,
                sigma=config.sigma,
                margin=config.margin,
                neighbors=min(config.context_neighbors, len(patches)),
                similarity_power=2,
            )

        history = train(
            network,
            loss,
            cache,
            indices,
            config,
            context,
            after_step=lambda: network.update_target(config.target_momentum),
        )
        f = network.representation
        with torch.inference_mode():
            images = each_image(cache, indices, context, "patches")
            patches = torch.cat([f(patch_vectors(levels)[0]) for levels in images])
            bank = coreset(patches, config.coreset_ratio, config.coreset_projection, context)
        return cls(f, bank, config, {"epochs": len(history), "history": history})

    def score(self, levels: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Score as PatchCore does, on f of the patches."""
        patches = self.representation(patch_vectors(levels))
        return score_by_bank(patches, self.bank, levels[0].shape[2:], size, self.config)

    def state(self) -> dict[str, Tensor]:
        """Return f and the bank."""
        named = {f"representation.{name}": value for name, value in self.representation.state_dict().items()}
        return {"bank": self.bank, **named}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], config: ReConPatchConfig) -> ReConPatch:
        """Read what :meth:`state` returned."""
        weight = state["representation.weight"]
        with seeded(0):  # its weights are replaced
            representation = nn.Linear(weight.shape[1], weight.shape[0]).to(weight.device)
        representation.load_state_dict({"weight": weight, "bias": state["representation.bias"]})
        return cls(representation, state["bank"], config, {})


class ReConPatchDetector(BaselineDetector):
    """A fitted ReConPatch; made by :func:`pydefect.fit` or :func:`pydefect.load`."""

    method: ClassVar[str] = "reconpatch"
    config_type: ClassVar[type[FeatureConfig]] = ReConPatchConfig
    model_type: ClassVar[type[PatchModel]] = ReConPatch
