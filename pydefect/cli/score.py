"""``pydefect score``."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pydefect.cli._console import BatchSize, Debug, Device, OnError, OnErrorOption, Quiet, Weights, say
from pydefect.errors import InputError

if TYPE_CHECKING:
    from pydefect.data.images import Image, ImageCollection, SkippedImage
    from pydefect.detector import Detector
    from pydefect.score_folder import ScoreFolderWriter

_SHOWN = 10


class Pictures(str, Enum):
    """Of which images pictures are written."""

    ALL = "all"
    DEFECTIVE = "defective"
    NONE = "none"


def score(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A file that `pydefect fit` wrote.")],
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGES...", help="A folder (with its subfolders), or image files."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for scores and pictures.")],
    pictures: Annotated[
        Pictures,
        typer.Option(help="Write pictures of all images, of those called defective only, or none at all."),
    ] = Pictures.ALL,
    append: Annotated[
        bool,
        typer.Option(
            "--append",
            help="Add to the scores in DIR, of the same model; pass over the files that they list already.",
        ),
    ] = False,
    maps: Annotated[
        bool, typer.Option("--maps", help="Write the anomaly maps too, as float32 TIFF.")
    ] = False,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    weights: Weights = None,
    on_error: OnErrorOption = OnError.STOP,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Score images; write scores.csv, scores.json and pictures.

    DIR then holds overlays (the heat map over the image), contours (a red curve round every defect), masks
    and sheet.png with the highest scores. Files of the same names are replaced, others stay. scores.json
    lists every defective region: box, area, centroid, peak and score, in pixels of the image.

    With --append one DIR collects the scores of many calls, and repeating a call scores what has come since.
    sheet.png then shows the new images.

    \b
    pydefect score bottle.safetensors bottle/test --out bottle-scores
    pydefect score bottle.safetensors line/today --out shift --append --pictures defective
    """
    for path in images:
        if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            # The next run would find the pictures and score them too.
            raise typer.BadParameter(f"{out} lies inside the folder of images {path}", param_hint="--out")

    import pydefect
    from pydefect.data.images import ImageCollection
    from pydefect.persistence import content_digest, file_version
    from pydefect.score_folder import ScoreFolderWriter, check_inputs

    check_inputs(out, images)
    files = _files(images)
    root = images[0] if len(images) == 1 and images[0].is_dir() else None
    version = file_version(model)
    detector = pydefect.load(model, device=device, weights=weights)
    calibration = detector.calibration
    thresholds = (calibration.image_threshold, calibration.pixel_threshold) if calibration else (None, None)
    with ScoreFolderWriter(
        out,
        pictures=pictures.value,
        maps=maps,
        thresholds=thresholds,
        # Settings alone do not tell models of other images, or of other times, apart.
        configuration={"model_sha256": content_digest(model, version=version), **detector.configuration},
        append=append,
    ) as folder:
        earlier = len(folder.rows)
        new = [file for file in files if not folder.is_listed(str(file), file)]
        source = ImageCollection(new, on_error=on_error.value, folder=root, length=len(new))
        skipped = score_in_parts(
            detector, source, folder, batch_size=batch_size, on_error=on_error.value, progress=not quiet
        )
        for one in skipped:
            say(f"skipped: {one.name}: {one.reason}")
        if not folder.rows:
            raise InputError("images: none of them could be read; no scores were written")
    scored = folder.rows[earlier:]
    print_scores(scored, len(skipped), len(files) - len(new))
    text = f"scores: {out / 'scores.csv'}" + (f" ({len(folder.rows)} images)" if append else "")
    if scored and pictures is not Pictures.NONE:
        text += f", {out / 'sheet.png'}" + (" (the new ones)" if earlier else "")
    typer.echo(text)


def score_in_parts(
    detector: Detector,
    source: ImageCollection,
    folder: ScoreFolderWriter,
    *,
    batch_size: int,
    on_error: Literal["raise", "skip"],
    progress: bool,
) -> list[SkippedImage]:
    """Score batch by batch, so that neither images nor maps of a large folder are ever in memory together.

    Returns what was left out: what could not be read, and what the detector could not take.
    """
    from pydefect.progress import ProgressBars

    bars, done = ProgressBars(progress), 0
    refused: list[SkippedImage] = []
    try:
        for batch in _batches(source, batch_size):
            result = detector.score(batch, batch_size=batch_size, on_error=on_error)
            refused += result.skipped
            scored = set(result.names)
            if scored:
                folder.add(result, images=[image for image in batch if image.name in scored])
            else:
                folder.add_skipped(result.skipped)
            done += len(batch)
            bars("score", done, len(source))
    finally:
        bars.close()
    folder.add_skipped(source.skipped)
    return [*source.skipped, *refused]


def print_scores(rows: list[dict[str, Any]], skipped: int, listed: int) -> None:
    """Say how many images are defective, and show the highest scores."""
    highest = sorted(rows, key=lambda row: -row["score"])[:_SHOWN]
    width = max((len(row["name"]) for row in highest), default=0)
    for row in highest:
        verdict = {True: f"  {row['kind'] or 'defective'}", False: "  good", None: ""}[row["defective"]]
        typer.echo(f"{row['name']:<{width}}  {row['score']:10.4f}{verdict}")
    if len(rows) > len(highest):
        typer.echo(f"... and {len(rows) - len(highest)} with lower scores")
    text = f"{len(rows)} images"
    if rows and rows[0]["image_threshold"] is not None:
        found = sum(row["defective"] for row in rows)
        text += f", {found} defective (score above {rows[0]['image_threshold']:.4f})"
    text += f", {listed} listed already" if listed else ""
    typer.echo(text + (f", {skipped} skipped" if skipped else ""))


def _files(paths: list[Path]) -> list[Path]:
    from pydefect.data.images import list_image_files

    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise InputError(f"images: there is no file or folder {path}")
        found = list_image_files(path) if path.is_dir() else [path]
        if not found:
            raise InputError(f"images: no image in the folder {path}")
        files += found
    return files


def _batches(images: ImageCollection, size: int) -> Iterator[list[Image]]:
    from pydefect.detector import is_full

    batch: list[Image] = []
    for image in images:
        batch.append(image)
        if is_full(batch, size):
            yield batch
            batch = []
    if batch:
        yield batch
