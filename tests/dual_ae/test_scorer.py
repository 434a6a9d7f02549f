"""The fast form of the networks against the networks themselves."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pydefect.dual_ae.config import ADDITIONS
from pydefect.dual_ae.frozen import NormalisedTeacher
from pydefect.dual_ae.maps import place
from pydefect.dual_ae.pdn import PDN
from pydefect.dual_ae.scorer import MapScales, Scorer, placed_maps
from pydefect.dual_ae.trainer import build_network


def made(config, precision="float32"):
    network = build_network(config, (64, 72), 0).eval()
    torch.manual_seed(1)
    teacher = NormalisedTeacher(PDN(config.size, padding=config.padding), precision)
    teacher.set_statistics(torch.randn(384) / 50, torch.rand(384) / 20 + 0.05)
    images = torch.randn(3, 3, 64, 72).contiguous(memory_format=torch.channels_last)
    return network, teacher, images


@torch.no_grad()
def plainly(network, teacher, images):
    target = (teacher.network(images) - teacher.mean[:, None, None]) / teacher.std[:, None, None]
    described = network.student(images)
    fused = network.reconstruct(images)[1]
    differences = [target - described[:, :384], *(one - described[:, 384:] for one in fused)]
    return [one.square().mean(1) for one in differences]


@pytest.mark.parametrize("additions", ADDITIONS)
def test_maps_are_those_of_the_plain_networks(additions, config):
    network, teacher, images = made(dataclasses.replace(config, additions=additions))
    found = Scorer(network, teacher)(images)
    expected = plainly(network, teacher, images)
    assert len(found) == 1 + len(ADDITIONS[additions].reunions)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5 * float(two.abs().max()))


@pytest.mark.parametrize(("size", "padding"), [("medium", False), ("small", True)])
def test_other_networks(size, padding, config):
    network, teacher, images = made(dataclasses.replace(config, size=size, padding=padding))
    for one, two in zip(Scorer(network, teacher)(images), plainly(network, teacher, images), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5 * float(two.abs().max()))


def test_bfloat16_stays_near(config):
    """Eight bits an operand: under a percent of the largest difference, where 384 channels are averaged."""
    network, teacher, images = made(config, "bfloat16")
    for one, two in zip(Scorer(network, teacher)(images), plainly(network, teacher, images), strict=True):
        assert (one - two).abs().max() < 0.02 * two.abs().max()


def test_an_image_scores_alone_as_in_a_batch(config):
    network, teacher, images = made(config)
    scorer = Scorer(network, teacher)
    together = scorer(images)
    for index in range(len(images)):
        for one, two in zip(scorer(images[index : index + 1]), together, strict=True):
            torch.testing.assert_close(one[0], two[index], rtol=1e-5, atol=1e-6)


def test_maps_are_scaled_combined_and_placed():
    local, first, second = (torch.rand(2, 5, 6) for _ in range(3))
    maps = placed_maps((local, first, second), MapScales(2.0, (3.0, 5.0)), (50, 54), False)
    whole = (3 * first + 5 * second) / 2
    torch.testing.assert_close(maps["local"], place(2 * local, (50, 54), False))
    torch.testing.assert_close(maps["global"], place(whole, (50, 54), False))
    torch.testing.assert_close(maps["anomaly"], place((2 * local + whole) / 2, (50, 54), False))


def test_scales_go_through_json():
    scales = MapScales(0.5, (0.25, 2.0))
    assert MapScales.from_dict(scales.to_dict()) == scales
