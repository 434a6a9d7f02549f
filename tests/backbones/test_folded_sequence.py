"""The folded sequence against the plain one."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from pydefect.backbones import FoldedSequence
from pydefect.backbones import folded_sequence as module


def sequence() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, padding=1),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2, 2, padding=1),
        nn.Conv2d(16, 16, 3, stride=2),
        nn.Dropout(0.5),
        nn.Upsample((9, 11), mode="bilinear"),
        nn.Conv2d(16, 20, 3),
    ).eval()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_it_computes_what_the_sequence_does(fused, dtype, tolerance, monkeypatch):
    """bfloat16: three layers of 8-bit roundings. The first size is packed, others are not."""
    if not fused:
        monkeypatch.setattr(module, "has_fused_convolutions", lambda dtype: False)
    network = sequence()
    folded = FoldedSequence(network, dtype)
    for shape in ((1, 3, 20, 22), (1, 3, 20, 22), (3, 3, 17, 30), (2, 3, 20, 22)):
        images = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
        with torch.no_grad():
            expected = network(images)
        found = folded(images)
        assert found.dtype == dtype
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert (found.float() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (3, 3), (4, 2), (1, 0), (5, 2)])
def test_wide_layers_of_any_kernel_and_padding(kernel, padding):
    """Those that tiles have kernels for, and those that they have none for."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(32, 40, kernel, padding=padding), nn.ReLU()).eval()
    images = torch.randn(2, 32, 11, 9)
    with torch.no_grad():
        expected = network(images)
    found = FoldedSequence(network)(images)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_later_changes_to_the_weights_are_not_seen():
    network = sequence()
    folded = FoldedSequence(network)
    images = torch.randn(1, 3, 20, 22)
    before = folded(images)
    nn.init.zeros_(network[0].weight)
    nn.init.zeros_(network[0].bias)
    assert torch.equal(folded(images), before)


def test_an_interrupted_first_call_leaves_the_next_ones_whole(monkeypatch):
    """Weights are laid out on the way: Ctrl-C in the middle of a first image, or a second thread there."""
    images = torch.randn(1, 3, 20, 22)
    expected = FoldedSequence(sequence())(images)
    folded = FoldedSequence(sequence())

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(nn.Upsample, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            folded(images)
    for _ in range(2):
        assert torch.equal(folded(images), expected)


def test_threads_share_a_sequence():
    images = torch.randn(1, 3, 20, 22)
    expected = FoldedSequence(sequence())(images)
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            folded = FoldedSequence(sequence())
            for found in threads.map(folded, [images] * 8):
                assert torch.equal(found, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_compute_the_same(copied):
    folded, images = FoldedSequence(sequence()), torch.randn(1, 3, 20, 22)
    expected = folded(images)
    assert torch.equal(copied(folded)(images), expected)


def test_other_layers_are_refused():
    with pytest.raises(TypeError, match="BatchNorm2d"):
        FoldedSequence(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
