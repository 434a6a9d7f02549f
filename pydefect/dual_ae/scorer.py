"""From images to local and global maps (section 2.2)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pydefect.backbones import FoldedSequence
from pydefect.dual_ae.autoencoder import Autoencoder
from pydefect.dual_ae.frozen import DTYPES, NormalisedTeacher
from pydefect.dual_ae.maps import map_scale, place
from pydefect.dual_ae.network import DualNetwork
from pydefect.dual_ae.pdn import PDN_CHANNELS
from pydefect.dual_ae.reunion import SpatialReunion

__all__ = ["MapScales", "Scorer", "placed_maps"]


@dataclass(frozen=True)
class MapScales:
    """What the maps are multiplied by so that they can be compared (:func:`pydefect.dual_ae.maps.map_scale`).

    Attributes
    ----------
    local
        Of (T - S')^2.
    parts
        Of (F - S'')^2, one an autoencoder.
    """

    local: float
    parts: tuple[float, ...]

    @classmethod
    def fit(cls, maps: Sequence[tuple[Tensor, ...]], low_quantile: float, high_quantile: float) -> MapScales:
        """Take the quantiles of normal images' maps, each a tuple as :class:`Scorer` returns."""
        local, *parts = (map_scale(kind, low_quantile, high_quantile) for kind in zip(*maps, strict=True))
        return cls(local, tuple(parts))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"local": self.local, "parts": list(self.parts)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MapScales:
        """Read what :meth:`to_dict` wrote."""
        return cls(values["local"], tuple(values["parts"]))


class Scorer:
    """Teacher, student and autoencoders in the form that runs fastest.

    Parameters
    ----------
    network
        Its weights are copied: later changes to them are not seen. Only what is exported is the network
        itself, in float32.
    teacher
        Normalised; student and autoencoders compute with its precision.
    """

    def __init__(self, network: DualNetwork, teacher: NormalisedTeacher) -> None:
        self._network = network
        self._teacher = teacher
        dtype = DTYPES[teacher.precision]
        self._student = FoldedSequence(network.student, dtype)
        self._autoencoders = [FoldedSequence(cast(Autoencoder, one), dtype) for one in network.autoencoders]
        self._reunions = [copy.deepcopy(one) for one in network.reunions]
        for reunion in self._reunions:
            if isinstance(reunion, SpatialReunion):
                # As in training: the wide convolutions in the type of the maps, all around them in float32.
                reunion.local = _Folded(reunion.local, dtype)
                reunion.coarse = _Folded(reunion.coarse, dtype)
        self._fusion = copy.deepcopy(network.fusion)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute mean squared differences over channels.

        Parameters
        ----------
        images
            [B, 3, H, W] float32, normalised.

        Returns
        -------
        tuple of Tensor
            [B, h, w] float32 each: (T - S')^2, then (F - S'')^2 for every autoencoder.
        """
        # One image at a time on the CPU: its maps (16 MB the largest) stay near the processor, and memory
        # does not grow with the batch. An exported graph would hold the networks once for every part.
        alone = images.device.type == "cpu" and not torch.compiler.is_exporting()
        together = 1 if alone else len(images)
        parts = [self._differences(part) for part in images.split(together)]
        return tuple(torch.cat(maps) for maps in zip(*parts, strict=True))

    def _differences(self, images: Tensor) -> tuple[Tensor, ...]:
        if torch.compiler.is_exporting():
            described: Tensor = self._network.student(images)
            _, fused = self._network.reconstruct(images)
        else:
            described = self._student(images)
            outputs = [
                reunion(autoencoder(images))
                for autoencoder, reunion in zip(self._autoencoders, self._reunions, strict=True)
            ]
            fused = outputs if self._fusion is None else self._fusion(*outputs)
        first, second = described.split(PDN_CHANNELS, dim=1)
        local = _mean_square(self._teacher(images), first)
        second = second.to(fused[0].dtype)
        return local, *(_mean_square(one, second) for one in fused)


class _Folded(nn.Module):
    """A layer of a module in the form that runs fastest."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self._folded = FoldedSequence(nn.Sequential(layer), dtype)

    def forward(self, maps: Tensor) -> Tensor:
        """Run the layer."""
        return self._folded(maps)


def _mean_square(first: Tensor, second: Tensor) -> Tensor:
    """Mean of squared differences over channels, [B, h, w] float32. Of two bfloat16 numbers the difference is
    rounded once, by at most 2**-9 of itself."""
    norms: Tensor = torch.linalg.vector_norm(first - second, dim=1, dtype=torch.float32)
    return norms.square_().div_(first.shape[1])


def placed_maps(
    maps: Sequence[Tensor], scales: MapScales, image_size: tuple[int, int], padding: bool
) -> dict[str, Tensor]:
    """Scale, combine and place maps.

    Parameters
    ----------
    maps
        As :class:`Scorer` returns them.
    scales
        Of the detector.
    image_size
        (height, width) of the network's input.
    padding
        Of the networks.

    Returns
    -------
    dict of str to Tensor
        [B, height, width] each: ``"local"``, ``"global"`` (the mean over the autoencoders), and
        ``"anomaly"``, the mean of both.
    """
    local, *parts = maps
    local = local * scales.local
    whole = torch.stack([part * scale for part, scale in zip(parts, scales.parts, strict=True)]).mean(0)
    found = torch.stack([(local + whole) / 2, local, whole])
    placed = place(found.flatten(0, 1), image_size, padding).unflatten(0, found.shape[:2])
    return dict(zip(("anomaly", "local", "global"), placed, strict=True))
