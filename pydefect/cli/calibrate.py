"""``pydefect calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pydefect.cli._console import (
    BatchSize,
    Debug,
    Device,
    OnError,
    OnErrorOption,
    Quiet,
    Weights,
    check_new_file,
)

if TYPE_CHECKING:
    from pydefect.calibration import Calibration


# Options of thresholds for a rate.
_OF_A_RATE = ("normal", "defective", "false_alarm_rate", "guaranteed", "confidence", "histogram")


def calibrate(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A file that `pydefect fit` wrote.")],
    normal: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Good images that the fit did not see.  [default: the held-out scores that MODEL keeps]",
        ),
    ] = None,
    defective: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Defective images (of a data set's category those of its test part), to count how many are "
            "found; no threshold depends on them.",
        ),
    ] = None,
    labelled: Annotated[
        Path | None,
        typer.Option(
            metavar="DATASET",
            help="Instead of a rate: where F1 is largest over the labelled test images, with masks, of a "
            "data set's category, as papers do. Nothing is promised then.",
        ),
    ] = None,
    false_alarm_rate: Annotated[
        float, typer.Option(min=0, max=1, help="Share of good images that may be called defective.")
    ] = 0.01,
    guaranteed: Annotated[
        bool,
        typer.Option(
            "--guaranteed/--on-average", help="Keep the rate with --confidence, or on average only."
        ),
    ] = False,
    confidence: Annotated[float, typer.Option(help="Of the intervals and of the guarantee.")] = 0.95,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="Write the model here.  [default: MODEL is rewritten]"
        ),
    ] = None,
    histogram: Annotated[
        Path | None,
        typer.Option(
            metavar="PNG", help="Draw the scores, the threshold and the fitted tail; replaced if it exists."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace --out if it exists.")] = False,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    weights: Weights = None,
    on_error: OnErrorOption = OnError.STOP,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Set the thresholds of a model for a false-alarm rate, by good images that the fit did not see.

    The file is replaced at the very end, whole or not at all; all else in it stays as it is.

    \b
    pydefect calibrate bottle.safetensors --normal good-of-this-week --false-alarm-rate 0.01
    pydefect calibrate bottle.safetensors --false-alarm-rate 0.05 --out bottle-5.safetensors
    pydefect calibrate bottle.safetensors --labelled mvtec_ad/bottle
    """
    if out is not None:
        check_new_file(out, "--out", force)
    else:
        check_new_file(model, "MODEL", force=True)
    if histogram is not None:
        check_new_file(histogram, "--histogram", force=True)
        if histogram.suffix.lower() != ".png":
            raise typer.BadParameter(f"{histogram} does not end in .png", param_hint="--histogram")
    if labelled is not None:
        for name in _OF_A_RATE:
            source = context.get_parameter_source(name)
            if source is not None and source.name != "DEFAULT":
                raise typer.BadParameter(
                    f"given together with --{name.replace('_', '-')}; choose one way to calibrate",
                    param_hint="--labelled",
                )

    import pydefect
    from pydefect.persistence import file_version, replace_metadata, write_atomically

    version = file_version(model)
    detector = pydefect.load(model, device=device, weights=weights)
    calibration = pydefect.calibrate(
        detector,
        labelled,
        normal=normal,
        defective=defective,
        false_alarm_rate=false_alarm_rate,
        confidence=confidence,
        guaranteed=guaranteed,
        batch_size=batch_size,
        on_error=on_error.value,
        progress=not quiet,
    )
    if histogram is not None:
        from pydefect.charts import score_histogram

        write_atomically(histogram, score_histogram(calibration))
    replace_metadata(model, {"calibration": calibration.to_dict()}, version=version, out=out)
    print_calibration(calibration, false_alarm_rate)
    typer.echo(f"model: {model if out is None else out}")


def print_calibration(calibration: Calibration, asked: float) -> None:
    """Say where the thresholds lie, what they promise, and what promising the rate asked for takes."""
    from pydefect.calibration import clopper_pearson, images_needed, promised_confidence

    images, confidence = calibration.images, calibration.confidence
    typer.echo(
        f"defective above an image score of {calibration.image_threshold:.4g} and a pixel score of "
        f"{calibration.pixel_threshold:.4g}"
    )
    if calibration.interval is None:
        typer.echo(
            f"F1 is largest there over {images} labelled images, of whose good ones "
            f"{calibration.false_alarm_rate:.2%} are called defective; of new images this promises nothing"
        )
        return
    over = sum(score > calibration.image_threshold for score in calibration.image_scores)
    low, high = calibration.interval
    typer.echo(
        f"false alarms: {over} of {images} held-out good images; {calibration.false_alarm_rate:.2%} "
        f"expected, {low:.2%} to {high:.2%} with {confidence:.0%} confidence"
    )
    if calibration.defective_scores:
        shown = len(calibration.defective_scores)
        found = sum(score > calibration.image_threshold for score in calibration.defective_scores)
        low, high = clopper_pearson(found, shown, confidence)
        typer.echo(
            f"defects found: {found} of {shown}; {low:.1%} to {high:.1%} with {confidence:.0%} confidence"
        )
    rank = round((images + 1) * (1 - calibration.false_alarm_rate))
    promised = promised_confidence(images, images - rank, asked)
    needed, on_average = images_needed(asked, confidence), images_needed(asked, None)
    if needed is None:
        typer.echo("no number of images can promise that there will be no false alarm")
        return
    typer.echo(
        f"at most {asked:.2%} false alarms: promised with {promised:.1%} confidence by these thresholds; "
        f"with {confidence:.0%} by {needed} good images (--guaranteed), on average by {on_average}"
    )
    tail = calibration.tail
    if tail is None:
        typer.echo(f"probabilities: counted, 1 in {images + 1} at the lowest; too few images for a tail")
    else:
        typer.echo(
            f"probabilities: counted up to a score of {max(calibration.image_scores):.4g}, by a generalised "
            f"Pareto tail over it (shape {tail.shape:.2f}, scale {tail.scale:.3g})"
        )
