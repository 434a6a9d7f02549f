"""A benchmark's results: JSON lines, one a pair that was fitted and measured, or that failed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydefect.errors import InputError
from pydefect.persistence import write_atomically

__all__ = ["FAILED", "FINISHED", "Results", "read_results"]

FINISHED, FAILED = "finished", "failed"


def read_results(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the rows that ``pydefect benchmark`` wrote.

    Parameters
    ----------
    path
        ``results.jsonl``.

    Returns
    -------
    list of dict
        JSON values.

    Raises
    ------
    InputError
        The file is missing or damaged.
    """
    path = Path(path)
    try:
        # splitlines would also split at letters that end a line in other texts, such as U+2028 in a name.
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"results: {str(path)!r} is missing or damaged: {error}") from error
    if not all(isinstance(row, dict) and {"key", "status", "label"} <= row.keys() for row in rows):
        raise InputError(f"results: {str(path)!r} holds other lines than those of pydefect benchmark")
    return rows


class Results:
    """The rows of a folder, by key: at most one each, the latest.

    Parameters
    ----------
    path
        ``results.jsonl``; read if it is there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows = {str(row["key"]): row for row in (read_results(path) if path.exists() else [])}

    def finished(self, key: str, *, best_epoch: bool) -> dict[str, Any] | None:
        """Return the row of a pair that need not be repeated; None where it must."""
        row = self._rows.get(key)
        if row is None or row["status"] != FINISHED or (best_epoch and "best_epoch" not in row):
            return None
        return row

    def row(self, key: str) -> dict[str, Any]:
        """Return the latest row of a pair."""
        return self._rows[key]

    def add(self, row: Mapping[str, Any]) -> None:
        """Take a row in the place of an earlier one of its key, and write the file, whole."""
        self._rows.pop(str(row["key"]), None)
        self._rows[str(row["key"])] = dict(row)
        lines = [json.dumps(one, allow_nan=False) for one in self._rows.values()]
        write_atomically(self._path, ("\n".join(lines) + "\n").encode())
