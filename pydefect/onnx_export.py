"""Fitted detectors as ONNX files, for programs without Python and PyTorch.

PyTorch traces the detector's own scoring, from the pixels on. While it does, every operator of this package
is composed of PyTorch's (:func:`pydefect.ops._library.has_kernels`), and networks compute in float32 as they
were built, not in the forms that run fastest here.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pydefect.contexts import for_inference
from pydefect.detector import Detector
from pydefect.errors import InputError, PydefectError
from pydefect.persistence import write_atomically
from pydefect.places import check_file_writable
from pydefect.preprocessing import check_size
from pydefect.version import VERSION

__all__ = ["PACKAGES", "Pixels", "export_onnx"]

PACKAGES = ("onnxscript", "onnxruntime")
"""What exporting takes besides the package's own requirements."""

# The oldest that PyTorch writes: the more runtimes read it.
_OPSET = 18
# Protocol buffers hold no more, and what lies in several files cannot be replaced in one step.
_MOST_BYTES = 2**31 - 1
# An image of any size is traced with one that no network has: it must not look like a special case.
_EXAMPLE = (235, 267)
# Share of the largest value that the file may be off by: sums in another order differ by some 1e-5 of it, an
# operator that is understood otherwise by a multiple of this.
_TOLERANCE = 1e-3
# Of images to the network's size, said of whoever resizes before the file does.
_INTERPOLATION = "bilinear, antialiased, half-pixel centres"

Pixels: TypeAlias = Literal["auto", "uint8", "float32"]
"""Type of the pixels that a file takes."""


class _FromPixels(nn.Module):
    """A detector that takes pixels, and whose outputs have no names."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self._detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map [B, H, W, 3] uint8, or float32 in 0..1, to image scores [B] and the maps, [B, h, w] each."""
        scores, maps = self._detector.predict_maps(self._detector.preprocessing.apply(images))
        return scores, *maps.values()


def export_onnx(
    detector: Detector,
    path: str | os.PathLike[str],
    *,
    image_size: int | Sequence[int] | None = None,
    batch_size: int = 1,
    pixels: Pixels = "auto",
) -> None:
    """Write a fitted detector as an ONNX file; see :func:`pydefect.export_onnx`."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(
            f"{' and '.join(missing)}: not there, but needed to write ONNX; `pip install {' '.join(missing)}`"
        )
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size: {batch_size!r} given; allowed are whole numbers >= 1")
    if pixels not in ("auto", "uint8", "float32"):
        raise InputError(f"pixels: {pixels!r} given; allowed are 'auto', 'uint8', 'float32'")
    size = check_size("image_size", image_size)
    check_file_writable(path, "path")
    if detector.device.type != "cpu":
        raise InputError(
            f"detector: on {detector.device}; save it and export the file, which is loaded on the CPU"
        )
    if size is None and detector.preprocessing.resize is None:
        raise InputError("image_size: not given; this detector does not resize, and takes images of one size")
    if size is None and detector.preprocessing.ignore and detector.preprocessing.region is None:
        raise InputError(
            "image_size: not given; what this detector ignores has a place in images of one size"
        )
    if size is not None:
        detector.preprocessing.output_size(size)
    least = detector.preprocessing.least_size
    shape = (batch_size, *(size or (least[0] + _EXAMPLE[0], least[1] + _EXAMPLE[1])), 3)
    _warn_of_rounding(detector)
    noise: NDArray[Any] = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    if pixels == "float32" or (pixels == "auto" and "float32" in detector.training.get("pixels", [])):
        noise = (noise / 255).astype(np.float32)
    example = torch.from_numpy(noise)
    with _quiet(), for_inference(detector.device), torch.no_grad():
        # Before the tracing, during which what is kept of a first call would be the tracer's.
        _, maps = detector.predict_maps(detector.preprocessing.apply(example))
        open_size = None
        if size is None:
            open_size = {
                axis: torch.export.Dim(name, min=least[axis - 1])
                for axis, name in ((1, "height"), (2, "width"))
            }
        program = torch.export.export(_FromPixels(detector), (example,), dynamic_shapes=(open_size,))
        expected = program.module()(example)
        written = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=["image_scores", *(f"{name}_maps" for name in maps)],
            opset_version=_OPSET,
            verbose=False,
        )
    assert written is not None
    content = _serialised(written.model, detector, shape if size else (batch_size, "height", "width", 3))
    _check_agreement(content, noise, expected)
    write_atomically(path, content)


def _serialised(model: Any, detector: Detector, shape: Sequence[int | str]) -> bytes:
    """Add what a program needs to know besides the graph, and make the file's content."""
    import onnx_ir

    # The tracer names what is open s1, s2...
    model.graph.inputs[0].shape = onnx_ir.Shape(shape)
    model.producer_name, model.producer_version = "pydefect", VERSION
    model.doc_string = (
        f"A {detector.method} detector of pydefect {VERSION}. images: RGB pixels [batch, height, width, 3], "
        "uint8, or float32 in 0..1. An image is defective where image_scores is greater than the metadata's "
        "image_threshold, a pixel of anomaly_maps where it is greater than pixel_threshold."
    )
    thresholds: dict[str, float] = {}
    calibrated: dict[str, Any] = {}
    if (calibration := detector.calibration) is not None:
        thresholds = {"image": calibration.image_threshold, "pixel": calibration.pixel_threshold}
        thresholds |= calibration.part_thresholds
        kept = ("source", "images", "false_alarm_rate", "confidence", "interval")
        calibrated = {"calibration": json.dumps({name: getattr(calibration, name) for name in kept})}
    model.metadata_props.update(
        {
            "method": detector.method,
            "pydefect_version": VERSION,
            "preprocessing": json.dumps(detector.preprocessing.to_dict() | {"interpolation": _INTERPOLATION}),
            "configuration": json.dumps(detector.configuration),
            **calibrated,
            **{f"{name}_threshold": repr(value) for name, value in thresholds.items()},
        }
    )
    # Where each node comes from, with this machine's folders.
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if size > _MOST_BYTES:
        raise InputError(f"detector: {size / 1e9:.1f} GB of tensors; an ONNX file holds at most 2.1 GB")
    content: bytes = onnx_ir.to_proto(model).SerializeToString()
    return content


def _warn_of_rounding(detector: Detector) -> None:
    """Say that thresholds come from another arithmetic than the graph's."""
    settings = detector.configuration
    name = next((one for one in ("backbone_precision", "precision") if one in settings), None)
    if name is not None and settings[name] == "bfloat16" and detector.calibration is not None:
        warnings.warn(
            "the detector computes in bfloat16, and its thresholds are of that; the file computes in "
            f"float32, where scores differ in the third digit. Where that matters, fit with {name}='float32'",
            stacklevel=4,
        )


def _check_agreement(content: bytes, pixels: NDArray[Any], expected: Sequence[Tensor]) -> None:
    """Refuse a file of which a runtime makes something else than PyTorch did."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": pixels})
    for output, ours, theirs in zip(session.get_outputs(), expected, found, strict=True):
        most = np.abs(ours.numpy() - theirs).max() / max(float(ours.max()), np.finfo(np.float32).tiny)
        if not most <= _TOLERANCE:
            raise PydefectError(
                f"the ONNX file's {output.name} differ by {most:.1%} from the detector's, where they should "
                f"agree; nothing was written. PyTorch {torch.__version__} and ONNX Runtime "
                f"{onnxruntime.__version__} do not understand each other"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the exporter says of itself and of packages that are not there."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
