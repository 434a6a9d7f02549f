"""What defective images among the good ones do to a threshold, and whether a fit finds them.

    python benchmarks/contaminated.py run --weights resnet18.npz --data mvtec_ad/bottle --out spoilt.jsonl
    python benchmarks/contaminated.py render spoilt.jsonl

``--data`` may be repeated. Of every category a seed draws 60 training images and 3 of the defective test
images. Each method is fitted on the 60, and on the 63; both fits are measured on all other defective test
images. ``run`` leaves out what the output file holds already, so that it can be interrupted. A fit has found
a planted image that its warning names.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import pydefect
from pydefect.data import Image, read_dataset
from pydefect.data.images import read_image

METHODS = ("conpatch", "patchcore", "padim")
GOOD, PLANTED, RESIZE = 60, 3, 128


@dataclass(frozen=True)
class Fit:
    """One fit: ``planted`` defective images in it, ``warned`` of so many others, and ``found`` of these."""

    category: str
    method: str
    seed: int
    planted: int
    found: int
    warned: int
    highest: int
    recall: float


def measured(category: Path, method: str, seed: int, planted: int, weights: str) -> Fit:
    """Fit on good images and `planted` defective ones, and score the defective images that are left."""
    dataset = read_dataset(category)
    draw = np.random.default_rng((seed, 7))
    good = [dataset.train[index].image for index in draw.permutation(len(dataset.train))[:GOOD]]
    defective = [sample.image for sample in dataset.test if sample.label]
    order = draw.permutation(len(defective))
    # Names of their own: files in different folders are called alike.
    images = [Image(read_image(path), f"good-{number:02d}", path) for number, path in enumerate(good)]
    images += [
        Image(read_image(defective[index]), f"planted-{index}", defective[index]) for index in order[:planted]
    ]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        detector = pydefect.fit(
            images, method=method, weights=weights, seed=seed, resize=RESIZE, progress=False
        )
    named = [str(one.message) for one in said if "far above the rest" in str(one.message)]
    result = detector.score([defective[index] for index in order[PLANTED:]], progress=False)
    decisions = result.is_defective
    assert decisions is not None
    highest = [name for name, _ in detector.training["held_out_scores"][:PLANTED]]
    return Fit(
        category.name,
        method,
        seed,
        planted,
        found=sum(text.count("planted-") for text in named),
        warned=sum(text.count("good-") for text in named),
        highest=sum(name.startswith("planted-") for name in highest),
        recall=round(float(decisions.mean()), 4),
    )


def read(path: Path) -> list[Fit]:
    """Read what ``run`` wrote."""
    return [Fit(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def run(categories: list[Path], seeds: int, weights: str, out: Path) -> None:
    """Measure what the file does not hold yet."""
    done = {(fit.category, fit.method, fit.seed, fit.planted) for fit in read(out)}
    plan = [
        (category, method, seed, planted)
        for category in categories
        for method in METHODS
        for seed in range(seeds)
        for planted in (0, PLANTED)
        if (category.name, method, seed, planted) not in done
    ]
    for category, method, seed, planted in tqdm(plan, unit="fit"):
        with out.open("a") as file:
            file.write(json.dumps(asdict(measured(category, method, seed, planted, weights))) + "\n")


def rows(fits: list[Fit]) -> Iterator[dict[str, Any]]:
    """Summarise the fits of a category and method, and of all categories."""
    categories = sorted({fit.category for fit in fits})
    for method in METHODS:
        for category in [*categories, "all"]:
            some = [fit for fit in fits if fit.method == method and category in (fit.category, "all")]
            clean = [fit for fit in some if not fit.planted]
            spoilt = [fit for fit in some if fit.planted]
            if clean and spoilt:
                yield {
                    "method": method,
                    "category": category,
                    "warned without any": f"{sum(fit.warned > 0 for fit in clean)} of {len(clean)}",
                    "warned of them": f"{sum(fit.found > 0 for fit in spoilt)} of {len(spoilt)}",
                    "among the 3 highest": f"{sum(fit.highest for fit in spoilt)} of {PLANTED * len(spoilt)}",
                    "recall without": f"{100 * statistics.mean(fit.recall for fit in clean):.0f} %",
                    "recall with": f"{100 * statistics.mean(fit.recall for fit in spoilt):.0f} %",
                }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--data", action="append", required=True, type=Path, metavar="CATEGORY")
    running.add_argument("--weights", default="imagenet")
    running.add_argument("--seeds", type=int, default=3)
    running.add_argument("--out", required=True, type=Path)
    rendering = commands.add_parser("render")
    rendering.add_argument("results", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.data, arguments.seeds, arguments.weights, arguments.out)
        return
    table = list(rows(read(arguments.results)))
    print("| " + " | ".join(table[0]) + " |")
    print("|---" * len(table[0]) + "|")
    for row in table:
        print("| " + " | ".join(row.values()) + " |")


if __name__ == "__main__":
    main()
