"""Convolutions with frozen weights: the operator, PyTorch's, and oneDNN's with its weights laid out; and the
gradient of the weights.

Run with ``pytest benchmarks/bench_convolution.py``; ``OMP_NUM_THREADS=1`` in front gives single-thread
figures. The layers are those of a patch description network at 256 pixels (the last one a student's), of the
spatial reunion module, and of ResNet-18 at 256 pixels, each with its bias and ReLU, on channels_last maps.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pydefect import ops
from pydefect.backbones.convolution import Convolution, has_fused_convolutions
from pydefect.ops import reference

# Inputs, outputs, kernel, side of the map.
LAYERS = {
    "pdn layer 2": (128, 256, 4, 130),
    "pdn layer 3": (256, 256, 3, 67),
    "pdn layer 4": (256, 768, 4, 67),
    "spatial reunion": (384, 384, 3, 64),
    "resnet18 layer1": (64, 64, 3, 64),
    "resnet18 layer2": (128, 128, 3, 32),
    "resnet18 layer3": (256, 256, 3, 16),
}
CONTENDERS = ["pydefect", "PyTorch", "oneDNN", "oneDNN bf16"]

Run = Callable[[], Tensor]


def run_of(contender: str, maps: Tensor, weight: Tensor, bias: Tensor) -> Run:
    if contender == "pydefect":
        tiles = ops.convolution_tiles(weight)
        if tiles is None:
            pytest.skip("no kernels for it here")
        return lambda: ops.convolution(maps, weight, bias, padding=1, relu=True, tiles=tiles)
    dtype = torch.bfloat16 if contender.endswith("bf16") else torch.float32
    maps, weight, bias = maps.to(dtype), weight.to(dtype), bias.to(dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    if contender == "PyTorch":
        return lambda: torch.nn.functional.conv2d(maps, weight, bias, padding=1).relu_()
    if maps.device.type != "cpu" or not has_fused_convolutions(dtype):
        pytest.skip("no fused convolutions here")
    fused = Convolution(weight, bias, (1, 1), (1, 1), fused=True)
    packed = fused.packed((1, maps.shape[1], maps.shape[2], maps.shape[3]))
    return lambda: packed.relu(maps)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("layer", LAYERS)
def bench_convolution(layer: str, contender: str, device: str, measure: Callable[..., None]) -> None:
    inputs, outputs, kernel, side = LAYERS[layer]
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(1, inputs, side, side, generator=generator).relu().to(device)
    maps = maps.contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(outputs, inputs, kernel, kernel, generator=generator) / kernel / inputs**0.5).to(
        device
    )
    bias = torch.randn(outputs, generator=generator).to(device)
    with torch.inference_mode():
        expected = reference.convolution(maps, weight, bias, padding=1, relu=True)
        run = run_of(contender, maps, weight, bias)
        # A bfloat16 has 8 bits; of float32 see tests/ops/test_convolution.py.
        limit = 0.02 if contender.endswith("bf16") else 1e-5
        assert float((run() - expected).abs().max()) < limit * float(expected.max())
        measure(
            f"convolution {layer} {inputs}x{outputs} {kernel}x{kernel} {side}x{side}",
            run,
            flops=2 * weight.numel() * expected[0, 0].numel(),
            traffic=4 * (maps.numel() + weight.numel() + expected.numel()),
            contender=contender,
        )


def gradient_run_of(contender: str, gradient: Tensor, maps: Tensor, weight: Tensor) -> Run:
    kernel = weight.shape[2]
    if contender == "pydefect":
        if ops.convolution_tiles(weight) is None:
            pytest.skip("no kernels for it here")
        return lambda: ops.convolution_weight_gradient(gradient, maps, kernel=kernel, padding=1)
    dtype = torch.bfloat16 if contender.endswith("bf16") else torch.float32
    gradient, maps = gradient.to(dtype), maps.to(dtype)
    shape = tuple(weight.shape)
    return lambda: torch.nn.grad.conv2d_weight(maps, shape, gradient, padding=1)


@pytest.mark.parametrize("contender", ["pydefect", "PyTorch", "PyTorch bf16"])
@pytest.mark.parametrize("layer", LAYERS)
def bench_convolution_weight_gradient(
    layer: str, contender: str, device: str, measure: Callable[..., None]
) -> None:
    inputs, outputs, kernel, side = LAYERS[layer]
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(1, inputs, side, side, generator=generator).relu().to(device)
    maps = maps.contiguous(memory_format=torch.channels_last)
    grown = side + 3 - kernel
    gradient = torch.randn(1, outputs, grown, grown, generator=generator).to(device)
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    weight = torch.empty(outputs, inputs, kernel, kernel, device=device)
    with torch.inference_mode():
        expected = reference.convolution_weight_gradient(gradient, maps, kernel=kernel, padding=1)
        run = gradient_run_of(contender, gradient, maps, weight)
        limit = 0.02 if contender.endswith("bf16") else 2e-5
        assert float((run() - expected).abs().max()) < limit * float(expected.max())
        measure(
            f"convolution_weight_gradient {layer} {inputs}x{outputs} {kernel}x{kernel} {side}x{side}",
            run,
            flops=2 * weight.numel() * grown * grown,
            traffic=4 * (maps.numel() + weight.numel() + gradient.numel()),
            contender=contender,
        )
