"""Every setting of ConPatch, its two presets and the paper's ablations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydefect.conpatch.bank import BankBuilder
from pydefect.errors import InputError
from pydefect.feature_detector import FeatureConfig
from pydefect.features import check_levels

__all__ = ["PRESETS", "ConPatchConfig"]


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # The printed method to the letter.
    "paper": {
        "crop": 224,
        "level_balance": "none",
        "level_weights": None,
        "coordinate_weight": 1.0,
        "initialisation": "default",
        "bank": "ema",
        "gamma": 4.0,
        "max_bank_size": None,
        "rebuild_bank": "never",
        "reduction": "paper",
        "contrastive_patches": None,
        "epochs": 30,
        "early_stopping": False,
        "learning_rate": 1e-3,
        "image_score": "max_patch",
        "smoothing": 4.0,
        # The paper's threshold maximises F1 over labelled images: pydefect.calibrate(detector, dataset).
        "calibration_folds": 0,
    },
}


@dataclass(frozen=True)
class ConPatchConfig(FeatureConfig):
    """Settings of ConPatch; the defaults are those of ``preset="default"``.

    The section after each name is the paper's; ``docs/conpatch.md`` says which setting reaches which table,
    and ``docs/study.md`` how the defaults were chosen.
    """

    TITLE: ClassVar[str] = "ConPatch"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS
    RANGES: ClassVar[Mapping[str, tuple[float, float]]] = {
        **FeatureConfig.RANGES,
        "coordinate_weight": (0, math.inf),
        "representation_dim": (1, math.inf),
        "projection_dim": (1, math.inf),
        "gamma": (1, math.inf),
        "max_bank_size": (1, math.inf),
        "bank_momentum": (0, 1),
        "alpha": (0, 1),
        "sigma": (1e-12, math.inf),
        "global_neighbors": (1, math.inf),
        "margin": (0, math.inf),
        "contrastive_patches": (2, math.inf),
        "target_momentum": (0, 1),
        "phi": (0, math.inf),
        "neighbors": (1, math.inf),
        "radius": (0, math.inf),
        "epochs": (0, math.inf),
        "patience": (1, math.inf),
        "batch_size": (1, math.inf),
        "learning_rate": (0, math.inf),
        "weight_decay": (0, math.inf),
        "smoothing": (0, 10_000),
    }

    # -- input (4.1.1) -------------------------------------------------------------------------------------
    levels: tuple[int, ...] = (1, 2, 3)
    """Backbone levels; table 8 compares (2, 3) with (1, 2, 3)."""

    # -- representation network (3.3) ----------------------------------------------------------------------
    level_balance: Literal["none", "std"] = "std"
    """``"std"`` divides every level by its total standard deviation over the training patches."""
    level_weights: tuple[float, ...] | None = (0.5, 1.0, 1.0)
    """Factor of every level after the balancing; None: 1 each."""
    coordinate_weight: float = 2.0
    """Factor of the two coordinate channels, which lie in [-1, 1]."""
    representation_dim: int = 448
    """D, with ``initialisation="pca"`` at most the number of inputs; table 10 compares 224, 448, 896."""
    projection_dim: int | None = None
    """Dz; None: D."""
    initialisation: Literal["default", "identity", "pca"] = "pca"
    """F's start. ``"default"``: a fresh convolution, as printed; ``"identity"``: the scaled inputs (D =
    inputs); ``"pca"``: their D leading principal components. With the last two g starts as the identity (as
    far as Dz reaches)."""

    # -- compressed bank (3.2) -----------------------------------------------------------------------------
    bank: BankBuilder = "kcenter"
    """See :data:`pydefect.conpatch.bank.BANKS`."""
    gamma: float = 2.0
    """Patches of an image for one centre: M = round(T / gamma); table 11 compares 2, 4, 8."""
    max_bank_size: int | None = 4096
    """M at most, None: no limit. T / gamma grows with the input's area, and time and memory with its square:
    the limit is met by inputs of more than 362 x 362 pixels."""
    bank_momentum: float = 0.1
    """beta of algorithm 1 (``bank="ema"``)."""
    rebuild_bank: Literal["never", "epoch", "end"] = "epoch"
    """When the bank is built again with the trained F."""

    # -- losses (3.3, 3.4) ---------------------------------------------------------------------------------
    losses: Literal["none", "contrastive", "hypersphere", "both"] = "both"
    """Table 7; ``"none"``: no training."""
    alpha: float = 0.8
    """Share of pairwise similarity (3); table 9: 1 is pairwise only, 0 global only."""
    sigma: float = 4.0
    """Bandwidth of the pairwise similarity (1)."""
    similarity_power: Literal[1, 2] = 1
    """1 as printed in (1), 2 as ReConPatch."""
    pair_source: Literal["target", "cross"] = "target"
    """Which branch gives z_i in (1)."""
    global_neighbors: int = 5
    """k of the global similarity (2), the patch itself included."""
    margin: float = 0.2
    """m of (5)."""
    reduction: Literal["paper", "mean"] = "mean"
    """``"paper"``: 1/N as printed in (5); ``"mean"``: 1/N^2."""
    contrastive_patches: int | None = 1024
    """At most so many patches of a batch, drawn at random, enter the contrastive loss; None: all."""
    target_momentum: float = 0.4
    """lambda of (6)."""
    phi: float = 0.6
    """Weight of the contrastive loss (8)."""
    neighbors: int = 3
    """K of the hypersphere loss (7) and of the score (9)."""
    radius: float = 1e-5
    """r of (7)."""
    distance_power: Literal[1, 2] = 1
    """1 as printed in (7), 2 as in CFA's code."""

    # -- training (3.6, 4.1) -------------------------------------------------------------------------------
    epochs: int = 0
    """At most, with early stopping. 0 by default: the study could not show that training helps, and on
    one product of three it harmed."""
    early_stopping: bool = True
    """Stop after the epoch that best separates mixed patches from held-out normal images
    (:class:`pydefect.conpatch.crossfit.HeldOutScores`); needs ``calibration_folds``."""
    patience: int = 1
    """Epochs without a larger separation before the rest is left out."""
    batch_size: int = 2
    learning_rate: float = 1e-3
    weight_decay: float = 5e-4

    # -- scoring (3.5) -------------------------------------------------------------------------------------
    score: Literal["certainty", "nearest"] = "certainty"
    """Equation (9), or the plain distance to the nearest centre."""
    image_score: Literal["max_patch", "max_map"] = "max_map"
    """Maximum of the patch scores as printed, or of the smoothed map."""
    smoothing: float = 6.0
    """Standard deviation of (12)'s Gaussian in pixels of the network's input."""

    def __post_init__(self) -> None:
        """Check every setting before any work is done."""
        super().__post_init__()
        if self.level_weights is not None:
            object.__setattr__(self, "level_weights", _level_weights(self.level_weights))
            if len(self.level_weights) != len(self.levels):
                raise InputError(
                    f"level_weights: {len(self.level_weights)} given for levels {self.levels}; "
                    "one a level is needed"
                )

    @classmethod
    def from_preset(cls, preset: str, **settings: Any) -> ConPatchConfig:
        """Take a preset and change some of its settings.

        Parameters
        ----------
        preset
            ``"default"`` or ``"paper"``.
        settings
            Fields of this class. Where ``levels`` changes and ``level_weights`` is not given, the preset's
            weights of the remaining levels stay.

        Raises
        ------
        InputError
            Unknown preset or setting, or a value that is not allowed.
        """
        if "levels" in settings and "level_weights" not in settings:
            weights = cls.PRESETS.get(str(preset), {}).get("level_weights", cls.level_weights)
            levels = check_levels(settings["levels"])
            settings["level_weights"] = (
                None if weights is None else tuple(weights[level - 1] for level in levels)
            )
        return super().from_preset(preset, **settings)


def _level_weights(value: Any) -> tuple[float, ...]:
    weights = tuple(value) if isinstance(value, list | tuple) else ()
    if not weights or any(
        not isinstance(weight, int | float) or not 0 <= weight < math.inf for weight in weights
    ):
        raise InputError(f"level_weights: {value!r} given; allowed are one number >= 0 a level, or None")
    return tuple(float(weight) for weight in weights)
