"""The spatial-channel dual autoencoder: structural and logical defects; with no additions, EfficientAD."""

from pydefect.dual_ae.config import ADDITIONS, DualAEConfig, EfficientADConfig
from pydefect.dual_ae.detector import DualAEDetector, EfficientADDetector

__all__ = ["ADDITIONS", "DualAEConfig", "DualAEDetector", "EfficientADConfig", "EfficientADDetector"]
