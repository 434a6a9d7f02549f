"""The losses of section 1.5, computed in float32 whatever the maps' type.

Every loss is the mean over the images of a batch of what the image alone would give: a batch of four is four
steps' mean gradient.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

__all__ = [
    "autoencoder_loss",
    "hard_feature_loss",
    "hard_features",
    "penalty_loss",
    "student_autoencoder_loss",
]

# As torch.nn.functional.cosine_similarity.
_SMALLEST_NORM = 1e-8
# One of so many values is enough for a bound of the largest ones.
_EVERY = 16


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
    squared = (_by_position(teacher) - _by_position(student)).square_().flatten(1)
    count = squared.shape[1]
    place = quantile * (count - 1)
    below = math.floor(place)
    indices, weights = [], []
    for image, values in enumerate(squared):
        # The last one of these is the value at `below`, the one before it the next larger: no full sort.
        largest = _largest(values, count - below)
        threshold = largest[-1]
        if place > below:
            threshold = torch.lerp(threshold, largest[-2], place - below)
        # Not >=, which is false for NaN: a loss that is none must show.
        found = (~(values < threshold)).nonzero()[:, 0]
        indices.append(found + image * count)
        weights.append(torch.full_like(found, 1 / (len(squared) * len(found)), dtype=torch.float32))
    return torch.cat(indices), torch.cat(weights)


def _largest(values: Tensor, wanted: int) -> Tensor:
    """The `wanted` largest values, in descending order.

    The last of the `wanted` largest of some of them is no greater than that of all: what is smaller than it
    need not be looked at twice, which leaves a few thousand of a million.
    """
    some = values[::_EVERY]
    if len(some) >= wanted:
        bound = torch.topk(some, wanted).values[-1]
        # Not >=, which is false for NaN.
        values = values[~(values < bound)]
    return torch.topk(values, wanted, sorted=True).values


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
    if student.is_cuda:
        return _hard_feature_loss_on_device(teacher, student, quantile)
    indices, weights = hard_features(teacher, student, quantile)
    target = _by_position(teacher.detach()).flatten()[indices]
    return ((_by_position(student).flatten()[indices] - target).square() * weights).sum()


def _hard_feature_loss_on_device(teacher: Tensor, student: Tensor, quantile: float) -> Tensor:
    """Compute the same with every value's weight, most of them 0, instead of the hard ones' indices.

    How many these are is not known before they are found: gathering them would make the host wait for the
    device in every step, and a CUDA graph cannot capture that.
    """
    squared = (_by_position(student) - _by_position(teacher.detach())).square().flatten(1)
    count = squared.shape[1]
    place = quantile * (count - 1)
    below = math.floor(place)
    with torch.no_grad():
        largest = torch.topk(squared, count - below, dim=1).values
        threshold = largest[:, -1:]
        if place > below:
            threshold = torch.lerp(threshold, largest[:, -2:-1], place - below)
        # Not >=, which is false for NaN: a loss that is none must show.
        hard = ~(squared < threshold)
        weights = hard / (len(squared) * hard.sum(1, keepdim=True))
    return (squared * weights).sum()


def penalty_loss(student: Tensor) -> Tensor:
    """L_pen (12): mean of S'(P)^2 over [B, C, h, w]; scalar, float32."""
    values = _by_position(student).flatten()
    return torch.dot(values, values) / len(values)


def autoencoder_loss(teacher: Tensor, output: Tensor) -> Tensor:
    """L_TA (14): mean squared difference of T and an autoencoder's own output, [B, C, h, w] each."""
    squared, _ = _compared(_by_position(teacher).flatten(0, 1), _by_position(output).flatten(0, 1), 0.0)
    return squared


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
    return _compared(_by_position(fused).flatten(0, 1), _by_position(student).flatten(0, 1), cosine_weight)


def _by_position(maps: Tensor) -> Tensor:
    """[B, C, h, w] as float32 [B, h * w, C]: no copy where it is channels_last float32."""
    return maps.permute(0, 2, 3, 1).float().flatten(1, 2)


def _compared(first: Tensor, second: Tensor, cosine_weight: float) -> tuple[Tensor, Tensor]:
    squared, cosine = cast(tuple[Tensor, Tensor], _Compared.apply(first, second, cosine_weight))
    return squared, cosine


class _Compared(torch.autograd.Function):
    """Mean squared difference of [P, C] and [P, C], and cosine_weight * mean over P of 1 - cos.

    Both gradients are, position by position, sums of multiples of the two rows: the forward pass keeps three
    numbers a position beside its inputs, and each pass reads these once or twice, where a composition of
    PyTorch's operators takes a fifth of a whole training step for it.
    """

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, cosine_weight: float) -> tuple[Tensor, Tensor]:
        difference = (second - first).flatten()
        squared = torch.dot(difference, difference) / difference.numel()
        ctx.cosine_weight = cosine_weight
        if cosine_weight == 0:
            ctx.save_for_backward(first, second)
            return squared, squared.new_zeros(())
        norms = [torch.linalg.vector_norm(rows, dim=1).clamp_min(_SMALLEST_NORM) for rows in (first, second)]
        cosine = torch.linalg.vecdot(first, second) / (norms[0] * norms[1])
        ctx.save_for_backward(first, second, *norms, cosine)
        return squared, cosine_weight * (1 - cosine.mean())

    @staticmethod
    def backward(ctx: Any, d_squared: Tensor, d_cosine: Tensor) -> tuple[Tensor | None, ...]:
        first, second, *angles = ctx.saved_tensors
        own = 2 / first.numel() * d_squared
        needs_first, needs_second, _ = ctx.needs_input_grad
        if not angles:
            d_second = (second - first).mul_(own)
            return -d_second if needs_first else None, d_second if needs_second else None, None
        first_norm, second_norm, cosine = angles
        share = ctx.cosine_weight / len(first) * d_cosine
        other = (-own - share / (first_norm * second_norm))[:, None]

        def gradient(rows: Tensor, norm: Tensor, others: Tensor) -> Tensor:
            mine = (own + share * cosine / norm.square())[:, None]
            found: Tensor = (rows * mine).addcmul_(others, other)
            return found

        return (
            gradient(first, first_norm, second) if needs_first else None,
            gradient(second, second_norm, first) if needs_second else None,
            None,
        )
