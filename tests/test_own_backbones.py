"""Backbones that installed packages declare: the manual's example, ResNet under another name, a network with
patches of 14 pixels, and what may be wrong with one."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import pydefect
from pydefect.backbones import BACKBONE_NAMES, ResNet, build_backbone
from pydefect.benchmark import Variant, find_categories, render_tables
from pydefect.benchmark.plan import Pair, Weights
from pydefect.cli import app
from pydefect.data.procedural import write_dataset
from pydefect.errors import InputError, ModelFileError, PydefectError
from pydefect.features import PatchFeatureExtractor
from pydefect.persistence import load_tensors, save_tensors

MANUAL = (Path(__file__).parents[1] / "docs" / "own-backbones.md").read_text(encoding="utf-8")
METHODS = ["conpatch", "patchcore", "padim", "spade", "cfa", "reconpatch"]

Install = Callable[..., None]  # tests/conftest.py

# A ResNet under another name, and what a vision transformer has: one grid for all levels, with a stride that
# is no power of two, and maps that are not channels last in memory.
CODE = """
from torch import nn
from pydefect.backbones import ARCHITECTURES, Backbone, ResNet, build_backbone


class Renamed(Backbone):
    def __init__(self):
        super().__init__()
        self.network = ResNet(ARCHITECTURES["resnet18"])
        self.channels, self.strides = self.network.channels, self.network.strides

    def forward(self, images, levels):
        return self.network(images, levels)


class Patches14(Backbone):
    channels = {1: 24, 2: 24, 3: 24}
    strides = {1: 14, 2: 14, 3: 14}

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 24, 14, 14)
        self.blocks = nn.ModuleList(nn.Conv2d(24, 24, 1) for _ in range(3))

    def forward(self, images, levels):
        x, maps = self.embed(images), []
        for block in self.blocks:
            x = x + block(x).relu()
            maps.append(x)
        return [maps[level - 1] for level in levels]

    def load_pretrained(self):
        nn.init.ones_(self.embed.bias)


class Twice(ResNet):
    def __init__(self):
        super().__init__(ARCHITECTURES["resnet18"])

    def forward(self, images, levels):
        return [2 * level for level in super().forward(images, levels)]
