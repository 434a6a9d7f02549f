"""Images to patch features of a frozen backbone, and the cache that keeps them."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydefect import _native
from pydefect.backbones import Backbone, FoldedResNet, ResNet
from pydefect.errors import InputError, PydefectError

__all__ = [
    "FeatureCache",
    "PatchFeatureExtractor",
    "Precision",
    "check_levels",
    "cpu_has_amx",
    "cpu_has_bfloat16",
    "patch_vectors",
    "resolve_precision",
    "whole_patches",
]

Precision = Literal["float32", "bfloat16"]
_DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_precision(precision: Literal["auto", "float32", "bfloat16"], device: torch.device) -> Precision:
    """Say what ``"auto"`` means on this machine.

    Parameters
    ----------
    precision
        ``"float32"``, ``"bfloat16"``, or ``"auto"``: bfloat16 on a CPU with instructions for it (AVX512_BF16,
        which all processors with AMX have as well) and on a CUDA card with instructions for it (8.0 and
        later), else float32.
    device
        Where the network computes.

    Returns
    -------
    str
        ``"float32"`` or ``"bfloat16"``.

    Notes
    -----
    bfloat16 works everywhere, but pays where the processor has instructions for it only.
    """
    if precision != "auto":
        return precision
    has = {"cpu": cpu_has_bfloat16, "cuda": cuda_has_bfloat16}.get(device.type)
    return "bfloat16" if has is not None and has() else "float32"


def cpu_has_bfloat16() -> bool:
    """Tell whether this processor multiplies bfloat16 numbers with instructions of its own."""
    return "avx512bf16" in _native.build_info()["cpu_levels_usable"]


def cpu_has_amx() -> bool:
    """Tell whether this processor multiplies matrices of bfloat16 numbers with instructions of its own."""
    return "amx" in _native.build_info()["cpu_levels_usable"]


def cuda_has_bfloat16() -> bool:
    """Tell whether the CUDA device multiplies bfloat16 numbers with instructions of its own."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def check_levels(levels: Sequence[int]) -> tuple[int, ...]:
    """Return the levels as a tuple, or raise :class:`InputError` unless they are ascending out of 1, 2, 3."""
    chosen = tuple(levels) if isinstance(levels, Sequence) else ()
    whole = all(isinstance(level, int | np.integer) and level in (1, 2, 3) for level in chosen)
    if not chosen or not whole or list(chosen) != sorted(set(chosen)):
        raise InputError(f"levels: {levels!r} given; allowed are ascending choices out of 1, 2, 3")
    return tuple(int(level) for level in chosen)


