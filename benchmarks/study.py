"""The accuracy study behind the default preset: one command a table.

    python benchmarks/study.py run --weights resnet18.npz --data bottle=mvtec_ad/bottle --out study.jsonl
    python benchmarks/study.py render study.jsonl --out docs

Every run fits on all training images, without a threshold, and measures the test images after every epoch; no
test image takes part in fitting or stopping. Pixels are compared at the network's input size, inside the
crop. ``--data`` may be repeated. ``run`` leaves out what the output file holds already, so that it can be
interrupted; with ``--checkpoints`` it also goes on in the middle of a run. A seed other than 0 also shuffles
the training images: a streaming bank depends on their order. ``render`` needs matplotlib.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pydefect.backbones import build_backbone
from pydefect.conpatch.config import ConPatchConfig
from pydefect.conpatch.crossfit import HeldOutScores, blend_distance
from pydefect.conpatch.scorer import score_levels
from pydefect.conpatch.trainer import Trainer
from pydefect.data.images import open_images
from pydefect.data.layouts import read_dataset, read_mask
from pydefect.detector import batches
from pydefect.features import FeatureCache, PatchFeatureExtractor, resolve_precision
from pydefect.metrics import detection_metrics
from pydefect.ops import knn, score_maps
from pydefect.persistence import Checkpoint
from pydefect.preprocessing import Preprocessing
from pydefect.version import VERSION

# Half the default's bank: the study compares settings, and half takes half the time.
UNTRAINED: dict[str, Any] = {"losses": "none", "gamma": 4}
TRAINED: dict[str, Any] = {"gamma": 4, "epochs": 2}
# The printed method, but for the patches in the contrastive loss: 1,024 of the 6,272 of a batch.
PRINTED: dict[str, Any] = {"preset": "paper", "contrastive_patches": 1024}

# Name -> settings on top of the default preset (or of "preset"); before the slash, the section of the table.
RUNS: dict[str, dict[str, Any]] = {
    "printed/untrained": {**PRINTED, "losses": "none"},
    "printed/30 epochs": PRINTED,
    "printed/30 epochs, all patches": {"preset": "paper"},
    "bank/kcenter gamma 2": {"losses": "none"},
    "bank/kcenter gamma 4": UNTRAINED,
    "bank/kmeans gamma 4": {**UNTRAINED, "bank": "kmeans"},
    "bank/ema gamma 4": {**UNTRAINED, "bank": "ema"},
    "bank/position_mean gamma 1": {**UNTRAINED, "bank": "position_mean", "gamma": 1},
    "input/crop 224": {**UNTRAINED, "crop": 224},
    "input/crop 224, weight 0.3, coordinates 0.6, gamma 1": {
        "losses": "none",
        "crop": 224,
        "level_weights": (0.3, 1, 1),
        "coordinate_weight": 0.6,
        "gamma": 1,
    },
    "levels/not balanced": {**UNTRAINED, "level_balance": "none", "level_weights": None},
    "levels/0.3, 1, 1": {**UNTRAINED, "level_weights": (0.3, 1, 1)},
    "levels/1, 1, 1": {**UNTRAINED, "level_weights": None},
    "coordinates/0": {**UNTRAINED, "coordinate_weight": 0},
    "coordinates/1": {**UNTRAINED, "coordinate_weight": 1},
    "F/random": {**UNTRAINED, "initialisation": "default"},
    "training/none": {**TRAINED, "losses": "none"},
    "training/contrastive 1e-4": {**TRAINED, "losses": "contrastive", "learning_rate": 1e-4},
    "training/hypersphere 1e-4": {**TRAINED, "losses": "hypersphere", "learning_rate": 1e-4},
    "training/both 1e-4": {**TRAINED, "losses": "both", "learning_rate": 1e-4},
    "training/contrastive 1e-3": {**TRAINED, "losses": "contrastive", "learning_rate": 1e-3},
    "training/hypersphere 1e-3": {**TRAINED, "losses": "hypersphere", "learning_rate": 1e-3},
    "training/both 1e-3": {**TRAINED, "losses": "both", "learning_rate": 1e-3},
    "training/both 1e-3, bank fixed": {
        **TRAINED,
        "losses": "both",
        "learning_rate": 1e-3,
        "rebuild_bank": "never",
    },
    "precision/float32": {"losses": "none"},
    "precision/bfloat16": {"losses": "none", "backbone_precision": "bfloat16"},
    **{
        f"pairs/{patches or 'all'} patches": {
            **TRAINED,
            "losses": "both",
            "learning_rate": 1e-3,
            "contrastive_patches": patches,
        }
        for patches in (256, 1024, 4096, None)
    },
}

# Share of the training images that is kept apart in the second fit of a training run, to watch the stopping
# rule.
_HELD_OUT_EVERY = 5


@dataclass(frozen=True)
class Measured:
    """A data set's features and truth at one input geometry."""

    train: FeatureCache
    test: FeatureCache
    labels: np.ndarray
    masks: np.ndarray
    size: tuple[int, int]


