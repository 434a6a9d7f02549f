"""The trained part of the method: student, autoencoders with their modules, fusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from pydefect.dual_ae.autoencoder import Autoencoder
from pydefect.dual_ae.config import DualAEConfig, Reunion
from pydefect.dual_ae.convolution import trained_convolution
from pydefect.dual_ae.pdn import PDN, PDN_CHANNELS, output_size
from pydefect.dual_ae.reunion import ChannelReunion, SelectiveFusion, SpatialReunion

__all__ = ["DualNetwork", "StudentPasses"]


@dataclass(frozen=True)
class StudentPasses:
    """What a training step needs of the student, [B, 384, h, w] each.

    Attributes
    ----------
    images
        S' of the images: the first 384 channels.
    augmented
        S'' of their augmented copies: the last 384.
    penalty
        S' of the penalty images; None without them.
    """

    images: Tensor
    augmented: Tensor
    penalty: Tensor | None


class DualNetwork(nn.Module):
    """Student, autoencoders, reunion modules and fusion.

    Parameters
    ----------
    config
        Settings.
    image_size
        (height, width) of the network's input.

    Attributes
    ----------
    student
        PDN with 768 channels: S' imitates the teacher, S'' the autoencoders.
    autoencoders, reunions
        One each for every entry of ``config.addition.reunions``.
    fusion
        None where the row has none.
    """

    def __init__(self, config: DualAEConfig, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.image_size = image_size
        self.map_size = output_size(image_size, config.padding)
        self.student = PDN(config.size, 2 * PDN_CHANNELS, config.padding)
        addition = config.addition
        self.autoencoders = nn.ModuleList(
            [Autoencoder(image_size, self.map_size, PDN_CHANNELS, config.dropout) for _ in addition.reunions]
        )
        self.reunions = nn.ModuleList([_reunion(name, config) for name in addition.reunions])
        self.fusion = SelectiveFusion(PDN_CHANNELS, config.reduction) if addition.fusion else None

    @property
    def gates(self) -> list[nn.Module]:
        """The modules' layers that see one vector an image."""
        found: list[nn.Module] = []
        for reunion in self.reunions:
            if isinstance(reunion, ChannelReunion):
                found += [reunion.reduce, reunion.expand]
        if self.fusion is not None:
            found += [self.fusion.reduce, self.fusion.first, self.fusion.second]
        return found

    def describe(self, images: Tensor, augmented: Tensor, penalty: Tensor | None) -> StudentPasses:
        """Run the student over all images of a step in one pass.

        Parameters
        ----------
        images, augmented, penalty
            [B, 3, H, W] each, normalised.

        Returns
        -------
        StudentPasses
            The last convolution computes only the half of its channels that each needs.
        """
        last = cast(nn.Conv2d, self.student[-1])
        x = self.student.trunk(torch.cat([images, *([] if penalty is None else [penalty]), augmented]))
        ends = len(x) - len(augmented)
        assert last.bias is not None
        halves = zip(last.weight.split(PDN_CHANNELS), last.bias.split(PDN_CHANNELS), strict=True)
        first, second = (
            trained_convolution(part, *half, padding=0, small=True)
            for part, half in zip((x[:ends], x[ends:]), halves, strict=True)
        )
        return StudentPasses(first[: len(images)], second, None if penalty is None else first[len(images) :])

    def reconstruct(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Run the autoencoders.

        Parameters
        ----------
        images
            [B, 3, H, W], normalised.

        Returns
        -------
        outputs
            Every autoencoder's own output A, behind its reunion module, [B, 384, h, w].
        fused
            F: the outputs behind the fusion module, or the same tensors where there is none.
        """
        outputs = [
            reunion(autoencoder(images))
            for autoencoder, reunion in zip(self.autoencoders, self.reunions, strict=True)
        ]
        return outputs, outputs if self.fusion is None else list(self.fusion(*outputs))


def _reunion(name: Reunion, config: DualAEConfig) -> nn.Module:
    if name == "spatial":
        return SpatialReunion(PDN_CHANNELS, config.pool, config.context_normalisation)
    if name == "channel":
        return ChannelReunion(PDN_CHANNELS, config.reduction, config.context_normalisation)
    return nn.Identity()
