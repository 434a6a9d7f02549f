"""The frozen backbone to layer3: PyTorch's module, the same folded, fused, in tiles, and in bfloat16.

Run with ``pytest benchmarks/bench_backbone.py``; ``OMP_NUM_THREADS=1`` in front gives single-thread figures.
Weights are random: they change neither the operations nor their time. Every contender's maps are compared
with the module's before anything is timed. "folded" runs PyTorch's public operators, "fused" oneDNN's fused
ones, "tiles" :func:`pydefect.ops.convolution` and the fused ones for what is not at stride 1, and "extractor"
is what a detector runs: tiles in float32, a thread's worth of images at a time, and the averages over 3x3
neighbourhoods.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pydefect.backbones import FoldedResNet, ResNet, build_backbone, convolution, folded
from pydefect.features import PatchFeatureExtractor

Backbone = Callable[[Tensor], list[Tensor]]

CONTENDERS = ["module", "folded", "fused", "tiles"]
CONTENDERS += ["folded bf16", "fused bf16", "extractor", "extractor bf16"]


def operations_and_bytes(network: ResNet, size: int) -> tuple[int, int]:
    """Multiplications and additions of an image's convolutions, and the bytes that these move at least, in
    float32: the weights once, every input and output once."""
    flops = weights = maps = 0

    def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal flops, weights, maps
        assert isinstance(module, nn.Conv2d)
        flops += 2 * output[0, 0].numel() * module.weight.numel()
        weights += 4 * module.weight.numel()
        maps += 4 * (inputs[0].numel() + output.numel())

    hooks = [
        module.register_forward_hook(count) for module in network.modules() if isinstance(module, nn.Conv2d)
    ]
    network(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return flops, weights + maps


def build(contender: str, network: ResNet, device: str, patch: pytest.MonkeyPatch) -> Backbone:
    dtype = torch.bfloat16 if contender.endswith("bf16") else torch.float32
    if contender == "module":
        return network.to(memory_format=torch.channels_last)
    if contender.startswith("extractor"):
        return PatchFeatureExtractor(network, precision="bfloat16" if dtype == torch.bfloat16 else "float32")
    if contender != "tiles":
        patch.setattr(convolution, "convolution_tiles", lambda weight: None)
    if contender.startswith(("fused", "tiles")):
        if device != "cpu" or not folded.has_fused_convolutions(dtype):
            pytest.skip("no fused convolutions here")
    else:
        patch.setattr(folded, "has_fused_convolutions", lambda dtype: False)
    return FoldedResNet(network, dtype)


def compare(contender: str, found: list[Tensor], expected: list[Tensor]) -> None:
    limit = 0.02 if contender.endswith("bf16") else 1e-5
    for one, truth in zip(found, expected, strict=True):
        if contender.startswith("extractor"):
            truth = torch.nn.functional.avg_pool2d(truth, 3, 1, 1)
        assert float((one.float() - truth).norm() / truth.norm()) < limit


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("size", [224, 256])
@pytest.mark.parametrize("name", ["resnet18", "wide_resnet50_2"])
def bench_backbone(
    name: str,
    size: int,
    batch: int,
    contender: str,
    device: str,
    measure: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = build_backbone(name, "random")
    flops, traffic = operations_and_bytes(network, size)
    network = network.to(device)
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    images = images.contiguous(memory_format=torch.channels_last)
    backbone = build(contender, network, device, monkeypatch)
    with torch.inference_mode():
        compare(contender, backbone(images[:1]), network(images[:1]))
        measure(
            f"backbone {name} {batch}x{size}",
            lambda: backbone(images),
            flops=batch * flops,
            traffic=batch * traffic,
        )
