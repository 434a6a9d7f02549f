"""Distillation: windows, statistics, learning, resumption, and the command."""

from __future__ import annotations

import json
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from typer.testing import CliRunner

from pydefect.backbones import build_backbone, weights_fingerprint
from pydefect.cli import app
from pydefect.data.textures import texture
from pydefect.dual_ae import distillation
from pydefect.dual_ae.distillation import (
    Distillation,
    DistillationConfig,
    DistillationImages,
    explained_variance,
    pretrain_teacher,
    source_statistics,
)
from pydefect.dual_ae.pdn import PDN
from pydefect.dual_ae.teacher import BackboneTeacher, load_teacher
from pydefect.errors import InputError
from pydefect.persistence import Checkpoint, load_tensors
from pydefect.preprocessing import Preprocessing

CPU = torch.device("cpu")
# The smallest that has all parts: 40 pixels are 10 cells with padding and 2 without.
TINY: dict[str, Any] = {
    "image_size": 40,
    "batch_size": 2,
    "steps": 6,
    "learning_rate": 2e-4,
    "statistics_images": 4,
    "precision": "float32",
    "procedural": 1.0,
}


def config(**changes: Any) -> DistillationConfig:
    return DistillationConfig(**{**TINY, **changes})


@pytest.fixture(scope="module")
def source() -> BackboneTeacher:
    return BackboneTeacher(build_backbone("resnet18", "random"), True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty photographs of three sizes."""
    path = tmp_path / "photographs"
    path.mkdir()
    for number in range(20):
        size = [(48, 64), (90, 50), (30, 100)][number % 3]
        cv2.imwrite(str(path / f"{number:02d}.png"), texture((3, number), size))
    return path


def distil(source: BackboneTeacher, settings: DistillationConfig, **how: Any) -> Distillation:
    return Distillation(settings, DistillationImages([], settings, 0), source, 0, CPU, **how)


# -- images -------------------------------------------------------------------------------------------------


def test_a_step_is_drawn_from_seed_and_step_alone(folder):
    settings = config(procedural=0.5)
    first = DistillationImages([folder], settings, 7)
    again = DistillationImages([folder], settings, 7)
    for step in (5, 0, 3):  # in any order
        for one, other in zip(first.batch(step), again.batch(step), strict=True):
            assert torch.equal(one, other)
    assert not torch.equal(first.batch(1)[0], first.batch(2)[0])
    other = DistillationImages([folder], settings, 8)
    assert not torch.equal(first.batch(1)[0], other.batch(1)[0])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("procedural", [0.0, 0.5, 1.0])
def test_steps_in_a_row_are_those_drawn_one_by_one(folder, procedural, workers):
    settings = config(procedural=procedural, windows=3)
    images = DistillationImages([folder] if procedural < 1 else [], settings, 7)
    steps = range(2, 9)  # neither end where a drawing's steps begin
    found = list(images.stream(steps, CPU, workers))
    assert len(found) == len(steps)
    for step, windows in zip(steps, found, strict=True):
        for one, other in zip(windows, images.batch(step), strict=True):
            assert torch.equal(one, other)


def test_both_networks_see_the_same_window():
    """What the source sees, halved, is what the PDN sees, but for interpolation."""
    images, enlarged = DistillationImages([], config(batch_size=6), 0).batch(0)
    assert images.shape == (6, 3, 40, 40)
    assert enlarged.shape == (6, 3, 80, 80)
    halved = F.avg_pool2d(enlarged, 2)
    # In units of the pixels' standard deviation in ImageNet. Fine texture loses most by halving.
    assert float((halved - images).abs().mean()) < 0.25 * float(images.std())


def test_pixels_are_normalised_as_everywhere():
    settings = config(grey=0.0)
    image = texture(3, 40)
    windows = distillation._to_networks((image[None], cv2.resize(image, (80, 80))[None]))
    assert torch.allclose(windows[0][0], Preprocessing.create()(image), atol=1e-6)
    assert settings.grey == 0


def test_windows_reach_from_one_to_two_edges_and_stay_inside():
    ramp = np.broadcast_to(np.linspace(0, 255, 200, dtype=np.uint8)[None, :, None], (120, 200, 3))
    widths = []
    for seed in range(60):
        small, _ = distillation._cut(np.random.default_rng(seed), ramp, 40, 0.0)
        widths.append(np.ptp(small[20, :, 0].astype(float)) / 255 * 200)
    assert min(widths) > 36
    assert max(widths) < 84
    assert max(widths) - min(widths) > 25


def test_images_smaller_than_a_window_are_enlarged():
    small, large = distillation._cut(np.random.default_rng(0), texture(0, (17, 90)), 40, 0.0)
    assert small.shape == (40, 40, 3)
    assert large.shape == (80, 80, 3)


def test_grey_windows():
    windows = [distillation._cut(np.random.default_rng(s), texture(4, 60), 40, 1.0)[0] for s in range(3)]
    assert all((window == window[..., :1]).all() for window in windows)


def test_held_out_images_are_never_learned_from(folder):
    images = DistillationImages([folder], config(procedural=0.0, held_out=0.2), 0)
    assert len(images.held_out) == 4
    assert not set(images.held_out) & set(images.training)
    assert len(images.held_out) + len(images.training) == 20
    measured = images.measured("images", 64)
    assert measured is not None
    assert len(measured[0]) == 4
    assert DistillationImages([], config(), 0).measured("images", 64) is None


def test_measured_images_are_spread_over_the_held_out_ones(folder, monkeypatch):
    read = []
    real = distillation.read_image
    monkeypatch.setattr(distillation, "read_image", lambda path: read.append(path) or real(path))
    images = DistillationImages([folder], config(procedural=0.0, held_out=0.5), 0)
    assert len(images.held_out) == 10
    images.measured("images", 4)
    assert read == [images.held_out[number] for number in (0, 2, 5, 7)]


def test_a_damaged_held_out_image_is_left_out(folder):
    images = DistillationImages([folder], config(procedural=0.0, held_out=0.5), 0)
    images.held_out[0].write_bytes(b"no image")
    with pytest.warns(UserWarning, match="it is left out of what is measured"):
        measured = images.measured("images", 64)
    assert measured is not None
    assert len(measured[0]) == 9


def test_measured_procedural_images_are_not_those_of_training():
    images = DistillationImages([], config(), 0)
    measured = images.measured("procedural", 3)
    assert measured is not None
    assert not torch.equal(measured[0][:2], images.batch(0)[0])


def test_folders_are_mixed_by_their_images(folder, tmp_path):
    other = tmp_path / "others" / "deep"
    other.mkdir(parents=True)
    cv2.imwrite(str(other / "a.jpg"), np.full((64, 64, 3), 9, np.uint8))
    images = DistillationImages([folder, other.parent], config(procedural=0.0, held_out=0.0), 0)
    assert len(images.training) == 21


def test_no_images(tmp_path):
    with pytest.raises(InputError, match="no folder given, and procedural is 0"):
        DistillationImages([], config(procedural=0.5), 0)
    with pytest.raises(InputError, match="there is no folder"):
        DistillationImages([tmp_path / "none"], config(), 0)
    with pytest.raises(InputError, match="no image in the folder"):
        DistillationImages([tmp_path], config(), 0)


# -- settings -----------------------------------------------------------------------------------------------


def test_the_defaults_are_efficientads():
    settings = DistillationConfig()
    assert (settings.steps, settings.batch_size, settings.image_size) == (60_000, 16, 256)
    assert {settings.rate(step) for step in (0, 30_000, 59_999)} == {1e-4}
    assert settings.weight_decay == 1e-5
    assert settings.padding


def test_the_rate_rises_stays_and_falls():
    settings = config(steps=100, learning_rate=1.0, warmup=4, decay=0.5)
    rates = [settings.rate(step) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert set(rates[4:50]) == {1.0}
    assert np.all(np.diff(rates[49:]) < 0)
    assert rates[-1] == pytest.approx(0.01)


@pytest.mark.parametrize(
    "change",
    [
        {"size": "large"},
        {"padding": 1},
        {"image_size": 42},
        {"part": 40},
        {"part": 44, "padding": False},
        {"part": 38, "padding": False},
        {"image_size": 36},
        {"batch_size": 0},
        {"steps": 1.5},
        {"learning_rate": -1},
        {"learning_rate": "fast"},
        {"decay": 1.1},
        {"procedural": 2},
        {"held_out": 1},
        {"windows": 0},
        {"precision": "float16"},
    ],
)
def test_settings_are_checked(change):
    with pytest.raises(InputError, match=rf"^{next(iter(change))}: .* given; "):
        config(**change)


# -- statistics and measures --------------------------------------------------------------------------------


def test_statistics_are_those_of_all_cells(source):
    images = DistillationImages([], config(statistics_images=6), 0)
    mean, std = source_statistics(source, images, CPU)
    maps = torch.cat([source.enlarged(images.batch(step)[1]) for step in range(3)]).double()
    flat = maps.permute(1, 0, 2, 3).flatten(1)
    # Sums in float64, results rounded to float32.
    assert torch.allclose(mean.flatten().double(), flat.mean(1), rtol=1e-5, atol=1e-7)
    expected = flat.std(1, correction=0)
    # A channel that is never active stays 0, instead of being divided by nothing.
    expected = torch.where(expected == 0, 1.0, expected)
    assert torch.allclose(std.flatten().double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("padding", [True, False])
def test_explained_variance(padding):
    torch.manual_seed(0)
    network = PDN(padding=padding)
    images = torch.randn(10, 3, 40, 40)
    with torch.inference_mode():
        answers = network(images)
    targets = torch.randn(10, 384, 10, 10)
    if padding:
        targets = answers.clone()
    else:
        targets[:, :, 4:6, 4:6] = answers
    assert explained_variance(network, images, targets, padding)["both"] == pytest.approx(1, abs=1e-6)
    # Noise of the size of half the deviation in layer 3 alone takes a quarter of its variance away.
    inner = targets if padding else targets[:, :, 4:6, 4:6]
    noise = torch.randn_like(inner[:, 128:]) * 0.5 * inner[:, 128:].std((0, 2, 3), keepdim=True)
    noisy = targets.clone()
    (noisy if padding else noisy[:, :, 4:6, 4:6])[:, 128:] += noise
    found = explained_variance(network, images, noisy, padding)
    assert found["layer2"] == pytest.approx(1, abs=1e-6)
    # 0.25 / 1.25 of the noisy targets' variance; 40 cells of 256 channels leave some chance.
    assert found["layer3"] == pytest.approx(0.8, abs=0.03)


# -- learning -----------------------------------------------------------------------------------------------


def test_a_step_is_adams_step_on_the_mean_squared_error(source):
    """Against the plain way to write it, and the target against the source itself."""
    settings = config(steps=2, padding=False, weight_decay=1e-2)
    run = distil(source, settings)
    twin = PDN("small")
    twin.load_state_dict(run.network.state_dict())
    adam = torch.optim.Adam(twin.parameters(), 2e-4, weight_decay=1e-2, foreach=False, fused=False)
    for step in range(2):
        images, enlarged = run.images.batch(step)
        target = ((source.enlarged(enlarged) - run.mean) / run.std)[:, :, 4:6, 4:6]
        loss = (twin(images) - target).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    run.run()
    assert run.history[-1][0] == 2
    for name, value in twin.state_dict().items():
        # Adam divides by the gradient's size: rounding of small gradients moves a weight by some per cent of
        # a step of 2e-4.
        assert torch.allclose(run.network.state_dict()[name], value, atol=4e-5), name


def test_a_step_with_muon_is_muons_on_the_weights_as_matrices(source, iterated):
    """Against copies of the weights as matrices, one row an output channel, and Adam for the biases."""
    settings = config(steps=1, optimiser="muon", weight_decay=1e-2)
    run = distil(source, settings)
    twin = PDN("small", padding=True)
    twin.load_state_dict(run.network.state_dict())
    images, enlarged = run.images.batch(0)
    target = (source.enlarged(enlarged) - run.mean) / run.std
    (twin(images) - target).square().mean().backward()
    convolutions = [module for module in twin if isinstance(module, torch.nn.Conv2d)]
    expected_steps = []
    for module in convolutions:
        matrix, gradient = (one.detach().flatten(1).double() for one in (module.weight, module.weight.grad))
        direction = iterated(gradient) * 0.2 * max(gradient.shape) ** 0.5
        expected_steps.append(-2e-4 * (direction + 1e-2 * matrix))
    torch.optim.Adam([module.bias for module in convolutions], 2e-4, weight_decay=1e-2).step()
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    run.run()
    moved = [module for module in run.network if isinstance(module, torch.nn.Conv2d)]
    of_all = zip((0, 3, 6, 8), moved, convolutions, expected_steps, strict=True)
    for number, module, convolution, expected in of_all:
        step = (module.weight - before[f"{number}.weight"]).detach().flatten(1)
        # With AMX products are bfloat16's, of 8 bits, which was 0.098 off at most (torch.optim.Muon: 0.22).
        assert float((step - expected).norm() / expected.norm()) < 0.15
        assert torch.allclose(module.bias, convolution.bias, atol=4e-5)


@pytest.mark.parametrize(("size", "padding"), [("small", False), ("small", True), ("medium", True)])
def test_normalisation_is_folded_into_a_plain_pdn_that_says_the_same(source, size, padding):
    run = distil(source, config(size=size, padding=padding, batch_normalisation=True, steps=3))
    before = run.teacher()
    after = run.run()
    assert type(after) is PDN
    assert after.state_dict().keys() == PDN(size).state_dict().keys()
    images, _ = run.images.batch(5)
    with torch.inference_mode():
        expected = run.network.eval()(images)
        # Sums of up to 8,192 float32 products, scaled before instead of after.
        assert torch.allclose(after(images), expected, atol=2e-5 * float(expected.abs().max()))
        assert not torch.allclose(before(images), expected, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "how", [{}, {"optimiser": "muon"}, {"optimiser": "muon", "batch_normalisation": True}]
)
def test_learning_explains_what_it_is_shown(source, how):
    """Many steps on the same few windows: most of their variance, of which an untrained network explains
    none."""
    settings = config(steps=40, image_size=40, batch_size=2, learning_rate=1e-3, padding=False, **how)
    run = distil(source, settings)
    images, enlarged = run.images.batch(0)
    targets = (source.enlarged(enlarged) - run.mean) / run.std
    assert explained_variance(run.teacher(), images, targets, padding=False)["both"] < 0.05
    run.images.stream = lambda steps, device: ((images, enlarged) for _ in steps)  # type: ignore[method-assign]
    # The normalisation's running statistics lag behind weights that change as fast as here.
    enough = 0.4 if how.get("batch_normalisation") else 0.6
    assert explained_variance(run.run(), images, targets, padding=False)["both"] > enough


def test_a_part_of_the_windows_teaches_what_a_pdn_of_the_whole_would_say_there(source):
    """The answers on a part are those cells of the answers on the whole, and so are the targets."""
    settings = config(image_size=64, part=40, padding=False)
    run = distil(source, settings)
    places = set()
    for step in range(12):
        run.step = step
        images, _ = run.images.batch(0)
        cells = run.network(images)
        part, target = run._part(images, cells)
        # The same sums of products, in another order.
        assert torch.allclose(run.network(part), target, atol=1e-5)
        places.add(int((images == part[0, 0, 0, 0]).nonzero()[0][-1]))
    assert len(places) > 3


def test_bfloat16_learns_the_same(source):
    runs = [distil(source, config(precision=precision, steps=4)) for precision in ("float32", "bfloat16")]
    exact, rounded = (dict(run.run().state_dict()) for run in runs)
    moved = torch.cat([(exact[n] - rounded[n]).flatten().abs() for n in exact])
    # Four steps of at most 2e-4 each way.
    assert float(moved.max()) <= 2 * 4 * 2e-4 * 1.01
    assert float(moved.mean()) < 2e-4


class StopError(Exception):
    pass


def stop_at(step: int):
    def progress(description: str, done: int, total: int | None) -> None:
        if description == "distillation" and done == step:
            raise StopError

    return progress


@pytest.fixture
def saving_every_step(monkeypatch):
    monkeypatch.setattr(distillation, "_CHECKPOINT_INTERVAL", -1.0)


@pytest.fixture
def without_measuring(monkeypatch):
    """What takes most of the time, where it is the teacher that counts."""
    monkeypatch.setattr(distillation.Distillation, "measure", lambda _: {})


def tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def metadata(path: Path) -> dict[str, Any]:
    return load_tensors(path)[1]


def make(out: Path, **how: Any) -> dict[str, Any]:
    settings = {**TINY, "warmup": 1, "decay": 0.5, **how}
    return pretrain_teacher(out, source="resnet18", weights="random", **settings)


@pytest.mark.usefixtures("without_measuring")
@pytest.mark.parametrize("context", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_callers_context_changes_no_teacher(tmp_path, context):
    make(tmp_path / "plain.safetensors")
    with context():
        make(tmp_path / "within.safetensors")
    plain, within = (tensors(tmp_path / f"{name}.safetensors") for name in ("plain", "within"))
    assert all(torch.equal(within[name], value) for name, value in plain.items())


@pytest.mark.usefixtures("saving_every_step")
@pytest.mark.parametrize(
    ("stopped_at", "optimiser", "batch_normalisation"),
    [(1, "adam", False), (4, "adam", False), (2, "muon", False), (3, "muon", True)],
)
def test_an_interrupted_run_goes_on_to_the_same_teacher(
    tmp_path, folder, stopped_at, optimiser, batch_normalisation
):
    how = {
        "images": [folder],
        "procedural": 0.5,
        "optimiser": optimiser,
        "batch_normalisation": batch_normalisation,
    }
    make(tmp_path / "whole.safetensors", **how)
    with pytest.raises(StopError):
        make(
            tmp_path / "parts.safetensors", checkpoint=tmp_path / "state", progress=stop_at(stopped_at), **how
        )
    assert not (tmp_path / "parts.safetensors").exists()
    about = make(tmp_path / "parts.safetensors", checkpoint=tmp_path / "state", **how)
    assert about["resumed_at_step"] == stopped_at
    whole, parts = (tensors(tmp_path / f"{name}.safetensors") for name in ("whole", "parts"))
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name
    same = ("history", "explained_variance")
    one, other = (metadata(tmp_path / f"{name}.safetensors") for name in ("whole", "parts"))
    assert [one[key] for key in same] == [other[key] for key in same]


@pytest.mark.usefixtures("without_measuring")
def test_the_sources_statistics_are_not_measured_twice(tmp_path, monkeypatch):
    make(tmp_path / "whole.safetensors")
    with pytest.raises(StopError):
        make(tmp_path / "parts.safetensors", checkpoint=tmp_path / "state", progress=stop_at(1))
    monkeypatch.setattr(distillation, "source_statistics", None)
    make(tmp_path / "parts.safetensors", checkpoint=tmp_path / "state")
    whole, parts = (tensors(tmp_path / f"{name}.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_the_place_of_the_teacher_is_looked_at_first(tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "build_backbone", None)
    with pytest.raises(InputError, match=r"out: '.*' is a folder; name a file in it"):
        make(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="out: "):
        make(tmp_path / "file" / "teacher.safetensors")


@pytest.mark.usefixtures("without_measuring")
def test_a_checkpoint_does_not_name_every_file(tmp_path, folder):
    make(tmp_path / "teacher.safetensors", images=[folder], checkpoint=tmp_path / "state")
    (state,) = (tmp_path / "state").iterdir()
    assert next(folder.rglob("*.png")).name.encode() not in state.read_bytes()
    (folder / "another.png").write_bytes(next(folder.rglob("*.png")).read_bytes())
    with pytest.raises(InputError, match=r"holds another run \(it differs in images\)"):
        make(tmp_path / "teacher.safetensors", images=[folder], checkpoint=tmp_path / "state")


@pytest.mark.usefixtures("interruptible", "without_measuring")
def test_ctrl_c_ends_the_step_and_saves_it(tmp_path):
    def interrupt(description: str, done: int, total: int | None) -> None:
        if description == "distillation" and done == 2:
            signal.raise_signal(signal.SIGINT)

    make(tmp_path / "whole.safetensors")
    parts = tmp_path / "parts.safetensors"
    with pytest.raises(KeyboardInterrupt):
        make(parts, checkpoint=tmp_path / "state", progress=interrupt)
    # Told of the second step, it ended the third.
    assert make(parts, checkpoint=tmp_path / "state")["resumed_at_step"] == 3
    for name, value in tensors(tmp_path / "whole.safetensors").items():
        assert torch.equal(value, tensors(parts)[name]), name


@pytest.mark.usefixtures("saving_every_step")
def test_a_run_can_be_made_longer_until_its_rate_falls(tmp_path):
    make(tmp_path / "whole.safetensors", steps=8)
    with pytest.raises(StopError):
        make(
            tmp_path / "x.safetensors",
            steps=12,
            decay=0.75,
            checkpoint=tmp_path / "state",
            progress=stop_at(3),
        )
    make(tmp_path / "longer.safetensors", steps=8, checkpoint=tmp_path / "state")
    whole, longer = (tensors(tmp_path / f"{name}.safetensors") for name in ("whole", "longer"))
    assert all(torch.equal(value, longer[name]) for name, value in whole.items())
    with pytest.raises(InputError, match=r"^steps: 20 with decay=0.5 given, but the .* step 8 of 8 with"):
        make(tmp_path / "x.safetensors", steps=20, checkpoint=tmp_path / "state")


@pytest.mark.usefixtures("saving_every_step")
@pytest.mark.parametrize("change", [{"seed": 1}, {"learning_rate": 1e-3}, {"source": "resnet34"}])
def test_another_run_does_not_take_over_the_state(tmp_path, change):
    with pytest.raises(StopError):
        make(tmp_path / "x.safetensors", checkpoint=tmp_path / "state", progress=stop_at(1))
    settings = {**TINY, "warmup": 1, "decay": 0.5, "source": "resnet18", "weights": "random", **change}
    with pytest.raises(InputError, match=r"checkpoint: .* holds another run"):
        pretrain_teacher(tmp_path / "x.safetensors", checkpoint=tmp_path / "state", **settings)


@pytest.mark.usefixtures("saving_every_step")
@pytest.mark.parametrize("kept", [False, True])
def test_a_loss_that_is_not_finite_ends_the_run(source, kept, tmp_path):
    """In the step itself: the state with it could not be kept."""
    run = distil(source, config(steps=2))
    run.checkpoint = Checkpoint(tmp_path, {"run": 1}) if kept else None
    with torch.no_grad():
        run.network[0].weight.fill_(float("nan"))
    with pytest.raises(distillation.PydefectError, match="not finite; lower learning_rate"):
        run.run()


def test_the_file_is_a_teacher_and_says_how_it_was_made(tmp_path, folder):
    out = tmp_path / "teacher.safetensors"
    about = make(out, images=[folder], procedural=0.25, held_out=0.2)
    teacher = load_teacher(out)
    half = {name: value.float() for name, value in tensors(out).items()}
    assert weights_fingerprint(teacher.state_dict()) == weights_fingerprint(half)
    assert {value.dtype for value in tensors(out).values()} == {torch.float16}
    said = metadata(out)
    assert said == json.loads(json.dumps(about))
    assert said["settings"] == json.loads(
        json.dumps(config(warmup=1, decay=0.5, procedural=0.25, held_out=0.2).to_dict())
    )
    assert said["images"] == {"folders": 1, "files": 16}
    assert set(said["explained_variance"]) == {"procedural", "images"}
    # No path of the machine it was made on.
    assert str(tmp_path) not in json.dumps(said)


def test_medium(tmp_path):
    make(tmp_path / "m.safetensors", size="medium", steps=1, checkpoint=tmp_path / "state")
    assert load_teacher(tmp_path / "m.safetensors", "medium")(torch.zeros(1, 3, 33, 33)).shape == (
        1,
        384,
        1,
        1,
    )


def test_the_command(tmp_path, folder):
    out = tmp_path / "teacher.safetensors"
    fast = ["--source", "resnet18", "--weights", "random", "--steps", "2", "--batch-size", "2", "--quiet"]
    fast += ["--image-size", "40", "--set", "statistics_images=4"]
    result = CliRunner().invoke(
        app, ["pretrain-teacher", "--images", str(folder), "--procedural", "0.5", "--out", str(out), *fast]
    )
    assert result.exit_code == 0, result.output
    assert "after 2 steps" in result.output
    assert "held-out procedural images" in result.output
    assert "held-out images" in result.output
    load_teacher(out)
    again = CliRunner().invoke(app, ["pretrain-teacher", "--out", str(out), *fast])
    assert again.exit_code == 2
    assert "--force replaces it" in again.output
    for wrong in (["--set", "sizes=3"], ["--source", "vgg16"], ["--set", "steps=3"]):
        refused = CliRunner().invoke(
            app, ["pretrain-teacher", "--out", str(tmp_path / "n.st"), *fast, *wrong]
        )
        assert refused.exit_code == 2, refused.output
    assert not (tmp_path / "n.st").exists()


@pytest.mark.parametrize(("step", "goes_on"), [(4, True), (5, False)])
def test_other_plans_go_on_until_the_first_step_of_a_falling_rate(source, tmp_path, step, goes_on):
    def planned(**plan: Any) -> Distillation:
        return distil(source, config(**plan), checkpoint=Checkpoint(tmp_path, {"run": 1}))

    first = planned(steps=8, decay=0.5)  # steps 0 to 3 have the whole rate
    first.step = step
    first._save()
    with nullcontext() if goes_on else pytest.raises(InputError, match="the rate falls from step 4 on"):
        assert planned(steps=20, decay=0.5).step == step
