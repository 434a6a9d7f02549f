"""A frozen ResNet in the form that runs fastest: normalisation folded away, activations and sums fused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydefect.backbones.convolution import Convolution, Shape, has_fused_convolutions
from pydefect.backbones.resnet import BasicBlock, Bottleneck, ResNet

__all__ = ["FoldedResNet"]


@dataclass(frozen=True)
class _Block:
    """A residual block; without ``shortcut`` its input is the residual."""

    convolutions: tuple[Convolution, ...]
    shortcut: Convolution | None

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the block's output, which may lie in x's memory."""
        residual = x if self.shortcut is None else self.shortcut(x)
        *inner, last = self.convolutions
        for convolution in inner:
            x = convolution.relu(x)
        return last.add_relu(residual, x)


@dataclass(frozen=True)
class _Network:
    stem: Convolution
    levels: tuple[tuple[_Block, ...], ...]

    def __call__(self, images: Tensor, levels: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        x = F.max_pool2d(self.stem.relu(images), 3, 2, 1).to(dtype)
        maps = []
        for level, blocks in enumerate(self.levels[: max(levels)], start=1):
            for block in blocks:
                # A block without a shortcut overwrites its input, but a level begins with none of these
                # except level 1 of basic blocks, whose input is the pooled stem: no map is ever lost.
                x = block(x)
            if level in levels:
                maps.append(x)
        return maps

    def changed(self, change: Callable[[Convolution, Shape], Convolution], shape: Shape) -> _Network:
        """Change every convolution, given the shape of its input for images of a shape."""
        stem = change(self.stem, shape)
        _, channels, height, width = self.stem.output_shape(shape)
        shape = (1, channels, (height - 1) // 2 + 1, (width - 1) // 2 + 1)
        levels = []
        for blocks in self.levels:
            level = []
            for block in blocks:
                shortcut = None if block.shortcut is None else change(block.shortcut, shape)
                convolutions = []
                for convolution in block.convolutions:
                    convolutions.append(change(convolution, shape))
                    shape = convolution.output_shape(shape)
                level.append(_Block(tuple(convolutions), shortcut))
            levels.append(tuple(level))
        return _Network(stem, tuple(levels))


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d, dtype: torch.dtype) -> Convolution:
    """gamma (W x - mean) / sqrt(variance + eps) + beta as one convolution, multiplied out in float64."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    factor = norm.weight.double() / (variance.double() + norm.eps).sqrt()
    weight = convolution.weight.double() * factor[:, None, None, None]
    bias = norm.bias.double() - mean.double() * factor
    return Convolution(
        weight.to(dtype).contiguous(memory_format=torch.channels_last),
        bias.to(dtype),
        (convolution.stride[0], convolution.stride[1]),
        _pair(convolution.padding),
    )


def _pair(padding: object) -> tuple[int, int]:
    assert isinstance(padding, tuple)
    return int(padding[0]), int(padding[1])


def _folded(network: ResNet, dtype: torch.dtype) -> _Network:
    def block(module: nn.Module) -> _Block:
        assert isinstance(module, BasicBlock | Bottleneck)
        pairs = [(module.conv1, module.bn1), (module.conv2, module.bn2)]
        if isinstance(module, Bottleneck):
            pairs.append((module.conv3, module.bn3))
        shortcut = None
        if module.downsample is not None:
            convolution, norm = module.downsample
            assert isinstance(convolution, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            shortcut = _fold(convolution, norm, dtype)
        return _Block(tuple(_fold(*pair, dtype) for pair in pairs), shortcut)

    return _Network(
        # In float32 whatever the type: bfloat16 has 8 bits, as pixels have, but not evenly spaced. Half the
        # error of a bfloat16 network would come from rounding its input (docs/conpatch.md).
        _fold(network.conv1, network.bn1, torch.float32),
        tuple(
            tuple(block(module) for module in network.get_submodule(f"layer{level}").children())
            for level in (1, 2, 3)
        ),
    )


class FoldedResNet:
    """A frozen ResNet for inference: what :class:`~pydefect.backbones.resnet.ResNet` computes, sooner.

    Normalisations are folded into the convolutions. On the CPU activations and residual sums are fused into
    them too. In float32 those at stride 1 are :func:`pydefect.ops.convolution`; the weights of others are
    laid out for the images' size, where PyTorch has what it takes (:func:`has_fused_convolutions`).

    Parameters
    ----------
    network
        In eval mode. Its weights are copied: later changes to them are not seen.
    dtype
        float32 or bfloat16. Layers 1 to 3 compute with it (products of bfloat16 are added in float32), the
        first convolution in float32.

    Notes
    -----
    On the CPU an image's maps depend neither on the number of threads nor on the other images of a batch,
    as far as the tests have seen; oneDNN does not promise it.
    """

    def __init__(self, network: ResNet, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.device = network.conv1.weight.device
        self._plain = _folded(network, dtype)
        self._fused = self.device.type == "cpu" and all(map(has_fused_convolutions, {torch.float32, dtype}))
        self._plain = self._plain.changed(lambda one, _: one.fastest(self._fused), (1, 3, 64, 64))
        # One assignment: other threads may be in the middle of a call.
        self._packed: tuple[torch.Size, _Network] | None = None
        self._last: torch.Size | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what cannot be copied, weights that are laid out: the next call does it anew."""
        return {**self.__dict__, "_packed": None}

    @torch.inference_mode()
    def __call__(self, images: Tensor, levels: tuple[int, ...] = (1, 2, 3)) -> list[Tensor]:
        """Compute the maps of the chosen levels.

        Parameters
        ----------
        images
            [B, 3, H, W] float32, normalised; fastest with channels last in memory.
        levels
            Ascending, out of 1, 2, 3. Layers above the highest one are not run.

        Returns
        -------
        list of Tensor
            One [B, C_level, ceil(H / stride), ceil(W / stride)] of ``dtype`` a level, strides 4, 8, 16,
            channels last in memory.
        """
        images = images.contiguous(memory_format=torch.channels_last)
        return self._network_for(images.shape)(images, levels, self.dtype)

    def _network_for(self, shape: torch.Size) -> _Network:
        """Return the network with its weights laid out for images of a size: the first one to come, later one
        that comes twice running. Others do with weights that are laid out anew in every call."""
        size, packed, last = shape[2:], self._packed, self._last
        self._last = size
        if packed is not None and packed[0] == size:
            return packed[1]
        if not self._fused or (packed is not None and size != last):
            return self._plain
        # One image: layouts for one serve batches as well, and the other way round.
        laid_out = self._plain.changed(lambda one, of: one.packed(of), (1, 3, size[0], size[1]))
        self._packed = size, laid_out
        return laid_out
