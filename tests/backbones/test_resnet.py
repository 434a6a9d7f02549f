"""The frozen ResNets: torchvision's names and shapes, and the forward pass against one written with plain
functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pydefect.backbones import ARCHITECTURES, build_backbone
from pydefect.errors import InputError

# torchvision 0.2x's state dicts without layer4 and fc: entries, parameters, and shapes that tell the
# variants apart. Parameters are the published totals less layer4 and fc, such as 11,689,512 - 8,393,728 -
# 513,000 for ResNet-18.
TORCHVISION = {
    "resnet18": (
        90,
        2_782_784,
        {
            "conv1.weight": (64, 3, 7, 7),
            "bn1.running_var": (64,),
            "layer1.1.conv2.weight": (64, 64, 3, 3),
            "layer2.0.downsample.0.weight": (128, 64, 1, 1),
            "layer2.0.downsample.1.num_batches_tracked": (),
            "layer3.0.conv1.weight": (256, 128, 3, 3),
            "layer3.1.bn2.bias": (256,),
        },
    ),
    "wide_resnet50_2": (
        258,
        24_862_528,
        {
            "conv1.weight": (64, 3, 7, 7),
            "layer1.0.conv1.weight": (128, 64, 1, 1),
            "layer1.0.downsample.0.weight": (256, 64, 1, 1),
            "layer1.2.conv3.weight": (256, 128, 1, 1),
            "layer2.0.conv2.weight": (256, 256, 3, 3),
            "layer2.3.bn3.weight": (512,),
            "layer3.5.conv2.weight": (512, 512, 3, 3),
            "layer3.0.downsample.1.running_mean": (1024,),
        },
    ),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_names(name):
    entries, parameters, shapes = TORCHVISION[name]
    network = build_backbone(name, "random")
    state = network.state_dict()
    assert len(state) == entries
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    for key, shape in shapes.items():
        assert tuple(state[key].shape) == shape
    assert not any(key.startswith(("layer4", "fc")) for key in state)
    assert ("layer1.0.downsample.0.weight" in state) == (name != "resnet18")


def test_the_shared_file_fits_name_for_name(resnet18_weights):
    with np.load(resnet18_weights) as archive:
        names = {name for name in archive.files if not name.endswith("num_batches_tracked")}
    state = build_backbone("resnet18", "random").state_dict()
    assert names == {name for name in state if not name.endswith("num_batches_tracked")}


def functional(
    images: Tensor, state: dict[str, Tensor], blocks: tuple[int, int, int], convolutions: int
) -> list[Tensor]:
    """He et al.'s figure 3 and torchvision's strides, from a state dict alone; the shortcut where there is
    one."""

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance, weight, bias = (
            state[f"{name}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias

    x = F.max_pool2d(F.relu(norm(conv(images, "conv1", 2), "bn1")), 3, 2, 1)
    maps = []
    for level, depth in enumerate(blocks, start=1):
        for index in range(depth):
            name = f"layer{level}.{index}"
            stride = 2 if level > 1 and index == 0 else 1
            # A basic block strides in its first convolution, a bottleneck in its 3x3, the second.
            striding = 1 if convolutions == 2 else 2
            out = x
            for number in range(1, convolutions + 1):
                out = norm(
                    conv(out, f"{name}.conv{number}", stride if number == striding else 1),
                    f"{name}.bn{number}",
                )
                if number < convolutions:
                    out = F.relu(out)
            shortcut = x
            if f"{name}.downsample.0.weight" in state:
                shortcut = norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
            x = F.relu(out + shortcut)
        maps.append(x)
    return maps


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        # float32 against float64: some 20 layers of sums over up to 2304 products, each rounding about
        # sqrt(2304) * 2**-24 = 3e-6 of a layer's scale.
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_the_callers_random_numbers_are_not_used_up():
    before = torch.get_rng_state()
    build_backbone("resnet18", "random", seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [(64, 64), (50, 71)])
def test_the_forward_pass_of_the_real_resnet18(resnet18_weights, size):
    network = build_backbone("resnet18", str(resnet18_weights))
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    state = {name: value.double() for name, value in network.state_dict().items()}
    assert_close(network(images), functional(images.double(), state, (2, 2, 2), 2))


def test_the_forward_pass_of_a_bottleneck():
    """With statistics and factors of its own at every normalisation, so that none can be left out unseen."""
    network = build_backbone("wide_resnet50_2", "random")
    generator = torch.Generator().manual_seed(1)
    for name, value in network.state_dict().items():
        if name.endswith("running_var") or (value.dim() == 1 and name.endswith("weight")):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.dim() == 1:
            value.uniform_(-0.2, 0.2, generator=generator)
    images = torch.randn(1, 3, 32, 48, generator=generator)
    state = {name: value.double() for name, value in network.state_dict().items()}
    assert_close(network(images), functional(images.double(), state, (3, 4, 6), 3))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_maps_have_the_promised_sizes(name):
    network = build_backbone(name, "random")
    channels = ARCHITECTURES[name].channels
    maps = network(torch.zeros(1, 3, 40, 56))
    assert [tuple(level.shape) for level in maps] == [
        (1, channels[1], 10, 14),
        (1, channels[2], 5, 7),
        (1, channels[3], 3, 4),
    ]


def test_chosen_levels_are_those_of_all_and_higher_layers_are_not_run():
    network = build_backbone("resnet18", "random")
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    everything = network(images)
    network.layer3 = torch.nn.Identity()
    assert torch.equal(network(images, (2,))[0], everything[1])
    assert [torch.equal(*pair) for pair in zip(network(images, (1, 2)), everything[:2], strict=True)] == [
        True
    ] * 2


def test_frozen_and_in_eval_mode():
    network = build_backbone("resnet18", "random")
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_random_weights_come_from_the_seed():
    one, same, other = (build_backbone("resnet18", "random", seed=seed).conv1.weight for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("name", ["vgg16", "ResNet18", ""])
def test_an_unknown_backbone(name):
    with pytest.raises(
        InputError, match=r"backbone: '.*' is not known; allowed are resnet18, .*wide_resnet50_2"
    ):
        build_backbone(name, "random")
