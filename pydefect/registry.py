"""The methods that :func:`pydefect.fit` knows, imported when they are used: pydefect's own, a name and a line
each, and those that installed packages declare as entry points (``docs/own-methods.md``)."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from pydefect.errors import InputError, nearest

if TYPE_CHECKING:
    from pydefect.detector import Detector

__all__ = [
    "GROUP",
    "METHODS",
    "Method",
    "declared_methods",
    "detector_type",
    "method_names",
    "package_name",
    "package_of",
]

GROUP = "pydefect.methods"
"""The entry points by which a package declares methods: a name, and where its detector is."""


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


def declared_methods() -> dict[str, list[EntryPoint]]:
    """Look up what installed packages declare, by name in alphabetical order; nothing is imported.

    Returns
    -------
    dict of str to list of EntryPoint
        More than one where packages declare the same name, which may also be one in :data:`METHODS`:
        :func:`detector_type` refuses both.
    """
    found: dict[str, list[EntryPoint]] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        found.setdefault(point.name, []).append(point)
    return found


def method_names() -> list[str]:
    """List the names that :func:`detector_type` takes: pydefect's own, then those of installed packages."""
    return list(dict.fromkeys([*METHODS, *declared_methods()]))


def package_of(method: str) -> str | None:
    """Name and version of the package that declares a method; None: it is pydefect's own."""
    return None if method in METHODS else package_name(declared_methods()[method][0])


def detector_type(method: Any) -> type[Detector]:
    """Import a method's detector.

    Raises
    ------
    InputError
        No such method; or the package that declares it takes a name that another has, cannot be imported, or
        does not declare a detector. The message names the package.
    """
    declared = declared_methods()
    if not isinstance(method, str) or (method not in METHODS and method not in declared):
        names = method_names()
        meant = nearest(str(method), names)
        raise InputError(f"method: {method!r} is not known; allowed are {', '.join(names)}{meant}")
    packages = [*(["pydefect"] if method in METHODS else []), *map(package_name, declared.get(method, []))]
    if len(packages) > 1:
        raise InputError(
            f"method: {method!r} is declared by {' and by '.join(packages)}; rename it in the entry points "
            f"of {packages[-1]}, or uninstall that"
        )
    if method in METHODS:
        entry = METHODS[method]
        found: type[Detector] = getattr(importlib.import_module(entry.module), entry.name)
        return found
    return _loaded(declared[method][0], method)


def _loaded(point: EntryPoint, method: str) -> type[Detector]:
    what = f"method: {method!r}, which {package_name(point)} declares as {point.value!r}"
    try:
        loaded = point.load()
    except Exception as error:
        raise InputError(f"{what}, cannot be imported: {type(error).__name__}: {error}") from error
    if reason := _unusable(loaded, method):
        raise InputError(f"{what}, {reason}")
    detector: type[Detector] = loaded
    return detector


def package_name(point: EntryPoint) -> str:
    """Name and version of the package that an entry point is from, such as "my-package 0.3"."""
    assert point.dist is not None  # entry_points() knows whose they are
    return f"{point.dist.name} {point.dist.version}"


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
    return None
