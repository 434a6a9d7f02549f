"""Teachers: patch description networks from files, and frozen backbones in their place."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydefect.backbones import ARCHITECTURES, Backbone, build_backbone, load_state_dict
from pydefect.dual_ae.pdn import PDN, PDN_CHANNELS, Size, output_size
from pydefect.errors import InputError
from pydefect.features import PatchFeatureExtractor, Precision
from pydefect.randomness import seeded

__all__ = ["SHIPPED_TEACHER", "BackboneTeacher", "load_teacher", "pdn_state"]

SHIPPED_TEACHER = "shipped"

# Cells of a padded PDN before the first cell of one without padding: their centres lie at 0.5 and 16.5.
_CELLS_BEFORE = 4
# Between the pixels of the image and those that the backbone sees.
_ENLARGEMENT = 2
# Pixels of an enlarged image for one cell: the stride of layer 2.
_BACKBONE_STRIDE = 8


class BackboneTeacher(nn.Module):
    """Fused layers 2 and 3 of a frozen backbone at twice the image's size, on the grid of a PDN.

    What a PDN teacher is distilled to imitate, and a teacher itself. The maps of both layers are averaged
    over 3x3 neighbourhoods, layer 3 is resized to the grid of layer 2, the channels of both are concatenated
    and reduced to 384 by adaptive average pooling over channels. ResNet-18 and ResNet-34 have just 384 of
    them; the first third comes from layer 2 with every architecture.

    Parameters
    ----------
    backbone
        Frozen, in eval mode.
    padding
        The grid: True that of a padded PDN (256 pixels, 64 cells), False that of an unpadded one (56, which
        are the inner ones of the same 64).
    precision
        Of the backbone's arithmetic; see :func:`pydefect.features.resolve_precision`.

    References
    ----------
    Batzner et al., EfficientAD, WACV 2024, appendix A.2; Roth et al., Towards total recall in industrial
    anomaly detection, CVPR 2022, section 3.1.
    """

    def __init__(self, backbone: Backbone, padding: bool = False, precision: Precision = "float32") -> None:
        super().__init__()
        self.padding = padding
        self.extractor = PatchFeatureExtractor(backbone, (2, 3), precision)
        self.out_channels = PDN_CHANNELS

    def forward(self, images: Tensor) -> Tensor:
        """Describe the patches of a batch.

        Parameters
        ----------
        images
            [B, 3, H, W] float32, normalised with ImageNet's mean and standard deviation.

        Returns
        -------
        Tensor
            [B, 384, h, w] float32, (h, w) = :func:`pydefect.dual_ae.pdn.output_size`. No gradient flows.
        """
        height, width = images.shape[2:]
        enlarged = F.interpolate(images, scale_factor=_ENLARGEMENT, mode="bilinear", align_corners=False)
        grid = output_size((height, width), padding=True)
        # The cells of a PDN cover a few pixels more or less than there are; what is missing repeats the edge,
        # so that neither network's cells drift against the other's.
        below, right = (
            _BACKBONE_STRIDE * cells - _ENLARGEMENT * edge
            for cells, edge in zip(grid, (height, width), strict=True)
        )
        described = self.enlarged(F.pad(enlarged, (0, right, 0, below), mode="replicate"))
        if self.padding:
            return described
        rows, columns = output_size((height, width), padding=False)
        return described[:, :, _CELLS_BEFORE : _CELLS_BEFORE + rows, _CELLS_BEFORE : _CELLS_BEFORE + columns]

    def enlarged(self, images: Tensor) -> Tensor:
        """Describe the patches of images that have been enlarged already.

        Parameters
        ----------
        images
            [B, 3, 8 h, 8 w] float32, normalised.

        Returns
        -------
        Tensor
            [B, 384, h, w] float32.
        """
        second, third = self.extractor(images)
        third = F.interpolate(third, second.shape[2:], mode="bilinear", align_corners=False)
        return pool_channels(torch.cat([second, third], 1), PDN_CHANNELS)


def pool_channels(maps: Tensor, channels: int) -> Tensor:
    """Reduce [B, C, H, W] to [B, channels, H, W]: each new channel is the mean of a run of neighbouring ones
    (adaptive average pooling; runs overlap by one where C is no multiple)."""
    if maps.shape[1] == channels:
        return maps
    pooled = F.adaptive_avg_pool1d(maps.permute(0, 2, 3, 1).flatten(1, 2), channels)
    return pooled.reshape(maps.shape[0], *maps.shape[2:], channels).permute(0, 3, 1, 2)


def load_teacher(
    teacher: str | os.PathLike[str] | Mapping[str, Tensor] = SHIPPED_TEACHER,
    size: Size = "small",
    *,
    padding: bool = False,
    weights: str | os.PathLike[str] = "imagenet",
    precision: Precision = "float32",
) -> nn.Module:
    """Load a frozen teacher.

    Parameters
    ----------
    teacher
        ``"shipped"``: the small PDN that comes with the package, distilled on procedural images only
        (``docs/teacher.md``); the path of a ``.pth``/``.pt`` (read with ``weights_only``), ``.safetensors``
        or ``.npz`` file with the state dict of a PDN, as ``pydefect pretrain-teacher`` and EfficientAD's
        implementations write it, or such a state dict itself; or the name of a backbone, ``"resnet18"``,
        ``"wide_resnet50_2"``...: a :class:`BackboneTeacher`.
    size
        ``"small"`` or ``"medium"``: of the PDN. Unused with a backbone.
    padding
        Whether the teacher's grid is that of a padded PDN. The weights serve both.
    weights
        A backbone's: ``"imagenet"``, a file or ``"random"``; see
        :func:`pydefect.backbones.build_backbone`. Unused with a PDN.
    precision
        Of a backbone's arithmetic.

    Returns
    -------
    torch.nn.Module
        In eval mode, without gradients, float32: images [B, 3, H, W], normalised with ImageNet's mean and
        standard deviation, to [B, 384, h, w]. Its outputs are not normalised by statistics of any training
        set. :func:`pydefect.backbones.weights_fingerprint` of its state dict tells one teacher from another.

    Raises
    ------
    InputError
        The name is none of these and no file; or the file is damaged, of an unknown type, or holds no PDN of
        this size with 384 outputs. The message says which size it holds if it is the other one.
    WeightsNotFoundError
        A backbone's weights are not there.
    """
    if size not in ("small", "medium"):
        raise InputError(f"size: {size!r} given; allowed are 'small', 'medium'")
    if isinstance(teacher, str) and teacher in ARCHITECTURES:
        backbone = build_backbone(teacher, os.fspath(weights))
        return BackboneTeacher(backbone, padding, precision).requires_grad_(False).eval()
    state, what = _read(teacher, size)
    with seeded(0):  # its weights are replaced
        network = PDN(size, PDN_CHANNELS, padding)
    network.load_state_dict(pdn_state(state, size, what))
    return network.requires_grad_(False).eval()


def _read(
    teacher: str | os.PathLike[str] | Mapping[str, Tensor], size: Size
) -> tuple[Mapping[str, Tensor], str]:
    """The state dict of a PDN, and what to call it in a message."""
    if isinstance(teacher, Mapping):
        return teacher, "teacher"
    if not isinstance(teacher, str | os.PathLike):
        raise InputError(f"teacher: an object of type {type(teacher).__name__} given; allowed are {_ALLOWED}")
    if os.fspath(teacher) == SHIPPED_TEACHER:
        if size != "small":
            raise InputError(
                f"teacher: the one that comes with the package is a small PDN, and size is {size!r}; distil "
                "a medium one with `pydefect pretrain-teacher --size medium`, or choose size='small'"
            )
        with resources.as_file(resources.files("pydefect.dual_ae") / "teacher_small.safetensors") as path:
            return load_state_dict(path), "teacher 'shipped'"
    path = Path(teacher)
    if not path.is_file():
        raise InputError(f"teacher: {os.fspath(teacher)!r} is no file and no name; allowed are {_ALLOWED}")
    return load_state_dict(path), f"teacher {os.fspath(teacher)!r}"


_ALLOWED = (
    f"'{SHIPPED_TEACHER}', a .pth, .pt, .safetensors or .npz file, {', '.join(map(repr, ARCHITECTURES))}"
)


def pdn_state(state: Mapping[str, Tensor], size: Size, what: str = "teacher") -> dict[str, Tensor]:
    """Bring a PDN's state dict under the names of :class:`~pydefect.dual_ae.pdn.PDN`.

    Parameters
    ----------
    state
        Weights and biases of the convolutions under the names of a plain sequential network (``0.weight``,
        ``3.weight``, ...) or numbered convolutions (``conv1.weight``, ``conv2.weight``, ...), with or without
        a prefix that all have in common, such as ``module.`` or ``teacher.``. Both are taken in the order of
        their numbers.
    size
        The PDN that it must be.
    what
        Begins the messages.

    Returns
    -------
    dict of str to Tensor
        float32, on the CPU.

    Raises
    ------
    InputError
        It is no PDN of this size with 384 outputs, or a value is not finite.
    """
    wanted = _shapes(size)
    found: dict[int, dict[str, Tensor]] = {}
    prefixes: set[str] = set()
    for name, value in state.items():
        match = re.fullmatch(r"(.*?)(\d+)\.(weight|bias)", name)
        if match is None:
            raise InputError(
                f"{what}: not a plain PDN: {name!r} is no weight or bias of a numbered convolution"
            )
        prefixes.add(match[1])
        found.setdefault(int(match[2]), {})[match[3]] = value
    if len(prefixes) > 1:
        raise InputError(
            f"{what}: not a plain PDN: names begin with {', '.join(map(repr, sorted(prefixes)))}"
        )
    shapes = [tuple(found[number]["weight"].shape) for number in sorted(found) if "weight" in found[number]]
    if shapes != _weight_shapes(size):
        other: Size = "medium" if size == "small" else "small"
        hint = f" (it is a {other} one: choose size={other!r})" if shapes == _weight_shapes(other) else ""
        raise InputError(
            f"{what}: not a {size} PDN with {PDN_CHANNELS} outputs{hint}: its convolutions are "
            f"{_text(shapes)}, not {_text(_weight_shapes(size))}"
        )
    renamed = {}
    for name, (number, key) in zip(
        wanted, ((number, key) for number in sorted(found) for key in ("weight", "bias")), strict=True
    ):
        if key not in found[number] or found[number][key].shape != wanted[name]:
            raise InputError(f"{what}: not a {size} PDN: convolution {number} lacks a fitting {key}")
        renamed[name] = found[number][key].detach().to("cpu", torch.float32)
        if not bool(torch.isfinite(renamed[name]).all()):
            raise InputError(f"{what}: the {key} of convolution {number} has values that are not finite")
    return renamed


def _shapes(size: Size) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        network = PDN(size, PDN_CHANNELS)
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def _weight_shapes(size: Size) -> list[tuple[int, ...]]:
    return [shape for name, shape in _shapes(size).items() if name.endswith("weight")]


def _text(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes) or "none"