"""


def block(language: str, containing: str) -> str:
    (found,) = [
        text
        for text in re.findall(rf"```{language}\n(.*?)```", MANUAL, flags=re.DOTALL)
        if containing in text
    ]
    return str(found)


@pytest.fixture
def declared(install: Install) -> None:
    install(
        "my-networks",
        {name.lower(): f"my_networks:{name}" for name in ("Renamed", "Patches14", "Twice")},
        CODE,
        group="pydefect.backbones",
    )


@pytest.fixture(scope="module")
def flange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "flange"
    write_dataset(root, 4, 2, 1, 64)
    return root


def how(**settings: object) -> dict[str, object]:
    return {"weights": "random", "calibration_folds": 0, "resize": 64, "progress": False, **settings}


def fit(images: object, **settings: object) -> pydefect.Detector:
    return pydefect.fit(images, **how(**settings))  # type: ignore[arg-type]


@pytest.mark.usefixtures("declared")
def test_a_resnet_under_another_name_gives_the_resnets_features(resnet18_weights: Path) -> None:
    resnet = build_backbone("resnet18", str(resnet18_weights))
    state = {f"network.{name}": value for name, value in resnet.state_dict().items()}
    renamed = build_backbone("renamed", state)
    assert not isinstance(renamed, ResNet)
    assert not renamed.training
    assert not any(parameter.requires_grad for parameter in renamed.parameters())
    images = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    # The ResNet runs with its normalisations folded into the convolutions: other roundings, of float32 some
    # units in 10**7, of bfloat16 in 10**2 of the largest, over 17 layers some times as much.
    for precision, most in (("float32", 1e-5), ("bfloat16", 5e-2)):
        ours = PatchFeatureExtractor(resnet, (1, 2, 3), precision)(images)
        theirs = PatchFeatureExtractor(renamed, (1, 2, 3), precision)(images)
        for level, other in zip(ours, theirs, strict=True):
            assert other.dtype == torch.float32
            assert other.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(other, level, rtol=0, atol=most * float(level.abs().max()))
            assert not torch.equal(other, level), precision


@pytest.mark.usefixtures("declared")
def test_a_resnet_that_computes_something_else() -> None:
    """It does not run in the form that a ResNet has."""
    resnet = build_backbone("resnet18", "random")
    twice = build_backbone("twice", resnet.state_dict())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for level, other in zip(
        PatchFeatureExtractor(resnet)(images), PatchFeatureExtractor(twice)(images), strict=True
    ):
        torch.testing.assert_close(other, 2 * level, rtol=1e-4, atol=1e-4 * float(level.max()))


@pytest.mark.usefixtures("declared")
@pytest.mark.filterwarnings("ignore:.*held-out images support:UserWarning")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_works_with_patches_of_14_pixels(method: str, flange: Path, tmp_path: Path) -> None:
    settings = {"levels": (2, 3), "calibration_folds": 2, "backbone": "patches14"}
    detector = fit(flange / "train/good", method=method, **settings)
    files = sorted((flange / "train/good").iterdir())
    result = pydefect.score(detector, files, progress=False)
    assert [one.shape for one in result.anomaly_maps] == [(64, 64)] * 4
    # An image does not score otherwise because of those beside it.
    alone = [pydefect.score(detector, file, progress=False).image_scores[0] for file in files]
    if method != "padim":  # whose own product has other roundings for other batches
        assert result.image_scores.tolist() == alone
    detector.save(tmp_path / "model")
    loaded = pydefect.load(tmp_path / "model")
    again = pydefect.score(loaded, files, progress=False)
    np.testing.assert_array_equal(again.image_scores, result.image_scores)
    np.testing.assert_array_equal(again.anomaly_maps, result.anomaly_maps)
    assert loaded.captured_state() is None


@pytest.mark.usefixtures("declared")
@pytest.mark.parametrize("method", METHODS)
def test_maps_lie_where_the_defect_is(method: str) -> None:
    """Inputs of 100 x 144 pixels are extended to 112 x 154; what is cut off again is the extension."""
    random = np.random.default_rng(0)
    images = [random.normal(0.5, 0.02, (100, 144, 3)).clip(0, 1).astype(np.float32) for _ in range(6)]
    detector = fit(images, method=method, backbone="patches14", levels=(1,), resize=None)
    # In the patch of rows 70 to 84 and columns 112 to 126.
    defective = images[0].copy()
    defective[72:82, 114:124] = 1
    found, before = pydefect.score(detector, [defective, images[0]], progress=False).anomaly_maps
    assert found.shape == (100, 144)
    # Its neighbours, which are averages with it, may be as far from normal, but lie around it. A map of the
    # extended input that was squeezed into the image would have it 8 pixels further up and to the left.
    more = found - before
    row, column = np.argwhere(more > more.max() / 2).mean(0)
    assert abs(row - 76.5) < 4, row
    assert abs(column - 118.5) < 4, column


@pytest.mark.usefixtures("declared")
def test_a_model_file_without_the_backbone_or_without_its_package(
    flange: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights.safetensors"
    save_tensors(weights, build_backbone("patches14", "random", seed=3).state_dict(), {})
    detector = fit(flange, backbone="patches14", weights=str(weights))
    detector.save(tmp_path / "small", include_backbone=False)
    detector.save(tmp_path / "model")
    with pytest.raises(ModelFileError, match="give the weights of patches14 that it was fitted with"):
        pydefect.load(tmp_path / "small")
    with pytest.raises(ModelFileError, match="'imagenet' are not the weights that the model was fitted with"):
        pydefect.load(tmp_path / "small", weights="imagenet")
    expected = pydefect.score(detector, flange / "test", progress=False).image_scores
    small = pydefect.load(tmp_path / "small", weights=weights)
    found = pydefect.score(small, flange / "test", progress=False).image_scores
    np.testing.assert_array_equal(found, expected)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(tmp_path / "site")])
    with pytest.raises(ModelFileError, match=r"with the backbone 'patches14', which is not known here; inst"):
        pydefect.load(tmp_path / "model")
    with pytest.raises(InputError, match=r"^backbone: 'patches14' is not known; allowed are resnet18, "):
        fit(flange, backbone="patches14")
    tensors, metadata = load_tensors(tmp_path / "model")
    for name in (["patches14"], None):
        metadata["config"]["backbone"] = name
        save_tensors(tmp_path / "model", tensors, metadata)
        with pytest.raises(ModelFileError, match="which is not known here"):
            pydefect.load(tmp_path / "model")


@pytest.mark.usefixtures("declared")
def test_weights() -> None:
    one, same, other = (build_backbone("patches14", "random", seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(one["embed.weight"], same["embed.weight"])
    assert not torch.equal(one["embed.weight"], other["embed.weight"])
    assert torch.equal(build_backbone("patches14").state_dict()["embed.bias"], torch.ones(24))
    with pytest.raises(InputError, match=r"^weights: 'imagenet' given, but Renamed has no published weights"):
        build_backbone("renamed")
    del one["blocks.2.bias"]
    with pytest.raises(InputError, match=r"^weights: not a patches14: 1 parameters are missing, such as 'bl"):
        build_backbone("patches14", one)
    with pytest.raises(InputError, match=r"'embed.bias' has shape \(3,\); patches14 needs \(24,\)"):
        build_backbone("patches14", {**same, "embed.bias": torch.zeros(3)})


@pytest.mark.usefixtures("declared")
def test_an_onnx_file(flange: Path, tmp_path: Path) -> None:
    """export_onnx itself compares the file's maps with the detector's."""
    pytest.importorskip("onnxscript")
    detector = fit(flange, backbone="patches14", method="patchcore", backbone_precision="float32")
    pydefect.export_onnx(detector, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size > 1000


def test_a_new_version_is_measured_anew(flange: Path, install: Install) -> None:
    (category,) = find_categories([flange])

    def pair(backbone: str) -> Pair:
        return Pair(Variant("padim", settings={"backbone": backbone}), category, 0, Weights("random"), "cpu")

    resnet, keys = pair("resnet18").key, set()
    for version in ("0.1", "0.2"):
        points = {"patches14": "my_networks:Patches14"}
        install("my-networks", points, CODE, version, "pydefect.backbones")
        assert pair("patches14").facts["backbone_package"] == f"my-networks {version}"
        keys.add(pair("patches14").key)
    assert len(keys) == 2
    assert pair("resnet18").key == resnet
    assert "backbone_package" not in pair("resnet18").facts


BEGINNING = """
from pydefect.backbones import Backbone
class Mine(Backbone):
    channels, strides = {1: 3, 2: 3, 3: 3}, {1: 1, 2: 1, 3: 1}
    def forward(self, images, levels):
        return [images for level in levels]
