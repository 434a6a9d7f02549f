"""The folded sequence against the plain one."""

from __future__ import annotations

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


def test_later_changes_to_the_weights_are_not_seen():
    network = sequence()
    folded = FoldedSequence(network)
    images = torch.randn(1, 3, 20, 22)
    before = folded(images)
    nn.init.zeros_(network[0].weight)
    nn.init.zeros_(network[0].bias)
    assert torch.equal(folded(images), before)


def test_other_layers_are_refused():
    with pytest.raises(TypeError, match="BatchNorm2d"):
        FoldedSequence(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
