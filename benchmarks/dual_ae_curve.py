"""The dual autoencoder's AUROC against training steps: what more steps buy, and which settings are stable.

    python benchmarks/dual_ae_curve.py run --data mvtec_loco/juice_bottle --steps 2000 --rows curve.jsonl
    python benchmarks/dual_ae_curve.py run --data mvtec_loco/juice_bottle --steps 2000 --rows curve.jsonl \\
        --set context_normalisation=none --set additions=none
    python benchmarks/dual_ae_curve.py picture --rows benchmarks/results/dual_ae_curve.jsonl \\
        --fits benchmarks/results/methods.jsonl --out docs/dual_ae-curve.png

``run`` trains once and measures on the way, at steps that double. A row is one measurement; a run that was
stopped goes on from its checkpoint (a folder beside the rows) and repeats no measurement; ``fit_seconds``
counts from the measurement before, or from where it last went on. The learning rate falls towards the end
of ``--steps``, so only a run's last row is what a fit of that length gives, and the picture has these alone.
Test images are measured and choose nothing within a run. A run whose loss stops being finite leaves a row
that says so: the question of equation (6)'s normalisation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pydefect
from pydefect.data.images import open_images
from pydefect.data.layouts import read_dataset
from pydefect.detector import resolve_device
from pydefect.dual_ae.config import DualAEConfig
from pydefect.dual_ae.detector import DualAEDetector
from pydefect.dual_ae.reunion import ChannelReunion, SelectiveFusion
from pydefect.errors import PydefectError


def milestones(steps: int) -> list[int]:
    """Steps at which a run is measured: 125, 250, 500, ... and the last one."""
    found = [125 * 2**power for power in range(20) if 125 * 2**power < steps]
    return [*found, steps]


def settings_of(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE, the value as JSON, and as plain text where it is none."""
    found = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row, on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def run(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train and measure, as far as that has not been done."""
    dataset = read_dataset(arguments.data)
    settings = settings_of(arguments.set)
    config = DualAEConfig.from_preset(arguments.preset, **{**settings, "steps": arguments.steps})
    name = {"product": dataset.name, "seed": arguments.seed, "preset": arguments.preset, **settings}
    if arguments.images is not None or arguments.every != 1:
        # Or a trial of the script would pass for the run.
        name["trial"] = f"{arguments.images} images, every {arguments.every}"
    label = json.dumps({**name, "steps": arguments.steps}, sort_keys=True)
    measured = {row["step"] for row in read_rows(arguments.rows) if row["run"] == label}
    checkpoint = arguments.rows.with_suffix("") / hashlib.sha256(label.encode()).hexdigest()[:12]
    images = [sample.image for sample in dataset.train][: arguments.images]
    validation = [sample.image for sample in dataset.validation] or None
    test = replace(dataset, test=dataset.test[:: arguments.every])
    for step in arguments.at or milestones(arguments.steps):
        if step in measured:
            continue
        row: dict[str, Any] = {"run": label, **name, "step": step, "steps": arguments.steps}
        began = time.perf_counter()
        try:
            detector = DualAEDetector.fit(
                images,
                config,
                validation=validation,
                weights=arguments.weights,
                seed=arguments.seed,
                device=resolve_device(arguments.device),
                checkpoint=checkpoint,
                until=step,
            )
        except PydefectError as error:
            yield {**row, "failed": str(error)}
            return
        seconds = time.perf_counter() - began
        found = pydefect.evaluate(detector, test, progress=False).to_dict()
        kept = ("image_auroc", "pixel_auroc", "image_auroc_by_defect", "seconds_per_image")
        losses = detector.training["history"][-1] if detector.training["history"] else {}
        row |= {"device": str(detector.device), "configuration": detector.configuration}
        row |= {"live_units": live_units(detector, images[:_LOOKED_AT])}
        yield {**row, "fit_seconds": seconds, "losses": losses, **{key: found[key] for key in kept}}


@torch.no_grad()
def live_units(detector: DualAEDetector, images: Sequence[Any]) -> dict[str, str]:
    """Count the hidden units of the modules' gates that are on for one image at least, of all.

    What a channel reunion or the fusion does to a channel depends on the image through these ReLUs alone:
    with none of them on it multiplies every image by the same numbers.
    """
    seen: dict[nn.Module, list[Tensor]] = {}

    def look(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        if isinstance(module, SelectiveFusion):
            pooled = (given[0] + given[1]).float().mean((2, 3))
        else:
            assert isinstance(module, ChannelReunion)
            features = given[0].float()
            attention = module.outer(module.inner(features)) * features
            pooled = attention.sum((2, 3)) if module.normalisation == "none" else attention.mean((2, 3))
        seen.setdefault(module, []).append(torch.relu(module.reduce(pooled)) > 0)

    network = detector.network
    modules = {f"reunion {number}": one for number, one in enumerate(network.reunions)}
    modules |= {"fusion": network.fusion} if network.fusion is not None else {}
    gated = {name: one for name, one in modules.items() if isinstance(one, ChannelReunion | SelectiveFusion)}
    hooks = [one.register_forward_pre_hook(look) for one in gated.values()]
    try:
        for image in open_images(images):
            network.reconstruct(detector.preprocessing(image.pixels)[None].to(detector.device))
    finally:
        for hook in hooks:
            hook.remove()
    found = {name: torch.cat(seen[one]).any(0) for name, one in gated.items()}
    return {name: f"{int(on.sum())} of {len(on)}" for name, on in found.items()}


# Training images that live_units looks at.
_LOOKED_AT = 16
# What the label of an EfficientAD run adds to the product.
_ONE_AUTOENCODER = "additions=none"


def finished_runs(
    rows: list[dict[str, Any]], fits: list[dict[str, Any]]
) -> dict[str, list[tuple[int, float]]]:
    """The last measurement of every finished run, by product and settings: (steps, AUROC in percent).

    ``fits`` are lines of `pydefect benchmark`, with every setting at its default.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for fit in fits:
        if fit["method"] in ("dual_ae", "efficientad") and fit["status"] == "finished":
            label = fit["category"] + (f", {_ONE_AUTOENCODER}" if fit["method"] == "efficientad" else "")
            point = fit["configuration"]["steps"], 100 * fit["metrics"]["image_auroc"]
            found.setdefault(label, []).append(point)
    for row in rows:
        if "failed" not in row and row["step"] == row["steps"]:
            words = {name: value for name, value in json.loads(row["run"]).items() if value != "default"}
            product, _, _ = (words.pop(name) for name in ("product", "steps", "seed"))
            label = ", ".join([product, *(f"{name}={value}" for name, value in words.items())])
            found.setdefault(label, []).append((row["steps"], 100 * row["image_auroc"]))
    return {label: sorted(points) for label, points in sorted(found.items())}


def picture(arguments: argparse.Namespace) -> None:
    """Draw image AUROC over the length of a run at the defaults, and of all other settings side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = finished_runs(read_rows(arguments.rows), read_rows(arguments.fits) if arguments.fits else [])
    at_defaults = {label: runs[label] for label in runs if label.partition(", ")[2] in ("", _ONE_AUTOENCODER)}
    others = {label: points for label, points in runs.items() if label not in at_defaults}
    height = 0.28 * len(others)
    figure = plt.figure(figsize=(11, 4.5 + height), dpi=100, layout="constrained")
    # Apart, so that the long names of the settings leave the curves their width.
    above, below = figure.subfigures(2, height_ratios=(3.5, 1 + height))
    _draw_defaults(above.subplots(), at_defaults)
    _draw_others(below.subplots(), others)
    figure.savefig(arguments.out)


def _draw_defaults(axes: Any, runs: dict[str, list[tuple[int, float]]]) -> None:
    """AUROC over steps, a colour for a product, dashed for EfficientAD; lines go through the seeds' mean."""
    products = list(dict.fromkeys(label.partition(", ")[0] for label in runs))
    for label, points in runs.items():
        product, _, one = label.partition(", ")
        number = products.index(product)
        style: dict[str, Any] = {"color": f"C{number}", "markerfacecolor": "white" if one else None}
        marker, line = "os^D"[number % 4], "--" if one else "-"
        by_steps: dict[int, list[float]] = {}
        for steps, auroc in points:
            by_steps.setdefault(steps, []).append(auroc)
        axes.plot(*zip(*points, strict=True), marker, **style)
        means = [sum(values) / len(values) for values in by_steps.values()]
        axes.plot(list(by_steps), means, line, color=f"C{number}")
        name = f"{product}, {'EfficientAD' if one else 'dual autoencoder'}"
        axes.plot([], [], marker + line, label=name, **style)
    axes.set(xscale="log", xlabel="training steps of the whole run", ylabel="image AUROC, %")
    axes.set_title("default settings")
    ticks = sorted({step for points in runs.values() for step, _ in points})
    axes.set_xticks(ticks, [f"{step:,}" for step in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_others(axes: Any, runs: dict[str, list[tuple[int, float]]]) -> None:
    """A row for settings, the best ones on top."""
    ascending = sorted(runs, key=lambda label: max(auroc for _, auroc in runs[label]))
    for place, label in enumerate(ascending):
        for steps, auroc in runs[label]:
            axes.plot(auroc, place, "o", color="C0")
            axes.annotate(
                f"{steps:,}", (auroc, place), (0, 4), textcoords="offset points", ha="center", size=6
            )
    axes.set_yticks(range(len(ascending)), ascending, fontsize=7)
    axes.set(xlabel="image AUROC, %, and the run's steps", ylim=(-0.8, len(ascending)))
    axes.set_title("other settings, and what differs from the defaults")
    axes.grid(alpha=0.3)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["run", "picture"])
    parser.add_argument("--rows", required=True, type=Path, help="JSON lines, appended to")
    parser.add_argument("--data", type=Path, help="a product's folder")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument(
        "--at",
        type=lambda text: [int(step) for step in text.split(",")],
        metavar="STEP,STEP,...",
        help="measure there, and end with the last of them  [default: 125, 250, 500, ..., the last step]",
    )
    parser.add_argument("--preset", default="default")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting")
    parser.add_argument("--weights", default="imagenet", help="of a backbone as the teacher")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, help="train on the first so many only, to try the script")
    parser.add_argument("--every", type=int, default=1, help="measure every n-th test image only")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--fits", type=Path, help="for the picture: results.jsonl of `pydefect benchmark`")
    parser.add_argument("--out", type=Path, help="the picture")
    arguments = parser.parse_args()
    if arguments.what == "picture":
        if arguments.out is None:
            parser.error("picture needs --out")
        picture(arguments)
        return
    if arguments.data is None:
        parser.error("run needs --data")
    torch.set_num_threads(arguments.threads)
    for row in run(arguments):
        append_row(arguments.rows, row)
        shown = row.get("failed") or f"image AUROC {100 * row['image_auroc']:.2f}"
        print(f"{row['product']} step {row['step']}: {shown}", flush=True)


if __name__ == "__main__":
    main()
