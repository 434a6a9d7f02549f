"""The fast form of the backbone: the plain network's maps, whatever PyTorch offers, on any number of
threads."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from pydefect.backbones import ARCHITECTURES, FoldedResNet, ResNet, build_backbone, folded

DTYPES = [torch.float32, torch.bfloat16]


def network_with_statistics(name: str) -> ResNet:
    """Random weights, and statistics and factors of its own at every normalisation: none can be left out
    unseen."""
    network = build_backbone(name, "random")
    generator = torch.Generator().manual_seed(1)
    for key, value in network.state_dict().items():
        if key.endswith("running_var") or (value.dim() == 1 and key.endswith("weight")):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.dim() == 1:
            value.uniform_(-0.2, 0.2, generator=generator)
    return network


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture
def no_fused(monkeypatch):
    """A PyTorch without the fused operators."""
    monkeypatch.setattr(folded, "has_fused_convolutions", lambda dtype: False)


@pytest.fixture(scope="module")
def resnet18() -> ResNet:
    return network_with_statistics("resnet18")


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_plain_networks_maps(name):
    network = network_with_statistics(name)
    batch = images(2, 3, 50, 71)
    expected = network.double()(batch.double())
    plain = network.float()(batch)
    found = FoldedResNet(network)(batch)
    for one, unfolded, truth in zip(found, plain, expected, strict=True):
        assert one.dtype == torch.float32
        assert one.is_contiguous(memory_format=torch.channels_last)
        # Weights are rounded once more, after the folding: a few times as far from float64 as the plain
        # network is, which is at some ten layers' roundings of 2**-24.
        assert error(one, truth) < 4 * error(unfolded, truth) < 1e-5


def test_bfloat16_is_as_near_as_a_bfloat16_network_can_be(resnet18):
    batch = images(2, 3, 64, 48)
    expected = resnet18(batch)
    found = FoldedResNet(resnet18, torch.bfloat16)(batch)
    plain = network_with_statistics("resnet18").bfloat16()(batch.bfloat16())
    for one, unfolded, truth in zip(found, plain, expected, strict=True):
        assert one.dtype == torch.bfloat16
        # No worse than PyTorch's own cast, which rounds the input too and every residual sum twice.
        assert error(one, truth.double()) < error(unfolded, truth.double())
        assert error(one, truth.double()) < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_the_fused_operators(resnet18, no_fused, dtype):
    batch = images(2, 3, 40, 56)
    network = FoldedResNet(resnet18, dtype)
    for found, expected in zip(network(batch), resnet18(batch), strict=True):
        # 24 bits and 8 bits of a number; roundings of some ten layers add up.
        assert error(found, expected.double()) < (1e-5 if dtype == torch.float32 else 0.02)
    assert network._packed is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_threads_and_company_change_nothing(name, dtype):
    network = FoldedResNet(network_with_statistics(name), dtype)
    batch = images(3, 3, 64, 80)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = network(batch)
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            assert all(map(torch.equal, network(batch), expected))
            for index in range(3):
                alone = network(batch[index : index + 1])
                assert all(
                    torch.equal(one[0], many[index]) for one, many in zip(alone, expected, strict=True)
                )
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_that_change_from_image_to_image(resnet18, dtype):
    """The layout of the weights follows the size, the values do not follow the layout."""
    network = FoldedResNet(resnet18, dtype)
    for height, width in [(32, 48), (48, 32), (32, 48), (64, 64), (64, 64), (32, 48), (33, 17)]:
        batch = images(1, 3, height, width)
        assert all(map(torch.equal, network(batch), FoldedResNet(resnet18, dtype)(batch)))


def test_one_layout_is_kept(resnet18):
    network = FoldedResNet(resnet18)
    if not folded.has_fused_convolutions(torch.float32):
        pytest.skip("this PyTorch has no fused convolutions")
    kept = []
    for size in (32, 48, 32, 48, 48, 32):
        network(images(1, 3, size, size))
        kept.append(network._packed[0][0])
    assert kept == [32, 32, 32, 32, 48, 48]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_at_an_odd_size(name):
    network = build_backbone(name, "random")
    batch = images(1, 3, 33, 47)
    for found, expected in zip(FoldedResNet(network)(batch), network(batch), strict=True):
        assert error(found, expected.double()) < 1e-5


def test_maps_outlive_the_layers_above(resnet18):
    """Residual sums are written over their summand, which must never be a map that was asked for."""
    network, batch = FoldedResNet(resnet18), images(1, 3, 32, 32)
    everything = network(batch)
    for levels in [(1,), (2,), (1, 2), (1, 3)]:
        found = network(batch, levels)
        assert all(torch.equal(one, everything[level - 1]) for one, level in zip(found, levels, strict=True))


def test_images_and_weights_stay_as_they_are(resnet18):
    batch = images(1, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    before, state = batch.clone(), {name: value.clone() for name, value in resnet18.state_dict().items()}
    FoldedResNet(resnet18)(batch)
    assert torch.equal(batch, before)
    assert all(torch.equal(value, state[name]) for name, value in resnet18.state_dict().items())


@pytest.mark.parametrize("change", ["missing", "raises", "wrong"])
def test_fused_operators_that_have_changed_are_not_used(monkeypatch, change):
    def packed(self, shape):
        if change == "missing":
            raise AttributeError("no such operator")
        if change == "raises":
            raise RuntimeError("another signature")
        return replace(self, bias=self.bias + 1)

    monkeypatch.setattr(folded.Convolution, "packed", packed)
    # The undecorated function: what other tests have found out is remembered.
    assert not folded.has_fused_convolutions.__wrapped__(torch.float32)


def test_a_processor_without_bfloat16(tmp_path):
    """oneDNN can be told to believe in an older processor: bfloat16 is then slow, but there."""
    code = (
        "import torch\n"
        "from pydefect.backbones import FoldedResNet, build_backbone\n"
        "network = build_backbone('resnet18', 'random')\n"
        "images = torch.randn(1, 3, 32, 32)\n"
        "for found, truth in zip(FoldedResNet(network, torch.bfloat16)(images), network(images)):\n"
        "    assert (found.float() - truth).norm() < 0.01 * truth.norm()\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    # Not in the source folder, where Python would take the sources.
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120, cwd=tmp_path)
