"""Methods that installed packages declare: the manual's example, word for word, and what may be wrong with
one."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import pydefect
from pydefect.benchmark import Variant, find_categories
from pydefect.benchmark.plan import Pair, Weights
from pydefect.cli import app
from pydefect.data.procedural import write_dataset
from pydefect.errors import InputError, ModelFileError, PydefectError
from pydefect.persistence import load_tensors, save_tensors
from pydefect.registry import METHOD_NAMES, METHODS, detector_type

MANUAL = (Path(__file__).parents[1] / "docs" / "own-methods.md").read_text(encoding="utf-8")

Install = Callable[..., None]  # tests/conftest.py


def block(language: str, containing: str) -> str:
    (found,) = [
        text
        for text in re.findall(rf"```{language}\n(.*?)```", MANUAL, flags=re.DOTALL)
        if containing in text
    ]
    return str(found)


@pytest.fixture
def example(install: Install) -> None:
    """The manual's package."""
    project = block("toml", "pydefect.methods")
    (package,) = re.findall(r'^name = "(.*)"$', project, flags=re.MULTILINE)
    (declared,) = re.findall(r'"pydefect\.methods"\]\n(.*)', project, flags=re.DOTALL)
    points = dict(re.findall(r'^(\w+) = "(.*)"$', declared, flags=re.MULTILINE))
    assert points == {"one_gaussian": "one_gaussian:OneGaussianDetector"}
    install(package, points, block("python", "class OneGaussianDetector"))


@pytest.fixture(scope="module")
def flange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "flange"
    write_dataset(root, 4, 2, 1, 64)
    return root


