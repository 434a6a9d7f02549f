"""ResNet up to layer3, with torchvision's state_dict names and without depending on torchvision.

Anomaly detectors read the intermediate maps only, so layer4 and the classifier are not built; files that hold
them load all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pydefect.backbones.backbone import Backbone

__all__ = ["ARCHITECTURES", "Architecture", "ResNet"]


@dataclass(frozen=True)
class Architecture:
    """What tells one ResNet from another (He et al., CVPR 2016; Zagoruyko and Komodakis, BMVC 2016)."""

    block: Literal["basic", "bottleneck"]
    blocks: tuple[int, int, int]
    """Residual blocks in layer1, layer2 and layer3."""
    base_width: int = 64
    """Channels of a bottleneck's 3x3 convolution in layer1: 64, or 128 for the wide variants."""

    @property
    def channels(self) -> dict[int, int]:
        """Channels of the output of each level."""
        expansion = 1 if self.block == "basic" else 4
        return {1: 64 * expansion, 2: 128 * expansion, 3: 256 * expansion}


ARCHITECTURES: dict[str, Architecture] = {
    "resnet18": Architecture("basic", (2, 2, 2)),
    "resnet34": Architecture("basic", (3, 4, 6)),
    "resnet50": Architecture("bottleneck", (3, 4, 6)),
    "wide_resnet50_2": Architecture("bottleneck", (3, 4, 6), base_width=128),
    "wide_resnet101_2": Architecture("bottleneck", (3, 4, 23), base_width=128),
}


def _downsample(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int, base_width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, channels, H / stride, W / stride]."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        activated: Tensor = self.relu(out)
        return activated


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride, as torchvision does) and 1x1 convolutions, and a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int, base_width: int) -> None:
        super().__init__()
        width = channels * base_width // 64
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(in_channels, channels * 4, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, 4 * channels, H / stride, W / stride]."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        activated: Tensor = self.relu(out)
        return activated


class ResNet(Backbone):
    """A ResNet cut after layer3.

    Parameters
    ----------
    architecture
        One of the values of :data:`ARCHITECTURES`.

    Notes
    -----
    Parameters carry torchvision's names (``conv1.weight``, ``layer1.0.bn1.bias``, ...).
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.channels = architecture.channels
        self.strides = {1: 4, 2: 8, 3: 16}
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        block = BasicBlock if architecture.block == "basic" else Bottleneck
        in_channels = 64
        for level, (depth, channels) in enumerate(
            zip(architecture.blocks, (64, 128, 256), strict=True), start=1
        ):
            blocks = []
            for index in range(depth):
                stride = 2 if level > 1 and index == 0 else 1
                blocks.append(block(in_channels, channels, stride, architecture.base_width))
                in_channels = architecture.channels[level]
            self.add_module(f"layer{level}", nn.Sequential(*blocks))

    def forward(self, images: Tensor, levels: tuple[int, ...] = (1, 2, 3)) -> list[Tensor]:
        """Compute the maps of the chosen levels.

        Parameters
        ----------
        images
            [B, 3, H, W] float, normalised with the ImageNet mean and standard deviation.
        levels
            Ascending, out of 1, 2, 3. Layers above the highest one are not run.

        Returns
        -------
        list of Tensor
            One [B, C_level, ceil(H / stride), ceil(W / stride)] a level, strides 4, 8, 16.
        """
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = []
        for level in range(1, max(levels) + 1):
            x = self.get_submodule(f"layer{level}")(x)
            if level in levels:
                maps.append(x)
        return maps

    def initialise(self, seed: int) -> None:
        """Take He et al.'s random weights from a seed."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(
                    module.weight, mode="fan_out", nonlinearity="relu", generator=generator
                )
