"""The normalised teacher and its statistics."""

from __future__ import annotations

import pytest
import torch

from pydefect.dual_ae.frozen import DTYPES, ChannelStatistics, NormalisedTeacher, arithmetic
from pydefect.dual_ae.pdn import PDN


@pytest.mark.parametrize("outer", [False, True])
def test_the_arithmetic_sees_weights_that_have_changed(outer):
    """Within another autocast too, be it off: PyTorch keeps what it has cast until the outermost ends."""
    layer, x = torch.nn.Linear(4, 4), torch.ones(1, 4)
    results = []
    with torch.autocast("cpu", torch.bfloat16, enabled=outer):
        for _ in range(2):
            with arithmetic("bfloat16", torch.device("cpu")):
                results.append(layer(x))
            with torch.no_grad():
                layer.weight.add_(1)
    assert all(one.dtype == torch.bfloat16 for one in results)
    # Four weights of one more each; sums near 4 have steps of 1/32.
    assert (results[1] - results[0] - 4).abs().max() < 0.1


def test_statistics_of_a_stream_are_those_of_all_maps():
    maps = torch.randn(7, 5, 4, 3, generator=torch.Generator().manual_seed(0)) * 3 + 100
    statistics = ChannelStatistics()
    for part in maps.split([1, 4, 2]):
        statistics.add(part)
    mean, std = statistics.result()
    by_channel = maps.double().permute(1, 0, 2, 3).flatten(1)
    torch.testing.assert_close(mean, by_channel.mean(1).float())
    torch.testing.assert_close(std, by_channel.std(1, correction=0).float())


def test_a_constant_channel_divides_by_one():
    statistics = ChannelStatistics()
    statistics.add(torch.stack([torch.full((4, 4), 0.1), torch.zeros(4, 4), torch.eye(4)])[None])
    assert statistics.result()[1][:2].tolist() == [1, 1]


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.03)])
def test_the_teacher_is_normalised(precision, tolerance):
    """bfloat16: four layers of 8-bit roundings."""
    torch.manual_seed(0)
    network = PDN()
    images = torch.randn(2, 3, 40, 44)
    expected = network(images).detach()
    statistics = ChannelStatistics()
    statistics.add(expected)
    teacher = NormalisedTeacher(network, precision)
    teacher.set_statistics(*statistics.result())
    found = teacher(images)
    assert not found.requires_grad
    assert found.dtype == DTYPES[precision]
    expected = (expected - teacher.mean[:, None, None]) / teacher.std[:, None, None]
    assert (found - expected).abs().max() < tolerance * expected.abs().max()
