"""Whole paths against anomalib: scoring an image, fitting a product, and measuring a test set's pixels.

    python benchmarks/end_to_end.py score --data mvtec_ad/bottle --weights resnet18.npz --out score.json
    python benchmarks/end_to_end.py fit --data mvtec_ad/bottle --weights resnet18.npz --out fit.json
    python benchmarks/end_to_end.py dual_ae --data mvtec_ad/bottle --out dual_ae.json
    python benchmarks/end_to_end.py metrics --images 100 --size 1024 --rounds 3 --passes 1 --out metrics.json

Everybody gets the same images at the same input size, the same backbone with the same weights, the same
number of threads. Scoring begins with the network's input and ends with image scores and maps; reading files
and calibration are left out. Fitting begins with files; CFA's time for its epochs is that of a few measured
training steps times their number, and ours for 30 epochs that of a fit with one epoch and one without.
Metrics are those of drawn maps in memory, anomalib's and scikit-learn's timed once a pass, ours in every
round. "dual_ae" times scoring and a training step of the dual autoencoder and of EfficientAD against
anomalib's EfficientAD-S, all with random weights; our steps read the teacher's kept maps and draw penalty
images, as in a fit, the peer's are its losses and optimiser alone. The peers' environment is made by the
command in the README; without it only pydefect is timed.
``table.py`` makes tables of the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import anomaly_maps
import machine
import torch
from peak_memory import peak_mib

import pydefect
from pydefect.backbones import build_backbone
from pydefect.conpatch import ConPatchConfig
from pydefect.data.images import open_images
from pydefect.data.layouts import read_dataset
from pydefect.detector import batches
from pydefect.dual_ae.pdn import PDN
from pydefect.dual_ae.trainer import Trainer
from pydefect.metrics import aupro, detection_metrics
from pydefect.persistence import save_tensors
from pydefect.preprocessing import Preprocessing

# Images that banks are made of; enough for PatchCore's tenth of all patches.
BANK_IMAGES = 32


def record(group: str, contender: str, threads: int, times: list[float], note: str = "") -> dict[str, Any]:
    """One line of the results, as pytest-benchmark writes it."""
    ordered = sorted(times)
    low, _, high = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return {
        "group": f"{group} cpu",
        "name": f"{group} {contender}",
        "stats": {
            "min": ordered[0],
            "q1": low,
            "median": statistics.median(ordered),
            "q3": high,
            "max": ordered[-1],
            "rounds": len(ordered),
        },
        "extra_info": {"contender": contender, "threads": threads, "note": note},
    }


def peer_times(python: Path, task: dict[str, Any]) -> dict[str, Any]:
    """Let the peers' environment do the task."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(task, Path(folder) / "task.pt")
        script = Path(__file__).absolute().parent / "peers" / "time_anomalib.py"
        # In that folder: whatever a peer writes goes away with it.
        done = subprocess.run(
            [python, script, "task.pt", "times.json"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(script.parents[1])},
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{script.name} failed:\n{done.stderr}")
        return json.loads((Path(folder) / "times.json").read_text())


def precisions() -> list[tuple[str, dict[str, Any]]]:
    """Our contenders: one a precision of the backbone, where that is a setting."""
    if any(field.name == "backbone_precision" for field in dataclasses.fields(ConPatchConfig)):
        return [
            (f"pydefect {precision}", {"backbone_precision": precision})
            for precision in ("float32", "bfloat16")
        ]
    return [("pydefect float32", {})]


def read_inputs(files: list[Path], side: int) -> torch.Tensor:
    """[N, 3, side, side] as every network takes it."""
    preprocessing = Preprocessing.create(side, None)
    return torch.cat([tensors for _, tensors in batches(open_images(files), preprocessing, 8)])


def score(arguments: argparse.Namespace, python: Path | None) -> Iterator[dict[str, Any]]:
    """Time scoring, everybody in every pass, so that a change of the machine shows as spread."""
    dataset = read_dataset(arguments.data)
    files = [sample.image for sample in dataset.train]
    train = read_inputs(files[:BANK_IMAGES], arguments.size)
    images = read_inputs([sample.image for sample in dataset.test[: max(arguments.batches)]], arguments.size)
    weights = build_backbone(arguments.backbone, arguments.weights).state_dict()
    times: dict[tuple[str, int], list[float]] = {}
    peaks: dict[tuple[str, int], float] = {}
    detectors = {}
    for name, settings in precisions():
        detectors[name] = pydefect.fit(
            files[:BANK_IMAGES],
            backbone=arguments.backbone,
            weights=arguments.weights,
            resize=arguments.size,
            calibration_folds=0,
            progress=False,
            **settings,
        )
    for _ in range(arguments.passes):
        for name, detector in detectors.items():
            for batch in arguments.batches:
                part = images[:batch]
                peaks[name, batch] = peak_mib(partial(detector.predict, part))
                for _ in range(arguments.rounds):
                    began = time.perf_counter()
                    detector.predict(part)
                    times.setdefault((name, batch), []).append(time.perf_counter() - began)
        if python is None:
            continue
        found = peer_times(
            python,
            {
                "what": "score",
                "backbone": arguments.backbone,
                "weights": weights,
                "train": train,
                "train_images": len(files),
                "images": images,
                "batches": arguments.batches,
                "rounds": arguments.rounds,
                "threads": arguments.threads,
            },
        )
        machine.peers |= found["versions"]
        for peer, by_batch in found["times"].items():
            for batch in arguments.batches:
                times.setdefault((peer, batch), []).extend(by_batch[str(batch)])
                peaks[peer, batch] = found["peak_mib"][peer][str(batch)]
    for (name, batch), measured in times.items():
        group = f"score {arguments.backbone} batch {batch}"
        line = record(group, name, arguments.threads, measured, f"{arguments.size} px")
        line["extra_info"]["peak_mib"] = peaks[name, batch]
        yield line


def fit_seconds(arguments: argparse.Namespace, files: list[Path], **settings: Any) -> float:
    """Seconds of one fit, files included."""
    began = time.perf_counter()
    pydefect.fit(
        files,
        backbone=arguments.backbone,
        weights=arguments.weights,
        resize=arguments.size,
        progress=False,
        **settings,
    )
    return time.perf_counter() - began


def fit(arguments: argparse.Namespace, python: Path | None) -> Iterator[dict[str, Any]]:
    """Time fits of the whole training set."""
    dataset = read_dataset(arguments.data)
    files = [sample.image for sample in dataset.train][: arguments.images]
    threads = arguments.threads
    note = f"{len(files)} images"
    group = f"fit {arguments.backbone} default preset"
    yield record(group, "pydefect", threads, [fit_seconds(arguments, files)], note)
    group = f"fit {arguments.backbone} 30 epochs"
    thirty: dict[str, dict[str, Any]] = {
        "pydefect": {"calibration_folds": 0, "early_stopping": False},
        "pydefect paper preset": {"preset": "paper", "crop": None},
    }
    for name, settings in thirty.items():
        if name not in arguments.contenders:
            continue
        without, one = (fit_seconds(arguments, files, epochs=epochs, **settings) for epochs in (0, 1))
        yield record(group, name, threads, [without + 30 * (one - without)], f"{note}, from 1 epoch")
    if python and "CFA" in arguments.contenders:
        found = peer_times(
            python,
            {
                "what": "fit",
                "backbone": arguments.backbone,
                "weights": build_backbone(arguments.backbone, arguments.weights).state_dict(),
                "train": read_inputs(files[:BANK_IMAGES], arguments.size),
                "rounds": arguments.rounds,
                "threads": threads,
            },
        )
        machine.peers |= found["versions"]
        steps = 30 * math.ceil(len(files) / 4)
        times = [steps * seconds for seconds in found["times"]["step"]]
        yield record(group, "CFA", threads, times, f"{note}, {steps} steps of 4 from {len(times)}")


def seconds_of(call: Callable[[], float]) -> tuple[float, float]:
    """Return how long the call took and what it found."""
    began = time.perf_counter()
    found = call()
    return time.perf_counter() - began, found


def metrics(arguments: argparse.Namespace, python: Path | None) -> Iterator[dict[str, Any]]:
    """Time pixel metrics; everybody must find the same."""
    from sklearn.metrics import roc_auc_score

    images = arguments.images or 100
    maps, masks = anomaly_maps.draw(images, arguments.size)
    scores, labels = maps.ravel(), masks.ravel()
    size = f"{images}x{arguments.size}x{arguments.size}"
    ours: dict[str, Callable[[], float]] = {
        "auroc": lambda: detection_metrics(labels, scores).auroc,
        "aupro": lambda: aupro(maps, masks),
    }
    rivals: dict[str, tuple[str, Callable[[], float]]] = {
        "auroc": ("scikit-learn", lambda: float(roc_auc_score(labels, scores))),
    }
    times: dict[tuple[str, str], list[float]] = {}
    peaks: dict[tuple[str, str], float] = {}
    found: dict[tuple[str, str], float] = {}
    for _ in range(arguments.passes):
        for metric, call in ours.items():
            if (rivals[metric][0] if metric in rivals else "anomalib") not in arguments.contenders:
                continue
            peaks[metric, "pydefect"] = peak_mib(call)
            for _ in range(arguments.rounds):
                seconds, found[metric, "pydefect"] = seconds_of(call)
                times.setdefault((metric, "pydefect"), []).append(seconds)
            if metric in rivals:
                name, rival = rivals[metric]
                seconds, found[metric, name] = seconds_of(rival)
                times.setdefault((metric, name), []).append(seconds)
        if python and "anomalib" in arguments.contenders:
            task = {"what": "metrics", "threads": arguments.threads}
            theirs = peer_times(
                python, task | {"maps": torch.from_numpy(maps), "masks": torch.from_numpy(masks)}
            )
            machine.peers |= theirs["versions"]
            times.setdefault(("aupro", "anomalib"), []).extend(theirs["times"]["aupro"])
            peaks["aupro", "anomalib"] = theirs["peak_mib"]["aupro"]
            found["aupro", "anomalib"] = theirs["found"]["aupro"]
    for (metric, name), measured in times.items():
        difference = abs(found[metric, name] - found[metric, "pydefect"])
        # anomalib adds up in float32; the others agree to 1e-9.
        if difference > (1e-3 if name == "anomalib" else 1e-9):
            raise RuntimeError(f"{metric}: {name} finds {found[metric, name]}, off by {difference}")
        note = "" if name == "pydefect" else f"differs by {difference:.1e}"
        line = record(f"{metric} {size}", name, arguments.threads, measured, note)
        if (metric, name) in peaks:
            line["extra_info"]["peak_mib"] = peaks[metric, name]
        yield line


def step_seconds(method: str, files: list[Path], settings: dict[str, Any], rounds: int) -> list[float]:
    """Seconds of every training step of a fit, with its penalty image, after one that does not count."""
    ends: list[float] = []
    train_step = Trainer._train_step

    def timed(trainer: Trainer, penalty: torch.Tensor | None) -> torch.Tensor:
        losses = train_step(trainer, penalty)
        ends.append(time.perf_counter())
        return losses

    with unittest.mock.patch.object(Trainer, "_train_step", timed):
        pydefect.fit(files, method=method, **{**settings, "steps": rounds + 1})
    return [end - began for began, end in pairwise(ends)]


def dual_ae(arguments: argparse.Namespace, python: Path | None) -> Iterator[dict[str, Any]]:
    """Time scoring and training steps, everybody in every pass."""
    dataset = read_dataset(arguments.data)
    files = [sample.image for sample in dataset.train][:4]
    images = read_inputs([sample.image for sample in dataset.test[: max(arguments.batches)]], arguments.size)
    contenders = [
        (f"pydefect {method} {precision}", method, precision)
        for method in ("efficientad", "dual_ae")
        for precision in ("float32", "bfloat16")
    ]
    times: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        teacher = Path(folder) / "teacher.safetensors"
        save_tensors(teacher, PDN().state_dict(), {})
        common = {"teacher": teacher, "resize": arguments.size, "held_out_share": 0, "progress": False}
        common |= {"padding": False, "optimiser": "adam", "learning_rate": 1e-4}  # as the peer
        settings = {name: {**common, "precision": precision} for name, _, precision in contenders}
        detectors = {
            name: pydefect.fit(files, method=method, steps=1, **settings[name])
            for name, method, _ in contenders
        }
        for _ in range(arguments.passes):
            for name, method, _ in contenders:
                found = step_seconds(method, files, settings[name], arguments.rounds)
                times.setdefault(("step", name), []).extend(found)
                for batch in arguments.batches:
                    detectors[name].predict(images[:batch])
                    for _ in range(arguments.rounds):
                        began = time.perf_counter()
                        detectors[name].predict(images[:batch])
                        seconds = time.perf_counter() - began
                        times.setdefault((f"score batch {batch}", name), []).append(seconds)
            if python is None:
                continue
            peer = "EfficientAD-S"
            task = {
                "models": [peer],
                "train": read_inputs(files, arguments.size),
                "images": images,
                "batches": arguments.batches,
                "rounds": arguments.rounds,
                "threads": arguments.threads,
            }
            stepped = peer_times(python, {**task, "what": "efficientad step"})
            times.setdefault(("step", peer), []).extend(stepped["times"]["step"])
            scored = peer_times(python, {**task, "what": "score"})
            machine.peers |= scored["versions"]
            for batch in arguments.batches:
                measured = scored["times"][peer][str(batch)]
                times.setdefault((f"score batch {batch}", peer), []).extend(measured)
    for (what, name), measured in times.items():
        yield record(f"dual_ae {what}", name, arguments.threads, measured, f"{arguments.size} px")


WHAT = {"score": score, "fit": fit, "dual_ae": dual_ae, "metrics": metrics}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=list(WHAT))
    parser.add_argument("--data", type=Path, help="a product's folder: mvtec_ad/bottle; not for metrics")
    parser.add_argument("--backbone", default="resnet18", choices=["resnet18", "wide_resnet50_2"])
    parser.add_argument("--weights", default="random", help="a file with torchvision's names, or 'random'")
    parser.add_argument(
        "--size", type=int, default=256, help="side of the network's input, or of maps, in pixels"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passes", type=int, default=2, help="times that everybody's rounds are repeated")
    parser.add_argument(
        "--images", type=int, help="fit on so many of the training images only, or measure so many maps"
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=["pydefect", "CFA", "scikit-learn", "anomalib"],
        help="of 30 epochs: pydefect, CFA, also 'pydefect paper preset'; of metrics: scikit-learn, anomalib",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="the peers' environment")
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    if arguments.data is None and arguments.what != "metrics":
        parser.error(f"{arguments.what} needs --data")
    torch.set_num_threads(arguments.threads)
    # Metrics take theirs from here.
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    python = arguments.peers.absolute() / "bin" / "python"
    if not python.exists():
        print(f"no peers in {arguments.peers}: only pydefect is timed", file=sys.stderr)
        python = None
    machine.measure_limits(arguments.threads)
    results = []
    for line in WHAT[arguments.what](arguments, python):
        results.append(line)
        name, milliseconds = line["extra_info"]["contender"], 1e3 * line["stats"]["median"]
        print(f"{line['group']:<40} {name:<24} {milliseconds:>10.1f} ms")
    machine.measure_again()
    run = {
        "datetime": datetime.now(timezone.utc).isoformat(),
        "machine_info": {"cpu": machine.cpu_name(), "system": sys.platform, **machine.facts()},
        "benchmarks": results,
    }
    arguments.out.write_text(json.dumps(run, indent=1) + "\n")


if __name__ == "__main__":
    main()
