"""ConPatch: contrastive representation learning with a compressed memory bank."""

from pydefect.conpatch.config import PRESETS, ConPatchConfig
from pydefect.conpatch.detector import ConPatchDetector

__all__ = ["PRESETS", "ConPatchConfig", "ConPatchDetector"]
