"""Frozen feature extractors and where their weights come from."""

from pydefect.backbones.backbone import Backbone
from pydefect.backbones.build import BACKBONE_NAMES, build_backbone
from pydefect.backbones.folded import FoldedResNet
from pydefect.backbones.folded_sequence import FoldedSequence
from pydefect.backbones.resnet import ARCHITECTURES, ResNet
from pydefect.backbones.weights import IMAGENET_WEIGHTS, cached_weights, load_state_dict, weights_fingerprint

__all__ = [
    "ARCHITECTURES",
    "BACKBONE_NAMES",
    "IMAGENET_WEIGHTS",
    "Backbone",
    "FoldedResNet",
    "FoldedSequence",
    "ResNet",
    "build_backbone",
    "cached_weights",
    "load_state_dict",
    "weights_fingerprint",
]
