"""Every setting of the dual autoencoder, its presets and the paper's ablations."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydefect.config import MethodConfig
from pydefect.dual_ae.optimisers import Optimiser
from pydefect.dual_ae.pdn import Size, output_size
from pydefect.errors import InputError
from pydefect.ops.reference.spatial_reunion import Normalisation

__all__ = ["ADDITIONS", "Additions", "DualAEConfig", "EfficientADConfig", "Reunion", "check_input_size"]

Reunion = Literal["plain", "spatial", "channel"]


@dataclass(frozen=True)
class Additions:
    """What a row of the paper's ablation tables has.

    Attributes
    ----------
    reunions
        One entry an autoencoder: the module behind it.
    cosine
        Whether L_SA has its cosine term (16).
    fusion
        Whether the selective fusion module weighs the two outputs against each other.
    """

    reunions: tuple[Reunion, ...]
    cosine: bool = False
    fusion: bool = False


ADDITIONS: dict[str, Additions] = {
    "none": Additions(("plain",)),
    "cosine": Additions(("plain",), cosine=True),
    "one_spatial": Additions(("spatial",)),
    "one_channel": Additions(("channel",)),
    "two_plain": Additions(("plain", "plain")),
    "two_spatial": Additions(("spatial", "spatial")),
    "two_channel": Additions(("channel", "channel")),
    "spatial_channel": Additions(("spatial", "channel")),
    "spatial_channel_cosine": Additions(("spatial", "channel"), cosine=True),
    "spatial_channel_fusion": Additions(("spatial", "channel"), fusion=True),
    "all": Additions(("spatial", "channel"), cosine=True, fusion=True),
}

AdditionsName = Literal[
    "none",
    "cosine",
    "one_spatial",
    "one_channel",
    "two_plain",
    "two_spatial",
    "two_channel",
    "spatial_channel",
    "spatial_channel_cosine",
    "spatial_channel_fusion",
    "all",
]


@dataclass(frozen=True)
class DualAEConfig(MethodConfig):
    """Settings of the dual autoencoder; the defaults are those of ``preset="default"``.

    Sections and equations are those of Liang and Chen's paper; ``docs/dual_ae.md`` says which setting reaches
    which row of its tables.
    """

    TITLE: ClassVar[str] = "the dual autoencoder"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        # 2.2 and EfficientAD's published code.
        "paper": {
            "resize": 256,
            "padding": False,
            "context_normalisation": "none",
            "steps": 70_000,
            "optimiser": "adam",
            "learning_rate": 1e-4,
            "schedule": "drop",
        },
    }
    RANGES: ClassVar[Mapping[str, tuple[float, float]]] = {
        **MethodConfig.RANGES,
        "held_out_share": (0, 0.5),
        "pool": (1, math.inf),
        "reduction": (1, math.inf),
        "cosine_weight": (0, math.inf),
        "hard_quantile": (0, 1),
        "dropout": (0, 0.99),
        "penalty_pool": (1, math.inf),
        "jitter": (0, 1),
        "steps": (1, math.inf),
        "batch_size": (1, math.inf),
        "learning_rate": (0, math.inf),
        "gate_learning_rate": (0, math.inf),
        "weight_decay": (0, math.inf),
        "muon_weight_decay": (0, math.inf),
        "low_quantile": (0, 1),
        "high_quantile": (0, 1),
        "cache_memory_mb": (0, math.inf),
    }

    resize: tuple[int, int] | int | None = 128
    """(height, width) in pixels, or one number for a square; None keeps the images' size. EfficientAD's code
    has 256: small defects on large images need that, four times the work a step, and more steps."""

    # -- networks (1.1) ------------------------------------------------------------------------------------
    teacher: str = "shipped"
    """``"shipped"``: the teacher that comes with the package, of the chosen ``size``; ``"resnet18"`` or
    another backbone: its layers 2 and 3, fused; or the path of a ``.pth``, ``.safetensors`` or ``.npz`` file
    with the state of a PDN, such as EfficientAD's published ones. See ``docs/teacher.md``."""
    size: Size = "small"
    """Of the student's PDN (EfficientAD-S or -M), and of a PDN teacher."""
    padding: bool = True
    """Whether the PDNs see zeros beyond the image's edge: 32x32 instead of 24x24 cells of 128x128 pixels."""
    additions: AdditionsName = "all"
    """A row of the paper's ablation tables 2 and 3, a key of :data:`ADDITIONS`; ``"none"`` is EfficientAD."""
    dropout: float = 0.2
    """In the autoencoders' decoders."""

    # -- reunion and fusion modules (1.2 to 1.4) -----------------------------------------------------------
    pool: int = 4
    """r of (1) and (2)."""
    context_normalisation: Normalisation = "mean"
    """The sums (6) and (9) over all positions: ``"none"`` as printed, ``"mean"`` over them, or ``"softmax"``:
    (6) with the softmax of the attention over them, (9) as their mean."""
    reduction: int = 16
    """Of the channels inside the channel reunion (10) and the fusion module."""

    # -- losses (1.5) --------------------------------------------------------------------------------------
    hard_quantile: float = 0.999
    """Of an image's squared differences, those at or above this quantile are L_hard."""
    loss_scale: Literal["mean", "paper"] = "mean"
    """Squared differences of the channels: ``"mean"`` as EfficientAD's code, or summed as printed in (11)."""
    cosine_weight: float = 0.5
    """lambda of (17)."""
    penalty: str = "procedural"
    """Images of anything else for L_pen (12): ``"procedural"``, drawn by :mod:`pydefect.data.textures`; the
    path of a folder with images of any kind; ``"none"``: no L_pen."""
    penalty_pool: int = 2048
    """So many procedural images are drawn (0.05 s each; in memory 0.05 MB of 128 x 128 pixels); then the same
    ones come again."""
    jitter: float = 0.2
    """The autoencoders' copy of an image has one of brightness, contrast and saturation changed by a factor
    of 1 - jitter to 1 + jitter."""

    # -- training (2.2) ------------------------------------------------------------------------------------
    steps: int | None = None
    """None: :meth:`default_steps`. A fitted detector keeps what that was."""
    batch_size: int = 1
    learning_rate: float = 3e-3
    gate_learning_rate: float | None = None
    """Of the layers of the channel reunion and the fusion module that see one vector an image: Adam trains
    them at this rate, which rises and falls with ``learning_rate``. These vectors hardly differ between the
    images of one product, and fast steps leave most of their ReLUs off for all of them
    (``docs/dual_ae.md``). None: as all other layers."""
    schedule: Literal["drop", "fall"] = "fall"
    """``"drop"``: the learning rate falls to a tenth after 95 % of the steps, as in EfficientAD's code.
    ``"fall"``: it rises over the first 2 % and falls over the last 40 %, straight to a hundredth."""
    optimiser: Optimiser = "muon"
    """``"muon"``: for the convolutions' weights, see :class:`pydefect.dual_ae.optimisers.Optimisers`;
    ``"adam"`` wants a learning rate of 5e-4 at most."""
    weight_decay: float = 1e-5
    """Of Adam, as EfficientAD's code has it: added to the gradient."""
    muon_weight_decay: float = 0.5
    """Of Muon: a step takes ``learning_rate`` times this off the convolutions' weights. Without it they grow
    until the autoencoders' values overflow (``docs/dual_ae.md``)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the networks; ``"auto"``: bfloat16 on processors and cards with instructions for it. A
    fitted detector keeps what ``"auto"`` meant for it. Losses, modules and weights are float32 always."""

    # -- calibration (2.2) ---------------------------------------------------------------------------------
    held_out_share: float = 0.1
    """Part of the images, drawn by the seed, that is kept from training for the maps' quantiles and the
    thresholds, unless a data set has validation images for that. 0: the quantiles come from the training
    images, and there are no thresholds."""
    low_quantile: float = 0.9
    """q_a: maps are scaled by 0.1 / (q_b - q_a)."""
    high_quantile: float = 0.995
    """q_b."""

    # -- resources -----------------------------------------------------------------------------------------
    cache_memory_mb: int = 2048
    """Teacher features and training images beyond this go to temporary files."""

    @staticmethod
    def default_steps(device_type: str) -> int:
        """Count the training steps of a fit that asks for none: what docs/dual_ae.md found worth waiting for.

        Parameters
        ----------
        device_type
            ``"cpu"``, ``"cuda"``, ... as ``torch.device.type``.
        """
        return 3_000 if device_type == "cuda" else 1_500

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0; needs a number of ``steps``."""
        assert self.steps is not None
        if self.schedule == "drop":
            return self.learning_rate * (0.1 if step >= int(0.95 * self.steps) else 1)
        rising, falling = 0.02 * self.steps, 0.4 * self.steps
        left = (self.steps - step - 1) / falling
        return self.learning_rate * min(1.0, (step + 1) / (rising + 1), 0.01 + 0.99 * left)

    @property
    def addition(self) -> Additions:
        """The row that ``additions`` names."""
        return ADDITIONS[self.additions]

    def __post_init__(self) -> None:
        """Check every setting before any work is done."""
        super().__post_init__()
        for name in ("teacher", "penalty"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
            elif not isinstance(value, str):
                raise InputError(f"{name}: {value!r} given; allowed are a name or a path")
        if self.low_quantile > self.high_quantile:
            raise InputError(
                f"low_quantile: {self.low_quantile!r} given; allowed are 0 to high_quantile, "
                f"{self.high_quantile!r}"
            )
        size = self.preprocessing.input_size
        if size is not None:
            name = "crop" if self.crop else "resize" if self.resize else "region"
            check_input_size(name, size, self.padding)


@dataclass(frozen=True)
class EfficientADConfig(DualAEConfig):
    """Settings of EfficientAD: the dual autoencoder without additions."""

    TITLE: ClassVar[str] = "EfficientAD"

    additions: AdditionsName = "none"

    def __post_init__(self) -> None:
        """Check every setting before any work is done."""
        super().__post_init__()
        if self.additions != "none":
            raise InputError(
                f"additions: {self.additions!r} given; EfficientAD allows 'none', method='dual_ae' the others"
            )


def check_input_size(name: str, size: tuple[int, int], padding: bool) -> None:
    """Raise an InputError where the networks have no output for images of a size."""
    # The autoencoder halves five times, and the decoder begins at a 64th.
    if min(size) < 64 or min(output_size(size, padding)) < 1:
        raise InputError(
            f"{name}: {size[0]} x {size[1]} pixels given; allowed are 64 and more in each direction"
        )
