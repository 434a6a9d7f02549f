"""The methods that :func:`pydefect.fit` knows, imported when they are used: pydefect's own, a name and a line
each, and those that installed packages declare as entry points (``docs/own-methods.md``)."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydefect import declared
from pydefect.declared import DeclaredNames

if TYPE_CHECKING:
    from pydefect.detector import Detector

__all__ = ["METHODS", "METHOD_NAMES", "Method", "detector_type"]


@dataclass(frozen=True)
class Method:
    """Where a method of pydefect's own is and what it does.

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


METHOD_NAMES = DeclaredNames("method", declared.METHODS, METHODS)
"""All methods' names: those of :data:`METHODS`, and those of installed packages."""


def detector_type(method: Any) -> type[Detector]:
    """Import a method's detector.

    Raises
    ------
    InputError
        No such method; or the package that declares it takes a name that another has, cannot be imported, or
        does not declare a detector. The message names the package.
    """
    found: type[Detector] | None = METHOD_NAMES.load(method, _unusable)
    if found is None:
        entry = METHODS[method]
        found = getattr(importlib.import_module(entry.module), entry.name)
    assert found is not None
    return found


def _unusable(found: Any, method: str) -> str | None:
    """What keeps an object from being the detector of that name; None: nothing."""
    from pydefect.config import MethodConfig
    from pydefect.detector import Detector

    if not isinstance(found, type) or not issubclass(found, Detector):
        return "is no subclass of pydefect.Detector"
    if found.__abstractmethods__:
        return f"lacks {', '.join(sorted(found.__abstractmethods__))}"
    # Model files name it.
    if getattr(found, "method", None) != method:
        return f"has method = {getattr(found, 'method', None)!r}; it must be the declared name"
    config_type = getattr(found, "config_type", None)
    if not isinstance(config_type, type) or not issubclass(config_type, MethodConfig):
        return "has no config_type that is a subclass of pydefect.config.MethodConfig"
    if not hasattr(config_type, "TITLE"):
        return f"has a config_type without TITLE, the method's name in messages ({config_type.__name__})"
    # What pydefect.fit takes beside settings.
    taken = {"method", "preset", *inspect.signature(Detector.fit).parameters}
    if names := sorted(taken.intersection(field.name for field in dataclasses.fields(config_type))):
        return f"has settings called {', '.join(names)}, as arguments of pydefect.fit are; rename them"
    return None
