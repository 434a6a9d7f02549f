"""Run folders: all that an evaluation said about every test image, kept for reports and later analysis.

::

    RUN/evaluation.json   the metrics, and what they were measured with: data set, configuration,
                          calibration, versions, machine, times
    RUN/images.jsonl      one line a test image: its label and masks, score, decision, seconds
    RUN/maps.npz          the anomaly maps at the network input's size, and their parts where a method has any

A map is kept as float16 times a power of two of its own, chosen so that its largest value fills the range.
The relative error of a score is then at most 2**-11 (of scores below 2**-28 of the map's largest one the
absolute error is at most 2**-39 of that). Maps at the original size are interpolated from these, and their
relative error is bounded by the same.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pydefect.buildinfo import build_info, versions
from pydefect.calibration import Calibration
from pydefect.data.layouts import GOOD, Dataset, Sample
from pydefect.detector import Detector, OnError
from pydefect.errors import InputError
from pydefect.evaluation import Evaluation, evaluate
from pydefect.metrics import Curve
from pydefect.persistence import folder_written_atomically, write_atomically
from pydefect.places import check_not_current, check_writable
from pydefect.preprocessing import Preprocessing
from pydefect.scoring import Kind, Result, ScoredImage

__all__ = ["Run", "RunImage", "is_run", "machine", "read_run", "write_run"]

FORMAT = 1
EVALUATION, IMAGES, MAPS = "evaluation.json", "images.jsonl", "maps.npz"
# What a later run may take away; the page is pydefect.report's, and the part of one if that was killed.
_REPLACED = (EVALUATION, IMAGES, MAPS, "report.html")
_PART_OF_A_PAGE = re.compile(r"\.report\.html\.[a-z0-9_]{8}")

_LARGEST_EXPONENT = (
    15  # a map's largest value becomes at least 2**14 and less than 2**15: float16 ends at 65504
)


@dataclass(frozen=True)
class RunImage:
    """What a run says about one test image.

    Attributes
    ----------
    name
        Its path below the data set's root, with ``/`` between the folders; whole where it lies elsewhere.
    defect
        ``"good"`` or the name of the defect.
    label
        0 good, 1 defective.
    image_score
        >= 0, larger is more anomalous.
    is_defective
        The decision at the image threshold; None without one.
    kind
        What the defect is, of methods that tell: see :attr:`pydefect.Result.kind`.
    p_value
        Probability that a normal image scores as high; None without held-out normal images.
    masks
        The ground truth's files, named like `name`; their union marks the defect.
    size
        (height, width) in pixels.
    scored_box
        (top, left, bottom, right) in original pixels, half open.
    seconds
        Reading, scoring and mapping back; of what a batch took together, an equal share.
    map_exponents
        For every map the power of two that the numbers in ``maps.npz`` are to be multiplied with.
    """

    name: str
    defect: str
    label: int
    image_score: float
    is_defective: bool | None
    kind: Kind | None
    p_value: float | None
    masks: tuple[str, ...]
    size: tuple[int, int]
    scored_box: tuple[int, int, int, int]
    seconds: float
    map_exponents: Mapping[str, int]


@dataclass(frozen=True)
class Run:
    """A run folder that has been read; maps are read when they are asked for.

    Attributes
    ----------
    folder
        The run folder.
    root
        The data set's folder: where it was, or where the reader was told that it is now.
    images
        In the order in which they were scored.
    facts
        ``evaluation.json``: ``evaluation`` (:meth:`pydefect.evaluation.Evaluation.to_dict`), ``dataset``
        (name, layout, root, and the names of the training, validation and test images), ``curves``,
        ``method``, ``calibration``, ``preprocessing``, ``training`` (what the fit found), ``versions``,
        ``machine``, ``times``, ``maps`` (their names).
    """

    folder: Path
    root: Path
    images: tuple[RunImage, ...]
    facts: dict[str, Any]

    @property
    def evaluation(self) -> dict[str, Any]:
        """The metrics under flat names: image_auroc, pixel_auroc, ..."""
        evaluation: dict[str, Any] = self.facts["evaluation"]
        return evaluation

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """Over pixels; see :attr:`pydefect.evaluation.Evaluation.curves`."""
        return {name: _from_curve(values) for name, values in self.facts["curves"].items()}

    @property
    def map_names(self) -> tuple[str, ...]:
        """``"anomaly"`` first, then the parts of which the method makes it."""
        return tuple(self.facts["maps"])

    @cached_property
    def calibration(self) -> Calibration | None:
        """The detector's thresholds; None: it scored without deciding."""
        values = self.facts["calibration"]
        return None if values is None else Calibration.from_dict(values)

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """From pixels to network input and back."""
        return Preprocessing.from_dict(self.facts["preprocessing"])

    @cached_property
    def dataset(self) -> Dataset:
        """The data set below :attr:`root`, as it was then; its test part holds what was scored."""
        facts = self.facts["dataset"]
        train, validation = (
            tuple(Sample(self.root / name, GOOD) for name in facts[part]) for part in ("train", "validation")
        )
        test = tuple(self.sample(index) for index in range(len(self.images)))
        return Dataset(facts["name"], facts["layout"], self.root, train, validation, test)

    def sample(self, index: int) -> Sample:
        """The image's files below :attr:`root`, as :func:`pydefect.data.layouts.read_mask` takes them."""
        image = self.images[index]
        return Sample(self.root / image.name, image.defect, tuple(self.root / mask for mask in image.masks))

    def network_map(self, index: int, name: str = "anomaly") -> NDArray[np.float32]:
        """Read one map at the network input's size.

        Parameters
        ----------
        index
            Of the image.
        name
            One of :attr:`map_names`.

        Returns
        -------
        numpy.ndarray
            [h, w] float32.

        Raises
        ------
        InputError
            There is no map of this name, or the file is damaged.
        """
        if name not in self.map_names:
            raise InputError(f"name: {name!r} is no map of this run; it has {', '.join(self.map_names)}")
        try:
            stored = self._maps[_key(name, index)]
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(f"run: {str(self.folder / MAPS)!r} is damaged: {error}") from error
        exponent = self.images[index].map_exponents[name]
        values: NDArray[np.float32] = np.ldexp(stored.astype(np.float32), exponent)
        return values

    @cached_property
    def _maps(self) -> Any:
        return np.load(self.folder / MAPS, allow_pickle=False)

    def map(self, index: int, name: str = "anomaly") -> NDArray[np.float32]:
        """Read one map at the image's original size; see :meth:`network_map` for the parameters.

        Returns
        -------
        numpy.ndarray
            [H, W] float32; 0 outside the scored box.
        """
        network_map = torch.from_numpy(self.network_map(index, name))
        return self.preprocessing.to_original(network_map, self.images[index].size).numpy()


