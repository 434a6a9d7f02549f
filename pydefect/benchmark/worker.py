"""One pair in a process of its own.

Its peak memory is the pair's, and nothing that happens to it happens to the other pairs.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from pydefect import api
from pydefect.benchmark.plan import without_places
from pydefect.buildinfo import versions
from pydefect.data.layouts import Dataset, read_dataset
from pydefect.detector import Detector
from pydefect.evaluation import Evaluation, peak_rss_mb
from pydefect.heap import return_large_blocks
from pydefect.persistence import write_atomically
from pydefect.run import machine

__all__ = ["Job", "end_with", "main", "run_job"]

# prctl's parameter (linux/prctl.h).
_PARENT_DEATH_SIGNAL = 1

CHOSEN_BY = ("image_auroc", "pixel_auroc")
"""What the best number of epochs is chosen by, each for itself."""


@dataclass(frozen=True)
class Job:
    """What a worker is told.

    Attributes
    ----------
    root
        Of the category.
    method, preset, settings, weights, seed, device, batch_size
        See :func:`pydefect.fit` and :func:`pydefect.evaluate`.
    checkpoint
        Folder of the unfinished fit.
    run
        Folder for maps and scores; None: they are not kept.
    best_epoch
        Also measure every smaller number of epochs.
    threads
        Of PyTorch; None: its own choice.
    """

    root: str
    method: str
    preset: str
    settings: dict[str, Any]
    weights: str
    seed: int
    device: str
    batch_size: int
    checkpoint: str
    run: str | None
    best_epoch: bool
    threads: int | None


def run_job(job: Job) -> dict[str, Any]:
    """Fit and measure; return what the figures are, as JSON values."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    dataset = read_dataset(job.root)
    resumed = Path(job.checkpoint).exists()
    detector, fit_seconds = _fit(job, job.settings, job.checkpoint)
    fit_peak = peak_rss_mb()
    evaluation = api.evaluate(
        detector, dataset, out=job.run, batch_size=job.batch_size, progress=sys.stderr.isatty()
    )
    row: dict[str, Any] = {
        "started": started,
        # A detector names files without their folders: what they were when it was fitted, the job knows.
        "configuration": {
            **without_places(detector.configuration),
            **{name: file for name, file in without_places(job.settings).items() if isinstance(file, dict)},
        },
        "metrics": _metrics(evaluation),
        "epochs": detector.training.get("epochs"),
        "training_images": detector.training["images"],
        "fit_seconds": fit_seconds,
        # The seconds are then those since the last start only.
        "resumed": resumed,
        "seconds_per_image": evaluation.seconds_per_image,
        "fit_peak_rss_mb": fit_peak,
        "peak_rss_mb": evaluation.peak_rss_mb,
        "versions": versions(),
        "machine": machine(detector.device),
    }
    if job.best_epoch:
        row["best_epoch"] = _best_epoch(job, dataset, detector, row["metrics"])
    return row


def _fit(job: Job, settings: dict[str, Any], checkpoint: str | None) -> tuple[Detector, float]:
    began = time.perf_counter()
    detector = api.fit(
        job.root,
        method=job.method,
        preset=job.preset,
        weights=job.weights,
        seed=job.seed,
        device=job.device,
        checkpoint=checkpoint,
        progress=sys.stderr.isatty(),
        **settings,
    )
    return detector, time.perf_counter() - began


def _metrics(evaluation: Evaluation) -> dict[str, Any]:
    left_out = {"dataset", "configuration", "learned", "skipped", "seconds_per_image", "peak_rss_mb"}
    return {name: value for name, value in evaluation.to_dict().items() if name not in left_out}


def _best_epoch(
    job: Job, dataset: Dataset, detector: Detector, last: dict[str, Any]
) -> dict[str, Any] | None:
    """The best figures over the numbers of epochs up to that of the fit, each chosen on the test set; None
    for a method without epochs.

    The method is fitted anew for every number: what it makes of a training that ends there, whatever of its
    training depends on the end.
    """
    epochs = detector.training.get("epochs")
    if "epochs" not in detector.configuration or epochs is None:
        return None
    fixed = {"calibration_folds": 0, "early_stopping": False}
    fixed = {name: value for name, value in fixed.items() if name in detector.configuration}
    by_epochs = {epochs: last}
    for fewer in range(epochs):
        shorter, _ = _fit(job, {**job.settings, **fixed, "epochs": fewer}, None)
        by_epochs[fewer] = _metrics(
            api.evaluate(shorter, dataset, batch_size=job.batch_size, progress=sys.stderr.isatty())
        )
    best: dict[str, Any] = {"chosen_on": "test"}
    for metric in CHOSEN_BY:
        known = {
            count: figures[metric] for count, figures in by_epochs.items() if figures[metric] is not None
        }
        if known:
            # Of equal ones the fewest epochs.
            chosen = max(known, key=lambda count: (known[count], -count))
            best[metric] = {"epochs": chosen, "value": known[chosen]}
    return best


def end_with(parent: int) -> None:
    """Let Linux end this process when its parent, the process of that number, is ended in whatever way."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:  # it has ended already
        sys.exit(1)


def main(job: str, result: str, parent: str) -> None:
    """Read a job's file, write its result's: all that the process of a pair does."""
    end_with(int(parent))
    return_large_blocks()
    row = run_job(Job(**json.loads(Path(job).read_text(encoding="utf-8"))))
    write_atomically(result, json.dumps(row, allow_nan=False).encode())
