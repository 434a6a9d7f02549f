"""SPADE: pixels of the most similar normal images as the gallery.

Cohen and Hoshen, Sub-image anomaly detection with deep pyramid correspondences, 2020 (arXiv 2005.02357);
equations are numbered as there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pydefect.baselines.detector import BaselineDetector, Context, PatchModel, each_image
from pydefect.errors import InputError
from pydefect.feature_detector import FeatureConfig
from pydefect.features import FeatureCache, patch_vectors
from pydefect.ops import knn, score_maps

__all__ = ["Spade", "SpadeConfig", "SpadeDetector", "global_features"]

# Gallery images searched at a time: with ResNet-18 at 224 pixels 45 MB of float32.
_GALLERY = 8


@dataclass(frozen=True)
class SpadeConfig(FeatureConfig):
    """Settings of SPADE; features are the backbone's own (section 3.2)."""

    TITLE: ClassVar[str] = "SPADE"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "paper": {"backbone": "wide_resnet50_2", "crop": 224},
    }
    RANGES: ClassVar[Mapping[str, tuple[float, float]]] = {
        **FeatureConfig.RANGES,
        "image_neighbors": (1, math.inf),
        "pixel_neighbors": (1, math.inf),
        "smoothing": (0, 10_000),
    }

    levels: tuple[int, ...] = (1, 2, 3)
    """Backbone levels; the mean of the last one describes a whole image."""
    image_neighbors: int = 50
    """K of (2): normal images that a test image is compared with."""
    pixel_neighbors: int = 1
    """kappa of (3)."""
    image_score: Literal["images", "max_map"] = "images"
    """The distance to the K images (2), or the map's maximum."""
    smoothing: float = 4.0
    """Standard deviation of the map's Gaussian in pixels of the network's input."""


class Spade(PatchModel):
    """The features of all normal images.

    Attributes
    ----------
    descriptors
        [n, D] float32: one a normal image.
    gallery
        [n, C_l, H_l, W_l] float16 a level, at native resolution: 0.7 MB an image with ResNet-18 at 224
        pixels.
    """

    def __init__(self, descriptors: Tensor, gallery: list[Tensor], config: SpadeConfig) -> None:
        self.descriptors, self.gallery, self.config = descriptors, gallery, config
        self.found = {}

    @classmethod
    def fit(cls, cache: FeatureCache, indices: Sequence[int], config: SpadeConfig, context: Context) -> Spade:
        """Keep all images."""
        # Features that went through the cache are float16 numbers: nothing is lost here.
        images = [
            [level.half() for level in levels] for levels in each_image(cache, indices, context, "gallery")
        ]
        gallery = [torch.cat(level) for level in zip(*images, strict=True)]
        descriptors = torch.cat([global_features([levels[-1].float()]) for levels in images])
        return cls(descriptors, gallery, config)

    def score(self, levels: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Score images by (2) and pixels by (3), one image at a time."""
        if [level.shape[1] for level in levels] != [level.shape[1] for level in self.gallery]:
            raise InputError("model: the features have other widths than those of the gallery")
        k = min(self.config.image_neighbors, len(self.descriptors))
        squared, nearest = knn(global_features(levels), self.descriptors, k)
        batch, _, height, width = levels[0].shape
        distances = torch.stack(
            [
                self._pixel_distances([level[image : image + 1] for level in levels], nearest[image])
                for image in range(batch)
            ]
        )
        _, maps = score_maps(
            distances.reshape(batch, height, width, 1), size, self.config.smoothing, certainty=False
        )
        if self.config.image_score == "max_map":
            return maps.flatten(1).amax(1), maps
        return squared.mean(1), maps

    def _pixel_distances(self, levels: Sequence[Tensor], nearest: Tensor) -> Tensor:
        """Mean distance of every patch to its kappa nearest in the K images, [T]; some images at a time.

        Equation (3) with roots instead of squares: the map's Gaussian then mixes distances.
        """
        queries = patch_vectors(levels)[0]
        smallest = queries.new_empty(len(queries), 0)
        for images in nearest.split(_GALLERY):
            bank = patch_vectors([level[images].float() for level in self.gallery]).flatten(0, 1)
            kappa = min(self.config.pixel_neighbors, len(bank))
            found = knn(queries, bank, kappa, precision="bf16")[0]
            smallest = torch.cat([smallest, found], dim=1).sort(dim=1).values
            smallest = smallest[:, : self.config.pixel_neighbors]
        return smallest.sqrt().mean(1)

    def state(self) -> dict[str, Tensor]:
        """Return descriptors and gallery."""
        levels = {f"gallery.{index}": level for index, level in enumerate(self.gallery)}
        return {"descriptors": self.descriptors, **levels}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], config: SpadeConfig) -> Spade:
        """Read what :meth:`state` returned."""
        gallery = [state[f"gallery.{index}"] for index in range(len(config.levels))]
        return cls(state["descriptors"], gallery, config)


def global_features(levels: Sequence[Tensor]) -> Tensor:
    """Describe whole images by the mean of the last level, [B, C].

    The paper takes the network's pooled last layer (section 3.1). The frozen backbones here end with level 3,
    which is what the patches use, so its mean stands in.
    """
    return levels[-1].flatten(2).mean(2).contiguous()


class SpadeDetector(BaselineDetector):
    """A fitted SPADE; made by :func:`pydefect.fit` or :func:`pydefect.load`."""

    method: ClassVar[str] = "spade"
    config_type: ClassVar[type[FeatureConfig]] = SpadeConfig
    model_type: ClassVar[type[PatchModel]] = Spade
    average: ClassVar[bool] = False
