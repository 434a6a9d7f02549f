"""Bank builders over a stream of images, beside the backbone's time for them.

Run with ``pytest benchmarks/bench_bank.py``; ``OMP_NUM_THREADS=1`` in front gives single-thread figures. The
images are of a product that :mod:`pydefect.data.procedural` draws, seen through a ResNet-18 with random
weights and put on principal components, as a fit does: 209 images of 3136 patches, 1.2 GB. The target is half
of the backbone's time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pydefect.backbones import build_backbone
from pydefect.conpatch.bank import BankBuilder, build_bank
from pydefect.conpatch.config import ConPatchConfig
from pydefect.conpatch.trainer import build_network, represent
from pydefect.data.procedural import render_product
from pydefect.features import FeatureCache, PatchFeatureExtractor
from pydefect.preprocessing import Preprocessing

IMAGES, SIZE = 209, 224
GROUP = f"bank of 784 over {IMAGES} images"
BATCH = 8


@functools.cache
def network_inputs() -> Tensor:
    preprocessing = Preprocessing.create(SIZE, None)
    return torch.stack(
        [preprocessing(render_product(np.random.default_rng(seed), SIZE)[0]) for seed in range(IMAGES)]
    )


@functools.cache
def extractor() -> PatchFeatureExtractor:
    return PatchFeatureExtractor(build_backbone("resnet18", "random", seed=0))


@functools.cache
def representations() -> list[Tensor]:
    cache = FeatureCache()
    for batch in network_inputs().split(BATCH):
        cache.append(extractor()(batch))
    indices = range(IMAGES)
    network = build_network(cache, indices, ConPatchConfig(), seed=0)
    return list(represent(network, cache, indices, torch.device("cpu")))


@pytest.mark.parametrize("builder", ["ema", "kmeans", "kcenter"])
def bench_bank(builder: BankBuilder, device: str, measure: Callable[..., None]) -> None:
    images = [image.to(device) for image in representations()]
    centres = build_bank(images[:2], builder).centres
    assert centres.shape == (784, 448)
    # What every builder needs at least: each patch against each centre.
    flops = 2 * 784 * 448 * sum(len(image) for image in images)
    measure(
        GROUP,
        lambda: build_bank(images, builder),
        flops=flops,
        traffic=4 * 448 * 3136 * IMAGES,
        contender=builder,
    )


def bench_backbone(device: str, measure: Callable[..., None]) -> None:
    model, images = extractor().to(device), network_inputs().to(device)
    measure(GROUP, lambda: [model(batch) for batch in images.split(BATCH)], contender="backbone")
