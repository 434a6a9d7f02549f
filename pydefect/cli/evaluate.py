"""``pydefect evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pydefect.cli._console import (
    STANDARD_OUTPUT,
    BatchSize,
    Debug,
    Device,
    OnError,
    OnErrorOption,
    Quiet,
    Weights,
    is_below,
    say,
)
from pydefect.cli._figures import JsonFile, check_json_file, tell


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A file that `pydefect fit` wrote.")],
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A data set's category, with labelled test images.")
    ],
    json_file: JsonFile = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="RUN",
            help="Keep scores, maps and times in this folder, for `pydefect report`; an earlier run there is "
            "replaced.",
        ),
    ] = None,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    weights: Weights = None,
    on_error: OnErrorOption = OnError.STOP,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a model on labelled test images: AUROC, average precision, F1, AUPRO, and sPRO for MVTec LOCO.

    \b
    pydefect evaluate bottle.safetensors mvtec_ad/bottle --json bottle.json
    pydefect evaluate bottle.safetensors mvtec_ad/bottle --out runs/bottle
    """
    check_json_file(json_file)
    if json_file not in (None, STANDARD_OUTPUT) and out is not None and is_below(json_file, out):
        raise typer.BadParameter(
            f"{json_file} lies in {out}, which is replaced as a whole; evaluation.json in it has the "
            "same figures",
            param_hint="--json",
        )

    import pydefect

    detector = pydefect.load(model, device=device, weights=weights)
    evaluation = pydefect.evaluate(
        detector, data, out=out, batch_size=batch_size, on_error=on_error.value, progress=not quiet
    )
    for skipped in evaluation.skipped:
        say(f"skipped: {skipped.name}: {skipped.reason}")
    tell(evaluation, json_file)