class PatchFeatureExtractor(nn.Module):
    """Patch features: the maps of a frozen backbone, locally aware ones averaged over 3x3 neighbourhoods.

    Parameters
    ----------
    backbone
        Frozen network in eval mode.
    levels
        Ascending out of 1, 2, 3; the first one gives the patch grid.
    precision
        Of the backbone's arithmetic; see :func:`resolve_precision`.
    average
        Average every level over 3x3 neighbourhoods; False: the backbone's own maps, as PaDiM and SPADE take
        them.

    Attributes
    ----------
    backbone
        As given, for saving. Images go through a copy of a ResNet in the form that runs fastest, made when
        the first one comes; only what is exported is the backbone itself, in float32.

    References
    ----------
    Roth et al., Towards total recall in industrial anomaly detection, CVPR 2022, section 3.1.
    """

    def __init__(
        self,
        backbone: Backbone,
        levels: Sequence[int] = (1, 2, 3),
        precision: Precision = "float32",
        average: bool = True,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.average = average
        self.levels = check_levels(levels)
        self.precision = precision
        self._folded: FoldedResNet | None = None

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.backbone.channels[level] for level in self.levels)

    @property
    def strides(self) -> tuple[int, ...]:
        """Input pixels for one step of each level's grid."""
        return tuple(self.backbone.strides[level] for level in self.levels)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the patch features of a batch.

        Parameters
        ----------
        images
            [B, 3, H, W] float32, normalised; fastest with channels last in memory.

        Returns
        -------
        list of Tensor
            One [B, C_level, H_level, W_level] a level at its native resolution, channels last in memory;
            borders count as zeros in the average (``count_include_pad``), as in CFA's code.

        Raises
        ------
        PydefectError
            The maps of a network that a package declares are not of its channels and strides.
        """
        if torch.compiler.is_exporting():
            return [self._averaged(level) for level in self.backbone(images, self.levels)]
        # As many images at a time as there are threads: that is what keeps all of them busy, and the maps in
        # between stay in the processor's cache instead of going through memory. Other networks take one image
        # at a time: beside others it may get other roundings, and lie beside the threshold that it set.
        together = max(1, len(images))
        if images.device.type == "cpu":
            together = torch.get_num_threads() if type(self.backbone) is ResNet else 1
        parts = [
            [self._averaged(level.float()) for level in self._maps(part)] for part in images.split(together)
        ]
        return parts[0] if len(parts) == 1 else [torch.cat(level) for level in zip(*parts, strict=True)]

    def _maps(self, images: Tensor) -> list[Tensor]:
        if type(self.backbone) is ResNet:  # a subclass may compute something else
            if self._folded is None or self._folded.device != images.device:
                self._folded = FoldedResNet(self.backbone, _DTYPES[self.precision])
            return self._folded(images, self.levels)
        # Not a copy of it in bfloat16: some networks compute a part of their own in float32.
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            maps = self.backbone(images, self.levels)
        return [level.contiguous(memory_format=torch.channels_last) for level in self._checked(images, maps)]

    def _checked(self, images: Tensor, maps: Any) -> list[Tensor]:
        """Return what somebody else's network gave, or say what is wrong with it."""
        batch, _, height, width = images.shape
        wanted = [
            (batch, channels, -(-height // stride), -(-width // stride))
            for channels, stride in zip(self.channels, self.strides, strict=True)
        ]
        given = list(maps) if isinstance(maps, list | tuple) else [maps]
        found = [tuple(level.shape) if isinstance(level, Tensor) else type(level) for level in given]
        if found != wanted:
            raise PydefectError(
                f"backbone: {type(self.backbone).__name__} gave {found} for images of {tuple(images.shape)}; "
                f"its channels and strides say maps of {wanted}"
            )
        return given

    def _averaged(self, level: Tensor) -> Tensor:
        return F.avg_pool2d(level, 3, stride=1, padding=1) if self.average else level


def whole_patches(images: Tensor, strides: Sequence[int]) -> Tensor:
    """Extend network inputs to the right and below, so that the patches of all levels cover them exactly.

    A ResNet's grid has a patch for every 4, 8 or 16 pixels, begun ones included. Maps are interpolated as
    if the grid ended where the input does; where it ends some pixels later, everything would move to the
    left and up, and each level by another amount.

    Parameters
    ----------
    images
        [B, 3, H, W] normalised network inputs.
    strides
        Of the levels' grids, in pixels.

    Returns
    -------
    Tensor
        [B, 3, H', W'], the next multiples of all strides; zeros, the mean colour, are added.
        `images` itself where nothing is missing.
    """
    stride = math.lcm(*strides)
    below, right = (-length % stride for length in images.shape[2:])
    if not below and not right:
        return images
    return F.pad(images, (0, right, 0, below)).contiguous(memory_format=torch.channels_last)


def patch_vectors(levels: Sequence[Tensor], mode: Literal["bilinear", "nearest"] = "bilinear") -> Tensor:
    """Bring all levels to the first one's grid and join their channels.

    Parameters
    ----------
    levels
        [B, C_l, H_l, W_l] each.
    mode
        How coarser levels are upsampled: interpolated (PatchCore, SPADE, CFA), or every patch takes the
        coarser patch that it lies in (PaDiM).

    Returns
    -------
    Tensor
        [B, H_1 * W_1, sum(C_l)], patches in row-major order, contiguous.
    """
    grid = levels[0].shape[2:]
    # Half-pixel centres in both; PyTorch refuses the argument for "nearest".
    corners = False if mode == "bilinear" else None
    same = [
        levels[0],
        *(F.interpolate(level, grid, mode=mode, align_corners=corners) for level in levels[1:]),
    ]
    return torch.cat([level.permute(0, 2, 3, 1) for level in same], dim=3).flatten(1, 2)


class FeatureCache:
    """Patch features of a set of images, computed once: the backbone is frozen and nothing is augmented.

    Kept as float16 at native resolution (0.7 MB for a 224x224 image with ResNet-18, 2.8 MB with
    Wide-ResNet-50-2). Images beyond the memory budget go to a file.

    Parameters
    ----------
    memory_budget
        Bytes to keep in memory; the rest goes to disk.
    device
        In whose memory.
    folder
        Where the file is made, which has no name and is gone with the cache, or with its process; None: the
        system's temporary folder.

    Notes
    -----
    float16 keeps 11 bits: features move by at most 2**-11 of themselves, and the scores of a detector by less
    than 0.2 %. A bank fitted on them is as good as one of unrounded features but not always the same: where
    two patches are equally far, greedy choices (k-centre, k-means' beginning) may fall otherwise, and single
    scores then differ by some percent (``tests/test_features.py`` holds all this on real images).
    """

    def __init__(
        self,
        memory_budget: int = 2 << 30,
        folder: str | Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if memory_budget < 0:
            raise InputError(f"memory_budget: {memory_budget} given; allowed are 0 and more bytes")
        self._budget = memory_budget
        self._parent = folder
        self._device = torch.device(device)
        self._shapes: list[tuple[int, int, int]] = []
        self._in_memory: list[Tensor] = []
        self._on_disk = 0
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        """Count the images."""
        return len(self._in_memory) + self._on_disk

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(channels, height, width) of each level."""
        return self._shapes

    @property
    def bytes_in_memory(self) -> int:
        """Bytes held in memory."""
        return len(self._in_memory) * self._image_bytes

    @property
    def images_on_disk(self) -> int:
        """Number of images whose features went to the file."""
        return self._on_disk

    @property
    def _image_bytes(self) -> int:
        return 2 * sum(channels * height * width for channels, height, width in self._shapes)

    def append(self, levels: Sequence[Tensor]) -> None:
        """Add a batch of images.

        Parameters
        ----------
        levels
            One [B, C, H, W] float a level; the shapes behind B are the same in every call.

        Raises
        ------
        InputError
            Another shape than before: images of different sizes without a common ``resize``.
        PydefectError
            A feature that float16 cannot hold (not finite, or over 65504).
        """
        shapes = [(level.shape[1], level.shape[2], level.shape[3]) for level in levels]
        if self._shapes and shapes != self._shapes:
            raise InputError(
                f"images: patch grids of {shapes[0][1:]} and {self._shapes[0][1:]} in one training set; "
                "set resize (or crop) so that all images have one size"
            )
        self._shapes = shapes
        for image in range(levels[0].shape[0]):
            # Channels last: the order in which the projection reads.
            flat = torch.cat([level[image].permute(1, 2, 0).flatten() for level in levels]).to(
                self._device, torch.float16
            )
            if not bool(torch.isfinite(flat).all()):
                raise PydefectError("features: the backbone gave a value that is not finite or over 65504")
            if (len(self._in_memory) + 1) * self._image_bytes <= self._budget and not self._on_disk:
                self._in_memory.append(flat)
            else:
                self._spill(flat)

    def _spill(self, flat: Tensor) -> None:
        if self._file is None:
            # Without a name: the system takes it away however the process ends.
            self._file = tempfile.TemporaryFile(dir=self._parent)  # noqa: SIM115 - lives as long as the cache
        try:
            self._file.seek(self._on_disk * self._image_bytes)
            self._file.write(flat.cpu().numpy().tobytes())
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror} (features over cache_memory_mb go there; TMPDIR names another place)",
                os.fspath(self._parent or tempfile.gettempdir()),
            ) from error
        self._on_disk += 1

    def _flat(self, index: int) -> Tensor:
        if index < len(self._in_memory):
            return self._in_memory[index]
        assert self._file is not None
        self._file.seek((index - len(self._in_memory)) * self._image_bytes)
        return torch.from_numpy(
            np.frombuffer(bytearray(self._file.read(self._image_bytes)), dtype=np.float16)
        )

    def get(self, indices: Sequence[int], device: torch.device | str = "cpu") -> list[Tensor]:
        """Read a batch.

        Parameters
        ----------
        indices
            Images, each in 0..len(self) - 1.
        device
            Where the tensors go.

        Returns
        -------
        list of Tensor
            One [len(indices), C, H, W] float32 a level, channels last in memory.
        """
        batch = torch.stack([self._flat(index).to(device) for index in indices]).float()
        sizes = [channels * height * width for channels, height, width in self._shapes]
        return [
            part.reshape(len(indices), height, width, channels).permute(0, 3, 1, 2)
            for part, (channels, height, width) in zip(batch.split(sizes, dim=1), self._shapes, strict=True)
        ]
