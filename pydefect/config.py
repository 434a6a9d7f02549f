"""Settings of a method or a command: presets, checks before any work, JSON."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Union

import numpy as np

from pydefect.errors import InputError, nearest
from pydefect.preprocessing import Preprocessing
from pydefect.shapes import Shape, check_shape, check_shapes

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["MethodConfig", "Settings"]


@dataclass(frozen=True)
class Settings:
    """How settings are checked, changed and written down; a subclass adds its fields.

    A field that is a ``Literal``, a ``bool``, an ``int`` or a ``float`` (or None) is checked by its type, and
    numbers by :attr:`RANGES` where it has one. What goes beyond that, a subclass checks in its own
    ``__post_init__``.
    """

    TITLE: ClassVar[str]
    """Whose settings they are, in messages: "ConPatch"."""
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}}
    """What each preset changes of the defaults."""
    RANGES: ClassVar[Mapping[str, tuple[float, float]]] = {}
    """Smallest and largest value of a number; without one it may be any finite number."""

    def __post_init__(self) -> None:
        """Check every setting before any work is done."""
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.generic):
                object.__setattr__(self, field.name, value.item())
            self._check(field.name, hints[field.name])

    def _check(self, name: str, hint: Any) -> None:
        value = getattr(self, name)
        union = typing.get_origin(hint) in (Union, UnionType)
        kinds = set(typing.get_args(hint) if union else (hint,))
        if value is None and type(None) in kinds:
            return
        kinds.discard(type(None))
        if all(typing.get_origin(kind) is Literal for kind in kinds):
            choices = tuple(choice for kind in kinds for choice in typing.get_args(kind))
            # 1 is equal to True and to 1.0, which no operator takes for it.
            if value not in choices or isinstance(value, float | bool):
                raise InputError(f"{name}: {value!r} given; allowed are {', '.join(map(repr, choices))}")
        elif kinds == {bool}:
            if not isinstance(value, bool):
                raise InputError(f"{name}: {value!r} given; allowed are True, False")
        elif kinds <= {int, float}:
            low, high = self.RANGES.get(name, (-math.inf, math.inf))
            number = isinstance(value, int | float) and not (float in kinds and isinstance(value, bool))
            # Infinity is no JSON number: a detector with it could not be saved.
            if not (number and low <= value <= high and math.isfinite(value)):
                allowed = f"{low:g} and more" if high == math.inf else f"{low:g} to {high:g}"
                allowed = "finite numbers" if low == -math.inf else allowed
                raise InputError(f"{name}: {value!r} given; allowed are {allowed}")
            if float in kinds:
                # One form of equal settings: 2 and 2.0 would be told apart in files.
                object.__setattr__(self, name, float(value))
            elif not isinstance(value, int) or isinstance(value, bool):
                raise InputError(f"{name}: {value!r} given; allowed are whole numbers")

    @classmethod
    def from_preset(cls, preset: str, **settings: Any) -> Self:
        """Take a preset and change some of its settings.

        Parameters
        ----------
        preset
            A key of :attr:`PRESETS`.
        settings
            Fields of this class.

        Raises
        ------
        InputError
            Unknown preset or setting, or a value that is not allowed.
        """
        if not isinstance(preset, str) or preset not in cls.PRESETS:
            raise InputError(f"preset: {preset!r} is not known; allowed are {', '.join(cls.PRESETS)}")
        known = {field.name for field in dataclasses.fields(cls)}
        for name in settings:
            if name not in known:
                raise InputError(
                    f"{name}: not a setting of {cls.TITLE}; allowed are {', '.join(sorted(known))}"
                    f"{nearest(name, known)}"
                )
        return cls(**{**cls.PRESETS[preset], **settings})

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {name: _listed(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_dict` wrote."""
        return cls(**{name: _tupled(value) for name, value in values.items()})


@dataclass(frozen=True)
class MethodConfig(Settings):
    """The settings that every method has; a method adds its own fields."""

    RANGES: ClassVar[Mapping[str, tuple[float, float]]] = {
        "false_alarm_rate": (0, 1),
    }

    resize: tuple[int, int] | int | None = 256
    """(height, width) in pixels, or one number for a square; None keeps the images' size."""
    crop: tuple[int, int] | int | None = None
    """Centre crop after the resize; what lies outside is not scored. None: the whole image."""
    region: Shape | None = None
    """(top, left, bottom, right) in pixels of the original images, half open: the part of every image that is
    learned and scored, before the resize; or the corners of a polygon, three or more pixels (row, column).
    None: the whole image."""
    ignore: tuple[Shape, ...] | None = None
    """Boxes or polygons likewise, of which nothing is looked at; None: there are none."""
    false_alarm_rate: float = 0.01
    """Share of normal images that may be called defective."""

    def __post_init__(self) -> None:
        """Check every setting before any work is done."""
        super().__post_init__()
        for name in ("resize", "crop"):
            object.__setattr__(self, name, _size(name, getattr(self, name)))
        if self.region is not None:
            object.__setattr__(self, "region", check_shape("region", self.region))
        # None alone says that nothing is set: so do files of versions that did not know the setting.
        shapes = None if self.ignore is None else check_shapes("ignore", self.ignore)
        object.__setattr__(self, "ignore", shapes or None)

    @property
    def preprocessing(self) -> Preprocessing:
        """From pixels to network input and back."""
        return Preprocessing.create(self.resize, self.crop, region=self.region, ignore=self.ignore or ())


def _listed(value: Any) -> Any:
    return [_listed(part) for part in value] if isinstance(value, tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def _size(name: str, value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    pair = (
        (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, list | tuple) else ()
    )
    if len(pair) != 2 or any(
        not isinstance(side, int) or isinstance(side, bool) or side < 16 for side in pair
    ):
        raise InputError(
            f"{name}: {value!r} given; allowed are a side or (height, width) of 16 pixels or more, or None"
        )
    return pair[0], pair[1]
