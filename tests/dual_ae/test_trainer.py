"""One training run: resumed with identical results, in a random order, at the schedule's rate."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from pydefect.dual_ae.augmentation import PenaltyImages
from pydefect.dual_ae.config import DualAEConfig
from pydefect.dual_ae.frozen import NormalisedTeacher
from pydefect.dual_ae.pdn import PDN
from pydefect.dual_ae.trainer import Trainer, build_network, step_losses
from pydefect.errors import PydefectError
from pydefect.features import FeatureCache
from pydefect.persistence import Checkpoint
from pydefect.preprocessing import Preprocessing


@pytest.fixture
def make(good_images, config):
    preprocessing = Preprocessing.create((64, 72))

    def build(checkpoint=None, seed=0, progress=None, device="cpu", count=None, **changes):
        images, features = (FeatureCache(device=device) for _ in range(2))
        torch.manual_seed(0)
        teacher = NormalisedTeacher(PDN(padding=config.padding).to(device), "float32")
        teacher.set_statistics(torch.zeros(384, device=device), torch.full((384,), 0.05, device=device))
        for image in good_images:
            tensor = preprocessing(image)[None].to(device)
            images.append([tensor])
            features.append([teacher.describe(tensor)])
        own = dataclasses.replace(config, **changes)
        penalty = PenaltyImages("procedural", preprocessing, (64, 72), seed, own.penalty_pool)
        return Trainer(
            images,
            range(len(good_images) if count is None else count),
            features,
            teacher,
            penalty if own.penalty != "none" else None,
            preprocessing,
            own,
            seed,
            torch.device(device),
            checkpoint,
            progress,
        )

    return build


def states(trainer):
    return trainer.network.state_dict()


@pytest.mark.parametrize("optimiser", ["adam", "muon"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(make, tmp_path, optimiser):
    settings = {"steps": 4, "optimiser": optimiser}
    whole = make(**settings)
    whole.train()
    first = make(Checkpoint(tmp_path, {"run": 1}), **settings)
    first.train(until=2)
    second = make(Checkpoint(tmp_path, {"run": 1}), **settings)
    assert second.step == 2
    second.train()
    assert all(torch.equal(states(whole)[name], states(second)[name]) for name in states(whole))
    assert second.history == whole.history
    # A finished run goes on no further.
    third = make(Checkpoint(tmp_path, {"run": 1}), **settings)
    third.train()
    assert third.step == 4
    assert third.history == whole.history


def test_training_leaves_the_users_random_numbers_alone(make):
    trainer = make(steps=1)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    trainer.train()
    assert torch.equal(torch.rand(3), expected)


def test_the_student_learns(make):
    trainer = make(steps=12, learning_rate=1e-3)
    trainer.train()
    losses = [record.hard + record.teacher_autoencoder for record in trainer.history]
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_all_images_come_before_any_comes_again(make):
    trainer = make(batch_size=4)
    drawn = [trainer._image_of(draw) for draw in range(12)]
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == list(range(6))
    assert drawn[:6] != drawn[6:]
    assert drawn == [make()._image_of(draw) for draw in range(12)]


def test_the_rate_falls_to_a_tenth_at_95_percent(make):
    trainer = make(steps=20, penalty="none", schedule="drop", learning_rate=1e-4)
    rates = []
    step = trainer._optimisers.step
    trainer._optimisers.step = lambda rate: (rates.append(rate), step(rate))
    trainer.train(until=1)
    trainer.step = 18
    trainer.train(until=20)
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5])
    assert all(record.penalty == 0 for record in trainer.history)


def test_the_falling_schedule():
    config = DualAEConfig(schedule="fall", steps=1000, learning_rate=1e-3)
    rates = [config.rate(step) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-3 / 21)
    assert rates[20:600] == pytest.approx([1e-3] * 580)
    assert rates[-1] == pytest.approx(1e-5)
    falls = [before - after for before, after in itertools.pairwise(rates[604:])]
    assert falls == pytest.approx([0.99e-3 / 400] * len(falls))
    assert DualAEConfig(schedule="fall", steps=1, learning_rate=1e-4).rate(0) == pytest.approx(1e-6)


def test_muon_takes_the_convolutions_and_leaves_the_rest_to_adam(make):
    # One step: Adam's parameters move by the rate whatever the gradient, Muon's matrices by 0.2 of it in mean
    # square, so the two are told apart by what moved how far.
    trainer = make(optimiser="muon", learning_rate=1e-3)
    before = {name: value.detach().clone() for name, value in trainer.network.named_parameters()}
    trainer.train(until=1)
    for name, value in trainer.network.named_parameters():
        moved = (value.detach() - before[name]).square().mean().sqrt() / 1e-3
        if value.dim() == 4:
            assert 0.02 < moved < 0.5, name
        else:
            assert moved <= 1.001, name


def test_a_loss_that_is_not_finite_ends_the_run(make):
    trainer = make()
    torch.nn.init.constant_(trainer.network.student[0].weight, float("nan"))
    with pytest.raises(PydefectError, match="not finite"):
        trainer.train()


@pytest.mark.gpu
@pytest.mark.parametrize("optimiser", ["adam", "muon"])
@pytest.mark.parametrize("penalty", ["procedural", "none"])
def test_a_card_trains_as_the_processor(make, optimiser, penalty, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    settings = {"optimiser": optimiser, "penalty": penalty, "dropout": 0.0, "steps": 6, "batch_size": 2}
    # At the default's rate Adam's losses go through a thousand within these steps, and rounding with them.
    settings["learning_rate"] = 1e-4
    own, card = make(**settings), make(device="cuda", **settings)
    for trainer in (own, card):
        trainer.train()
    # Convolutions of other orders of summation, amplified over six steps.
    for one, other in zip(own.history, card.history, strict=True):
        for name, value in vars(one).items():
            assert getattr(other, name) == pytest.approx(value, rel=2e-3), name


@pytest.mark.gpu
@pytest.mark.parametrize("optimiser", ["adam", "muon"])
def test_an_interrupted_run_goes_on_on_a_card(make, tmp_path, optimiser):
    """Its graphs are captured anew after the stop, and drop out as they would have."""
    settings = {"device": "cuda", "steps": 12, "optimiser": optimiser, "learning_rate": 1e-4}
    before = torch.cuda.get_rng_state()
    whole = make(**settings)
    whole.train()
    make(Checkpoint(tmp_path, {"run": 1}), **settings).train(until=6)
    second = make(Checkpoint(tmp_path, {"run": 1}), **settings)
    assert second.step == 6
    second.train()
    # Gradients add in whatever order on a card: as between a card and the processor.
    for one, other in zip(whole.history, second.history, strict=True):
        assert vars(other) == pytest.approx(vars(one), rel=2e-3)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.gpu
def test_a_card_drops_out_anew_in_every_step_and_alike_in_every_run(make):
    runs = [make(device="cuda", steps=8, learning_rate=0.0, jitter=0.0, penalty="none") for _ in range(2)]
    for trainer in runs:
        trainer.train()
    # The weights stay, and six images come again after six steps: what differs then is dropped out anew.
    first, again = ([vars(record) for record in trainer.history] for trainer in runs)
    assert len({record["teacher_autoencoder"] for record in first}) == len(first)
    for one, other in zip(first, again, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.gpu
def test_a_graph_can_capture_the_losses_and_their_gradients(config):
    device = torch.device("cuda")
    own = dataclasses.replace(config, dropout=0.0)
    network = build_network(own, (64, 72), 0).to(device).train()
    teacher = NormalisedTeacher(PDN(padding=config.padding).to(device), "float32")
    teacher.set_statistics(torch.zeros(384, device=device), torch.full((384,), 0.05, device=device))
    images, augmented, penalty = (torch.randn(1, 3, 64, 72, device=device) for _ in range(3))

    def step():
        losses = step_losses(network, own, images, teacher(images), augmented, teacher(augmented), penalty)
        return losses, torch.autograd.grad(losses.sum(), list(network.parameters()))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # runs before the capture, as PyTorch asks for
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for one in (images, augmented, penalty):
        one.copy_(torch.randn_like(one))
    graph.replay()
    losses, gradients = step()
    # cuDNN may choose another convolution for the capture, and some of them add in any order.
    torch.testing.assert_close(captured[0], losses, rtol=1e-3, atol=1e-5)
    for actual, expected in zip(captured[1], gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.parametrize(("jitter", "dropout"), [(0.2, 0.0), (0.0, 0.2)])
def test_every_step_jitters_and_drops_out_anew(make, jitter, dropout):
    plan = {"steps": 4, "learning_rate": 0.0, "penalty": "none"}
    trainer = make(count=2, jitter=jitter, dropout=dropout, **plan)
    trainer.train()
    # The weights stay, and two images come twice.
    assert len({record.teacher_autoencoder for record in trainer.history}) == 4


@pytest.mark.parametrize("rate", [None, 0.0])
def test_the_gates_have_their_own_rate(make, rate):
    trainer = make(steps=1, schedule="drop", gate_learning_rate=rate)
    network = trainer.network
    before = [gate.weight.detach().clone() for gate in network.gates]
    student = network.student[0].weight.detach().clone()
    trainer.train()
    moved = [not torch.equal(gate.weight, old) for gate, old in zip(network.gates, before, strict=True)]
    assert len(moved) == 5
    assert any(moved) == (rate is None)
    assert not torch.equal(network.student[0].weight, student)


def test_adam_has_the_weight_decay_of_the_settings(make):
    # So large a one decides about the direction of every step.
    trainer = make(steps=1, optimiser="adam", schedule="drop", learning_rate=1e-5, weight_decay=1e9)
    before = trainer.network.student[0].weight.detach().clone()
    trainer.train()
    large = before.abs() > 1e-4
    assert (trainer.network.student[0].weight.detach().abs() < before.abs())[large].all()
