"""PaDiM, PatchCore and CFA beside anomalib's, with the same images and the same backbone weights.

    python benchmarks/against_anomalib.py --data mvtec_ad/bottle --weights resnet18.npz --peers build/peers

Both sides get the same tensors (resized to 256, cropped to 224 unless told otherwise) and the settings of
anomalib's defaults, with a coreset of 1 %, a few epochs of CFA, and the same random channels for PaDiM; image
and pixel AUROC of both come from scikit-learn, over the network's input. The lines are Markdown.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

import pydefect
from pydefect.backbones import build_backbone
from pydefect.data.images import open_images
from pydefect.data.layouts import Dataset, Sample, read_dataset, read_mask
from pydefect.detector import batches
from pydefect.preprocessing import Preprocessing

METHODS = ("padim", "patchcore", "cfa")
# Largest difference of AUROC, in points, that passes.
ALLOWED = 0.5


def read_inputs(samples: tuple[Sample, ...], preprocessing: Preprocessing) -> torch.Tensor:
    """[N, 3, H, W] as every network takes it."""
    files = [sample.image for sample in samples]
    return torch.cat([tensors for _, tensors in batches(open_images(files), preprocessing, 8)])


def read_masks(dataset: Dataset, preprocessing: Preprocessing) -> np.ndarray:
    """[N, H, W] bool at the network's input."""
    sizes = [image.pixels.shape[:2] for image in open_images([sample.image for sample in dataset.test])]
    return np.stack(
        [
            preprocessing.mask_to_input(read_mask(sample, size))
            for sample, size in zip(dataset.test, sizes, strict=True)
        ]
    )


def auroc(
    labels: np.ndarray, masks: np.ndarray, scores: torch.Tensor, maps: torch.Tensor
) -> tuple[float, float]:
    """Image and pixel AUROC in percent."""
    image = roc_auc_score(labels, scores.numpy())
    return 100 * image, 100 * roc_auc_score(masks.ravel(), maps.numpy().ravel())


def ours(method: str, files: list[Path], settings: dict[str, Any], test: torch.Tensor) -> dict[str, Any]:
    """Fit and score with pydefect."""
    detector = pydefect.fit(files, method=method, calibration_folds=0, progress=False, **settings)
    found = [detector.predict(batch) for batch in test.split(8)]
    return {
        "detector": detector,
        "scores": torch.cat([scores for scores, _ in found]),
        "maps": torch.cat([maps for _, maps in found]),
    }


def theirs(python: Path, task: dict[str, Any]) -> dict[str, Any]:
    """Let the peers' environment do the same."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(task, Path(folder) / "task.pt")
        script = Path(__file__).absolute().parent / "peers" / "fit_anomalib.py"
        subprocess.run(
            [python, script, "task.pt", "scores.pt"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(script.parents[1])},
            check=True,
        )
        found: dict[str, Any] = torch.load(Path(folder) / "scores.pt", weights_only=True)
        return found


def main() -> None:
    """Fit both sides and print a line a method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a category's folder")
    parser.add_argument("--weights", required=True, help="a file with torchvision's names")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="the peers' environment")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--images", type=int, help="fit on the first so many images; default: all")
    parser.add_argument("--resize", type=int, default=256)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--coreset-ratio", type=float, default=0.01)
    parser.add_argument("--epochs", type=int, default=2, help="of CFA")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    dataset = read_dataset(arguments.data)
    preprocessing = Preprocessing.create(arguments.resize, arguments.crop)
    chosen = dataset.train[: arguments.images]
    train, test = read_inputs(chosen, preprocessing), read_inputs(dataset.test, preprocessing)
    masks = read_masks(dataset, preprocessing)
    labels = np.array([sample.label == 1 for sample in dataset.test])
    common = {
        "backbone": arguments.backbone,
        "weights": arguments.weights,
        "backbone_precision": "float32",
        "resize": arguments.resize,
        "crop": arguments.crop,
        "seed": arguments.seed,
    }
    own: dict[str, dict[str, Any]] = {
        "padim": {},
        "patchcore": {"coreset_ratio": arguments.coreset_ratio},
        "cfa": {"epochs": arguments.epochs},
    }
    files = [sample.image for sample in chosen]
    task = {
        "backbone": arguments.backbone,
        "weights": build_backbone(arguments.backbone, arguments.weights).state_dict(),
        "train": train,
        "test": test,
        "coreset_ratio": arguments.coreset_ratio,
        "epochs": arguments.epochs,
        "seed": arguments.seed,
        "threads": arguments.threads,
    }
    python = arguments.peers.absolute() / "bin" / "python"
    print(f"{dataset.name}, {len(files)} training images, image / pixel AUROC in percent\n")
    print("| method | pydefect | anomalib | largest difference |\n|---|---|---|---|", flush=True)
    largest = 0.0
    for name in arguments.methods:
        found = ours(name, files, {**common, **own[name]}, test)
        if name == "padim":
            task["channels"] = found["detector"].model.channels
        peer = theirs(python, {**task, "method": name})
        mine = auroc(labels, masks, found["scores"], found["maps"])
        other = auroc(labels, masks, peer["scores"], peer["maps"])
        difference = max(abs(one - two) for one, two in zip(mine, other, strict=True))
        largest = max(largest, difference)
        note = f"{name}, {arguments.epochs} epochs" if name == "cfa" else name
        figures = " | ".join(f"{image:.2f} / {pixel:.2f}" for image, pixel in (mine, other))
        print(f"| {note} | {figures} | {difference:.2f} |", flush=True)
    sys.exit(0 if largest <= ALLOWED else 1)


if __name__ == "__main__":
    main()
