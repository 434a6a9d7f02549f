"""The README's examples, run word for word on few and small drawings, and the pages' links."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import pydefect
import pydefect.data
from pydefect.backbones import IMAGENET_WEIGHTS, build_backbone
from pydefect.cli import app
from pydefect.data.procedural import write_dataset
from pydefect.dual_ae.config import DualAEConfig
from pydefect.dual_ae.pdn import PDN

ROOT = Path(__file__).parents[1]


def blocks(language: str, page: str = "README.md") -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the README expects it, its drawings small and few.

    Random weights lie where torch hub keeps the published ones.
    """
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            pydefect.data, "write_dataset", lambda root, seed=0: write_dataset(root, 4, 2, 1, 128, seed)
        )
        (drawing,) = [block for block in blocks("bash") if "write_dataset" in block]
        program, option, code = shlex.split(drawing)
        assert (program, option) == ("python", "-c")
        exec(code, {})
    cache = tmp_path / "hub" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    weights = build_backbone("resnet18", "random").state_dict()
    torch.save(weights, cache / IMAGENET_WEIGHTS["resnet18"].filename)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("PYDEFECT_WEIGHTS_DIR", raising=False)
    return tmp_path


@pytest.fixture
def logical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a product and photographs for the dual autoencoder.

    It makes two steps with an untrained teacher.
    """
    monkeypatch.chdir(tmp_path)
    write_dataset("juice_bottle", 4, 1, 1, 64, scene="tray")
    shutil.copytree("juice_bottle/train/good", "photographs")
    torch.manual_seed(0)
    save_file(PDN().state_dict(), "untrained.safetensors")
    quick = {"teacher": "untrained.safetensors", "resize": 64, "steps": 2, "held_out_share": 0.5}
    monkeypatch.setitem(DualAEConfig.PRESETS, "default", quick)  # type: ignore[index]
    return tmp_path


def run_commands(example: str, **more: str) -> None:
    """Run every line of an example, with further options for some commands."""
    for line in example.splitlines():
        program, command, *arguments = shlex.split(line, comments=True)
        assert program == "pydefect"
        arguments += shlex.split(more.get(command.replace("-", "_"), ""))
        done = CliRunner().invoke(app, [command, *arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output


@pytest.mark.filterwarnings("ignore:.*held-out images support:UserWarning")
def test_the_python_example(workplace: Path) -> None:
    (example,) = [block for block in blocks("python") if "conpatch" in block]
    names: dict[str, object] = {}
    exec(example, names)
    assert len(names["result"]) == 2 + 6  # type: ignore[arg-type]
    assert (workplace / "flange.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:.*held-out images support:UserWarning")
def test_the_command_lines(workplace: Path) -> None:
    (example,) = [block for block in blocks("bash") if "pydefect score" in block]
    run_commands(example, benchmark="--threads 1 --set resize=64 --set levels=[1] --set calibration_folds=0")
    for written in ("scores/scores.csv", "flange.json", "runs/flange/report.html", "comparison/table.md"):
        assert (workplace / written).is_file()


@pytest.mark.filterwarnings("ignore:.*held-out images support:UserWarning")
def test_the_dual_autoencoders_example(logical: Path) -> None:
    (example,) = [block for block in blocks("python") if "dual_ae" in block]
    names: dict[str, object] = {"pydefect": pydefect}
    exec(example, names)
    assert set(names["result"].kind) <= {"structural", "logical", "both", None}  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:.*held-out images support:UserWarning")
def test_the_command_lines_for_a_teacher(logical: Path) -> None:
    (example,) = [block for block in blocks("bash") if "pretrain-teacher" in block]
    small = "--source resnet18 --weights random --image-size 64 --batch-size 1"
    run_commands(example, pretrain_teacher=f"{small} --steps 1 --set statistics_images=2")
    assert (logical / "juice.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:.*held-out images support:UserWarning")
def test_the_examples_with_a_camera(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    small = {"weights": "random", "resize": 64, "levels": [1], "false_alarm_rate": 0.4, "progress": False}
    pydefect.fit("flange/train/good", method="padim", **small).save("flange.safetensors")

    class Camera:
        def __init__(self, number: int) -> None:
            assert number == 0
            self.colours = [(255, 0, 255), (0, 255, 0)]

        def read(self) -> tuple[bool, np.ndarray | None]:
            if not self.colours:
                return False, None
            return True, np.full((64, 64, 3), self.colours.pop(), np.uint8)

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    deciding, collecting = [block for block in blocks("python", "docs/data.md") if "VideoCapture" in block]
    names: dict[str, object] = {}
    exec(deciding, names)
    assert len(re.findall(r"^\d{8}-\d{6}-\d{6} ", capsys.readouterr().out, flags=re.MULTILINE)) == 2
    for calls in (1, 2):
        exec(collecting, names)
        assert len(list((workplace / "camera/masks").iterdir())) == 2 * calls
    shutil.copytree("flange/test", "line/today")
    commands = [block for block in blocks("bash", "docs/data.md") if "--append" in block]
    for _ in range(2):
        run_commands("".join(commands))
    assert len((workplace / "shift/scores.csv").read_text().splitlines()) == 1 + 8


def test_every_link_leads_somewhere() -> None:
    if not (ROOT / ".ci").exists():
        pytest.skip("a source distribution, which leaves pictures out")
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
    linked = set()
    for page in pages:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"
                linked.add((page.parent / link).resolve())
    # The README leads to every page, or to a page that does.
    assert {page.resolve() for page in ROOT.glob("docs/*.md")} <= linked