def measure_features(root: Path, config: ConPatchConfig, weights: str) -> Measured:
    """Run the backbone over all images of a data set."""
    dataset = read_dataset(root)
    preprocessing = Preprocessing.create(config.resize, config.crop)
    precision = resolve_precision(config.backbone_precision, torch.device("cpu"))
    extractor = PatchFeatureExtractor(build_backbone(config.backbone, weights), precision=precision)
    caches, masks = [], []
    samples = {"train": dataset.train, "test": dataset.test}
    for part, images in samples.items():
        cache = FeatureCache()
        collection = open_images([sample.image for sample in images])
        position = 0
        for group, tensors in batches(collection, preprocessing, 8):
            cache.append(extractor(tensors))
            size = (tensors.shape[2], tensors.shape[3])
            for image in group:
                if part == "test":
                    height, width, _ = image.pixels.shape
                    masks.append(preprocessing.mask_to_input(read_mask(images[position], (height, width))))
                position += 1
        caches.append(cache)
    labels = np.array([sample.label == 1 for sample in dataset.test])
    return Measured(caches[0], caches[1], labels, np.stack(masks), size)


@torch.inference_mode()
def test_metrics(data: Measured, trainer: Trainer) -> dict[str, float]:
    """AUROC (%) of the test images with both scores of section 3.5 and both image scores."""
    found: dict[str, float] = {}
    config, bank = trainer.config, trainer.scoring_bank()
    _, height, width = data.test.shapes[0]
    distances = []
    for index in range(len(data.test)):
        patches = trainer.network.representation(data.test.get([index]))[0]
        distances.append(knn(patches, bank.centres, config.neighbors)[0].sqrt().reshape(height, width, -1))
    for score in ("certainty", "nearest"):
        scores, maps = score_maps(
            torch.stack(distances), data.size, config.smoothing, certainty=score == "certainty"
        )
        for image_score, values in (("max_patch", scores), ("max_map", maps)):
            maxima = values.flatten(1).amax(1)
            found[f"{score}_{image_score}"] = 100 * detection_metrics(data.labels, maxima).auroc
        # Every second row and column: a quarter of the pixels changes the AUROC by less than 0.01.
        pixels = detection_metrics(data.masks[:, ::2, ::2], maps[:, ::2, ::2].contiguous())
        found[f"{score}_pixel"] = 100 * pixels.auroc
    return {name: round(value, 3) for name, value in found.items()}


@torch.inference_mode()
def held_out_separation(data: Measured, trainer: Trainer, held_out: list[int]) -> float:
    """What the stopping rule sees of images that the trainer has not seen."""
    maxima = []
    for index in held_out:
        levels = data.train.get([index])
        _, maps = score_levels(levels, trainer.network, trainer.bank, trainer.config, data.size)
        maxima.append(float(maps.max()))
    blend = blend_distance(
        trainer.network, trainer.bank, data.train, held_out, seed=trainer.seed, device=trainer.device
    )
    return round(HeldOutScores((), tuple(maxima), blend).separation, 5)


