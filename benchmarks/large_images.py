"""Small defects on large images: what the network's input size does to accuracy, time and memory.

    python benchmarks/large_images.py run --data mvtec_ad/bottle --weights resnet18.npz --out large.jsonl
    python benchmarks/large_images.py render large.jsonl

A large image is a tray of 4 x 4 products, each at its own resolution: 24 of good training images, 10 of good
test images, and one for every defective test image, whose other fifteen are good. Every size is fitted and
evaluated in a process of its own; ``run`` leaves out what the output file holds already.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from peak_memory import peak_mib
from tqdm import tqdm

import pydefect
from pydefect.data import read_dataset
from pydefect.data.images import read_image
from pydefect.data.layouts import read_mask

SIDE, TRAINING, GOOD = 4, 24, 10
SIZES = (256, 512, 1024)


@dataclass(frozen=True)
class Row:
    """One size, fitted and evaluated."""

    category: str
    pixels: int
    resize: int
    max_bank_size: int
    centres: int
    threads: int
    precision: str
    image_auroc: float
    pixel_auroc: float
    pixel_ap: float
    aupro: float
    false_alarms: str
    missed: str
    fit_seconds: float
    score_ms: float
    fit_peak_mib: float
    score_peak_mib: float


def tray(cells: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Put SIDE x SIDE pictures of one size side by side."""
    return np.concatenate([np.concatenate(cells[i : i + SIDE], 1) for i in range(0, SIDE * SIDE, SIDE)])


def draw(category: Path, root: Path) -> None:
    """Write the trays, in MVTec AD's layout."""
    dataset, cells = read_dataset(category), SIDE * SIDE
    random = np.random.default_rng(0)
    good = {
        "train": [read_image(sample.image) for sample in dataset.train],
        "test": [read_image(sample.image) for sample in dataset.test if not sample.label],
    }

    def drawn(part: str) -> list[np.ndarray[Any, Any]]:
        return [good[part][index] for index in random.integers(len(good[part]), size=cells)]

    def write(path: Path, pixels: np.ndarray[Any, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not cv2.imwrite(str(path), pixels[..., ::-1] if pixels.ndim == 3 else pixels):
            raise OSError(f"{path} could not be written")

    for part, count in (("train", TRAINING), ("test", GOOD)):
        for number in range(count):
            write(root / part / "good" / f"{number:03}.png", tray(drawn(part)))
    for number, sample in enumerate(sample for sample in dataset.test if sample.label):
        pictures, at = drawn("test"), int(random.integers(cells))
        pictures[at] = read_image(sample.image)
        masks = [np.zeros(picture.shape[:2], np.uint8) for picture in pictures]
        masks[at] = read_mask(sample, pictures[at].shape[:2]).astype(np.uint8) * 255
        write(root / "test" / sample.defect / f"{number:03}.png", tray(pictures))
        write(root / "ground_truth" / sample.defect / f"{number:03}_mask.png", tray(masks))


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a call returns, its seconds, and the MiB that it takes at most."""
    returned: list[Any] = []
    began = time.perf_counter()
    peak = peak_mib(lambda: returned.append(call()))
    return returned[0], time.perf_counter() - began, peak


def measured(root: Path, category: str, resize: int, bank: int, weights: str, threads: int) -> Row:
    """Fit and evaluate at one size; the model's own threshold decides."""
    torch.set_num_threads(threads)
    settings = {"resize": resize, "max_bank_size": bank}
    detector, fit_seconds, fit_peak = timed(
        lambda: pydefect.fit(root, weights=weights, seed=0, progress=False, **settings)
    )
    evaluation, _, score_peak = timed(lambda: pydefect.evaluate(detector, root, progress=False))
    good = evaluation.images - evaluation.defective
    image = read_image(next((root / "train" / "good").iterdir()))
    return Row(
        category=category,
        pixels=image.shape[0],
        resize=resize,
        max_bank_size=bank,
        centres=len(detector.bank.centres),
        threads=threads,
        precision=detector.configuration["backbone_precision"],
        image_auroc=round(100 * evaluation.image.auroc, 2),
        pixel_auroc=round(100 * evaluation.pixel.auroc, 2),
        pixel_ap=round(100 * evaluation.pixel.average_precision, 2),
        aupro=round(100 * evaluation.pixel_aupro, 2),
        false_alarms=f"{evaluation.false_alarms} of {good}",
        missed=f"{evaluation.misses} of {evaluation.defective}",
        fit_seconds=round(fit_seconds, 1),
        score_ms=round(1000 * evaluation.seconds_per_image, 1),
        fit_peak_mib=fit_peak,
        score_peak_mib=score_peak,
    )


def read(path: Path) -> list[Row]:
    """Read what ``run`` wrote."""
    return [Row(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def run(category: Path, sizes: list[int], bank: int, weights: str, threads: int, out: Path) -> None:
    """Measure what the file does not hold yet."""
    done = {(row.category, row.resize, row.max_bank_size, row.threads) for row in read(out)}
    wanted = [size for size in sizes if (category.name, size, bank, threads) not in done]
    with tempfile.TemporaryDirectory() as folder:
        draw(category, Path(folder))
        for size in tqdm(wanted, unit="size"):
            # A process each: what one leaves in the heap would be another's.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row = pool.apply(measured, (Path(folder), category.name, size, bank, weights, threads))
            with out.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--data", required=True, type=Path, metavar="CATEGORY")
    running.add_argument("--weights", default="imagenet")
    running.add_argument("--sizes", default=",".join(map(str, SIZES)), help="sides of the network's input")
    running.add_argument("--max-bank-size", type=int, default=4096, help="centres at most")
    running.add_argument("--threads", type=int, default=1)
    running.add_argument("--out", required=True, type=Path)
    rendering = commands.add_parser("render")
    rendering.add_argument("results", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "run":
        sizes = [int(size) for size in arguments.sizes.split(",")]
        run(
            arguments.data,
            sizes,
            arguments.max_bank_size,
            arguments.weights,
            arguments.threads,
            arguments.out,
        )
        return
    columns = [
        "`resize`",
        "centres",
        "images",
        "pixels, AP",
        "false alarms",
        "missed",
        "fit",
        "an image",
        "memory",
    ]
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for row in read(arguments.results):
        cells = (
            str(row.resize),
            f"{row.centres:,}",
            f"{row.image_auroc:.2f}",
            f"{row.pixel_auroc:.2f}, {row.pixel_ap:.1f}",
            row.false_alarms,
            row.missed,
            f"{row.fit_seconds:.0f} s",
            f"{row.score_ms / 1000:.2f} s",
            f"{row.fit_peak_mib / 1024:.1f} GiB",
        )
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
