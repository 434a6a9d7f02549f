"""Student, autoencoders and modules together: passes, ablations, batch sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pydefect.dual_ae.config import ADDITIONS, DualAEConfig
from pydefect.dual_ae.network import DualNetwork
from pydefect.dual_ae.reunion import ChannelReunion, SelectiveFusion, SpatialReunion
from pydefect.dual_ae.trainer import LOSSES, build_network, step_losses


def images(seed: int, count: int = 2, size: tuple[int, int] = (64, 72)) -> torch.Tensor:
    found = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))
    return found.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", ["small", "medium"])
def test_one_pass_gives_what_three_passes_give(size, config):
    network = build_network(dataclasses.replace(config, size=size), (64, 72), 0)
    batches = [images(seed, count) for seed, count in ((0, 2), (1, 2), (2, 1))]
    with torch.no_grad():
        passes = network.describe(batches[0], batches[1], batches[2])
        whole = [network.student(batch) for batch in batches]
        alone = network.describe(batches[0], batches[1], None)
    for found, expected in (
        (passes.images, whole[0][:, :384]),
        (passes.augmented, whole[1][:, 384:]),
        (passes.penalty, whole[2][:, :384]),
        (alone.images, whole[0][:, :384]),
        (alone.augmented, whole[1][:, 384:]),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert alone.penalty is None


def test_gradients_of_one_pass_are_those_of_three(config):
    network = build_network(config, (64, 64), 0)
    first, second, third = (images(seed, 1, (64, 64)) for seed in range(3))
    passes = network.describe(first, second, third)
    loss = passes.images.square().sum() + passes.augmented.abs().sum() + passes.penalty.pow(3).sum()
    found = torch.autograd.grad(loss, list(network.student.parameters()))
    slow = (
        network.student(first)[:, :384].square().sum()
        + network.student(second)[:, 384:].abs().sum()
        + network.student(third)[:, :384].pow(3).sum()
    )
    for one, two in zip(found, torch.autograd.grad(slow, list(network.student.parameters())), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4 * float(two.abs().max()))


@pytest.mark.parametrize("additions", ADDITIONS)
def test_every_row_of_the_ablation_has_its_modules_and_losses(additions, config):
    row = ADDITIONS[additions]
    config = dataclasses.replace(config, additions=additions)
    network = build_network(config, (64, 72), 0)
    kinds = {"spatial": SpatialReunion, "channel": ChannelReunion, "plain": torch.nn.Identity}
    assert [type(one) for one in network.reunions] == [kinds[name] for name in row.reunions]
    assert len(network.autoencoders) == len(row.reunions)
    assert isinstance(network.fusion, SelectiveFusion) == row.fusion
    targets = torch.randn(1, 384, *network.map_size)
    losses = step_losses(network, config, images(0, 1), targets, images(1, 1), targets, images(2, 1))
    named = dict(zip(LOSSES, losses.tolist(), strict=True))
    assert (named.pop("cosine") > 0) == row.cosine
    assert min(named.values()) > 0
    losses.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_the_rows_are_the_papers_eleven():
    assert len(ADDITIONS) == 11
    assert ADDITIONS["none"].reunions == ("plain",)
    assert ADDITIONS["all"].cosine
    assert ADDITIONS["all"].fusion


def test_a_batch_of_four_is_the_mean_of_four_steps(settings):
    config = DualAEConfig(**settings, dropout=0.0)
    network = build_network(config, (64, 64), 0)
    map_size = network.map_size
    targets, augmented_targets = (torch.randn(4, 384, *map_size) for _ in range(2))
    batch = [images(seed, 4, (64, 64)) for seed in range(3)]
    parameters = list(network.parameters())

    def gradients(start: int, stop: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        losses = step_losses(
            network,
            config,
            batch[0][start:stop],
            targets[start:stop],
            batch[1][start:stop],
            augmented_targets[start:stop],
            batch[2][start:stop],
        )
        return losses.detach(), torch.autograd.grad(losses.sum(), parameters)

    together, found = gradients(0, 4)
    singly = [gradients(number, number + 1) for number in range(4)]
    torch.testing.assert_close(together, torch.stack([losses for losses, _ in singly]).mean(0))
    for index, one in enumerate(found):
        mean = torch.stack([of_image[index] for _, of_image in singly]).mean(0)
        torch.testing.assert_close(one, mean, rtol=1e-3, atol=1e-4 * float(mean.abs().max()))


def test_the_papers_scale_sums_over_channels(config):
    network = build_network(dataclasses.replace(config, dropout=0.0), (64, 64), 0)
    targets = torch.randn(1, 384, *network.map_size)
    arguments = (images(0, 1, (64, 64)), targets, images(1, 1, (64, 64)), targets, images(2, 1, (64, 64)))
    with torch.no_grad():
        network.eval()
        means = step_losses(network, config, *arguments)
        sums = step_losses(network, dataclasses.replace(config, loss_scale="paper"), *arguments)
    torch.testing.assert_close(sums[:4], 384 * means[:4])
    torch.testing.assert_close(sums[4], means[4])


def test_equal_seeds_give_equal_networks(config):
    states = [build_network(config, (64, 64), seed).state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["student.0.weight"], states[2]["student.0.weight"])
    assert isinstance(build_network(config, (64, 64), 0), DualNetwork)


def test_each_network_has_its_own_target() -> None:
    config = DualAEConfig(resize=(64, 72), precision="float32", dropout=0.0, hard_quantile=0.0)
    network = build_network(config, (64, 72), 0).eval()
    images, augmented = torch.randn(2, 1, 3, 64, 72)
    targets, augmented_targets = torch.randn(2, 1, 384, *network.map_size)
    with torch.no_grad():
        losses = step_losses(network, config, images, targets, augmented, augmented_targets, None)
        outputs, _ = network.reconstruct(augmented)
        described = network.student(images)[:, :384]
    named = dict(zip(LOSSES, losses, strict=True))
    torch.testing.assert_close(named["hard"], (described - targets).square().mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        named["teacher_autoencoder"],
        sum((one - augmented_targets).square().mean() for one in outputs),
        rtol=1e-4,
        atol=0,
    )