def config_of(settings: dict[str, Any]) -> ConPatchConfig:
    """Read a run's settings on top of its preset; float32 features unless it says otherwise."""
    chosen = {"backbone_precision": "float32", **settings}
    return ConPatchConfig.from_preset(chosen.pop("preset", "default"), **chosen)


def epochs_of(config: ConPatchConfig) -> int:
    """Count the epochs that a run trains."""
    return 0 if config.losses == "none" else config.epochs


def run_once(
    data: Measured, config: ConPatchConfig, seed: int, watch: bool, checkpoint: Checkpoint | None
) -> Iterator[dict[str, Any]]:
    """Fit with one choice of settings; yield a row an epoch, from where the checkpoint left off."""
    epochs = epochs_of(config)
    began = time.perf_counter()
    everything = list(range(len(data.train)))
    if seed:
        everything = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed)).tolist()
    resumed = checkpoint is not None and checkpoint.load("final") is not None
    trainer = Trainer(data.train, everything, config, seed, torch.device("cpu"), checkpoint)
    watched = None
    held_out = everything[::_HELD_OUT_EVERY]
    if 0 < epochs <= 5 and watch:
        seen = [index for index in everything if index not in held_out]
        watched = Trainer(data.train, seen, config, seed, torch.device("cpu"))
    fit_seconds = time.perf_counter() - began
    for epoch in range(trainer.epoch, epochs + 1):
        row: dict[str, Any] = {"epoch": epoch}
        if epoch > trainer.epoch:
            began = time.perf_counter()
            row |= vars(trainer.train_epoch())
            fit_seconds += time.perf_counter() - began
            if watched is not None:
                watched.train_epoch()
        if watched is not None:
            row["separation"] = held_out_separation(data, watched, held_out)
        if epoch in (0, epochs) or epochs <= 5 or epoch % 5 == 0:
            row |= test_metrics(data, trainer)
            yield row | ({} if resumed else {"fit_seconds": round(fit_seconds, 1)})


def run(arguments: argparse.Namespace) -> None:
    """Measure what the output file does not hold yet."""
    torch.set_num_threads(arguments.threads)
    out = Path(arguments.out)
    done = (
        {(row["data"], row["run"], row["epoch"]) for row in _rows(out) if row["seed"] == arguments.seed}
        if out.exists()
        else set()
    )
    for entry in arguments.data:
        name, _, root = entry.partition("=")
        features: dict[Any, Measured] = {}
        for run_name, settings in RUNS.items():
            config = config_of(settings)
            if (name, run_name, epochs_of(config)) in done or not any(
                fnmatch.fnmatch(run_name, only) for only in arguments.only
            ):
                continue
            geometry = (config.resize, config.crop, config.levels, config.backbone_precision)
            if geometry not in features:
                features.clear()
                features[geometry] = measure_features(Path(root), config, arguments.weights)
            about = {"data": name, "run": run_name, "seed": arguments.seed, "version": VERSION}
            checkpoint = None
            if arguments.checkpoints:
                folder = Path(arguments.checkpoints) / f"{name} {run_name.replace('/', ' ')} {arguments.seed}"
                checkpoint = Checkpoint(folder, about)
            for row in run_once(features[geometry], config, arguments.seed, arguments.watch, checkpoint):
                if (name, run_name, row["epoch"]) in done:
                    continue
                with out.open("a") as file:
                    file.write(json.dumps(about | row | {"settings": settings}) + "\n")
                print(
                    name, run_name, row["epoch"], row["certainty_max_map"], row["certainty_pixel"], flush=True
                )


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def render(arguments: argparse.Namespace) -> None:
    """Write study-table.md and study-training.png."""
    rows = [row for path in arguments.results for row in _rows(Path(path))]
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(row["data"] for row in rows))
    runs = list(dict.fromkeys([*RUNS, *(row["run"] for row in rows)]))
    last: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in rows:
        last[row["run"], row["data"], row["seed"]] = row
    lines = [
        "A cell: image AUROC by the largest patch score / by the maximum of the smoothed map / pixel AUROC, "
        'in percent, at the last epoch; "eq. 9" weighs a patch\'s distance by its certainty, "nearest" '
        "does not.",
        "",
    ]
    lines.append("| run | " + " | ".join(f"{name}: eq. 9 | nearest" for name in names) + " |")
    lines.append("|---" * (1 + 2 * len(names)) + "|")
    for run_name in runs:
        cells = []
        for name in names:
            row = last.get((run_name, name, 0))
            for score in ("certainty", "nearest"):
                keys = (f"{score}_max_patch", f"{score}_max_map", f"{score}_pixel")
                cells.append("/".join(f"{row[key]:.1f}" for key in keys) if row else "")
        if any(cells):
            lines.append(f"| {run_name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Several seeds (equation 9, maximum of the map; pixel): mean, smallest to largest, number.",
        "",
    ]
    lines.append("| run | " + " | ".join(f"{name}: image | pixel" for name in names) + " |")
    lines.append("|---" * (1 + 2 * len(names)) + "|")
    for run_name in runs:
        cells = []
        for name in names:
            found = [row for (run, data, _), row in last.items() if (run, data) == (run_name, name)]
            for key in ("certainty_max_map", "certainty_pixel"):
                values = [row[key] for row in found]
                cells.append(
                    f"{np.mean(values):.2f}, {min(values):.2f} to {max(values):.2f}, {len(values)}"
                    if len(values) > 1
                    else ""
                )
        if any(cells):
            lines.append(f"| {run_name} | " + " | ".join(cells) + " |")
    (out / "study-table.md").write_text("\n".join(lines) + "\n")
    trained = [row for row in rows if row["seed"] == 0 and row["run"].startswith("training/")]
    if trained:
        _plot(trained, list(dict.fromkeys(row["data"] for row in trained)), out / "study-training.png")


