"""Teachers: every format of a file, bad files, and backbones on the grid of a PDN."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pydefect.backbones import build_backbone, weights_fingerprint
from pydefect.data import read_image, texture
from pydefect.dual_ae import teacher as teacher_module
from pydefect.dual_ae.pdn import PDN, output_size
from pydefect.dual_ae.teacher import BackboneTeacher, load_teacher, pool_channels
from pydefect.errors import InputError, WeightsNotFoundError
from pydefect.preprocessing import Preprocessing

NUMBERS = {"small": (0, 3, 6, 8), "medium": (0, 3, 6, 8, 10, 12)}


def pdn(size: str = "small", channels: int = 384) -> PDN:
    torch.manual_seed(1)
    return PDN(size, channels)


def numbered(state: dict[str, Tensor], size: str, pattern: str) -> dict[str, Tensor]:
    """The same weights under other names: the pattern's {} is the convolution's number, from 1."""
    names = {f"{old}": pattern.format(new) for new, old in enumerate(NUMBERS[size], start=1)}
    return {f"{names[key.partition('.')[0]]}.{key.partition('.')[2]}": value for key, value in state.items()}


def write(path: Path, state: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: value.numpy() for name, value in state.items()})
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize("ending", [".pth", ".pt", ".safetensors", ".npz"])
@pytest.mark.parametrize("pattern", [None, "conv{}", "teacher.conv{}", "module.layers.{}"])
def test_every_format_and_naming_scheme(tmp_path, size, ending, pattern):
    state = pdn(size).state_dict()
    file = write(tmp_path / f"t{ending}", state if pattern is None else numbered(state, size, pattern))
    teacher = load_teacher(file, size)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert weights_fingerprint(teacher.state_dict()) == weights_fingerprint(state)


def test_a_checkpoint_that_wraps_the_state_dict_and_a_state_dict_itself(tmp_path):
    state = pdn().state_dict()
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "t.pth")
    expected = weights_fingerprint(state)
    assert weights_fingerprint(load_teacher(tmp_path / "t.pth").state_dict()) == expected
    assert weights_fingerprint(load_teacher(state).state_dict()) == expected


def test_float16_files_become_float32(tmp_path):
    state = {name: value.half() for name, value in pdn().state_dict().items()}
    teacher = load_teacher(write(tmp_path / "t.safetensors", state))
    assert {value.dtype for value in teacher.state_dict().values()} == {torch.float32}
    assert torch.equal(teacher.state_dict()["3.weight"], state["3.weight"].float())


@pytest.mark.parametrize("padding", [False, True])
def test_one_file_serves_both_grids(padding):
    images = torch.randn(1, 3, 48, 40)
    described = load_teacher(pdn().state_dict(), padding=padding)(images)
    assert described.shape == (1, 384, *output_size((48, 40), padding))


def changed(change: str) -> dict[str, Tensor]:
    state = dict(pdn().state_dict())
    if change == "missing":
        del state["6.bias"]
    elif change == "missing convolution":
        del state["6.bias"], state["6.weight"]
    elif change == "more":
        state |= {"9.weight": torch.zeros(3), "9.bias": torch.zeros(3)}
    elif change == "bias":
        state["0.bias"] = torch.zeros(5)
    elif change == "nan":
        state["3.weight"] = state["3.weight"] * float("nan")
    elif change == "prefixes":
        state["other.0.weight"] = state.pop("0.weight")
    elif change == "names":
        state["norm.running_mean"] = torch.zeros(3)
    elif change == "student":
        state = dict(pdn(channels=768).state_dict())
    elif change == "medium":
        state = dict(pdn("medium").state_dict())
    elif change == "empty":
        state = {}
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "convolution 6 lacks a fitting bias"),
        ("missing convolution", "not a small PDN with 384 outputs"),
        ("more", "not a small PDN with 384 outputs"),
        ("bias", "convolution 0 lacks a fitting bias"),
        ("nan", "weight of convolution 3 has values that are not finite"),
        ("prefixes", "names begin with '', 'other.'"),
        ("names", "'norm.running_mean' is no weight or bias"),
        ("student", "768x256x4x4, not"),
        ("medium", "it is a medium one: choose size='medium'"),
        ("empty", "its convolutions are none"),
    ],
)
def test_what_is_no_such_pdn(tmp_path, change, message):
    file = write(tmp_path / "wrong.safetensors", changed(change))
    with pytest.raises(InputError, match=message) as caught:
        load_teacher(file)
    assert "wrong.safetensors" in str(caught.value)


def test_bad_files(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    (tmp_path / "code.pth").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    (tmp_path / "t.onnx").write_bytes(b"x")
    for name in ("cut.safetensors", "code.pth", "t.onnx"):
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            load_teacher(tmp_path / name)


@pytest.mark.parametrize("teacher", ["resnet19", "nowhere.pth", 7, None, ["resnet18"]])
def test_unknown_teachers(teacher: Any):
    with pytest.raises(InputError, match=r"teacher: .*allowed are 'shipped', a \.pth.*'wide_resnet101_2'"):
        load_teacher(teacher)


def test_unknown_sizes():
    with pytest.raises(InputError, match="size: 'large' given"):
        load_teacher(size="large")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="comes with the package is a small PDN"):
        load_teacher(size="medium")


def test_a_backbone_needs_its_weights(tmp_path):
    with pytest.raises(WeightsNotFoundError, match="weights"):
        load_teacher("resnet18", weights=tmp_path / "none.pth")


def fused_slowly(backbone: nn.Module, enlarged: Tensor) -> Tensor:
    """Section 4 of the description, step by step and cell by cell, in float64."""
    second, third = backbone.double()(enlarged.double(), (2, 3))
    maps = []
    for level in (second, third):
        padded = F.pad(level, (1, 1, 1, 1))
        height, width = level.shape[2:]
        local = torch.stack(
            [
                torch.stack([padded[:, :, y : y + 3, x : x + 3].mean((2, 3)) for x in range(width)], -1)
                for y in range(height)
            ],
            -2,
        )
        maps.append(local)
    height, width = maps[0].shape[2:]
    fused = torch.cat([maps[0], F.interpolate(maps[1], (height, width), mode="bilinear")], 1)
    channels = fused.shape[1]
    pooled = [fused[:, channels * c // 384 : -(-channels * (c + 1) // 384)].mean(1) for c in range(384)]
    return torch.stack(pooled, 1)


@pytest.mark.parametrize("name", ["resnet18", "wide_resnet50_2"])
def test_the_target_is_that_of_the_description(name):
    backbone = build_backbone(name, "random")
    enlarged = torch.randn(2, 3, 64, 48)
    found = BackboneTeacher(backbone, padding=True).enlarged(enlarged)
    expected = fused_slowly(backbone, enlarged)
    assert found.shape == (2, 384, 8, 6)
    # float32 against float64 through some 20 (resnet18) to 40 layers of random weights.
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) < 1e-4 * scale


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(384, 1600))
def test_channels_are_pooled_as_adaptive_pooling_does(seed, channels):
    maps = torch.randn(1, channels, 2, 3, generator=torch.Generator().manual_seed(seed))
    slow = torch.stack(
        [maps[:, channels * c // 384 : -(-channels * (c + 1) // 384)].mean(1) for c in range(384)], 1
    )
    # Means of at most five float32 numbers of size 1.
    assert torch.allclose(pool_channels(maps, 384), slow, atol=1e-6)


@pytest.fixture(scope="module")
def random_backbone():
    return build_backbone("resnet18", "random")


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("size", [(256, 256), (64, 64), (70, 93), (33, 47), (101, 66)])
def test_a_backbone_has_the_grid_of_a_pdn(random_backbone, padding, size):
    teacher = BackboneTeacher(random_backbone, padding)
    described = teacher(torch.zeros(1, 3, *size))
    assert described.shape == (1, 384, *output_size(size, padding))
    assert not described.requires_grad


def test_the_unpadded_grid_is_the_inside_of_the_padded_one(random_backbone):
    images = torch.randn(1, 3, 90, 77)
    whole = BackboneTeacher(random_backbone, True)(images)
    inside = BackboneTeacher(random_backbone, False)(images)
    rows, columns = inside.shape[2:]
    assert torch.equal(inside, whole[:, :, 4 : 4 + rows, 4 : 4 + columns])


def test_a_backbone_sees_a_spot_in_the_cells_where_a_pdn_sees_it(random_backbone):
    """The response to a spot has its middle where it is, half a cell at most away."""
    teacher = BackboneTeacher(random_backbone, True)
    plain = torch.zeros(1, 3, 256, 256)
    for row, column in ((128, 128), (80, 170)):
        images = plain.clone()
        images[:, :, row - 2 : row + 2, column - 2 : column + 2] = 3
        # Layer 2 alone: layer 3's own grid has cells twice as large.
        change = (teacher(images) - teacher(plain))[0, :128].square().sum(0)
        cells = torch.arange(64) * 4 + 0.5
        middle = [(change.sum(axis) * cells).sum() / change.sum() for axis in (1, 0)]
        assert abs(float(middle[0]) - row) < 2
        assert abs(float(middle[1]) - column) < 2


def test_bfloat16_differs_by_rounding_only(random_backbone):
    images = torch.randn(1, 3, 64, 64)
    exact = BackboneTeacher(random_backbone)(images)
    rounded = BackboneTeacher(random_backbone, precision="bfloat16")(images)
    # 8 bits, through 12 layers.
    assert float((exact - rounded).abs().mean() / exact.abs().mean()) < 0.02


# -- the teacher that comes with the package ----------------------------------------------------------------

SHIPPED = Path(teacher_module.__file__).with_name("teacher_small.safetensors")


def test_the_shipped_teacher_is_small_and_has_seen_procedural_images_only():
    assert SHIPPED.stat().st_size < 12e6
    with safe_open(SHIPPED, "pt") as file:
        about = json.loads(file.metadata()["pydefect"])
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    assert about["images"] == {"folders": 0, "files": 0}
    assert about["settings"]["procedural"] == 1.0
    # The figures of docs/teacher.md.
    docs = (Path(__file__).parents[2] / "docs" / "teacher.md").read_text(encoding="utf-8")
    assert f"{about['settings']['steps']} steps" in docs
    assert f"{about['explained_variance']['procedural']['both']:.1%}".replace("%", " %") in docs


@pytest.mark.parametrize("padding", [False, True])
def test_the_shipped_teacher_is_the_default_and_answers(padding):
    teacher = load_teacher(padding=padding)
    images = torch.stack([Preprocessing.create()(texture((5, number), 96)) for number in range(3)])
    answers = teacher(images)
    assert answers.shape == (3, 384, *output_size((96, 96), padding))
    # Different patches, different answers, in every channel.
    assert float(answers.std((0, 2, 3)).min()) > 1e-3


def test_the_shipped_teacher_says_what_the_source_says_about_real_images(bottle, resnet18_weights):
    """It has never seen a photograph; a PDN that has learned nothing has correlations round 0."""
    files = sorted((bottle / "train" / "good").glob("*.png"))[:40:10]
    images = torch.stack([Preprocessing.create(resize=256)(read_image(file)) for file in files])
    source = load_teacher("resnet18", weights=resnet18_weights)(images)
    answers = load_teacher()(images)
    both = torch.stack([maps.permute(1, 0, 2, 3).flatten(1) for maps in (source, answers)])
    both = (both - both.mean(2, keepdim=True)) / both.std(2, keepdim=True).clamp_min(1e-6)
    correlation = both.prod(0).mean(1)
    assert float(correlation.median()) > 0.2


@pytest.mark.parametrize("padding", [True, False])
def test_what_is_missing_of_the_last_cells_repeats_the_edge(padding: bool) -> None:
    teacher = BackboneTeacher(build_backbone("resnet18", "random"), padding=padding)
    images = torch.randn(1, 3, 66, 69, generator=torch.Generator().manual_seed(0))
    whole = torch.nn.functional.pad(images, (0, 3, 0, 2), mode="replicate")  # of which no cell is cut
    described, expected = teacher(images), teacher(whole)
    rows, columns = described.shape[2:]
    torch.testing.assert_close(described, expected[:, :, :rows, :columns])
