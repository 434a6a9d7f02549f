"""The README's examples, run word for word on a drawn product in place of the bottle."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pydefect.backbones import IMAGENET_WEIGHTS, build_backbone
from pydefect.cli import app
from pydefect.data.procedural import write_dataset

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the README expects it, and random weights where torch hub keeps the published ones."""
    write_dataset(tmp_path / "bottle", n_train=4, n_test_good=2, n_per_defect=1, size=128, seed=0)
    write_dataset(tmp_path / "later", n_train=2, n_test_good=1, n_per_defect=1, size=128, seed=1)
    (tmp_path / "later" / "train" / "good").rename(tmp_path / "new_images")
    (tmp_path / "bottle" / "new_good_images").symlink_to(tmp_path / "new_images")
    cache = tmp_path / "hub" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    weights = build_backbone("resnet18", "random").state_dict()
    torch.save(weights, cache / IMAGENET_WEIGHTS["resnet18"].filename)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("PYDEFECT_WEIGHTS_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*held-out images support:UserWarning")
def test_the_python_example(workplace: Path) -> None:
    (example,) = blocks("python")
    names: dict[str, object] = {}
    exec(example, names)
    assert len(names["result"]) == 2 + 6  # type: ignore[arg-type]
    assert (workplace / "bottle.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:.*held-out images support:UserWarning")
def test_the_command_lines(workplace: Path) -> None:
    (example,) = [block for block in blocks("bash") if "pydefect score" in block]
    for line in example.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "pydefect"
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    assert (workplace / "report" / "scores.csv").is_file()
    assert (workplace / "bottle.json").is_file()