@pytest.mark.filterwarnings("ignore:.*held-out images support:UserWarning")
@pytest.mark.usefixtures("example")
def test_the_manuals_example_works_as_a_method_of_pydefect(
    flange: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(flange.parent)
    call = block("python", "pydefect.fit(").replace("0.1)", '0.1, weights="random", resize=64)')
    names: dict[str, object] = {"pydefect": pydefect}
    exec(call, names)
    detector = names["detector"]
    assert isinstance(detector, pydefect.Detector)
    assert detector.configuration["regularisation"] == 0.1
    assert detector.calibration is not None
    result = pydefect.score(detector, flange / "test", progress=False)
    assert min(map(np.max, result.anomaly_maps)) > 0
    detector.save(tmp_path / "model")
    loaded = pydefect.score(tmp_path / "model", flange / "test", progress=False)
    np.testing.assert_array_equal(loaded.image_scores, result.image_scores)
    np.testing.assert_array_equal(loaded.anomaly_maps, result.anomaly_maps)
    with pytest.raises(InputError, match="smoothing: -1 given; allowed are 0 to 100"):
        pydefect.fit(flange, method="one_gaussian", smoothing=-1)
    with pytest.raises(InputError, match="blur: not a setting of One Gaussian; allowed are "):
        pydefect.fit(flange, method="one_gaussian", blur=1)


@pytest.mark.filterwarnings("ignore:.*held-out images support:UserWarning")
@pytest.mark.usefixtures("example")
def test_the_manuals_command_lines(flange: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flange").symlink_to(flange)
    small = "--set resize=64 --weights random"
    more = {"fit": small, "benchmark": f"{small} --set levels=[1] --set calibration_folds=0 --threads 1"}
    for line in block("bash", "pydefect info").splitlines():
        _, command, *arguments = shlex.split(line, comments=True)
        done = CliRunner().invoke(app, [command, *arguments, *more.get(command, "").split()])
        assert done.exit_code == 0, done.output
        if command == "info":
            assert re.search(
                r"one_gaussian +one_gaussian:OneGaussianDetector \(one-gaussian 0\.1\)", done.output
            )
    rows = [json.loads(line) for line in Path("comparison/results.jsonl").read_text().splitlines()]
    assert {row["method"]: row.get("package") for row in rows} == {
        "one_gaussian": "one-gaussian 0.1",
        "padim": None,
        "patchcore": None,
    }
    assert all(row["metrics"]["pixel_auroc"] > 0 for row in rows)


@pytest.mark.usefixtures("example")
def test_a_package_is_imported_when_its_method_is_used(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from pydefect.cli import app\n"
        "print(CliRunner().invoke(app, ['fit', '--help']).output)\n"
        "assert not {'one_gaussian', 'torch'} & set(sys.modules)\n"
        "from pydefect.registry import detector_type\n"
        "detector_type('padim')\n"
        "assert 'one_gaussian' not in sys.modules\n"
        "detector_type('one_gaussian')\n"
        "assert 'one_gaussian' in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "reconpatch, one_gaussian" in " ".join(done.stdout.split())


@pytest.mark.usefixtures("example")
def test_a_model_of_a_method_that_is_not_installed(
    flange: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"resize": 64, "calibration_folds": 0, "levels": (1,), "weights": "random"}
    detector = pydefect.fit(flange, method="one_gaussian", progress=False, **settings)  # type: ignore[arg-type]
    detector.save(tmp_path / "model")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(tmp_path / "site")])
    with pytest.raises(ModelFileError) as caught:
        pydefect.load(tmp_path / "model")
    assert "model' was fitted with the method 'one_gaussian' (one_gaussian:OneGaussianDetector), " in str(
        caught.value
    )
    assert "install the package that declares it" in str(caught.value)
    # Names in a file are no reason to import anything.
    tensors, metadata = load_tensors(tmp_path / "model")
    (tmp_path / "intruder.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("intruder", "intruder:Detector", ["intruder"], None):
        save_tensors(tmp_path / "model", tensors, {**metadata, "method": name, "class": "intruder:Detector"})
        with pytest.raises(ModelFileError, match=r"install the package|reads format 1"):
            pydefect.load(tmp_path / "model")
    with pytest.raises(InputError, match="method: 'one_gaussian' is not known; allowed are conpatch, "):
        pydefect.fit(flange, method="one_gaussian")


WRONG = {
    "import of a module that is not there": (
        "import nowhere",
        "ModuleNotFoundError: No module named 'nowhere'",
    ),
    "error of syntax": ("def", "SyntaxError: "),
    "error at import": ("1 / 0", "ZeroDivisionError: "),
    "nothing of that name": ("", "AttributeError: module 'mine' has no attribute 'Mine'"),
    "an object": ("Mine = 3", "is no subclass of pydefect.Detector"),
    "another class": ("class Mine: pass", "is no subclass of pydefect.Detector"),
    "an abstract class": ("from pydefect import Detector as Mine", "lacks fit, from_file, predict, save"),
    "another name": (
        "from pydefect.baselines.padim import PaDiMDetector as Mine",
        "has method = 'padim'; it must be the declared name",
    ),
    "no name": (
        "from pydefect.baselines.detector import BaselineDetector\nclass Mine(BaselineDetector): pass",
        "has method = None",
    ),
    "no settings": (
        "from pydefect.baselines.detector import BaselineDetector\n"
        "class Mine(BaselineDetector): method = 'mine'",
        "has no config_type",
    ),
    "settings called as arguments": (
        "from dataclasses import dataclass\n"
        "from pydefect.baselines.detector import BaselineDetector\n"
        "from pydefect.feature_detector import FeatureConfig\n"
        "@dataclass(frozen=True)\n"
        "class Config(FeatureConfig):\n"
        "    TITLE = 'Mine'\n"
        "    seed: int = 7\n"
        "    images: int = 3\n"
        "class Mine(BaselineDetector): method, config_type = 'mine', Config",
        "has settings called images, seed, as arguments of pydefect.fit are; rename them",
    ),
    "an end of the program": ("raise SystemExit('bye')", "cannot be imported: SystemExit: bye"),
    "settings without a title": (
        "from pydefect.baselines.detector import BaselineDetector\n"
        "from pydefect.feature_detector import FeatureConfig\n"
        "class Mine(BaselineDetector): method, config_type = 'mine', FeatureConfig",
        r"has a config_type without TITLE, the method's name in messages \(FeatureConfig\)",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_package_that_does_not_work_is_named_when_its_method_is_used(what: str, install: Install) -> None:
    code, reason = WRONG[what]
    install("my-package", {"mine": "mine:Mine"}, version="2.0")
    install("mine", {}, code)
    assert "mine" in METHOD_NAMES.names()
    assert detector_type("padim").method == "padim"
    assert CliRunner().invoke(app, ["info"]).exit_code == 0
    with pytest.raises(InputError, match=rf"^method: 'mine', which my-package 2\.0 declares .*{reason}"):
        pydefect.fit([], method="mine")


def test_a_place_that_is_no_name_of_a_module(install: Install) -> None:
    install("my-package", {"mine": "not a module!"})
    with pytest.raises(InputError, match=r"my-package 0\.1 declares as 'not a module!', cannot be imported"):
        detector_type("mine")


def test_a_name_has_one_package(install: Install) -> None:
    install("my-package", {"padim": "my_package:Mine", "mine": "my_package:Mine"})
    message = r"method: 'padim' is declared by pydefect and by my-package 0\.1; rename it in the entry points"
    with pytest.raises(InputError, match=message):
        pydefect.fit([], method="padim")
    assert METHOD_NAMES.names() == [*METHODS, "mine"]
    assert METHOD_NAMES.package_of("padim") is None
    assert detector_type("patchcore").method == "patchcore"
    install("other-package", {"mine": "other_package:Mine"})
    with pytest.raises(InputError, match=r"'mine' is declared by (my|other)-package 0\.1 and by"):
        pydefect.fit([], method="mine")
    assert len(METHOD_NAMES.points()["mine"]) == 2


def test_a_new_version_is_measured_anew(flange: Path, install: Install) -> None:
    code = block("python", "class OneGaussianDetector")
    (category,) = find_categories([flange])

    def key(method: str) -> str:
        return Pair(Variant(method), category, 0, Weights("random"), "cpu").key

    padim = key("padim")
    keys = set()
    for version in ("0.1", "0.2"):
        install("one-gaussian", {"one_gaussian": "one_gaussian:OneGaussianDetector"}, code, version)
        keys.add(key("one_gaussian"))
    assert len(keys) == 2
    assert key("padim") == padim


@pytest.mark.usefixtures("example")
def test_a_checkpoint_of_another_version_is_not_resumed(
    flange: Path, tmp_path: Path, install: Install
) -> None:
    settings = {"resize": 64, "levels": (1,), "calibration_folds": 2, "weights": "random", "progress": False}

    def fit() -> pydefect.Detector:
        return pydefect.fit(flange, method="one_gaussian", checkpoint=tmp_path / "state", **settings)  # type: ignore[arg-type]

    code = block("python", "class OneGaussianDetector")
    points = {"one_gaussian": "one_gaussian:OneGaussianDetector"}
    with pytest.warns(UserWarning, match="held-out images support"):
        fit()
    install("one-gaussian", points, code, version="0.2")
    with pytest.raises(InputError, match=r"holds another run \(it differs in package\)"):
        fit()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("self.found = {}  #", "#", r"OneGaussian must have found after a fit, .*: NoneType given"),
        ("self.found = {}", "self.found = {'mean': mean}", "a dict of JSON values: Object of type Tensor"),
        (
            "maps.flatten(1).amax(1), maps",
            "maps.flatten(1).amax(1), maps[:, None]",
            r"gave \(1,\) and \(1, 1, ",
        ),
        ("maps.flatten(1).amax(1), maps", "-maps.flatten(1).amax(1), maps", "the least of them -"),
    ],
)
def test_a_model_that_breaks_the_contract_is_told_at_the_first_fold(
    old: str, new: str, message: str, flange: Path, install: Install
) -> None:
    code = block("python", "class OneGaussianDetector")
    assert old in code
    points = {"one_gaussian": "one_gaussian:OneGaussianDetector"}
    install("one-gaussian", points, code.replace(old, new))
    with pytest.raises(PydefectError, match=message):
        pydefect.fit(
            flange,
            method="one_gaussian",
            resize=64,
            levels=(1,),
            calibration_folds=2,
            weights="random",
            progress=False,
        )