def _plot(rows: list[dict[str, Any]], names: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    panels = (("certainty_max_map", "image AUROC (%)"), ("certainty_pixel", "pixel AUROC (%)"))
    panels += (("separation", "separation (held-out normal images)"),)
    figure, axes = pyplot.subplots(len(panels), len(names), figsize=(4 * len(names), 9), squeeze=False)
    for column, name in enumerate(names):
        for line, (key, label) in enumerate(panels):
            axis = axes[line][column]
            for run_name in [run_name for run_name in RUNS if run_name.startswith("training/")][1:]:
                chosen = [
                    row for row in rows if row["data"] == name and row["run"] == run_name and key in row
                ]
                axis.plot(
                    [row["epoch"] for row in chosen], [row[key] for row in chosen], "o-", label=run_name[9:]
                )
            axis.set_title(name if line == 0 else "")
            axis.set_xlabel("epoch" if line == len(panels) - 1 else "")
            axis.set_ylabel(label if column == 0 else "")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.3)
            axis.set_visible(bool(sum(len(curve.get_xdata()) for curve in axis.lines)))
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    run_parser = commands.add_parser("run", help="measure")
    run_parser.add_argument("--weights", required=True)
    run_parser.add_argument("--data", action="append", required=True, metavar="NAME=FOLDER")
    run_parser.add_argument("--out", required=True)
    run_parser.add_argument(
        "--only", action="append", metavar="PATTERN", help="runs to measure, such as 'bank/*'"
    )
    run_parser.add_argument(
        "--watch",
        action="store_true",
        help="fit training runs twice, the second time without a fifth of the "
        "images, to record what the stopping rule sees",
    )
    run_parser.add_argument("--checkpoints", metavar="FOLDER", help="keep the state of unfinished runs here")
    run_parser.add_argument("--seed", type=int, default=0)
    run_parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    run_parser.set_defaults(call=run)
    render_parser = commands.add_parser("render", help="write the table and the curves")
    render_parser.add_argument("results", nargs="+")
    render_parser.add_argument("--out", required=True)
    render_parser.set_defaults(call=render)
    arguments = parser.parse_args()
    if getattr(arguments, "only", ()) is None:
        arguments.only = ["*"]
    if getattr(arguments, "watch", False) and arguments.checkpoints:
        parser.error("--watch: its second fit has no checkpoint; leave out --checkpoints")
    arguments.call(arguments)


if __name__ == "__main__":
    main()
