"""What installed packages declare as entry points: methods (``docs/own-methods.md``) and backbones
(``docs/own-backbones.md``) beside pydefect's own, by name."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydefect.errors import InputError, nearest

__all__ = ["BACKBONES", "METHODS", "DeclaredNames", "declaring_package", "package_name"]

METHODS, BACKBONES = "pydefect.methods", "pydefect.backbones"
"""Groups of entry points."""


@dataclass(frozen=True)
class DeclaredNames:
    """The names of one kind: pydefect's own, and those that installed packages declare.

    Attributes
    ----------
    kind
        The setting that takes such a name, for messages: "method".
    group
        Of the entry points.
    own
        pydefect's own names, in order.
    """

    kind: str
    group: str
    own: Collection[str]

    def points(self) -> dict[str, list[EntryPoint]]:
        """Look up what installed packages declare, by name in alphabetical order; nothing is imported.

        Returns
        -------
        dict of str to list of EntryPoint
            More than one where packages declare the same name, which may also be one of :attr:`own`:
            :meth:`load` refuses both.
        """
        found: dict[str, list[EntryPoint]] = {}
        for point in sorted(entry_points(group=self.group), key=lambda point: point.name):
            found.setdefault(point.name, []).append(point)
        return found

    def names(self) -> list[str]:
        """List all names: pydefect's own, then those of installed packages."""
        return list(dict.fromkeys([*self.own, *self.points()]))

    def check_known(self, name: Any) -> None:
        """Raise :class:`InputError` unless the name is pydefect's own or declared; nothing is imported."""
        if isinstance(name, str) and name in self.own:
            return
        names = self.names()
        if not isinstance(name, str) or name not in names:
            meant = nearest(str(name), names)
            raise InputError(f"{self.kind}: {name!r} is not known; allowed are {', '.join(names)}{meant}")

    def package_of(self, name: str) -> str | None:
        """Name and version of the package that declares a name; None: no package but pydefect."""
        return None if name in self.own else declaring_package(self.group, name)

    def load(self, name: Any, unusable: Callable[[Any, str], str | None]) -> Any:
        """Import what a package declares.

        Parameters
        ----------
        name
            One of :meth:`names`.
        unusable
            Of what was imported and the name: what keeps it from being used, as the end of a message; None:
            nothing.

        Returns
        -------
        Any
            None where the name is pydefect's own.

        Raises
        ------
        InputError
            The name is not known; or the package that declares it takes a name that another has, cannot be
            imported, or declares something else. The message names the package.
        """
        self.check_known(name)
        points = self.points().get(name, [])
        packages = [*(["pydefect"] if name in self.own else []), *map(package_name, points)]
        if len(packages) > 1:
            raise InputError(
                f"{self.kind}: {name!r} is declared by {' and by '.join(packages)}; rename it in the entry "
                f"points of {packages[-1]}, or uninstall that"
            )
        if not points:
            return None
        what = f"{self.kind}: {name!r}, which {package_name(points[0])} declares as {points[0].value!r}"
        try:
            loaded = points[0].load()
        except (Exception, SystemExit) as error:
            raise InputError(f"{what}, cannot be imported: {type(error).__name__}: {error}") from error
        if reason := unusable(loaded, name):
            raise InputError(f"{what}, {reason}")
        return loaded


def declaring_package(group: str, name: str) -> str | None:
    """Name and version of the (first) package that declares a name in a group; None: none does."""
    points = list(entry_points(group=group, name=name))
    return package_name(points[0]) if points else None


def package_name(point: EntryPoint) -> str:
    """Name and version of the package that an entry point is from, such as "my-package 0.3"."""
    assert point.dist is not None  # entry_points() knows whose they are
    return f"{point.dist.name} {point.dist.version}"
