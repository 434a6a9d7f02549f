"""The methods that :func:`pydefect.fit` knows: a name and a line each, imported when they are used."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydefect.errors import InputError

if TYPE_CHECKING:
    from pydefect.detector import Detector

__all__ = ["METHODS", "Method", "detector_type"]


@dataclass(frozen=True)
class Method:
    """Where a method is and what it does.

    Attributes
    ----------
    module, name
        Of its :class:`pydefect.detector.Detector`.
    summary
        For lists of methods.
    """

    module: str
    name: str
    summary: str


METHODS: dict[str, Method] = {
    "conpatch": Method(
        "pydefect.conpatch", "ConPatchDetector", "contrastive patch representations, compressed bank"
    ),
    "dual_ae": Method(
        "pydefect.dual_ae",
        "DualAEDetector",
        "teacher, student and two autoencoders: structural and logical defects",
    ),
    "efficientad": Method(
        "pydefect.dual_ae", "EfficientADDetector", "teacher, student and one autoencoder (EfficientAD)"
    ),
    "patchcore": Method(
        "pydefect.baselines.patchcore", "PatchCoreDetector", "nearest neighbours in a coreset of all patches"
    ),
    "padim": Method("pydefect.baselines.padim", "PaDiMDetector", "a Gaussian at every patch position"),
    "spade": Method(
        "pydefect.baselines.spade", "SpadeDetector", "nearest patches in the most similar normal images"
    ),
    "cfa": Method("pydefect.baselines.cfa", "CfaDetector", "patches adapted to hyperspheres around a bank"),
    "reconpatch": Method(
        "pydefect.baselines.reconpatch", "ReConPatchDetector", "contrastive patch representations, coreset"
    ),
}


def detector_type(method: Any) -> type[Detector]:
    """Import a method's detector.

    Raises
    ------
    InputError
        No such method.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise InputError(f"method: {method!r} is not known; allowed are {', '.join(METHODS)}")
    entry = METHODS[method]
    found: type[Detector] = getattr(importlib.import_module(entry.module), entry.name)
    return found