def write_run(
    detector: Detector,
    dataset: Dataset,
    out: str | os.PathLike[str],
    *,
    batch_size: int = 8,
    on_error: OnError = "raise",
    progress: bool = False,
) -> Evaluation:
    """Measure a detector on labelled test images, and keep all that it said about them in a folder.

    Parameters
    ----------
    detector, dataset, batch_size, on_error, progress
        See :func:`pydefect.evaluate`.
    out
        The run folder: complete or absent, even if the program is killed. An earlier run is replaced.

    Returns
    -------
    Evaluation
        As :func:`pydefect.evaluate` gives it.

    Raises
    ------
    InputError
        See :func:`pydefect.evaluate`; or `out` is a file or a folder with something else in it.
    """
    folder = Path(out)
    check_place(folder)
    began, started = time.perf_counter(), datetime.now(timezone.utc)
    images: list[RunImage] = []
    with folder_written_atomically(folder) as unfinished:
        with zipfile.ZipFile(unfinished / MAPS, "w") as maps:

            def keep(sample: Sample, scored: ScoredImage) -> None:
                exponents = {
                    name: _write_map(maps, _key(name, len(images)), values)
                    for name, values in scored.network_maps.items()
                }
                images.append(_run_image(sample, scored, dataset.root, detector.calibration, exponents))

            evaluation = evaluate(
                detector,
                dataset,
                batch_size=batch_size,
                on_error=on_error,
                progress=progress,
                on_scored=keep,
                with_curves=True,
            )
        with (unfinished / MAPS).open("rb") as file:
            os.fsync(file.fileno())  # as the files below: whole after a power cut
        lines = [json.dumps(asdict(image), allow_nan=False) for image in images]
        write_atomically(unfinished / IMAGES, ("\n".join(lines) + "\n").encode())
        facts = {
            "format": FORMAT,
            "evaluation": evaluation.to_dict(),
            "curves": {name: _curve_values(curve) for name, curve in evaluation.curves.items()},
            "dataset": _dataset_facts(dataset),
            "method": detector.method,
            "calibration": None if detector.calibration is None else detector.calibration.to_dict(),
            "preprocessing": detector.preprocessing.to_dict(),
            "training": {name: value for name, value in detector.training.items() if name != "files"},
            "versions": versions(),
            "machine": machine(detector.device),
            "times": {
                "started": started.isoformat(timespec="seconds"),
                "evaluation_seconds": time.perf_counter() - began,
            },
            "maps": list(images[0].map_exponents),
        }
        write_atomically(
            unfinished / EVALUATION, (json.dumps(facts, indent=2, allow_nan=False) + "\n").encode()
        )
    return evaluation


def read_run(folder: str | os.PathLike[str], *, data: str | os.PathLike[str] | None = None) -> Run:
    """Read a run folder.

    Parameters
    ----------
    folder
        What :func:`write_run` wrote.
    data
        The data set's folder, where it is no longer at the place that the run was made from.

    Returns
    -------
    Run

    Raises
    ------
    InputError
        The folder is no run folder, is damaged, or of a newer version of pydefect.
    """
    folder = Path(folder)
    if not is_run(folder):
        what = "is missing" if not folder.exists() else f"holds no {EVALUATION}"
        raise InputError(
            f"run: {str(folder)!r} {what}; a folder that `pydefect evaluate --out` wrote is needed"
        )
    try:
        facts = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise InputError(
                f"run: {str(folder)!r} has format {facts['format']!r}; this version of pydefect reads "
                f"{FORMAT}"
            )
        lines = (folder / IMAGES).read_text(encoding="utf-8").splitlines()
        images = tuple(_from_row(json.loads(line)) for line in lines)
        root = Path(facts["dataset"]["root"] if data is None else data)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"run: {str(folder)!r} is damaged: {type(error).__name__}: {error}") from error
    return Run(folder, root, images, facts)


