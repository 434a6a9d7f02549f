"""The contrastive representation network: F, g and their slowly moving twins (section 3.3)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pydefect.features import FeatureCache
from pydefect.ops import project_levels

__all__ = ["ConPatchNetwork", "Representation", "level_scales", "principal_components"]

Initialisation = Literal["default", "identity", "pca"]


class Representation(nn.Module):
    """F: a 1x1 CoordConv from scaled feature levels and coordinates to the representation.

    Parameters
    ----------
    channels
        Channels of every level.
    dimension
        D, channels of the representation.
    input_scale
        [sum(channels) + 2]: factor of every input channel, the two coordinates last. A constant of the
        network, not a parameter: it balances the levels.

    Notes
    -----
    The weights start as those of a fresh ``torch.nn.Conv2d`` (the printed reading).
    """

    def __init__(self, channels: Sequence[int], dimension: int, input_scale: Tensor) -> None:
        super().__init__()
        inputs = sum(channels) + 2
        convolution = nn.Conv2d(inputs, dimension, 1)
        self.weight = nn.Parameter(convolution.weight.detach()[:, :, 0, 0].clone())
        self.bias = nn.Parameter(convolution.bias.detach().clone())  # type: ignore[union-attr]
        self.register_buffer("input_scale", input_scale.clone())
        self.input_scale: Tensor

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Map [B, C_l, H_l, W_l] a level to [B, H_1 * W_1, D]."""
        return project_levels(levels, self.weight * self.input_scale, self.bias)


class ConPatchNetwork(nn.Module):
    """Online branch F, g and target branch F', g'.

    Parameters
    ----------
    channels, dimension, input_scale
        See :class:`Representation`.
    projection_dimension
        Dz, channels of the projection.

    References
    ----------
    Luo et al., Computer Science 52(1), 2025, section 3.3, equation (6).
    """

    def __init__(
        self, channels: Sequence[int], dimension: int, projection_dimension: int, input_scale: Tensor
    ) -> None:
        super().__init__()
        self.representation = Representation(channels, dimension, input_scale)
        self.projection = nn.Linear(dimension, projection_dimension)
        self.reset_target()

    def reset_target(self) -> None:
        """Make the target branch a copy of the online branch."""
        self.target_representation = copy.deepcopy(self.representation).requires_grad_(False)
        self.target_projection = copy.deepcopy(self.projection).requires_grad_(False)

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """Move the target branch: theta' <- momentum * theta' + (1 - momentum) * theta, equation (6)."""
        for target, online in (
            (self.target_representation, self.representation),
            (self.target_projection, self.projection),
        ):
            for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
                slow.lerp_(fast, 1 - momentum)

    @torch.no_grad()
    def start_as(self, weight: Tensor, bias: Tensor) -> None:
        """Let F start from a given linear map ([D, inputs], [D]) and g from the identity."""
        self.representation.weight.copy_(weight)
        self.representation.bias.copy_(bias)
        nn.init.eye_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)
        self.reset_target()


def level_scales(cache: FeatureCache, indices: Sequence[int]) -> list[float]:
    """Divide every level by its total standard deviation over images, so that no level drowns another.

    Parameters
    ----------
    cache, indices
        The training images.

    Returns
    -------
    list of float
        1 / sqrt(sum over channels of the variance over patches and images), one a level; 1 for a constant
        level.
    """
    sums = [torch.zeros(channels, dtype=torch.float64) for channels, _, _ in cache.shapes]
    squares = [torch.zeros(channels, dtype=torch.float64) for channels, _, _ in cache.shapes]
    for index in indices:
        for level, values in enumerate(cache.get([index])):
            patches = values[0].flatten(1).double()
            sums[level] += patches.sum(1)
            squares[level] += patches.square().sum(1)
    scales = []
    for (_, height, width), total, square in zip(cache.shapes, sums, squares, strict=True):
        count = len(indices) * height * width
        variance = float((square / count - (total / count).square()).clamp_min(0).sum())
        scales.append(variance**-0.5 if variance > 0 else 1.0)
    return scales


def principal_components(
    cache: FeatureCache, indices: Sequence[int], input_scale: Tensor, dimension: int
) -> tuple[Tensor, Tensor]:
    """Rotate scaled features onto their leading principal components, without whitening: distances are kept.

    Parameters
    ----------
    cache, indices
        The training images; at most 64 of them, evenly spaced, are used.
    input_scale
        See :class:`Representation`.
    dimension
        Number of components, at most the number of inputs.

    Returns
    -------
    weight
        [dimension, inputs] for scaled inputs; orthonormal rows, each with its largest entry positive.
    bias
        [dimension]: centres the training patches.
    """
    inputs = len(input_scale)
    chosen = [indices[round(i)] for i in torch.linspace(0, len(indices) - 1, min(64, len(indices))).tolist()]
    scaled_identity = torch.diag(input_scale)
    total = torch.zeros(inputs, dtype=torch.float64)
    second = torch.zeros(inputs, inputs, dtype=torch.float64)
    count = 0
    for index in chosen:
        patches = project_levels(cache.get([index]), scaled_identity)[0]
        total += patches.sum(0, dtype=torch.float64)
        second += (patches.T @ patches).double()
        count += len(patches)
    mean = total / count
    _, vectors = torch.linalg.eigh(second / count - torch.outer(mean, mean))
    weight = vectors.flip(1)[:, :dimension].T
    largest = weight.gather(1, weight.abs().argmax(1, keepdim=True))
    weight = weight * largest.sign()
    return weight.float(), -(weight @ mean).float()
