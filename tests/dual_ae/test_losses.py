"""The losses against their definitions, and a batch against its images one at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pydefect.dual_ae import losses
from pydefect.dual_ae.losses import (
    autoencoder_loss,
    hard_feature_loss,
    hard_features,
    penalty_loss,
    student_autoencoder_loss,
)


def maps(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hard_reference(teacher: torch.Tensor, student: torch.Tensor, quantile: float) -> torch.Tensor:
    """EfficientAD's code, an image at a time."""
    losses = []
    for one, other in zip(teacher, student, strict=True):
        distance = (one - other) ** 2
        losses.append(distance[distance >= torch.quantile(distance, quantile)].mean())
    return torch.stack(losses).mean()


# As on the CPU, and as on CUDA.
HARD = [hard_feature_loss, losses._hard_feature_loss_on_device]


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("loss", HARD)
def test_hard_features_are_those_at_or_above_the_quantile(loss, quantile, layout):
    teacher = maps(0, 3, 8, 5, 7).contiguous(memory_format=layout)
    student = maps(1, 3, 8, 5, 7).contiguous(memory_format=layout).requires_grad_()
    found = loss(teacher, student, quantile)
    expected = hard_reference(teacher, student, quantile)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (found, expected)))


@pytest.mark.parametrize("loss", HARD)
@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=30), st.sampled_from([0.0, 0.25, 0.5, 0.8, 1.0]))
def test_ties_at_the_quantile_are_all_taken(loss, values, quantile):
    teacher = torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1)
    student = torch.zeros_like(teacher)
    found = loss(teacher, student, quantile)
    torch.testing.assert_close(found, hard_reference(teacher, student, quantile))


@pytest.mark.parametrize("loss", HARD)
def test_a_loss_that_is_no_number_shows(loss):
    teacher, student = maps(0, 2, 8, 3, 3), maps(1, 2, 8, 3, 3)
    student[1, 3, 1, 1] = torch.nan
    assert torch.isnan(loss(teacher, student, 0.9))


def test_a_difficult_image_does_not_silence_the_others():
    teacher, student = maps(0, 2, 8, 9, 9), maps(1, 2, 8, 9, 9)
    teacher[0] *= 100
    indices, weights = hard_features(teacher, student, 0.9)
    in_second = indices >= 8 * 81
    assert in_second.sum() == (~in_second).sum()
    assert weights.sum() == pytest.approx(1)


LOSSES = {
    "hard": lambda a, b: hard_feature_loss(a, b, 0.97),
    "hard on a device": lambda a, b: losses._hard_feature_loss_on_device(a, b, 0.97),
    "penalty": lambda _a, b: penalty_loss(b),
    "autoencoder": autoencoder_loss,
    "student": lambda a, b: sum(student_autoencoder_loss(a, b, 0.5)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_is_the_mean_of_its_images(name):
    first, second = maps(0, 4, 8, 6, 5), maps(1, 4, 8, 6, 5).requires_grad_()
    together = LOSSES[name](first, second)
    singly = torch.stack([LOSSES[name](first[i : i + 1], second[i : i + 1]) for i in range(4)]).mean()
    torch.testing.assert_close(together, singly)
    torch.testing.assert_close(*(torch.autograd.grad(loss, second)[0] for loss in (together, singly)))


def test_the_cosine_term_is_one_minus_the_cosine_at_each_position():
    fused, student = maps(0, 2, 8, 3, 3), maps(1, 2, 8, 3, 3)
    squared, cosine = student_autoencoder_loss(fused, student, 0.5)
    angles = (fused * student).sum(1) / (fused.norm(dim=1) * student.norm(dim=1))
    torch.testing.assert_close(cosine, 0.5 * (1 - angles).mean())
    torch.testing.assert_close(squared, (fused - student).square().mean())
    assert student_autoencoder_loss(fused, student, 0)[1] == 0


def test_gradients_flow_where_they_should():
    teacher, student, fused = (maps(seed, 1, 8, 4, 4).requires_grad_() for seed in range(3))
    for loss in HARD:
        assert torch.autograd.grad(loss(teacher, student, 0.999), teacher, allow_unused=True)[0] is None
    for one in torch.autograd.grad(sum(student_autoencoder_loss(fused, student, 0.5)), (fused, student)):
        assert one.abs().min() > 0


def test_half_precision_maps_are_compared_in_float32():
    teacher, student = maps(0, 1, 8, 4, 4), maps(1, 1, 8, 4, 4).bfloat16()
    for loss in LOSSES.values():
        assert loss(teacher, student).dtype == torch.float32
        torch.testing.assert_close(loss(teacher, student), loss(teacher, student.float()))


@pytest.mark.parametrize("cosine_weight", [0.0, 0.5])
def test_the_written_gradients_are_those_of_the_formula(cosine_weight):
    first, second = (maps(seed, 5, 7).double().requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(lambda a, b: losses._compared(a, b, cosine_weight), (first, second))


def test_zero_vectors_have_no_angle():
    rows = torch.zeros(2, 8, 1, 1, requires_grad=True)
    loss = sum(student_autoencoder_loss(rows, maps(0, 2, 8, 1, 1), 0.5))
    (gradient,) = torch.autograd.grad(loss, rows)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.integers(0, 3), st.data())
def test_the_largest_values_are_found_without_a_sort(count, levels, data):
    wanted = data.draw(st.integers(1, count))
    values = maps(count, count) if levels == 0 else (maps(count, count) * levels).round()
    assert torch.equal(losses._largest(values, wanted), values.sort(descending=True).values[:wanted])
