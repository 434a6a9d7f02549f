"""The exceptions that a user of pydefect meets, and what their messages say alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["InputError", "ModelFileError", "PydefectError", "WeightsNotFoundError", "as_array", "nearest"]


class PydefectError(Exception):
    """Base of every error that pydefect raises on purpose.

    The command line prints it as one line and exits with 1, or with 2 for an :class:`InputError`.
    """


class InputError(PydefectError, ValueError):
    """A wrong argument or unusable file: the message names it, what was given and what is allowed."""


class ModelFileError(InputError):
    """A file that is no model of pydefect, is damaged, or needs a newer version of pydefect."""


class WeightsNotFoundError(InputError, FileNotFoundError):
    """Weights that are neither cached nor downloadable: the message says which file belongs where."""


def as_array(name: str, values: Any) -> NDArray[Any]:
    """Make an array of an argument, or an :class:`InputError` that names it of what NumPy says."""
    import numpy as np  # not loaded for an error's sake

    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name}: {type(values).__name__} given that is no array: {error}") from error


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the one that may have been meant, if any is near."""
    import difflib  # nobody has to wait for it who makes no mistake

    found = difflib.get_close_matches(name.lower(), names, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
