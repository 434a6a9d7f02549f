"""``pydefect report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pydefect.cli._console import STANDARD_OUTPUT, Debug, Quiet, check_new_file, is_below


def report(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="A folder that `pydefect evaluate --out` wrote, or a folder of such folders."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="The HTML file; replaced if it exists. -: standard output.  [default: report.html in RUN]",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The data set's folder, if it has been moved since the evaluation."),
    ] = None,
    images: Annotated[
        int, typer.Option(min=0, help="Images in the gallery at most; errors come first.")
    ] = 400,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a run as one HTML page: figures, charts, warnings, and a gallery of every test image.

    The page holds all its pictures and loads nothing. Of a folder with several runs every run gets its
    report, and index.html compares them.

    \b
    pydefect evaluate bottle.safetensors mvtec_ad/bottle --out runs/bottle
    pydefect report runs/bottle --out bottle.html
    pydefect report runs
    """
    is_printed = out == STANDARD_OUTPUT
    if is_printed:
        out = Path("/dev/stdout")
    if out is not None:
        check_new_file(out, "--out", force=True)

    from pydefect.report import write_index, write_report
    from pydefect.run import is_run, read_run

    if out is not None and is_run(run) and is_below(out, run) and out.name != "report.html":
        raise typer.BadParameter(
            f"{out} lies in the run, where the page is called report.html; name a place outside",
            param_hint="--out",
        )
    if is_run(run) or not run.is_dir():
        page = write_report(read_run(run, data=data), out, images=images, progress=not quiet)
    elif out is not None or data is not None:
        raise typer.BadParameter(
            f"{run} is no run folder; --out and --data are for a single one", param_hint="RUN"
        )
    else:
        page = write_index(run, images=images, progress=not quiet)
    if not is_printed:
        typer.echo(f"report: {page}")
