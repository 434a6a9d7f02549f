"""Every setting of ConPatch, its two presets and the paper's ablations."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pydefect.backbones import ARCHITECTURES
from pydefect.conpatch.bank import BankBuilder
from pydefect.errors import InputError
from pydefect.features import check_levels

__all__ = ["PRESETS", "ConPatchConfig"]


@dataclass(frozen=True)
class ConPatchConfig:
    """Settings of ConPatch; the defaults are those of ``preset="default"``.

    The section after each name is the paper's; ``docs/conpatch.md`` says which setting reaches which table,
    and ``docs/study.md`` how the defaults were chosen.
    """

    # -- input (4.1.1) -------------------------------------------------------------------------------------
    backbone: str = "resnet18"
    """A key of :data:`pydefect.backbones.ARCHITECTURES`."""
    resize: tuple[int, int] | int | None = 256
    """(height, width) in pixels, or one number for a square; None keeps the images' size."""
    crop: tuple[int, int] | int | None = None
    """Centre crop after the resize; what lies outside is not scored. None: the whole image."""
    levels: tuple[int, ...] = (1, 2, 3)
    """Backbone levels; table 8 compares (2, 3) with (1, 2, 3)."""
    backbone_precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the backbone; see :func:`pydefect.features.resolve_precision`. A fitted detector keeps
    what ``"auto"`` meant for it, and scores with that on every machine."""

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
    """See :meth:`pydefect.conpatch.bank.MemoryBank.updated`."""
    gamma: float = 2.0
    """Patches of an image for one centre: M = round(T / gamma); table 11 compares 2, 4, 8."""
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

    # -- threshold -----------------------------------------------------------------------------------------
    calibration_folds: int = 3
    """Parts of the training set that calibrate the threshold in turn, each with a detector that has not seen
    it; 0: no threshold."""
    false_alarm_rate: float = 0.01
    """Share of normal images that may be called defective."""

    # -- resources -----------------------------------------------------------------------------------------
    cache_memory_mb: int = 2048
    """Backbone features beyond this go to a temporary file."""

    def __post_init__(self) -> None:
        """Check every setting before any work is done."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.generic):
                object.__setattr__(self, field.name, value.item())
        if not isinstance(self.backbone, str) or self.backbone not in ARCHITECTURES:
            raise InputError(
                f"backbone: {self.backbone!r} is not known; allowed are {', '.join(ARCHITECTURES)}"
            )
        for name in ("resize", "crop"):
            object.__setattr__(self, name, _size(name, getattr(self, name)))
        object.__setattr__(self, "levels", check_levels(self.levels))
        if self.level_weights is not None:
            object.__setattr__(self, "level_weights", _level_weights(self.level_weights))
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            choices = typing.get_args(hints[field.name])
            if typing.get_origin(hints[field.name]) is Literal and getattr(self, field.name) not in choices:
                allowed = ", ".join(map(repr, choices))
                raise InputError(f"{field.name}: {getattr(self, field.name)!r} given; allowed are {allowed}")
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            # Infinity is no JSON number: a detector with it could not be saved.
            if not (isinstance(value, int | float) and low <= value <= high and math.isfinite(value)):
                allowed = f"{low:g} and more" if high == _INF else f"{low:g} to {high:g}"
                raise InputError(f"{name}: {value!r} given; allowed are {allowed}")
        for name in _INTEGERS:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise InputError(f"{name}: {value!r} given; allowed are whole numbers")
        if not isinstance(self.early_stopping, bool):
            raise InputError(f"early_stopping: {self.early_stopping!r} given; allowed are True, False")
        if self.calibration_folds == 1:
            raise InputError("calibration_folds: 1 given; allowed are 0 (no threshold) and 2 or more")
        if self.level_weights is not None and len(self.level_weights) != len(self.levels):
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
        if not isinstance(preset, str) or preset not in PRESETS:
            raise InputError(f"preset: {preset!r} is not known; allowed are {', '.join(PRESETS)}")
        known = {field.name for field in dataclasses.fields(cls)}
        for name in settings:
            if name not in known:
                raise InputError(f"{name}: not a setting of ConPatch; allowed are {', '.join(sorted(known))}")
        merged = {**PRESETS[preset], **settings}
        if "levels" in settings and "level_weights" not in settings:
            weights = merged.get("level_weights", cls.level_weights)
            levels = check_levels(settings["levels"])
            merged["level_weights"] = (
                None if weights is None else tuple(weights[level - 1] for level in levels)
            )
        return cls(**merged)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConPatchConfig:
        """Read what :meth:`to_dict` wrote."""
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**settings)


def _size(name: str, value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    pair = (
        (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, list | tuple) else ()
    )
    if len(pair) != 2 or any(
        not isinstance(side, int) or isinstance(side, bool) or side < 16 for side in pair
    ):
        raise InputError(
            f"{name}: {value!r} given; allowed are a side or (height, width) of 16 pixels or more, or None"
        )
    return pair[0], pair[1]


def _level_weights(value: Any) -> tuple[float, ...]:
    weights = tuple(value) if isinstance(value, list | tuple) else ()
    if not weights or any(
        not isinstance(weight, int | float) or not 0 <= weight < math.inf for weight in weights
    ):
        raise InputError(f"level_weights: {value!r} given; allowed are one number >= 0 a level, or None")
    return tuple(float(weight) for weight in weights)


_INF = math.inf
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("coordinate_weight", 0, _INF),
    ("representation_dim", 1, _INF),
    ("projection_dim", 1, _INF),
    ("gamma", 1, _INF),
    ("bank_momentum", 0, 1),
    ("alpha", 0, 1),
    ("sigma", 1e-12, _INF),
    ("global_neighbors", 1, _INF),
    ("margin", 0, _INF),
    ("contrastive_patches", 2, _INF),
    ("target_momentum", 0, 1),
    ("phi", 0, _INF),
    ("neighbors", 1, _INF),
    ("radius", 0, _INF),
    ("epochs", 0, _INF),
    ("patience", 1, _INF),
    ("batch_size", 1, _INF),
    ("learning_rate", 0, _INF),
    ("weight_decay", 0, _INF),
    ("smoothing", 0, _INF),
    ("calibration_folds", 0, _INF),
    ("false_alarm_rate", 0, 1),
    ("cache_memory_mb", 0, _INF),
)
_OPTIONAL = ("projection_dim", "contrastive_patches")
_INTEGERS = (
    "representation_dim",
    "projection_dim",
    "global_neighbors",
    "contrastive_patches",
    "neighbors",
    "epochs",
    "patience",
    "batch_size",
    "calibration_folds",
    "cache_memory_mb",
)

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
        "rebuild_bank": "never",
        "reduction": "paper",
        "contrastive_patches": None,
        "epochs": 30,
        "early_stopping": False,
        "learning_rate": 1e-3,
        "image_score": "max_patch",
        "smoothing": 4.0,
        # The paper's threshold maximises F1 over labelled images: Detector.calibrate.
        "calibration_folds": 0,
    },
}
