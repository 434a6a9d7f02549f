"""``pydefect export``."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from pydefect.cli._console import Debug, Weights, check_new_file


class PixelType(str, Enum):
    """Of the file's input."""

    auto = "auto"
    uint8 = "uint8"
    float32 = "float32"


def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A file that `pydefect fit` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The ONNX file to write.")],
    image_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Of the images, such as 256 or [480,640] (height, width). At the model's own size the graph "
            "resizes nothing.  [default: any, which the graph resizes]",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that the graph takes at a time.")] = 1,
    pixels: Annotated[
        PixelType,
        typer.Option(
            help="What images consist of: bytes, or float32 in 0..1, such as 16-bit pixels divided by 65535; "
            "auto: what the model has learned from."
        ),
    ] = PixelType.auto,
    weights: Weights = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace FILE if it exists.")] = False,
    debug: Debug = False,
) -> None:
    """Write a model as an ONNX file, for programs without Python and PyTorch.

    It takes RGB pixels and gives scores and maps; its metadata hold the thresholds. Needs onnxscript and
    onnxruntime, with which the file is checked before it is written.

    \b
    pydefect export bottle.safetensors --out bottle.onnx
    pydefect export bottle.safetensors --out bottle.onnx --image-size 256
    """
    check_new_file(out, "--out", force)
    size = None
    if image_size is not None:
        try:
            size = json.loads(image_size)
        except ValueError:
            raise typer.BadParameter(
                f"{image_size!r} is no size such as 256 or [480,640]", param_hint="--image-size"
            ) from None

    import pydefect

    detector = pydefect.load(model, weights=weights)
    pydefect.export_onnx(detector, out, image_size=size, batch_size=batch_size, pixels=pixels.value)
    calibration = detector.calibration
    if calibration is not None:
        typer.echo(
            f"defective above an image score of {calibration.image_threshold:.4g} and a pixel score of "
            f"{calibration.pixel_threshold:.4g}"
        )
    typer.echo(f"model: {out}")
