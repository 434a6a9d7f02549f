"""Where results go, looked at before there are any."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TextIO

from pydefect.errors import InputError

__all__ = ["check_file_writable", "check_not_current", "check_writable", "is_written_into"]


def check_writable(folder: str | os.PathLike[str], argument: str) -> None:
    """Refuse, before any work is done, a folder in which nothing could be written at its end.

    Parameters
    ----------
    folder
        It may be missing: then the folder above it has to take it.
    argument
        Whose value this is, for the message.

    Raises
    ------
    InputError
        It is a file or lies below one, or it may not be written to.
    """
    folder = Path(folder).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"{argument}: {str(there)!r} is a file; a folder is needed")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{argument}: no permission to write to {str(there)!r}")


def check_file_writable(path: str | os.PathLike[str], argument: str) -> None:
    """Refuse, before any work is done, a file that could not be written at its end.

    Parameters
    ----------
    path
        It may be missing; a link is followed.
    argument
        Whose value this is, for the message.

    Raises
    ------
    InputError
        See :func:`check_writable`, of the folder that the file lies in.
    """
    if not is_written_into(path):
        check_writable(Path(os.path.realpath(path)).parent, argument)


def check_not_current(folder: str | os.PathLike[str], argument: str) -> None:
    """Refuse to replace the current folder: whoever works in it would be left in one that is gone.

    Parameters
    ----------
    folder
        It may be missing.
    argument
        Whose value this is, for the message.

    Raises
    ------
    InputError
        It is the current folder.
    """
    folder = Path(folder)
    if folder.is_dir() and os.path.samefile(folder, os.curdir):
        raise InputError(
            f"{argument}: {str(folder)!r} is the current folder, which cannot be replaced from inside; name "
            "a folder in it, or go to another one first"
        )


def is_written_into(path: str | os.PathLike[str]) -> bool:
    """Whether a file must not be replaced by another: a device or a pipe, or this program's own output."""
    path = Path(path)
    if not path.exists() or path.is_dir():
        return False
    # /dev/stdout may lead to a regular file, with what was printed so far.
    return not path.is_file() or any(_is_open_as(path, stream) for stream in (sys.stdout, sys.stderr))


def _is_open_as(path: Path, stream: TextIO | None) -> bool:
    try:
        return stream is not None and os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except (OSError, ValueError):  # no file behind it, or closed
        return False