"""
WRONG = {
    "import of a module that is not there": ("import nowhere", "cannot be imported: ModuleNotFoundError: "),
    "another class": ("class Mine: pass", "is no subclass of pydefect.backbones.Backbone"),
    "an object": ("Mine = 3", "is no subclass of pydefect.backbones.Backbone"),
    "an abstract class": ("from pydefect.backbones import Backbone as Mine", "lacks forward"),
    "arguments": (
        f"{BEGINNING}    def __init__(self, depth): super().__init__()",
        r"cannot be built: TypeError: .*'depth'",
    ),
    "no channels": (f"{BEGINNING}    channels = None", r"has channels None; needed is a whole number for"),
    "a level too few": (f"{BEGINNING}    strides = {{1: 4, 2: 8}}", r"has strides \{1: 4, 2: 8\}; needed is"),
    "a half": (f"{BEGINNING}    channels = {{1: 0.5, 2: 8, 3: 8}}", r"has channels \{1: 0.5, 2: 8, 3: 8\}"),
    "a coarse level first": (
        f"{BEGINNING}    strides = {{1: 8, 2: 4, 3: 4}}",
        "for each of the levels 1, 2, 3, the smallest stride first",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_package_that_does_not_work_is_named_when_its_backbone_is_used(what: str, install: Install) -> None:
    code, reason = WRONG[what]
    install("my-package", {"mine": "mine:Mine"}, version="2.0", group="pydefect.backbones")
    install("mine", {}, code)
    assert "mine" in BACKBONE_NAMES.names()
    assert isinstance(build_backbone("resnet18", "random"), ResNet)
    assert CliRunner().invoke(app, ["info"]).exit_code == 0
    with pytest.raises(InputError, match=rf"^backbone: 'mine', which my-package 2\.0 declares.*{reason}"):
        fit([np.zeros((64, 64, 3), np.uint8)], backbone="mine")


@pytest.mark.parametrize(
    "returned", ["images", "[images, images[:, :2]]", "[images]", "[images, None]", "[images, images[1:]]"]
)
def test_maps_that_are_not_what_the_backbone_says(
    returned: str, install: Install, products: list[np.ndarray]
) -> None:
    code = BEGINNING.replace("[images for level in levels]", returned)
    install("mine", {"mine": "mine:Mine"}, code, group="pydefect.backbones")
    with pytest.raises(PydefectError, match=r"^backbone: Mine gave .* its channels and strides say maps of "):
        fit(products, backbone="mine", method="padim", levels=(1, 2))


def test_published_weights_that_cannot_be_had(install: Install, products: list[np.ndarray]) -> None:
    code = f"{BEGINNING}    def load_pretrained(self): raise OSError('no network')"
    install("mine", {"mine": "mine:Mine"}, code, group="pydefect.backbones")
    message = "^weights: mine 0.1, which declares the backbone 'mine', cannot load .*: OSError: no network"
    with pytest.raises(InputError, match=message):
        fit(products, backbone="mine", weights="imagenet")


def test_a_name_has_one_package(install: Install, products: list[np.ndarray]) -> None:
    install("my-package", {"resnet18": "my_package:Mine"}, group="pydefect.backbones")
    with pytest.raises(InputError, match=r"^backbone: 'resnet18' is declared by pydefect and by my-package"):
        fit(products, backbone="resnet18")
    assert isinstance(build_backbone("resnet34", "random"), ResNet)


class Timm(types.ModuleType):
    """What the manual's example uses of timm, with networks that take no time."""

    @staticmethod
    def create_model(
        name: str, *, pretrained: bool, features_only: bool, out_indices: tuple[int, ...], **options: bool
    ) -> Features:
        assert features_only
        assert re.fullmatch(r"\w+\.\w+", name), "timm's name has its weights behind a dot"
        transformer = bool(options)
        network = Features([14] * 3 if transformer else [4, 8, 16], out_indices)
        nn.init.constant_(network.heads[0].bias, float(pretrained))
        return network


