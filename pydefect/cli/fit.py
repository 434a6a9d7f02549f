"""``pydefect fit``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pydefect.cli._console import (
    Debug,
    Device,
    OnError,
    OnErrorOption,
    Quiet,
    check_new_file,
    duration,
    parse_settings,
    say,
)
from pydefect.registry import METHOD_NAMES

if TYPE_CHECKING:
    from pydefect.detector import Detector

_OPTIONS = (
    "method",
    "preset",
    "backbone",
    "weights",
    "epochs",
    "seed",
    "device",
    "checkpoint",
    "on_error",
    "false_alarm_rate",
)


def fit(
    ctx: typer.Context,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="A folder of good images, or a data set's category (MVTec AD, MVTec LOCO AD, VisA, magnetic "
            "tiles), of which the training images are taken.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="MODEL", help="The model file to write.")],
    method: Annotated[
        str, typer.Option(help=f"The detector, one of {', '.join(METHOD_NAMES.names())}.")
    ] = "conpatch",
    preset: Annotated[
        str, typer.Option(help="default, or paper: the published method's settings.")
    ] = "default",
    backbone: Annotated[
        str | None,
        typer.Option(
            help="The frozen network, one that `pydefect info` lists.  [default: the method's, resnet18]"
        ),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Its weights: imagenet, random, or a .pth, .safetensors or .npz file.")
    ] = "imagenet",
    epochs: Annotated[
        int | None, typer.Option(min=0, help="Training passes over the images.  [default: the preset's]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal models.")] = 0,
    device: Device = "cpu",
    false_alarm_rate: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Share of good images that may be called defective.  [default: the preset's]"
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any other setting of the method, such as gamma=2 or region=[top,left,bottom,right]; may be "
            "repeated. The value is read as JSON, and as plain text where it is none.",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the state here; the same command then resumes after a stop."),
    ] = None,
    on_error: OnErrorOption = OnError.STOP,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace MODEL if it exists.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Learn from good images and write a model file.

    MODEL is written at the very end, whole or not at all. An existing file is replaced with --force only.

    \b
    pydefect fit bottle/train/good --out bottle.safetensors
    pydefect fit mvtec_ad/bottle --out bottle.safetensors --set gamma=2 --checkpoint bottle-state
    """
    changes: dict[str, Any] = parse_settings(settings or [], _OPTIONS)
    if epochs is not None:
        changes["epochs"] = epochs
    if false_alarm_rate is not None:
        changes["false_alarm_rate"] = false_alarm_rate
    check_new_file(out, "--out", force)
    if checkpoint is not None:
        ctx.obj.resume = f"the same command resumes from what {checkpoint} holds"

    import pydefect

    start = time.perf_counter()
    detector = pydefect.fit(
        data,
        method=method,
        preset=preset,
        backbone=backbone,
        weights=weights,
        seed=seed,
        device=device,
        on_error=on_error.value,
        checkpoint=checkpoint,
        progress=not quiet,
        **changes,
    )
    seconds = time.perf_counter() - start
    detector.save(out)
    print_fit(detector, seconds)
    typer.echo(f"model: {out} ({out.stat().st_size / 1e6:.1f} MB)")


def print_fit(detector: Detector, seconds: float) -> None:
    """Say what was learned, and at which scores images and pixels count as defective."""
    training = detector.training
    for name in training["skipped"]:
        say(f"skipped: {name}")
    typer.echo(f"learned from {training['images']} images in {duration(seconds)}")
    calibration = detector.calibration
    if calibration is None:
        typer.echo("no thresholds: images are scored, but not decided about; `pydefect calibrate` sets some")
        return
    typer.echo(
        f"defective above an image score of {calibration.image_threshold:.4g} and a pixel score of "
        f"{calibration.pixel_threshold:.4g} (false-alarm rate {calibration.false_alarm_rate:.2%})"
    )
    # Methods of one's own may calibrate without them.
    if scores := training.get("held_out_scores"):
        highest = ", ".join(f"{name} ({score:.4g})" for name, score in scores[:3])
        typer.echo(f"highest scores of held-out images, to look at: {highest}")
