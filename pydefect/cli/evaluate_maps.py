"""``pydefect evaluate-maps``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pydefect.cli._console import Debug, Quiet
from pydefect.cli._figures import JsonFile, check_json_file, tell


def evaluate_maps(
    maps: Annotated[
        Path,
        typer.Argument(
            metavar="MAPS", help="A folder of maps that any program made: <defect>/<name>.tiff or .npy."
        ),
    ],
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A data set's category, with labelled test images.")
    ],
    image_scores: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A CSV file with the columns path and score and a line for every labelled test image, such "
            "as scores.csv of `pydefect score`.  [default: the maximum of each map]",
        ),
    ] = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure anomaly maps of another program as `evaluate` measures a model.

    \b
    pydefect evaluate-maps other-program/bottle/test mvtec_ad/bottle
    pydefect evaluate-maps scores/maps mvtec_ad/bottle --image-scores scores/scores.csv --json bottle.json
    """
    check_json_file(json_file)

    import pydefect
    from pydefect.data.maps import read_image_scores

    scores = None if image_scores is None else read_image_scores(image_scores)
    tell(pydefect.evaluate_maps(data, maps, image_scores=scores, progress=not quiet), json_file)
