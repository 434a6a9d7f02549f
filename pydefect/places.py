"""Where results go, looked at before there are any."""

from __future__ import annotations

import os
from pathlib import Path

from pydefect.errors import InputError

__all__ = ["check_writable"]


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
