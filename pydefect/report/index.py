"""Several runs: a report each, and a page that compares them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from pydefect.errors import InputError
from pydefect.persistence import write_atomically
from pydefect.progress import ProgressBars
from pydefect.report.page import METRICS, check_images, render, write_report
from pydefect.run import Run, is_run, read_run

__all__ = ["write_index"]


@dataclass(frozen=True)
class Entry:
    """A run on the page: where its report is, and its figures in the page's columns."""

    name: str
    address: str
    run: Run
    figures: tuple[float | None, ...]


def write_index(folder: str | os.PathLike[str], *, images: int = 400, progress: bool = True) -> Path:
    """Write a report into every run folder below a folder, and a page that lists them all.

    Parameters
    ----------
    folder
        With run folders at any depth.
    images, progress
        See :func:`pydefect.report.write_report`.

    Returns
    -------
    pathlib.Path
        ``index.html`` in the folder. Its links are relative: the folder can be moved.

    Raises
    ------
    InputError
        `images` is negative, there is no run below the folder, or none of them is whole and has its images.
        Where some are, the others are named in a warning each, and left out of the page.
    """
    check_images(images)
    top = Path(folder)
    if not top.is_dir():
        raise InputError(f"run: {str(top)!r} is {'a file' if top.exists() else 'missing'}, no folder")
    found = list(_runs(top, {os.path.realpath(top)}))
    if not found:
        raise InputError(f"run: {str(top)!r} is no run, and there is none below it")
    entries, failed = [], []
    bars = ProgressBars(progress)
    try:
        for done, path in enumerate(found, start=1):
            name = path.relative_to(top).as_posix()
            try:
                run = read_run(path)
                report = write_report(run, images=images, progress=False)
            except InputError as error:
                failed.append(f"{name}: {error}")
            else:
                entries.append((name, report.relative_to(top).as_posix(), run))
            bars("reports", done, len(found))
    finally:
        bars.close()
    if not entries:
        raise InputError(f"run: no report could be made; the first: {failed[0]}")
    for reason in failed:
        warnings.warn(f"{reason}; left out of the page", stacklevel=2)
    columns = [
        (f"{level}_{key}", f"{level.capitalize()} {name}")
        for level in ("image", "pixel")
        for key, name in METRICS.items()
        if any(run.evaluation.get(f"{level}_{key}") is not None for _, _, run in entries)
    ]
    page = render(
        "index.html.j2",
        title=f"Runs in {top.resolve().name}",
        columns=[name for _, name in columns],
        entries=[
            Entry(name, quote(os.fsencode(report)), run, tuple(run.evaluation.get(key) for key, _ in columns))
            for name, report, run in entries
        ],
    )
    path = top / "index.html"
    write_atomically(path, page.encode("utf-8", "backslashreplace"))
    return path


def _runs(folder: Path, visited: set[str]) -> Iterator[Path]:
    """The run folders below a folder, each once however many links lead to it; what one holds is its own."""
    for below in sorted(folder.iterdir()):
        # A hidden folder may be a run that is being written.
        real = os.path.realpath(below)
        if below.is_dir() and not below.name.startswith(".") and real not in visited:
            visited.add(real)
            yield from [below] if is_run(below) else _runs(below, visited)
