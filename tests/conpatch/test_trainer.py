"""Training: every setting runs, one seed gives one result, and an interruption leaves no trace in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pydefect
from pydefect.conpatch import trainer as module
from pydefect.conpatch.bank import build_bank
from pydefect.conpatch.trainer import Trainer, represent
from pydefect.errors import InputError, PydefectError
from pydefect.persistence import Checkpoint

CPU = torch.device("cpu")


def train(cache, config, *, seed=0, folder=None, progress=None) -> Trainer:
    checkpoint = Checkpoint(folder, {**config.to_dict(), "seed": seed}) if folder else None
    trainer = Trainer(cache, [0, 2, 3, 4, 1], config, seed, CPU, checkpoint, progress=progress)
    while trainer.epoch < config.epochs:
        trainer.train_epoch()
    return trainer


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        **trainer.network.state_dict(),
        **{f"bank.{name}": value for name, value in trainer.bank.state().items()},
    }


def assert_identical(one: Trainer, other: Trainer) -> None:
    assert one.history == other.history
    expected = state(other)
    assert state(one).keys() == expected.keys()
    for name, value in state(one).items():
        assert torch.equal(value, expected[name]), name


class StoppedError(Exception):
    pass


class StopAt:
    """A progress callback that interrupts the work at the n-th step that ends, as Ctrl-C would."""

    def __init__(self, call: int | None = None) -> None:
        self.calls = 0
        self.stop = call

    def __call__(self, description: str, done: int, total: int) -> None:
        if done == 0:
            return
        self.calls += 1
        assert done <= total
        if self.calls == self.stop:
            raise StoppedError


# -- what training does
# --------------------------------------------------------------------------------------------


def test_one_seed_one_result(cache, make_config):
    config = make_config(initialisation="default")
    assert_identical(train(cache, config, seed=4), train(cache, config, seed=4))
    one, other = train(cache, config, seed=4), train(cache, config, seed=5)
    assert not torch.equal(one.network.representation.weight, other.network.representation.weight)


def test_the_global_generator_has_no_say(cache, make_config):
    torch.manual_seed(1)
    one = train(cache, make_config())
    torch.manual_seed(2)
    assert_identical(train(cache, make_config()), one)


@pytest.mark.parametrize("seed", [0, 20_250_101, 2**32 - 1])
def test_any_seed_of_32_bits(cache, make_config, seed):
    """The choice of patches derives numbers from it that have more than 64 bits."""
    assert train(cache, make_config(contrastive_patches=20, epochs=1), seed=seed).epoch == 1


@pytest.mark.parametrize("losses", ["contrastive", "hypersphere"])
def test_training_lowers_the_losses(cache, make_config, losses):
    """With labels and bank held still: they move the goal otherwise."""
    config = make_config(
        losses=losses,
        epochs=8,
        rebuild_bank="never",
        target_momentum=1.0,
        contrastive_patches=None,
        alpha=0.0,
        batch_size=5,
        learning_rate=1e-2,
    )
    values = [getattr(record, losses) for record in train(cache, config).history[1:]]
    assert values[-1] < 0.95 * values[0]
    assert min(values) == values[-1]


@pytest.mark.parametrize(
    ("losses", "contrastive", "hypersphere"),
    [("contrastive", True, False), ("hypersphere", False, True), ("both", True, True)],
)
def test_the_history_holds_the_losses_that_were_computed(
    cache, make_config, losses, contrastive, hypersphere
):
    history = train(cache, make_config(losses=losses)).history
    assert [record.epoch for record in history] == [0, 1, 2]
    assert history[0].contrastive is None
    assert history[0].hypersphere is None
    for record in history[1:]:
        assert (record.contrastive is not None) == contrastive
        assert (record.hypersphere is not None) == hypersphere


def test_equation_8_and_adamw_by_hand(cache, make_config):
    """One step: phi * L_RC + L_hyper through PyTorch's AdamW with amsgrad, then equation (6)."""
    from pydefect.ops import reference

    config = make_config(epochs=1, batch_size=5, contrastive_patches=None, rebuild_bank="never", phi=0.6)
    start = Trainer(cache, [0, 2, 3, 4, 1], config, 0, CPU)
    online = start.network
    centres = start.bank.centres.clone()
    twin = {name: value.clone() for name, value in online.state_dict().items() if name.startswith("target_")}
    parameters = [*online.representation.parameters(), *online.projection.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=5e-4, amsgrad=True)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(1)).tolist()
    levels = cache.get([[0, 2, 3, 4, 1][i] for i in order])
    features = online.representation(levels).flatten(0, 1)
    contrastive = reference.relaxed_contrastive(
        online.projection(features), online.projection(features).detach(), alpha=0.8, neighbors=5
    )
    hyper = reference.hypersphere(features, centres, 3, 1e-5)
    (0.6 * contrastive + hyper).backward()
    optimiser.step()
    after = train(cache, config)
    assert after.history[1].contrastive == pytest.approx(contrastive.item(), rel=1e-5)
    assert after.history[1].hypersphere == pytest.approx(hyper.item(), rel=1e-5)
    for name, value in online.state_dict().items():
        if name.endswith("projection.bias"):
            continue  # the contrastive loss does not change under a shift: its gradient is rounding alone
        if name.startswith("target_"):
            value = 0.4 * twin[name] + 0.6 * online.state_dict()[name.removeprefix("target_")]
        # Adam divides by the gradient's size, so rounding counts where a gradient is nearly 0: a hundredth
        # of a step.
        torch.testing.assert_close(after.network.state_dict()[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rebuild", ["never", "epoch", "end"])
def test_when_the_bank_is_rebuilt(cache, make_config, rebuild):
    config = make_config(rebuild_bank=rebuild)
    first = Trainer(cache, [0, 2, 3, 4, 1], config, 0, CPU).bank.centres.clone()
    trainer = train(cache, config)
    now = build_bank(represent(trainer.network, cache, [0, 2, 3, 4, 1], CPU), "kcenter", gamma=4).centres
    assert torch.equal(trainer.bank.centres, now if rebuild == "epoch" else first)
    assert torch.equal(trainer.scoring_bank().centres, first if rebuild == "never" else now)


def test_only_the_training_images_are_looked_at(cache, make_config):
    """Fold detectors share the cache with the images that they must not see."""
    seen: set[int] = set()

    class Watched:
        shapes = cache.shapes

        def get(self, indices, device="cpu"):
            seen.update(indices)
            return cache.get(indices, device)

    trainer = Trainer(Watched(), [0, 2, 4], make_config(), 0, CPU)
    trainer.train_epoch()
    trainer.scoring_bank()
    assert seen == {0, 2, 4}


def test_a_diverging_training_says_so(cache, make_config):
    config = make_config(learning_rate=1e30, rebuild_bank="never")
    with pytest.raises(
        PydefectError, match=r"training: the loss of epoch \d is not finite; lower learning_rate"
    ):
        train(cache, config)


@pytest.mark.parametrize("kept", [False, True])
def test_weights_that_overflow_after_the_last_loss_say_so(products, tmp_path, kept):
    """No detector could be saved with what was found. An epoch of one step: its loss comes before."""
    settings = {"weights": "random", "resize": 64, "epochs": 1, "learning_rate": 1e30, "progress": False}
    with pytest.raises(PydefectError, match=r"distances after epoch 1 are not finite; lower learning_rate"):
        pydefect.fit(products[:3], **settings, device="cpu", checkpoint=tmp_path if kept else None)


# -- every setting
# -------------------------------------------------------------------------------------------------

ABLATIONS = [
    *({"losses": losses} for losses in ("contrastive", "hypersphere", "both")),
    *({"alpha": alpha} for alpha in (0.0, 1.0)),
    *({"representation_dim": dimension, "initialisation": "default"} for dimension in (3, 12, 60)),
    *({"gamma": gamma} for gamma in (1.0, 2.0, 8.0, 1000.0)),
    {"max_bank_size": 7},
    *(
        {"bank": bank, "rebuild_bank": when}
        for bank in ("ema", "kmeans")
        for when in ("never", "epoch", "end")
    ),
    {"bank": "position_mean", "gamma": 1.0},
    {"initialisation": "identity", "representation_dim": 26},
    {"initialisation": "pca", "representation_dim": 26, "projection_dim": 4},
    {"projection_dim": 40},
    {"level_balance": "none", "level_weights": None, "coordinate_weight": 0.0},
    {"similarity_power": 2, "pair_source": "cross", "reduction": "paper"},
    {"distance_power": 2, "radius": 0.5},
    {"contrastive_patches": None},
    {"contrastive_patches": 3, "global_neighbors": 5},
    {"batch_size": 1},
    {"batch_size": 99},
    {"neighbors": 50},
    {"target_momentum": 0.0, "phi": 0.0, "margin": 0.0},
]


@pytest.mark.parametrize(
    "changes", ABLATIONS, ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items())
)
def test_every_ablation_trains(cache, make_config, changes):
    trainer = train(cache, make_config(epochs=1, **changes))
    for name, value in state(trainer).items():
        assert torch.isfinite(value).all(), name
    start = Trainer(cache, [0, 2, 3, 4, 1], trainer.config, 0, CPU).network
    assert not torch.equal(trainer.network.representation.weight, start.representation.weight)


# -- interruptions
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bank", ["kcenter", "ema"])
@pytest.mark.parametrize("interval", [-1.0, 1e9], ids=["saved at every step", "saved at every epoch"])
def test_an_interruption_at_any_step_changes_nothing(
    cache, make_config, tmp_path, monkeypatch, bank, interval
):
    monkeypatch.setattr(module, "_CHECKPOINT_INTERVAL", interval)
    config = make_config(bank=bank)
    whole = StopAt()
    expected = train(cache, config, progress=whole)
    # First bank 5, two epochs of 3 steps, a bank of 5 after each.
    assert whole.calls == 21
    for call in range(1, whole.calls + 1):
        folder = tmp_path / str(call)
        with pytest.raises(StoppedError):
            train(cache, config, folder=folder, progress=StopAt(call))
        rest = StopAt()
        assert_identical(train(cache, config, folder=folder, progress=rest), expected)
        if interval < 0 and call > 6:
            # The steps before were not done again: only the one that was cut, and a bank being built.
            assert rest.calls <= whole.calls - call + 1 + 5


def test_many_interruptions_change_nothing_either(cache, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHECKPOINT_INTERVAL", -1.0)
    config = make_config(losses="hypersphere", rebuild_bank="never")
    expected = train(cache, config)
    for _ in range(100):
        try:
            resumed = train(
                cache, config, folder=tmp_path, progress=StopAt(2 if any(tmp_path.iterdir()) else 6)
            )
            break
        except StoppedError:
            continue
    assert_identical(resumed, expected)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("step", [1, 2, 3])
def test_ctrl_c_ends_the_step_and_loses_none(cache, make_config, tmp_path, step):
    config = make_config(rebuild_bank="never")
    expected = train(cache, config)
    seen = []

    def report(description: str, done: int, total: int) -> None:
        if done == 0:
            return
        seen.append((description, done))
        if len(seen) == 5 + step:  # a bank of five images comes first
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(cache, config, folder=tmp_path, progress=report)
    assert seen[-1] == ("epoch 1", step)
    assert_identical(train(cache, config, folder=tmp_path, progress=report), expected)
    # The next step, or where the epoch was at its end the next one's first.
    assert seen[5 + step] == (("epoch 1", step + 1) if step < 3 else ("epoch 2", 1))


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_the_bank_is_built_keeps_the_epochs_steps(cache, make_config, tmp_path):
    config = make_config(rebuild_bank="epoch", epochs=1)
    expected = train(cache, config)
    seen = []

    def report(description: str, done: int, total: int) -> None:
        if done == 0:
            return
        seen.append((description, done))
        if len(seen) == 5 + 3 + 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(cache, config, folder=tmp_path, progress=report)
    assert seen[-1] == ("memory bank", 2)
    assert_identical(train(cache, config, folder=tmp_path, progress=report), expected)
    assert seen[10:] == [("memory bank", image) for image in range(1, 6)]


def test_a_finished_training_is_not_done_again(cache, make_config, tmp_path):
    expected = train(cache, make_config(), folder=tmp_path)
    again = StopAt(1)
    assert_identical(train(cache, make_config(), folder=tmp_path, progress=again), expected)
    assert again.calls == 0


def test_the_checkpoint_of_another_run_is_refused(cache, make_config, tmp_path):
    train(cache, make_config(epochs=1), folder=tmp_path)
    with pytest.raises(InputError, match=r"holds another run \(it differs in alpha, seed\)"):
        train(cache, make_config(epochs=1, alpha=0.5), seed=1, folder=tmp_path)


FIT = """
import os, signal, sys
import numpy as np, torch, pydefect
from pydefect.conpatch import trainer
from pydefect.data.procedural import render_product
from pydefect.progress import ProgressBars

torch.set_num_threads(1)
trainer._CHECKPOINT_INTERVAL = -1.0
out, checkpoint, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
calls = 0

def report(self, description, done, total):
    global calls
    calls += 1
    if calls == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

ProgressBars.__call__ = report
images = [render_product(np.random.default_rng(i), (64, 64))[0] for i in range(4)]
detector = pydefect.fit(
    images, weights="random", resize=None, crop=None, representation_dim=24, bank="kcenter", gamma=4.0,
    epochs=2, early_stopping=False, calibration_folds=2, false_alarm_rate=0.4, learning_rate=1e-3,
    losses="both", contrastive_patches=100, rebuild_bank="epoch", checkpoint=checkpoint or None,
)
detector.save(out)
print(calls)
"""


def test_kill_9(tmp_path: Path):
    """A whole fit with cross-fitted folds, killed twice without warning: the model file is the same, byte
    for byte."""

    def run(out: str, checkpoint: str, kill_at: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", FIT, str(tmp_path / out), checkpoint, str(kill_at)],
            capture_output=True,
            text=True,
            timeout=120,
            # Not in the source folder, which Python would put in front of the installed package.
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    whole = run("whole", "", -1)
    assert whole.returncode == 0, whole.stderr
    checkpoint = str(tmp_path / "state")
    for kill_at in (13, int(whole.stdout) // 2):
        assert run("resumed", checkpoint, kill_at).returncode == -signal.SIGKILL
        assert not (tmp_path / "resumed").exists()
    resumed = run("resumed", checkpoint, -1)
    assert resumed.returncode == 0, resumed.stderr
    assert int(resumed.stdout) < int(whole.stdout)
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_weights_decay_as_the_setting_says(cache, make_config, decay):
    # Without a loss nothing but the decay moves a weight.
    config = make_config(
        losses="contrastive", phi=0.0, epochs=1, batch_size=2, learning_rate=0.1, weight_decay=decay
    )
    trainer = Trainer(cache, range(4), config, 0, CPU)
    before = trainer.network.representation.weight.detach().clone()
    trainer.train_epoch()
    after = trainer.network.representation.weight.detach()
    torch.testing.assert_close(after, before * (1 - 0.1 * decay) ** 2)


def test_every_step_draws_its_patches_anew(cache, make_config, monkeypatch):
    config = make_config(contrastive_patches=20, epochs=1, batch_size=1)
    trainer, drawn = Trainer(cache, range(4), config, 0, CPU), set()
    choose = trainer._contrastive_patches

    def spied(count, epoch):
        chosen = choose(count, epoch)
        drawn.add(tuple(chosen.tolist()))
        return chosen

    monkeypatch.setattr(trainer, "_contrastive_patches", spied)
    trainer.train_epoch()
    assert len(drawn) == 4