def is_run(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder looks like what :func:`write_run` writes."""
    return (Path(folder) / EVALUATION).is_file()


def check_place(folder: Path) -> None:
    """Refuse a place where a run would replace something else.

    Raises
    ------
    InputError
        `folder` is a file, a link, the current folder, a folder that is neither empty nor a run, or a run
        with something else in it; or it cannot be written or replaced there.
    """
    if folder.is_symlink():
        raise InputError(f"out: {str(folder)!r} is a link; name the folder itself")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"out: {str(folder)!r} is a file; a folder is needed")
    check_not_current(folder, "out")
    # A folder is replaced by renaming another: it is the one above that is written to.
    check_writable(folder.parent, "out")
    if folder.is_dir() and os.path.ismount(folder):
        raise InputError(f"out: {str(folder)!r} is where a file system is mounted; name a folder in it")
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    # The folder is replaced as a whole, with all that is in it.
    others = [path.name for path in found if not (_is_replaced(path.name) and path.is_file())]
    if others or (found and not _was_written_here(folder)):
        which = f" ({others[0]})" if others else ""
        raise InputError(
            f"out: {str(folder)!r} holds something else than a run{which}; name a new or empty folder, or an "
            "earlier run"
        )


def _is_replaced(name: str) -> bool:
    return name in _REPLACED or _PART_OF_A_PAGE.fullmatch(name) is not None


def _was_written_here(folder: Path) -> bool:
    try:
        facts = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(facts, dict) and {"format", "evaluation", "dataset"} <= facts.keys()


def _run_image(
    sample: Sample,
    scored: ScoredImage,
    root: Path,
    calibration: Calibration | None,
    exponents: Mapping[str, int],
) -> RunImage:
    assert sample.label is not None
    result = Result.collect([scored])
    if calibration is not None:
        result = result.calibrated(calibration)
    height, width = scored.anomaly_map.shape
    return RunImage(
        name=_name(sample.image, root),
        defect=sample.defect,
        label=sample.label,
        image_score=scored.image_score,
        is_defective=None if result.is_defective is None else bool(result.is_defective[0]),
        kind=None if result.kind is None else result.kind[0],
        p_value=None if result.p_values is None else float(result.p_values[0]),
        masks=tuple(_name(mask, root) for mask in sample.masks),
        size=(height, width),
        scored_box=scored.scored_box,
        seconds=scored.seconds,
        map_exponents=exponents,
    )


def _from_row(row: dict[str, Any]) -> RunImage:
    # JSON has lists only.
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in row.items()
    }
    known = {field.name for field in fields(RunImage)}
    if values.keys() != known:
        raise ValueError(f"{IMAGES} has the keys {sorted(values)}; they must be {sorted(known)}")
    return RunImage(**values)


def _curve_values(curve: Curve) -> dict[str, Any]:
    # The first threshold may be infinite, which JSON does not know.
    thresholds = [value if math.isfinite(value) else None for value in curve.thresholds.tolist()]
    return {"area": curve.area, "x": curve.x.tolist(), "y": curve.y.tolist(), "thresholds": thresholds}


def _from_curve(values: Mapping[str, Any]) -> Curve:
    thresholds = [math.inf if value is None else value for value in values["thresholds"]]
    return Curve(
        np.array(values["x"]), np.array(values["y"]), np.array(thresholds, dtype=np.float32), values["area"]
    )


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path.absolute())


def _key(name: str, index: int) -> str:
    return f"{name}/{index:05}"


def _write_map(maps: zipfile.ZipFile, key: str, values: NDArray[np.float32]) -> int:
    """Add a map to the file; return its power of two."""
    exponent = int(np.frexp(np.max(values))[1]) - _LARGEST_EXPONENT
    stored = np.ldexp(values, -exponent).astype(np.float16)
    # What np.load reads as an array of an .npz file, but written one after the other.
    with maps.open(f"{key}.npy", "w") as file:
        np.lib.format.write_array(file, stored, allow_pickle=False)
    return exponent


def _dataset_facts(dataset: Dataset) -> dict[str, Any]:
    def names(samples: tuple[Sample, ...]) -> list[str]:
        return [_name(sample.image, dataset.root) for sample in samples]

    return {
        "name": dataset.name,
        "layout": dataset.layout,
        "root": os.path.abspath(dataset.root),
        "train": names(dataset.train),
        "validation": names(dataset.validation),
        "test": names(dataset.test),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Return what times depend on, as JSON values."""
    is_cuda = device.type == "cuda"
    return {
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if is_cuda else None,
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "instruction_set": build_info().cpu_level_active,
    }