class Features(nn.Module):
    def __init__(self, strides: list[int], indices: tuple[int, ...]) -> None:
        super().__init__()
        assert len(indices) == 3
        self.heads = nn.ModuleList(nn.Conv2d(3, 8, stride, stride) for stride in strides)
        self.feature_info = types.SimpleNamespace(channels=lambda: [8, 8, 8], reduction=lambda: strides)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [head(images) for head in self.heads]


@pytest.fixture(params=["stand-in", "timm"])
def timm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The real one where it is installed, whose weights are not: random ones in their place."""
    if request.param == "stand-in":
        monkeypatch.setitem(sys.modules, "timm", Timm("timm"))
    elif importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    else:
        import timm

        create = timm.create_model
        monkeypatch.setattr(
            timm, "create_model", lambda name, pretrained, **how: create(name, pretrained=False, **how)
        )
    return str(request.param)


@pytest.fixture
def example(install: Install, timm: str) -> None:
    """The manual's package."""
    points = dict(re.findall(r'^(\w+) = "(timm_backbones:\w+)"$', MANUAL, flags=re.MULTILINE))
    assert set(points) == {"convnext_tiny", "dinov2_small"}
    code = block("python", "class TimmBackbone")
    install("timm-backbones", points, code, group="pydefect.backbones")


@pytest.mark.filterwarnings("ignore:.*held-out images support:UserWarning")
@pytest.mark.usefixtures("example")
def test_the_manuals_example(flange: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flange").symlink_to(flange)
    names: dict[str, object] = {"pydefect": pydefect}
    exec(block("python", "pydefect.fit(").replace('tiny")', 'tiny", resize=56, calibration_folds=0)'), names)
    exec(block("python", "torch.save("), names)
    detector = names["detector"]
    assert isinstance(detector, pydefect.Detector)
    assert detector.configuration["backbone"] == "convnext_tiny"
    detector.save("model")
    loaded = pydefect.load("model")
    expected = pydefect.score(detector, "flange/test", progress=False).image_scores
    assert pydefect.score(loaded, "flange/test", progress=False).image_scores.tolist() == expected.tolist()
    # A benchmark has a process of its own for every pair, which does not have the stand-in.
    lines = [line for line in block("bash", "pydefect info").splitlines() if " benchmark " not in line]
    assert len(lines) == 3
    (offline,) = re.findall(r"# (--weights .*)", MANUAL)
    for line in [*lines, f"{lines[1]} --force {offline}"]:
        _, command, *arguments = shlex.split(line.replace("resize=448", "resize=70"), comments=True)
        more = ["--set", "calibration_folds=0"] if command == "fit" else []
        more += ["--set", "resize=56"] if "convnext_tiny" in arguments else []
        done = CliRunner().invoke(app, [command, *arguments, *more])
        assert done.exit_code == 0, done.output
        if command == "info":
            assert re.search(r"dinov2_small +timm_backbones:DINOv2Small \(timm-backbones 0\.1\)", done.output)


@pytest.mark.usefixtures("declared")
@pytest.mark.filterwarnings("ignore:.*held-out images support:UserWarning")
def test_a_benchmark_of_two_backbones(flange: Path, tmp_path: Path) -> None:
    for backbone in ("resnet18", "patches14"):
        arguments = ["benchmark", "--data", str(flange), "--methods", "padim", "--backbone", backbone]
        arguments += ["--weights", "random", "--threads", "1", "--out", str(tmp_path / "out")]
        arguments += ["--set", "resize=64", "--set", "calibration_folds=0"]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [row.get("backbone_package") for row in rows] == [None, "my-networks 0.1"]
    table = render_tables(rows)
    assert "padim (backbone=resnet18" in table
    assert "padim (backbone=patches14" in table
