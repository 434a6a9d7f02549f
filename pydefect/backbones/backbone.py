"""What a frozen network has to have so that patch features can be taken from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from pydefect.errors import InputError

__all__ = ["Backbone"]


class Backbone(nn.Module, ABC):
    """A network with feature maps at three levels, 1, 2 and 3, of which methods choose some.

    pydefect's own are ResNets; a package declares further ones (``docs/own-backbones.md``), as subclasses
    that need no arguments.

    Attributes
    ----------
    channels
        Of each level's maps.
    strides
        Input pixels for one step of each level's grid, the finest level first; equal ones are allowed.
    """

    channels: Mapping[int, int]
    strides: Mapping[int, int]

    @abstractmethod
    def forward(self, images: Tensor, levels: tuple[int, ...]) -> list[Tensor]:
        """Compute the maps of the chosen levels.

        Parameters
        ----------
        images
            [B, 3, H, W] float32, normalised with the ImageNet mean and standard deviation; H and W are
            multiples of the chosen levels' strides.
        levels
            Ascending, out of 1, 2, 3.

        Returns
        -------
        list of Tensor
            One [B, channels, H / stride, W / stride] a level, of any floating dtype.
        """

    def load_pretrained(self) -> None:
        """Take the weights that ``weights="imagenet"`` stands for, where any are published.

        Raises
        ------
        InputError
            There are none: what this base says of every network.
        """
        raise InputError(
            f"weights: 'imagenet' given, but {type(self).__name__} has no published weights; give a file"
        )
