"""The spatial reunion, channel reunion and selective fusion modules, on the fused operations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pydefect.dual_ae.convolution import SmallConvolution
from pydefect.ops import channel_reunion, selective_fusion, spatial_reunion
from pydefect.ops.reference.spatial_reunion import Normalisation

__all__ = ["ChannelReunion", "SelectiveFusion", "SpatialReunion"]


class SpatialReunion(nn.Module):
    """Spatial reunion module (1.2, equations 1 to 7).

    Parameters
    ----------
    channels
        C of the map.
    pool
        r of (1) and (2).
    normalisation
        Of the sum (6); see :func:`pydefect.ops.spatial_reunion`.
    """

    def __init__(self, channels: int, pool: int, normalisation: Normalisation) -> None:
        super().__init__()
        self.pool = pool
        self.normalisation = normalisation
        self.coarse: nn.Module = SmallConvolution(channels, channels, 3, padding=1)
        self.local: nn.Module = SmallConvolution(channels, channels, 3, padding=1)
        self.attention = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Map I to O1, both [B, C, H, W]; O1 is float32."""
        # What a last, smaller window has left is averaged too: no position is without its surroundings.
        weight, bias = _parameters(self.attention)
        pooled = F.avg_pool2d(features, self.pool, ceil_mode=True)
        return spatial_reunion(
            features.float(),
            self.local(features),
            self.coarse(pooled),
            weight,
            bias,
            self.normalisation,
        )


class ChannelReunion(nn.Module):
    """Channel reunion module (1.3, equations 8 to 10).

    Parameters
    ----------
    channels
        C of the map.
    reduction
        C over the width between the two fully connected layers, and between the two 1x1 convolutions.
    normalisation
        Of the sum (9): ``"none"`` as printed, else the mean over positions. Over some thousands of positions
        the printed sum drives the gates (10) to 0 or 1 within the first steps: a channel at 0 gets no
        gradient and stays there.
    """

    def __init__(self, channels: int, reduction: int, normalisation: Normalisation) -> None:
        super().__init__()
        self.normalisation = normalisation
        reduced = max(1, channels // reduction)
        self.inner = nn.Conv2d(channels, reduced, 1)
        self.outer = nn.Conv2d(reduced, 1, 1)
        self.reduce = nn.Linear(channels, reduced)
        self.expand = nn.Linear(reduced, channels)

    def forward(self, features: Tensor) -> Tensor:
        """Map I to O2, both [B, C, H, W]; O2 is float32."""
        parameters = _parameters(self.inner, self.outer, self.reduce, self.expand)
        if self.normalisation != "none":
            # The layer behind the sum is linear: dividing its weights divides the sum.
            parameters[4] = parameters[4] / (features.shape[2] * features.shape[3])
        return channel_reunion(features.float(), *parameters)


class SelectiveFusion(nn.Module):
    """Selective fusion module (1.4).

    Parameters
    ----------
    channels
        C of the maps.
    reduction
        C over the width of the fully connected layer.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        reduced = max(1, channels // reduction)
        self.reduce = nn.Linear(channels, reduced)
        self.first = nn.Conv2d(reduced, channels, 1)
        self.second = nn.Conv2d(reduced, channels, 1)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Map O1, O2 to F_srm, F_crm, all [B, C, H, W]."""
        return selective_fusion(first, second, *_parameters(self.reduce, self.first, self.second))


def _parameters(*layers: nn.Conv2d | nn.Linear) -> list[Tensor]:
    found = []
    for layer in layers:
        assert layer.bias is not None
        found += [layer.weight, layer.bias]
    return found
