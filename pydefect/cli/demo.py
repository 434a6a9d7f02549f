"""``pydefect demo``."""

from __future__ import annotations

import shlex
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pydefect.cli._console import Debug, Quiet, say
from pydefect.cli._figures import print_evaluation
from pydefect.cli.fit import print_fit
from pydefect.places import check_writable

if TYPE_CHECKING:
    from pydefect.data.layouts import Dataset
    from pydefect.detector import Detector

_BACKBONE = "resnet18"
# Enough to show every kind of defect, few enough for two minutes on two cores.
_TRAIN, _TEST_GOOD, _PER_DEFECT, _SIZE = 48, 12, 3, 256
# Training the representation would take most of the two minutes; the bank of normal patches does the finding.
# A few dozen images cannot support a lower false-alarm rate.
_QUICK: dict[str, Any] = {"epochs": 0, "calibration_folds": 2, "false_alarm_rate": 0.05}
# Deep layers of a random network say little: rely on the first one and on the place of a patch.
_WITHOUT_LEARNED_FEATURES: dict[str, Any] = {
    "levels": (1, 2),
    "level_weights": (1.0, 0.3),
    "coordinate_weight": 2.0,
    "representation_dim": 128,
}
# A few hundred steps on small images learn where parts belong; the flange's defects need none of that.
_LOGICAL: dict[str, Any] = {
    "resize": 96,
    "padding": True,
    "steps": 240,
    "held_out_share": 0.3,
    "false_alarm_rate": 0.05,
}


class Scene(str, Enum):
    """What is drawn."""

    STRUCTURAL = "structural"
    LOGICAL = "logical"


def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for all that is written.")
    ] = Path("pydefect-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Draws another product series.")] = 0,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Backbone weights: imagenet, random or a file.  [default: imagenet if they are already on "
            "this machine, else random]",
        ),
    ] = None,
    scene: Annotated[
        Scene,
        typer.Option(
            help="structural: scratches and the like on a flange, with ConPatch. logical: missing, surplus "
            "and swapped parts on a tray, with the dual autoencoder."
        ),
    ] = Scene.STRUCTURAL,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Try everything on a drawn product: fit, score, measure, pictures. Offline, two minutes.

    DIR gets the images, the model, a folder of scores, report.html and sheet.png. Running it again replaces
    all but the images.
    """
    check_writable(out, "--out")
    if weights is not None and scene is Scene.LOGICAL:
        raise typer.BadParameter(
            "the logical scene's teacher comes with the package; weights are for --scene structural",
            param_hint="--weights",
        )

    import pydefect
    from pydefect.backbones import cached_weights
    from pydefect.data.layouts import read_dataset
    from pydefect.data.procedural import write_dataset
    from pydefect.report import write_report
    from pydefect.run import read_run
    from pydefect.score_folder import ScoreFolderWriter

    drawn: Literal["flange", "tray"] = "tray" if scene is Scene.LOGICAL else "flange"
    root = out / f"{drawn}-{seed}"
    if not root.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_dataset(root, _TRAIN, _TEST_GOOD, _PER_DEFECT, _SIZE, seed, drawn)
    dataset = read_dataset(root)
    say(f"images: {len(dataset.train)} good ones to learn from, {len(dataset.test)} to inspect, in {root}")
    if weights is None and scene is Scene.STRUCTURAL:
        weights = "imagenet" if cached_weights(_BACKBONE) else "random"
        if weights == "random":
            say(
                "weights: random, since the ImageNet weights are not on this machine and the demo downloads "
                "nothing; with --weights imagenet (45 MB) it finds more"
            )

    settings: dict[str, Any] = {"method": "dual_ae", **_LOGICAL}
    if scene is Scene.STRUCTURAL:
        settings = {"backbone": _BACKBONE, "weights": weights, **_QUICK}
        settings |= _WITHOUT_LEARNED_FEATURES if weights == "random" else {}
    say("settings: " + " ".join(f"{name}={value}" for name, value in settings.items()))
    start = time.perf_counter()
    detector = pydefect.fit(root, seed=seed, progress=not quiet, **settings)
    model = out / "model.safetensors"
    detector.save(model)
    print_fit(detector, time.perf_counter() - start)
    print_evaluation(pydefect.evaluate(detector, dataset, out=out / "run", progress=not quiet))

    result = detector.score(root / "test", progress=not quiet)
    with ScoreFolderWriter(out / "scores", configuration=detector.configuration) as folder:
        folder.add(result)
    _write_sheet(detector, dataset, out / "sheet.png")
    page = write_report(read_run(out / "run"), out / "report.html", progress=not quiet)
    typer.echo(f"report: {page}")
    typer.echo(f"pictures: {out / 'sheet.png'}, {out / 'scores'}")
    typer.echo(f"model: {model}")
    typer.echo(
        f"next: pydefect score {shlex.quote(str(model))} {shlex.quote(str(root / 'test'))} --out my-scores"
    )
    typer.echo("      pydefect fit FOLDER_OF_YOUR_GOOD_IMAGES --out my-model.safetensors")


def _write_sheet(detector: Detector, dataset: Dataset, path: Path) -> None:
    """One image of every kind, good ones too, beside what is known about it."""
    from pydefect.data.images import read_image
    from pydefect.data.layouts import read_mask
    from pydefect.score_folder import write_picture
    from pydefect.visualization import comparison_sheet

    first = {sample.defect: sample for sample in reversed(dataset.test)}
    chosen = sorted(first.values(), key=lambda sample: (sample.label, sample.defect))
    images = [read_image(sample.image) for sample in chosen]
    result = detector.score([sample.image for sample in chosen])
    sheet = comparison_sheet(
        images,
        result.anomaly_maps,
        masks=result.masks,
        ground_truth=[
            read_mask(sample, image.shape[:2]) for sample, image in zip(chosen, images, strict=True)
        ],
        captions=[
            f"{sample.defect.replace('_', ' ')}\nscore {score:.3g}" + (f"  {kind}" if kind else "")
            for sample, score, kind in zip(
                chosen, result.image_scores, result.kind or [None] * len(chosen), strict=True
            )
        ],
        part_maps=result.part_maps,
        pixel_threshold=result.pixel_threshold,
        scored_boxes=result.scored_boxes,
    )
    write_picture(path, sheet)
