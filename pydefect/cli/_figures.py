"""What ``pydefect evaluate`` and ``pydefect evaluate-maps`` tell of an evaluation."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pydefect.cli._console import STANDARD_OUTPUT, check_new_file

if TYPE_CHECKING:
    from pydefect.evaluation import Evaluation

__all__ = ["JsonFile", "check_json_file", "print_evaluation", "tell"]

JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Write the figures here too; replaced if it exists. -: print them, and all else to standard "
        "error.",
    ),
]


def check_json_file(file: Path | None) -> None:
    """Refuse a file that cannot be written, before there are figures for it."""
    if file is not None and file != STANDARD_OUTPUT:
        check_new_file(file, "--json", force=True)


def tell(evaluation: Evaluation, json_file: Path | None) -> None:
    """Print the figures, and write them where that is asked for."""
    import pydefect
    from pydefect.persistence import write_atomically

    is_printed = json_file == STANDARD_OUTPUT
    # First: who reads what is printed may be gone.
    figures = json.dumps({"pydefect": pydefect.__version__, **evaluation.to_dict()}, indent=2)
    if json_file is not None and not is_printed:
        write_atomically(json_file, f"{figures}\n".encode())
    with redirect_stdout(sys.stderr) if is_printed else nullcontext():
        print_evaluation(evaluation)
    if is_printed:
        typer.echo(figures)


def print_evaluation(evaluation: Evaluation) -> None:
    """Print the figures as a table, in percent."""
    good = evaluation.images - evaluation.defective
    typer.echo(
        f"{evaluation.dataset}: {evaluation.images} test images, "
        f"{good} good and {evaluation.defective} defective"
    )
    typer.echo(f"{'':<8}{'AUROC':>8}{'AP':>8}{'F1-max':>8}{'AUPRO':>8}")
    for level, metrics in (("images", evaluation.image), ("pixels", evaluation.pixel)):
        if metrics is None:
            typer.echo(f"{level:<8}{'no masks':>8}")
            continue
        figures = [metrics.auroc, metrics.average_precision, metrics.f1_max]
        if level == "pixels" and evaluation.pixel_aupro is not None:
            figures.append(evaluation.pixel_aupro)
        typer.echo(f"{level:<8}" + "".join(f"{100 * figure:8.2f}" for figure in figures))
    width = max([22, *map(len, evaluation.image_auroc_by_defect)])
    for defect, auroc in evaluation.image_auroc_by_defect.items():
        line = f"  {defect:<{width}}  image AUROC {100 * auroc:6.2f}"
        if defect in evaluation.pixel_aupro_by_defect:
            line += f"  pixel AUPRO {100 * evaluation.pixel_aupro_by_defect[defect]:6.2f}"
        if defect in evaluation.pixel_spro_by_defect:
            line += f"  pixel sPRO(0.05) {100 * evaluation.pixel_spro_by_defect[defect][0.05]:6.2f}"
        typer.echo(line)
    if evaluation.pixel_spro is not None:
        areas = ", ".join(f"{limit:g}: {100 * area:.2f}" for limit, area in evaluation.pixel_spro.items())
        typer.echo(f"sPRO up to false-positive rates of {areas}")
    if evaluation.without_mask:
        typer.echo(
            f"{evaluation.without_mask} defective images have no mask and are left out of the pixel figures"
        )
    if evaluation.false_alarms is not None:
        typer.echo(
            f"at the model's threshold: {evaluation.false_alarms} of {good} good images called defective, "
            f"{evaluation.misses} of {evaluation.defective} defective ones missed"
        )
    if evaluation.seconds_per_image is not None:
        typer.echo(
            f"{1000 * evaluation.seconds_per_image:.0f} ms an image, peak memory "
            f"{evaluation.peak_rss_mb:.0f} MB"
        )
