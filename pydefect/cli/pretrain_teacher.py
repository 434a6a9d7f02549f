"""``pydefect pretrain-teacher``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pydefect.cli._console import Debug, Device, Quiet, check_new_file, duration, parse_settings

_OPTIONS = (
    "size",
    "steps",
    "batch_size",
    "image_size",
    "learning_rate",
    "procedural",
    "seed",
    "device",
    "source",
    "weights",
    "checkpoint",
)


def pretrain_teacher(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="TEACHER", help="The file to write.")],
    images: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            help="Images of any kind, read recursively; may be repeated. Without: procedural images only.",
        ),
    ] = None,
    source: Annotated[
        str, typer.Option(help="The network to imitate: resnet18, wide_resnet50_2, wide_resnet101_2, ...")
    ] = "wide_resnet101_2",
    weights: Annotated[
        str, typer.Option(help="Its weights: imagenet, random, or a .pth, .safetensors or .npz file.")
    ] = "imagenet",
    size: Annotated[str, typer.Option(help="small or medium.")] = "small",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 60_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows a step.")] = 16,
    image_size: Annotated[
        int, typer.Option(help="Edge of a window in pixels; the source sees it at twice this size.")
    ] = 256,
    learning_rate: Annotated[
        float, typer.Option(min=0, help="Of the optimiser: Adam, or what --set optimiser names.")
    ] = 1e-4,
    procedural: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of procedural images, drawn by the package.  [default: 0 with folders, else 1]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal teachers.")] = 0,
    device: Device = "cpu",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any other setting, such as padding=false, warmup=200 or decay=0.3; may be repeated. The "
            "value is read as JSON, and as plain text where it is none.",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the state here; the same command then resumes after a stop."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace TEACHER if it exists.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Distil a teacher for the dual autoencoder and for EfficientAD.

    The teacher is a small network that has learned from images of any kind to say about patches what layers 2
    and 3 of a large one say. The package comes with one; a better one makes better detectors.

    \b
    pydefect pretrain-teacher --images IMAGENET --out teacher.safetensors --device cuda
    pydefect fit bottle --method dual_ae --set teacher=teacher.safetensors --out bottle.safetensors
    """
    changes: dict[str, Any] = parse_settings(settings or [], _OPTIONS)
    if procedural is not None:
        changes["procedural"] = procedural
    check_new_file(out, "--out", force)
    if checkpoint is not None:
        ctx.obj.resume = f"the same command resumes from what {checkpoint} holds"

    from pydefect.detector import resolve_device
    from pydefect.dual_ae import distillation
    from pydefect.progress import ProgressBars

    bars = ProgressBars(not quiet)
    try:
        about = distillation.pretrain_teacher(
            out,
            images or [],
            source=source,
            weights=weights,
            seed=seed,
            device=resolve_device(device),
            checkpoint=checkpoint,
            progress=bars,
            size=size,
            steps=steps,
            batch_size=batch_size,
            image_size=image_size,
            learning_rate=learning_rate,
            **changes,
        )
    finally:
        bars.close()
    last = about["history"][-1]
    typer.echo(f"distilled in {duration(about['seconds'])}: loss {last[1]:.4f} after {last[0]} steps")
    for kind, explained in about["explained_variance"].items():
        typer.echo(
            f"explained variance on held-out {'procedural images' if kind == 'procedural' else 'images'}: "
            f"{explained['both']:.1%} (layer 2 {explained['layer2']:.1%}, layer 3 {explained['layer3']:.1%})"
        )
    typer.echo(f"teacher: {out} ({out.stat().st_size / 1e6:.1f} MB)")
