"""How much of a backbone's features a teacher explains, on procedural and on real normal images.

    python benchmarks/teacher.py --weights resnet18.npz --images bottle/train/good --images ... TEACHER ...
    python benchmarks/teacher.py --sheet docs/textures.jpg

A teacher is the path of a file, or ``shipped``. Teacher and source are compared after both have been shifted
and scaled per channel to mean 0 and deviation 1 over the images measured, because the dual autoencoder
normalises a teacher by its statistics over the training images. Explained is then the square of the two's
correlation, mean over the channels; beside it stands the median correlation of a channel with its source.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from pydefect.backbones import build_backbone
from pydefect.data.images import list_image_files, read_image
from pydefect.data.textures import texture
from pydefect.dual_ae.teacher import BackboneTeacher, load_teacher
from pydefect.preprocessing import Preprocessing

PROCEDURAL_SEED = 2_000_000_000  # no run draws these


@torch.inference_mode()
def measure(teacher: torch.nn.Module, source: BackboneTeacher, images: Tensor) -> dict[str, float]:
    """Explained variance and correlation on the inner cells (those of an unpadded PDN)."""
    answers = torch.cat([teacher(part) for part in images.split(4)]).permute(1, 0, 2, 3).flatten(1)
    targets = torch.cat([source(part) for part in images.split(4)]).permute(1, 0, 2, 3).flatten(1)
    answers, targets = (
        (maps - maps.mean(1, keepdim=True)) / maps.std(1, keepdim=True).clamp_min(1e-6)
        for maps in (answers, targets)
    )
    correlation = (answers * targets).mean(1)
    # The best multiple of a normalised answer explains the square of the correlation.
    explained = correlation.clamp_min(0).square()
    return {
        "layer2": round(float(explained[:128].mean()), 4),
        "layer3": round(float(explained[128:].mean()), 4),
        "both": round(float(explained.mean()), 4),
        "median_correlation": round(float(correlation.median()), 4),
    }


def draw_sheet(out: Path, rows: int = 5, columns: int = 12, edge: int = 128) -> None:
    """Write the first procedural images of a run of seed 0 as one picture."""
    images = [texture((0, 0, number), 2 * edge) for number in range(rows * columns)]
    small = [cv2.resize(image, (edge, edge), interpolation=cv2.INTER_AREA) for image in images]
    sheet = np.concatenate(
        [np.concatenate(small[row * columns : (row + 1) * columns], axis=1) for row in range(rows)]
    )
    cv2.imwrite(str(out), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teachers", nargs="*", metavar="TEACHER")
    parser.add_argument("--source", default="resnet18")
    parser.add_argument("--weights", default="imagenet")
    parser.add_argument("--images", action="append", default=[], type=Path, metavar="FOLDER")
    parser.add_argument("--count", type=int, default=24, help="images of each kind")
    parser.add_argument("--sheet", type=Path, metavar="JPG", help="draw docs/textures.jpg")
    arguments = parser.parse_args()
    if arguments.sheet:
        draw_sheet(arguments.sheet)
    if not arguments.teachers:
        return
    source = BackboneTeacher(build_backbone(arguments.source, arguments.weights))
    preprocessing = Preprocessing.create(resize=256)
    sets = {
        "procedural": [texture((PROCEDURAL_SEED, number), 256) for number in range(arguments.count)],
    }
    for folder in arguments.images:
        files = list_image_files(folder)
        chosen = np.linspace(0, len(files) - 1, min(arguments.count, len(files))).round().astype(int)
        name = next(part for part in reversed(folder.parts) if part not in ("good", "train", "validation"))
        sets[name] = [read_image(files[number]) for number in chosen]
    for name, pixels in sets.items():
        images = torch.stack([preprocessing(image) for image in pixels])
        for path in arguments.teachers:
            found = measure(load_teacher(path), source, images)
            label = Path(path).name
            print(json.dumps({"images": name, "count": len(images), "teacher": label, **found}), flush=True)


if __name__ == "__main__":
    main()
