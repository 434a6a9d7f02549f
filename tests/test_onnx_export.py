"""Detectors as ONNX files: what ONNX Runtime makes of the file against what the detector says."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pydefect
from pydefect import onnx_export
from pydefect.data.images import open_images
from pydefect.detector import Detector
from pydefect.errors import InputError, ModelFileError, PydefectError
from pydefect.ops import knn, score_maps
from pydefect.preprocessing import _resize_matrix

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

# Both sides compute in float32 but sum in another order, thousands of products a value; roots of distances
# and quotients of scores multiply that by a small number. A wrong layout, border or interpolation is off by a
# hundredth and more.
_TOLERANCE = 1e-3

_SMALL: dict[str, dict[str, Any]] = {
    "conpatch": {},
    "patchcore": {},
    "padim": {},
    "spade": {"image_neighbors": 3, "pixel_neighbors": 3},
    "cfa": {"epochs": 1},
    "reconpatch": {"epochs": 1},
    "dual_ae": {"steps": 3, "precision": "float32"},
    "efficientad": {"steps": 3, "precision": "float32"},
}


def run(path: Path | bytes, images: np.ndarray) -> list[np.ndarray]:
    content = path.read_bytes() if isinstance(path, Path) else path
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, {"images": images})
    return found


def assert_agrees(path: Path, detector: Detector, images: Sequence[np.ndarray], tolerance: float) -> None:
    for image in images:
        scores, maps = detector.predict_maps(detector.preprocessing(image)[None])
        found = run(path, image[None])
        for expected, got in zip([scores, *maps.values()], found, strict=True):
            assert got.shape == expected.shape
            np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * float(expected.max()))


@pytest.mark.filterwarnings("ignore:.*held-out images support")
@pytest.mark.parametrize("method", _SMALL)
def test_the_file_says_what_the_detector_says(
    method: str, products: list[np.ndarray], defective: list[np.ndarray], tmp_path: Path
) -> None:
    settings = {"resize": (64, 72), **_SMALL[method]}
    if method not in ("dual_ae", "efficientad"):
        settings |= {"backbone_precision": "float32", "calibration_folds": 2}
    detector = pydefect.fit(products, method=method, weights="random", progress=False, **settings)
    path = tmp_path / "model.onnx"
    pydefect.export_onnx(detector, path)
    # Larger and smaller than what the network sees, and another shape: the graph resizes as the package does.
    larger = [np.kron(image, np.ones((2, 3, 1), dtype=np.uint8)) for image in defective[:1]]
    assert_agrees(path, detector, [products[0], *defective, *larger, defective[0][:37, :41]], _TOLERANCE)


def test_a_real_product(bottle: Path, resnet18_weights: Path, tmp_path: Path) -> None:
    """As people fit it: at 256 x 256, and in bfloat16 where the processor has that."""
    train = [image.pixels for image in open_images(bottle / "train" / "good")][:24]
    detector = pydefect.fit(train, weights=str(resnet18_weights), calibration_folds=0, progress=False)
    path = tmp_path / "bottle.onnx"
    pydefect.export_onnx(detector, path, image_size=256)
    test = [image.pixels for image in open_images(bottle / "test")][::20]
    # bfloat16 keeps 8 bits, and its errors average out over the hundreds of channels of a distance.
    assert_agrees(path, detector, test, 2e-2)


def test_the_face_of_the_file(colours: type[Detector], tmp_path: Path) -> None:
    import onnx

    path = tmp_path / "colours.onnx"
    pydefect.export_onnx(colours(), path, batch_size=2)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} <= {""}
    session = onnxruntime.InferenceSession(path)
    (images,) = session.get_inputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", [2, "height", "width", 3])
    names = ["image_scores", "anomaly_maps", "local_maps", "global_maps"]
    assert [output.name for output in session.get_outputs()] == names
    assert [output.shape for output in session.get_outputs()] == [[2], *[[2, 40, 40]] * 3]
    kept = session.get_modelmeta().custom_metadata_map
    assert kept["method"] == "colours"
    assert float(kept["image_threshold"]) == 0.75
    assert float(kept["pixel_threshold"]) == 0.5
    assert json.loads(kept["preprocessing"])["resize"] == [40, 40]
    assert json.loads(kept["preprocessing"])["interpolation"] == "bilinear, antialiased, half-pixel centres"
    assert kept["pydefect_version"] == pydefect.__version__
    assert json.loads(kept["configuration"]) == colours().configuration
    assert json.loads(kept["calibration"])["images"] == 9
    assert "greater than the metadata's image_threshold" in model.doc_string
    # Nothing says where it was made.
    for folder in (Path(pydefect.__file__).parent, Path(torch.__file__).parent):
        assert str(folder).encode() not in path.read_bytes()
    assert not any(node.metadata_props for node in model.graph.node)
    # What a user of the file writes, and what the package says of the same images.
    pixels = np.random.default_rng(0).integers(0, 256, (2, 90, 50, 3), dtype=np.uint8)
    pixels[0, :, :, 0] //= 2
    scores = run(path, pixels)[0]
    result = pydefect.score(colours(), pixels, progress=False)
    assert list(scores > float(kept["image_threshold"])) == list(result.is_defective) == [False, True]


def test_parts_have_their_thresholds(colours: type[Detector], tmp_path: Path) -> None:
    detector = colours()
    images = list(np.random.default_rng(0).integers(0, 256, (9, 40, 40, 3), dtype=np.uint8))
    pydefect.calibrate(detector, normal=images, false_alarm_rate=0.1, progress=False)
    path = tmp_path / "colours.onnx"
    pydefect.export_onnx(detector, path)
    kept = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert detector.calibration is not None
    for part, threshold in detector.calibration.part_thresholds.items():
        assert float(kept[f"{part}_threshold"]) == threshold


def test_a_crop_is_in_the_graph(colours: type[Detector], tmp_path: Path) -> None:
    detector = colours(crop=(20, 30))
    path = tmp_path / "colours.onnx"
    pydefect.export_onnx(detector, path)
    assert_agrees(
        path, detector, [np.random.default_rng(0).integers(0, 256, (55, 66, 3), dtype=np.uint8)], 1e-5
    )


def test_a_region_is_in_the_graph(colours: type[Detector], tmp_path: Path) -> None:
    detector = colours(region=(10, 20, 45, 66))
    rng, path = np.random.default_rng(0), tmp_path / "colours.onnx"
    pydefect.export_onnx(detector, path)
    images = [rng.integers(0, 256, size, dtype=np.uint8) for size in ((45, 66, 3), (300, 90, 3))]
    assert_agrees(path, detector, images, 1e-5)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail):
        run(path, images[0][None, :44])  # an image that does not hold it
    with pytest.raises(InputError, match=r"the image is 40 x 66 .* reach to 45 x 66"):
        pydefect.export_onnx(detector, path, image_size=(40, 66))


def test_what_is_ignored_is_in_the_graph(colours: type[Detector], tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "colours.onnx"
    outline, label = [(10, 20), (40, 66), (45, 20)], (20, 20, 30, 40)
    image = rng.integers(0, 256, (60, 70, 3), dtype=np.uint8)
    for detector in (
        colours(ignore=[label]),
        colours(region=outline),
        colours(region=outline, ignore=[label]),
    ):
        pydefect.export_onnx(detector, path, image_size=(60, 70))
        assert_agrees(path, detector, [image], 1e-5)
    pydefect.export_onnx(detector, path)
    assert_agrees(path, detector, [image, image[:50, :67]], 1e-5)
    with pytest.raises(InputError, match="image_size: not given; what this detector ignores has a place"):
        pydefect.export_onnx(colours(ignore=[label]), path)


def test_the_networks_own_size_needs_no_resize(colours: type[Detector], tmp_path: Path) -> None:
    import onnx

    path = tmp_path / "colours.onnx"
    for size, resizes in ((40, False), ((40, 41), True)):
        pydefect.export_onnx(colours(), path, image_size=size)
        assert ("MatMul" in {node.op_type for node in onnx.load(path).graph.node}) is resizes


@pytest.mark.parametrize(("size", "length"), [(5, 16), (16, 5), (7, 7), (256, 900), (300, 301), (1, 9)])
def test_the_resize_of_the_graph_is_the_packages(size: int, length: int) -> None:
    # In float64: places in float32 are off by a hundred times the roundings of the mean.
    column = torch.rand(1, 1, length, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(
        column, (size, 3), mode="bilinear", antialias=True, align_corners=False
    )
    matrix = _resize_matrix(size, length).double()
    # Weights are rounded to float32, and numbers below 1 averaged.
    torch.testing.assert_close(matrix @ column[0, 0], expected[0, 0], rtol=0, atol=1e-6)
    # And of weights that a runtime rounds to the 8 bits of bfloat16: no pixel gets the place of another.
    rounded = (matrix.bfloat16().double() @ column[0, 0] - expected[0, 0]).abs().max()
    assert float(rounded) < 2**-8


def test_places_of_pixels_are_whole_numbers_in_the_graph(colours: type[Detector], tmp_path: Path) -> None:
    """A runtime that computes in bfloat16 by itself, as OpenVINO does, rounds half pixels from 128 on."""
    import onnx

    path = tmp_path / "colours.onnx"
    pydefect.export_onnx(colours(), path)
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    kinds = {info.name: info.type.tensor_type.elem_type for info in model.graph.value_info}
    ranges = [node for node in model.graph.node if node.op_type == "Range"]
    assert len(ranges) >= 2
    for node in ranges:
        assert kinds[node.output[0]] == onnx.TensorProto.INT64


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("pixels", ["auto", "uint8", "float32"])
def test_the_type_of_the_pixels(kind: type, pixels: Any, products: list[np.ndarray], tmp_path: Path) -> None:
    """Auto takes what the detector has learned from; 16 bits would come to 8 in another way than they did."""
    most = {np.uint8: 255, np.uint16: 65535, np.float32: 1}[kind]
    images = [(image / 255 * most).astype(kind) for image in products]
    detector = pydefect.fit(
        images, method="patchcore", weights="random", resize=48, calibration_folds=0, progress=False
    )
    assert detector.training["pixels"] == ["uint8" if kind is np.uint8 else "float32"]
    path = tmp_path / "model.onnx"
    pydefect.export_onnx(detector, path, pixels=pixels)
    (given,) = onnxruntime.InferenceSession(path).get_inputs()
    floating = pixels == "float32" or (pixels == "auto" and kind is not np.uint8)
    assert given.type == ("tensor(float)" if floating else "tensor(uint8)")
    expected = detector.score(products[0], progress=False).image_scores
    image = products[0][None]
    found = run(path, (image / 255).astype(np.float32) if floating else image)[0]
    np.testing.assert_allclose(found, expected, rtol=2e-2)


def test_pixels_of_no_type(colours: type[Detector], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pixels: 'uint16' given; allowed are 'auto', 'uint8', 'float32'"):
        pydefect.export_onnx(colours(), tmp_path / "model.onnx", pixels="uint16")


@pytest.mark.filterwarnings("ignore:.*held-out images support")
def test_a_batch_has_the_networks_once(products: list[np.ndarray], tmp_path: Path) -> None:
    settings = {**_SMALL["dual_ae"], "resize": 64, "weights": "random", "progress": False}
    detector = pydefect.fit(products, method="dual_ae", **settings)
    sizes = []
    for batch in (1, 3):
        path = tmp_path / f"{batch}.onnx"
        pydefect.export_onnx(detector, path, batch_size=batch)
        sizes.append(path.stat().st_size)
    assert sizes[1] < 1.05 * sizes[0]
    result = detector.score(products[:3], progress=False).image_scores
    np.testing.assert_allclose(run(path, np.stack(products[:3]))[0], result, rtol=_TOLERANCE)


@pytest.mark.filterwarnings("ignore:.*held-out images support")
def test_thresholds_of_another_arithmetic_are_said(products: list[np.ndarray], tmp_path: Path) -> None:
    def fitted(precision: str, folds: int) -> Detector:
        return pydefect.fit(
            products,
            method="patchcore",
            weights="random",
            resize=48,
            backbone_precision=precision,
            calibration_folds=folds,
            progress=False,
        )

    message = "computes in float32, .* fit with backbone_precision='float32'"
    with pytest.warns(UserWarning, match=message):
        pydefect.export_onnx(fitted("bfloat16", 2), tmp_path / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for detector in (fitted("bfloat16", 0), fitted("float32", 0)):
            pydefect.export_onnx(detector, tmp_path / "model.onnx")


def test_a_saved_detector(products: list[np.ndarray], tmp_path: Path) -> None:
    model, path = tmp_path / "model.safetensors", tmp_path / "model.onnx"
    settings = {"resize": 32, "backbone_precision": "float32", "calibration_folds": 0}
    detector = pydefect.fit(products, weights="random", progress=False, **settings)
    detector.save(model)
    pydefect.export_onnx(model, path, image_size=32, batch_size=3)
    images = np.stack([image[:32, :32] for image in products[:3]])
    expected, _ = detector.predict(detector.preprocessing.apply(torch.from_numpy(images)))
    np.testing.assert_allclose(run(path, images)[0], expected, rtol=_TOLERANCE)
    # Tracing left nothing behind: the detector scores as before.
    assert torch.equal(detector.predict(detector.preprocessing.apply(torch.from_numpy(images)))[0], expected)
    with pytest.raises(ModelFileError, match="no file"):
        pydefect.export_onnx(tmp_path / "none.safetensors", path)


class _Searched(torch.nn.Module):
    def __init__(self, bank: torch.Tensor, k: int) -> None:
        super().__init__()
        self.bank, self.k = bank, k

    def forward(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return knn(queries, self.bank, self.k)


def test_the_search_by_products_survives_a_common_offset() -> None:
    """Distances of 1 among vectors of length 2000: products alone would lose them."""
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(50, 8, generator=generator) + 700
    queries = torch.randn(30, 8, generator=generator) + 700
    distances, indices = torch.export.export(_Searched(bank, 3), (queries,)).module()(queries)
    expected, nearest = knn(queries, bank, 3)
    assert torch.equal(indices, nearest)
    torch.testing.assert_close(distances, expected)


@pytest.mark.parametrize(("queries", "rows", "parts"), [(5000, 2048, 3), (130, 2**21, 44), (0, 4, 1)])
def test_the_search_by_products_holds_a_part_of_the_estimates(queries: int, rows: int, parts: int) -> None:
    """At a million pixels all of them would be a gigabyte; too many parts would be exported for minutes."""
    generator = torch.Generator().manual_seed(0)
    bank, wanted = (torch.randn(count, 4, generator=generator) for count in (rows, queries))
    program = torch.export.export(_Searched(bank, 2), (wanted,))
    shapes = [node.meta["val"].shape for node in program.graph.nodes if "addmm" in node.name]
    assert len(shapes) == parts
    assert sum(shape[0] for shape in shapes) == queries
    found = program.module()(wanted)
    for got, expected in zip(found, knn(wanted, bank, 2), strict=True):
        torch.testing.assert_close(got, expected)


class _Mapped(torch.nn.Module):
    def forward(self, distances: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return score_maps(distances, (33, 47), 4.0)


def test_exported_maps_are_the_kernels() -> None:
    distances = torch.rand(2, 7, 5, 3, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(_Mapped(), (distances,))
    assert "pydefect" not in str(program.graph)
    for got, expected in zip(program.module()(distances), score_maps(distances, (33, 47), 4.0), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("size", [0, (1,), (1, 2, 3), (4.0, 4.0), "256", True, (40, -1)])
def test_sizes_that_are_none(size: Any, colours: type[Detector], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"image_size is .*; it must be"):
        pydefect.export_onnx(colours(), tmp_path / "x.onnx", image_size=size)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True])
def test_batches_that_are_none(batch_size: Any, colours: type[Detector], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"batch_size: .* given; allowed are"):
        pydefect.export_onnx(colours(), tmp_path / "x.onnx", batch_size=batch_size)


def test_without_a_resize_a_size_is_needed(colours: type[Detector], tmp_path: Path) -> None:
    detector = colours()
    detector.preprocessing = detector.preprocessing.create(None)
    with pytest.raises(InputError, match="image_size: not given"):
        pydefect.export_onnx(detector, tmp_path / "x.onnx")
    pydefect.export_onnx(detector, tmp_path / "x.onnx", image_size=(12, 14))
    assert run(tmp_path / "x.onnx", np.zeros((1, 12, 14, 3), np.uint8))[1].shape == (1, 12, 14)


def test_a_missing_package_is_named(
    colours: type[Detector], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"onnxscript and onnxruntime: not there.*pip install onnxscript"):
        pydefect.export_onnx(colours(), tmp_path / "x.onnx")


def test_a_file_that_a_runtime_misunderstands_is_not_written(
    colours: type[Detector], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(b"the one of yesterday")
    monkeypatch.setattr(onnx_export, "_TOLERANCE", -1.0)
    with pytest.raises(PydefectError, match="image_scores differ by"):
        pydefect.export_onnx(colours(), path)
    assert path.read_bytes() == b"the one of yesterday"
    assert [file.name for file in tmp_path.iterdir()] == ["x.onnx"]
