"""From squared differences to anomaly maps: scale, place in the image, and kind of defect (section 2.2)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from pydefect.dual_ae.pdn import STRIDE, first_centre

__all__ = ["map_scale", "place", "placement_matrix"]

# Quantiles so close to each other say nothing about the spread; q_b then stands for it.
_SMALLEST_SPREAD = 1e-3


def map_scale(maps: Sequence[Tensor] | Tensor, low_quantile: float, high_quantile: float) -> float:
    """The factor that makes maps of different origin comparable.

    Parameters
    ----------
    maps
        Squared differences of normal images, [h, w] each, before they are placed in the image.
    low_quantile, high_quantile
        a and b, of the values of all maps together.

    Returns
    -------
    float
        0.1 / (q_b - q_a). Where the quantiles are equal or nearly so, q_b - q_a counts as a thousandth of
        q_b; where all is 0, the factor is 0.1.

    Notes
    -----
    The paper's map is 0.1 (map - q_a) / (q_b - q_a). Its constant term is left out, which moves the zero
    point and nothing else: maps of all methods here are >= 0.
    """
    values = torch.cat([one.double().flatten() for one in maps])
    # torch.quantile takes 16 million values at most.
    ordered = values.sort().values
    low, high = (_interpolated(ordered, quantile) for quantile in (low_quantile, high_quantile))
    spread = max(high - low, _SMALLEST_SPREAD * high)
    return 0.1 / spread if spread > 0 else 0.1


def _interpolated(ordered: Tensor, quantile: float) -> float:
    place = quantile * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return float(torch.lerp(ordered[below], ordered[above], place - below))


def placement_matrix(pixels: int, cells: int, padding: bool) -> Tensor:
    """How much each cell counts at each pixel, along one axis.

    Parameters
    ----------
    pixels, cells
        Lengths of the image and of the map.
    padding
        Of the networks that made the map.

    Returns
    -------
    Tensor
        [pixels, cells] float32, rows sum to 1: linear between the centres of the cells' receptive fields, and
        the nearest cell outside them, so that the image has no dead border.
    """
    centres = torch.arange(pixels, dtype=torch.float64) + 0.5
    place = ((centres - first_centre(padding)) / STRIDE).clamp(0, cells - 1)
    below = place.floor().long().clamp(max=max(0, cells - 2))
    above = (below + 1).clamp(max=cells - 1)
    share = (place - below).float()
    matrix = torch.zeros(pixels, cells)
    rows = torch.arange(pixels)
    matrix[rows, below] += 1 - share
    matrix[rows, above] += share
    return matrix


def place(maps: Tensor, image_size: tuple[int, int], padding: bool) -> Tensor:
    """Resize maps to the image so that every cell lies where its receptive field has its centre.

    Parameters
    ----------
    maps
        [B, h, w] float32.
    image_size
        (height, width) of the network's input.
    padding
        Of the networks that made the maps.

    Returns
    -------
    Tensor
        [B, height, width] float32.
    """
    rows = _placement_on(maps.device, image_size[0], maps.shape[1], padding)
    columns = _placement_on(maps.device, image_size[1], maps.shape[2], padding)
    return rows @ maps @ columns.T


# Kept for good: a CUDA graph can neither copy them nor live without them.
@functools.cache
def _placement_on(device: torch.device, pixels: int, cells: int, padding: bool) -> Tensor:
    with torch.inference_mode(False):
        return placement_matrix(pixels, cells, padding).to(device)
