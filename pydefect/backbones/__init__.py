"""Frozen feature extractors and where their weights come from."""

from pydefect.backbones.folded import FoldedResNet
from pydefect.backbones.folded_sequence import FoldedSequence
from pydefect.backbones.resnet import ARCHITECTURES, ResNet, build_backbone
from pydefect.backbones.weights import IMAGENET_WEIGHTS, cached_weights, load_state_dict, weights_fingerprint

__all__ = [
    "ARCHITECTURES",
    "IMAGENET_WEIGHTS",
    "FoldedResNet",
    "FoldedSequence",
    "ResNet",
    "build_backbone",
    "cached_weights",
    "load_state_dict",
    "weights_fingerprint",
]
