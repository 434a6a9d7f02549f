"""The losses of section 1.5, computed in float32 whatever the maps' type.

Every loss is the mean over the images of a batch of what the image alone would give: a batch of four is four
steps' mean gradient.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "autoencoder_loss",
    "hard_feature_loss",
    "hard_features",
    "penalty_loss",
    "student_autoencoder_loss",
]


@torch.no_grad()
def hard_features(teacher: Tensor, student: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Find the squared differences at or above their own image's quantile.

    Parameters
    ----------
    teacher, student
        [B, C, h, w] each.
    quantile
        0..1, with linear interpolation between two values, as ``torch.quantile``.

    Returns
    -------
    indices, weights
        [K] each, K over all images: positions in the flattened batch, in memory order of
        [B, h, w, C], and 1 / (B * number in the same image), float32.
    """
    squared = (_by_position(teacher) - _by_position(student)).square_()
    count = squared.shape[1]
    place = quantile * (count - 1)
    below = math.floor(place)
    indices, weights = [], []
    for image, values in enumerate(squared):
        # The last one of these is the value at `below`, the one before it the next larger: no full sort.
        largest = torch.topk(values, count - below, sorted=True).values
        threshold = largest[-1]
        if place > below:
            threshold = torch.lerp(threshold, largest[-2], place - below)
        # Not >=, which is false for NaN: a loss that is none must show.
        found = (~(values < threshold)).nonzero()[:, 0]
        indices.append(found + image * count)
        weights.append(torch.full_like(found, 1 / (len(squared) * len(found)), dtype=torch.float32))
    return torch.cat(indices), torch.cat(weights)


def hard_feature_loss(teacher: Tensor, student: Tensor, quantile: float = 0.999) -> Tensor:
    """L_hard: mean of the squared differences at or above their own image's quantile, averaged over images.

    Parameters
    ----------
    teacher, student
        T and S', [B, C, h, w] each; gradients flow into the student only.
    quantile
        0..1; 0 takes all.

    Returns
    -------
    Tensor
        Scalar, float32.

    References
    ----------
    Batzner et al., EfficientAD, WACV 2024, section 3.2. There the quantile goes over the whole batch, so that
    one difficult image silences the others.
    """
    indices, weights = hard_features(teacher, student, quantile)
    target = _by_position(teacher.detach()).flatten()[indices]
    return ((_by_position(student).flatten()[indices] - target).square() * weights).sum()


def penalty_loss(student: Tensor) -> Tensor:
    """L_pen (12): mean of S'(P)^2 over [B, C, h, w]; scalar, float32."""
    return student.float().square().mean()


def autoencoder_loss(teacher: Tensor, output: Tensor) -> Tensor:
    """L_TA (14): mean squared difference of T and an autoencoder's own output, [B, C, h, w] each."""
    return F.mse_loss(output.float(), teacher.float())


def student_autoencoder_loss(fused: Tensor, student: Tensor, cosine_weight: float) -> tuple[Tensor, Tensor]:
    """The two terms of L_SA (15 to 17).

    Parameters
    ----------
    fused
        F, an autoencoder's output behind the fusion module, [B, C, h, w].
    student
        S'', [B, C, h, w].
    cosine_weight
        lambda; 0 leaves the cosine out.

    Returns
    -------
    squared, cosine
        Mean squared difference, and lambda times the mean over positions of 1 - cos(F, S''), the cosine over
        channels; float32. Gradients flow into both maps.
    """
    fused, student = fused.float(), student.float()
    squared = F.mse_loss(student, fused)
    if cosine_weight == 0:
        return squared, squared.new_zeros(())
    return squared, cosine_weight * (1 - F.cosine_similarity(fused, student, dim=1)).mean()


def _by_position(maps: Tensor) -> Tensor:
    """[B, C, h, w] as float32 [B, h * w * C]: no copy where it is channels_last float32."""
    return maps.permute(0, 2, 3, 1).float().reshape(len(maps), -1)
