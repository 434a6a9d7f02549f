"""The frozen teacher as the method uses it: normalised per channel over the training images."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from pydefect.backbones import FoldedSequence
from pydefect.dual_ae.pdn import PDN
from pydefect.features import Precision

__all__ = ["DTYPES", "ChannelStatistics", "NormalisedTeacher", "arithmetic"]

DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def arithmetic(precision: Precision, device: torch.device) -> torch.autocast:
    """Return the context in which the networks compute.

    Weights that autocast has cast are not kept: within another autocast, be it one that is off, they would be
    until that one ends, and training would go on with those of its first step.
    """
    enabled = precision == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


class ChannelStatistics:
    """Mean and standard deviation of every channel over a stream of maps, in float64."""

    def __init__(self) -> None:
        self._count = 0
        self._sum: Tensor | None = None
        self._squares: Tensor | None = None

    def add(self, maps: Tensor) -> None:
        """Take in [B, C, h, w]."""
        values = maps.detach().double()
        total, squares = values.sum((0, 2, 3)).cpu(), values.square().sum((0, 2, 3)).cpu()
        self._count += values.shape[0] * values.shape[2] * values.shape[3]
        self._sum = total if self._sum is None else self._sum + total
        self._squares = squares if self._squares is None else self._squares + squares

    def result(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, [C] float32 each; a constant channel's deviation is 1."""
        assert self._sum is not None
        assert self._squares is not None
        mean = self._sum / self._count
        variance = (self._squares / self._count - mean.square()).clamp_min(0)
        # What is left of equal numbers is rounding.
        constant = variance <= 1e-12 * (mean.square() + 1e-12)
        return mean.float(), torch.where(constant, torch.ones_like(variance), variance).sqrt().float()


class NormalisedTeacher:
    """A frozen teacher and the statistics of its channels.

    Parameters
    ----------
    network
        Maps images [B, 3, H, W] to [B, 384, h, w]; kept as :attr:`network`, for saving. A PDN is run in the
        form that runs fastest.
    precision
        Of a PDN's arithmetic.

    Attributes
    ----------
    mean, std
        [384] each; see :meth:`set_statistics`.
    """

    def __init__(self, network: nn.Module, precision: Precision) -> None:
        self.network = network.eval().requires_grad_(False)
        self.precision = precision
        self.mean = torch.zeros(())
        self.std = torch.ones(())
        self._folded = FoldedSequence(network, DTYPES[precision]) if isinstance(network, PDN) else None
        self._normalised: FoldedSequence | None = None

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set the channels' mean and standard deviation, [384] each."""
        self.mean, self.std = mean, std
        if isinstance(self.network, PDN):
            # (W x + b - mean) / std is one convolution again.
            network = copy.deepcopy(self.network)
            last = cast(nn.Conv2d, network[-1])
            assert last.bias is not None
            last.weight.div_(std[:, None, None, None])
            last.bias.sub_(mean).div_(std)
            self._normalised = FoldedSequence(network, DTYPES[self.precision])

    @torch.no_grad()
    def describe(self, images: Tensor) -> Tensor:
        """Compute the teacher's own output of [B, 3, H, W], not normalised."""
        described: Tensor = self.network(images) if self._folded is None else self._folded(images)
        return described

    def normalise(self, features: Tensor) -> Tensor:
        """(T - mean) / std of the teacher's own output, float32."""
        return (features.float() - self.mean[:, None, None]).div_(self.std[:, None, None])

    def __call__(self, images: Tensor) -> Tensor:
        """Map [B, 3, H, W] to the normalised T, [B, 384, h, w] in float32 or the teacher's precision."""
        if torch.compiler.is_exporting():
            return self.normalise(self.network(images))
        return self.normalise(self.describe(images)) if self._normalised is None else self._normalised(images)
