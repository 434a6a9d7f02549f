"""k-means of one image's patch features beside scikit-learn's.

Run with ``pytest benchmarks/bench_kmeans.py``; ``OMP_NUM_THREADS=1`` in front gives single-thread figures.
The features are those of a drawn product through a ResNet-18 with random weights. scikit-learn begins with
greedy k-means++, which takes most of its time; ``-s`` prints how the sums of squares compare.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor

from pydefect.backbones import build_backbone
from pydefect.data.procedural import render_product
from pydefect.features import PatchFeatureExtractor, patch_vectors
from pydefect.kmeans import kmeans, nearest_centres
from pydefect.preprocessing import Preprocessing


@functools.cache
def image_patches(levels: tuple[int, ...]) -> Tensor:
    extractor = PatchFeatureExtractor(build_backbone("resnet18", "random", seed=0), levels)
    inputs = Preprocessing.create(256, None)(render_product(np.random.default_rng(0), 256)[0])
    return patch_vectors(extractor(inputs[None]))[0].contiguous()


def by_scikit_learn(patches: Tensor, size: int) -> Tensor:
    with threadpool_limits(torch.get_num_threads()):
        found = KMeans(size, n_init=1, random_state=0).fit(patches.cpu().numpy())
    return torch.from_numpy(found.cluster_centers_).to(patches)


@functools.cache
def centres_of(contender: str, levels: tuple[int, ...], size: int) -> Tensor:
    patches = image_patches(levels)
    return kmeans(patches, size)[0] if contender == "pydefect" else by_scikit_learn(patches, size)


@pytest.mark.parametrize("contender", ["pydefect", "scikit-learn"])
@pytest.mark.parametrize("levels", [(2, 3), (1, 2, 3)], ids=["1024 patches", "4096 patches"])
def bench_kmeans(levels: tuple[int, ...], contender: str, device: str, measure: Callable[..., None]) -> None:
    patches = image_patches(levels).to(device)
    size = len(patches) // 4
    squares = {
        who: float(nearest_centres(patches, centres_of(who, levels, size).to(device))[0].sum())
        for who in ("pydefect", "scikit-learn")
    }
    print(f"sum of squares, pydefect / scikit-learn: {squares['pydefect'] / squares['scikit-learn']:.3f}")
    assert squares["pydefect"] < 1.1 * squares["scikit-learn"]
    call = functools.partial(kmeans if contender == "pydefect" else by_scikit_learn, patches, size)
    measure(f"k-means, {size} of {len(patches)}x{patches.shape[1]}", call, contender=contender)
