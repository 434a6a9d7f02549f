"""Training of student, autoencoders and modules (sections 1.5 and 2.2)."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pydefect.cuda_graphs import CapturedCall
from pydefect.data.ahead import idle_workers
from pydefect.dual_ae.augmentation import PenaltyImages, jittered
from pydefect.dual_ae.config import DualAEConfig
from pydefect.dual_ae.frozen import NormalisedTeacher, arithmetic
from pydefect.dual_ae.losses import (
    autoencoder_loss,
    hard_feature_loss,
    penalty_loss,
    student_autoencoder_loss,
)
from pydefect.dual_ae.network import DualNetwork
from pydefect.dual_ae.optimisers import Optimisers
from pydefect.errors import PydefectError
from pydefect.features import FeatureCache
from pydefect.interruption import saved_between_steps
from pydefect.persistence import Checkpoint
from pydefect.preprocessing import Preprocessing
from pydefect.randomness import seeded

__all__ = ["LOSSES", "LossRecord", "Progress", "Trainer", "build_network", "step_losses"]

LOSSES = ("hard", "penalty", "teacher_autoencoder", "student_autoencoder", "cosine")

# Seconds between checkpoints; saving 100 MB of weights and moments takes about one.
_CHECKPOINT_INTERVAL = 60.0
_RECORDS = 200


class Progress(Protocol):
    """Told of every finished step."""

    def __call__(self, description: str, done: int, total: int) -> None:
        """Say that ``done`` of ``total`` steps of ``description`` are done."""


@dataclass(frozen=True)
class LossRecord:
    """Mean losses of the steps since the record before.

    Attributes
    ----------
    step
        Number of finished steps.
    hard, penalty, teacher_autoencoder, student_autoencoder, cosine
        The terms of L_TOTAL (19), as they enter it.
    """

    step: int
    hard: float
    penalty: float
    teacher_autoencoder: float
    student_autoencoder: float
    cosine: float


def build_network(config: DualAEConfig, image_size: tuple[int, int], seed: int) -> DualNetwork:
    """Build the untrained networks, channels last in memory; equal seeds give equal ones."""
    with seeded(seed):
        network = DualNetwork(config, image_size)
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return network


def step_losses(
    network: DualNetwork,
    config: DualAEConfig,
    images: Tensor,
    targets: Tensor,
    augmented: Tensor,
    augmented_targets: Tensor,
    penalty: Tensor | None,
) -> Tensor:
    """Compute the terms of L_TOTAL (19).

    Parameters
    ----------
    network, config
        What is trained.
    images, targets
        [B, 3, H, W] and the normalised teacher's T of them, [B, 384, h, w].
    augmented, augmented_targets
        Colour-jittered copies, and T of them.
    penalty
        [B, 3, H, W] of anything else; None: no L_pen.

    Returns
    -------
    Tensor
        [5] float32 in the order of :data:`LOSSES`; L_TOTAL is their sum.
    """
    passes = network.describe(images, augmented, penalty)
    outputs, fused = network.reconstruct(augmented)
    cosine_weight = config.cosine_weight if config.addition.cosine else 0.0
    of_student = [student_autoencoder_loss(one, passes.augmented, cosine_weight) for one in fused]
    # The printed sums over channels are their means times C.
    scale = float(targets.shape[1]) if config.loss_scale == "paper" else 1.0
    hard = scale * hard_feature_loss(targets, passes.images, config.hard_quantile)
    return torch.stack(
        [
            hard,
            hard.new_zeros(()) if passes.penalty is None else scale * penalty_loss(passes.penalty),
            scale * torch.stack([autoencoder_loss(augmented_targets, one) for one in outputs]).sum(),
            scale * torch.stack([squared for squared, _ in of_student]).sum(),
            torch.stack([cosine for _, cosine in of_student]).sum(),
        ]
    )


@dataclass
class Trainer:
    """One training run, which can stop after any step and go on later.

    On a card a step is two CUDA graphs, its losses with their gradients and the optimisers' part: a step of
    one image has hundreds of kernels, and launching them takes longer than running them.

    Parameters
    ----------
    images
        Network inputs, [3, H, W] an image.
    indices
        Which of them to train on.
    features
        The teacher's own output (not normalised) of these, in the order of `indices`.
    teacher
        Normalised; for the augmented copies.
    penalty
        None: no L_pen.
    preprocessing
        That of the images.
    config, seed, device
        See :func:`pydefect.fit`.
    checkpoint
        Where the state is kept; None: nowhere.
    progress
        Told of every finished step.

    Attributes
    ----------
    network
        As it stands now.
    step
        Number of finished steps.
    history
        Mean losses, at most 200 records of equally many steps.
    """

    images: FeatureCache
    indices: Sequence[int]
    features: FeatureCache
    teacher: NormalisedTeacher
    penalty: PenaltyImages | None
    preprocessing: Preprocessing
    config: DualAEConfig
    seed: int
    device: torch.device
    checkpoint: Checkpoint | None = None
    progress: Progress | None = None
    network: DualNetwork = field(init=False)
    step: int = field(init=False, default=0)
    history: list[LossRecord] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        """Restore the checkpoint, or begin."""
        _, height, width = self.images.shapes[0]
        self.network = build_network(self.config, (height, width), self.seed).to(self.device)
        self.network.train()
        config = self.config
        gate_rate = config.gate_learning_rate
        self._optimisers = Optimisers(
            self.network,
            config.optimiser,
            config.learning_rate,
            config.weight_decay,
            muon_decay=config.muon_weight_decay,
            gentle=[] if gate_rate is None else self.network.gates,
            gentle_rate=gate_rate or 0.0,
            captured=self.device.type == "cuda",
        )
        self._sums = torch.zeros(len(LOSSES), dtype=torch.float64, device=self.device)
        self._order: tuple[int, list[int]] = (-1, [])
        self._captured: CapturedCall | None = None
        saved = self.checkpoint.load("training") if self.checkpoint else None
        if saved is not None:
            self._restore(*saved)

    def train(self, until: int | None = None) -> None:
        """Go on to the end of the schedule, or until so many steps are done in all.

        Raises
        ------
        PydefectError
            The loss is no longer finite.
        """
        steps = self.config.steps
        assert steps is not None, "DualAEDetector.fit has chosen them"
        end = steps if until is None else min(until, steps)
        interval = math.ceil(steps / _RECORDS)
        save = self._save if self.checkpoint else None
        if self.progress is not None and self.step == 0:
            self.progress("training", 0, steps)
        with (
            saved_between_steps(save, _CHECKPOINT_INTERVAL) as between_steps,
            closing(self._penalties(range(self.step, end))) as penalties,
        ):
            while self.step < end:
                self._sums += self._train_step(next(penalties)).double()
                self.step += 1
                if self.step % interval == 0 or self.step == steps:
                    self._record(self.step - (self.history[-1].step if self.history else 0))
                if self.progress is not None:
                    self.progress("training", self.step, steps)
                between_steps()
        self._save()

    def _record(self, steps: int) -> None:
        means = (self._sums / steps).tolist()
        if not math.isfinite(sum(means)):
            raise PydefectError(
                f"training: the loss before step {self.step} is not finite; lower learning_rate, or use "
                "another context_normalisation"
            )
        self.history.append(LossRecord(self.step, *means))
        self._sums.zero_()

    def _penalties(self, steps: range) -> Generator[Tensor | None, None, None]:
        if self.penalty is None:
            yield from (None for _ in steps)
            return
        yield from self.penalty.stream(steps, self.config.batch_size, idle_workers(self.device))

    def _train_step(self, penalty: Tensor | None) -> Tensor:
        config = self.config
        chosen = [
            self._image_of(self.step * config.batch_size + number) for number in range(config.batch_size)
        ]
        (images,) = self.images.get([self.indices[position] for position in chosen], self.device)
        (features,) = self.features.get(chosen, self.device)
        # Drawn from (seed, step) alone, so that a resumed run needs no generator's state.
        rng = np.random.default_rng((self.seed, self.step))
        augmented = jittered(images, self.preprocessing, config.jitter, rng)
        inputs = [images, features, augmented]
        on_card = self.device.type == "cuda"
        if penalty is not None:
            # From pinned memory, so that nobody waits for the steps before to end.
            penalty = penalty.pin_memory() if on_card else penalty
            inputs.append(penalty.to(self.device, non_blocking=True))
        if on_card and self._captured is None:
            # Runs before the capture drop out too.
            with seeded(0, self.device):
                self._captured = CapturedCall(self._losses_and_gradients, inputs)
        # For the dropout.
        with seeded(int(rng.integers(2**63)), self.device):
            call = self._losses_and_gradients if self._captured is None else self._captured
            losses: Tensor = call(*inputs)
        self._optimisers.step(config.rate(self.step))
        return losses

    def _losses_and_gradients(
        self, images: Tensor, features: Tensor, augmented: Tensor, penalty: Tensor | None = None
    ) -> Tensor:
        with arithmetic(self.teacher.precision, self.device):
            losses = step_losses(
                self.network,
                self.config,
                images,
                self.teacher.normalise(features),
                augmented,
                self.teacher(augmented),
                penalty,
            )
        # None: a graph's gradients get memory of its own, and every replay writes them anew.
        self.network.zero_grad(set_to_none=True)
        losses.sum().backward()
        return losses.detach()

    def _image_of(self, draw: int) -> int:
        """Position in `indices` of the n-th image of the run: all in a random order, then all in another."""
        epoch, place = divmod(draw, len(self.indices))
        if self._order[0] != epoch:
            order = np.random.default_rng((self.seed, 1, epoch)).permutation(len(self.indices))
            self._order = epoch, order.tolist()
        return self._order[1][place]

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= self._optimisers.state()
        tensors["sums"] = self._sums
        state = {"step": self.step, "history": [vars(record) for record in self.history]}
        self.checkpoint.save("training", tensors, state)

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        moved = {name: value.to(self.device) for name, value in tensors.items()}
        self.network.load_state_dict(
            {name.removeprefix("network."): v for name, v in moved.items() if name.startswith("network.")}
        )
        self._optimisers.restore(moved)
        self._sums = moved["sums"]
        self.step = int(state["step"])
        self.history = [LossRecord(**record) for record in state["history"]]
