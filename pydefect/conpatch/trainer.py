"""Training of the representation on cached features of normal images (section 3.6, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pydefect.conpatch.bank import BANKS, MemoryBank, build_bank
from pydefect.conpatch.config import ConPatchConfig
from pydefect.conpatch.network import ConPatchNetwork, level_scales, principal_components
from pydefect.errors import InputError, PydefectError
from pydefect.features import FeatureCache
from pydefect.interruption import saved_between_steps
from pydefect.ops import hypersphere, relaxed_contrastive
from pydefect.persistence import Checkpoint
from pydefect.randomness import seeded

__all__ = ["EpochRecord", "Progress", "Trainer", "build_network", "represent"]

# Seconds between checkpoints inside an epoch; saving takes a few milliseconds.
_CHECKPOINT_INTERVAL = 20.0


class Progress(Protocol):
    """Told of every finished step."""

    def __call__(self, description: str, done: int, total: int) -> None:
        """Say that ``done`` of ``total`` steps of ``description`` are done."""


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch left behind.

    Attributes
    ----------
    epoch
        0: before training.
    contrastive, hypersphere
        Mean losses (5) and (7) over the epoch's steps; None where not computed.
    """

    epoch: int
    contrastive: float | None = None
    hypersphere: float | None = None


def build_network(
    cache: FeatureCache, indices: Sequence[int], config: ConPatchConfig, seed: int
) -> ConPatchNetwork:
    """Build the untrained network F_0, g_0 and its twins.

    Parameters
    ----------
    cache, indices
        The training images: the balance of the levels and the principal components come from them.
    config
        Settings.
    seed
        Of the random initialisation.

    Raises
    ------
    InputError
        ``representation_dim`` does not fit the initialisation.
    """
    channels = [shape[0] for shape in cache.shapes]
    scales = level_scales(cache, indices) if config.level_balance == "std" else [1.0] * len(channels)
    weights = config.level_weights or (1.0,) * len(channels)
    input_scale = torch.cat(
        [
            torch.full((count,), scale * weight)
            for count, scale, weight in zip(channels, scales, weights, strict=True)
        ]
        + [torch.full((2,), float(config.coordinate_weight))]
    )
    dimension = config.representation_dim
    if config.initialisation == "pca":
        # Two levels of ResNet-18 have fewer inputs than the default D; all their components are kept then.
        dimension = min(dimension, len(input_scale))
    with seeded(seed):
        network = ConPatchNetwork(channels, dimension, config.projection_dim or dimension, input_scale)
    if config.initialisation == "identity":
        if dimension != len(input_scale):
            raise InputError(
                f"representation_dim: {dimension} given; "
                f"initialisation 'identity' needs the number of inputs, {len(input_scale)}"
            )
        network.start_as(torch.eye(dimension), torch.zeros(dimension))
    elif config.initialisation == "pca":
        network.start_as(*principal_components(cache, indices, input_scale, dimension))
    return network


@torch.inference_mode()
def represent(
    network: ConPatchNetwork, cache: FeatureCache, indices: Sequence[int], device: torch.device
) -> Iterator[Tensor]:
    """Yield F(p) of one cached image after the other, [T, D] each."""
    for index in indices:
        yield network.representation(cache.get([index], device))[0]


def _generator(seed: int) -> torch.Generator:
    # PyTorch takes 64 bits; a date as the seed, 20250101, gives more here.
    return torch.Generator().manual_seed(seed % 2**63)


@dataclass
class Trainer:
    """One training run over a part of the cached images, which can stop after any step and go on later.

    Parameters
    ----------
    cache, indices
        The training images.
    config
        Settings.
    seed
        Of initialisation, order of the images and choice of patches.
    device
        Where network and bank live.
    checkpoint, stage
        Where and under which name the state is kept; None: nowhere.
    progress
        Told of every finished step.

    Attributes
    ----------
    network, bank
        As they stand now.
    history
        A record an epoch, the first before training.
    """

    cache: FeatureCache
    indices: Sequence[int]
    config: ConPatchConfig
    seed: int
    device: torch.device
    checkpoint: Checkpoint | None = None
    stage: str = "final"
    progress: Progress | None = None
    network: ConPatchNetwork = field(init=False)
    bank: MemoryBank = field(init=False)
    history: list[EpochRecord] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        """Restore the checkpoint, or begin: untrained network, first bank (algorithm 2, line 2)."""
        self._step = 0
        self._sums = torch.zeros(2, dtype=torch.float64)
        self.network = build_network(self.cache, self.indices, self.config, self.seed).to(self.device)
        online = [*self.network.representation.parameters(), *self.network.projection.parameters()]
        self._optimiser = torch.optim.AdamW(
            online, lr=self.config.learning_rate, weight_decay=self.config.weight_decay, amsgrad=True
        )
        saved = self.checkpoint.load(self.stage) if self.checkpoint else None
        if saved is None:
            self.bank = self._build_bank()
            self.history.append(EpochRecord(0))
            self._save()
        else:
            self._restore(*saved)

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return len(self.history) - 1

    def scoring_bank(self) -> MemoryBank:
        """Return the bank to score with: with ``rebuild_bank="end"`` one of the network as it is now."""
        return self._build_bank() if self.config.rebuild_bank == "end" and self.epoch else self.bank

    def _build_bank(self) -> MemoryBank:
        def images() -> Iterator[Tensor]:
            self._report("memory bank", 0, len(self.indices))
            patches = represent(self.network, self.cache, self.indices, self.device)
            for done, image in enumerate(patches, start=1):
                yield image
                self._report("memory bank", done, len(self.indices))

        return build_bank(
            images(),
            self.config.bank,
            gamma=self.config.gamma,
            max_size=self.config.max_bank_size,
            momentum=self.config.bank_momentum,
        )

    def train_epoch(self) -> EpochRecord:
        """Go through the training images once, from where the checkpoint left off.

        Returns
        -------
        EpochRecord
            Also appended to ``history``.
        """
        config, epoch = self.config, self.epoch + 1
        # Drawn from (seed, epoch) alone, so that a resumed run needs no generator's state.
        generator = _generator(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.indices), generator=generator).tolist()
        batches = [
            order[start : start + config.batch_size] for start in range(0, len(order), config.batch_size)
        ]
        save = self._save if self.checkpoint else None
        if self._step == 0:
            self._report(f"epoch {epoch}", 0, len(batches))
        with saved_between_steps(save, _CHECKPOINT_INTERVAL) as between_steps:
            while self._step < len(batches):
                levels = self.cache.get([self.indices[i] for i in batches[self._step]], self.device)
                self._sums += self._train_step(levels, epoch)
                self._step += 1
                self._report(f"epoch {epoch}", self._step, len(batches))
                between_steps()
        contrastive, hyper = (self._sums / len(batches)).tolist()
        if not math.isfinite(contrastive + hyper):
            raise PydefectError(f"training: the loss of epoch {epoch} is not finite; lower learning_rate")
        if config.rebuild_bank == "epoch":
            # It takes a while, and an interruption then has the epoch's steps behind it.
            self._save()
            self.bank = self._build_bank()
        record = EpochRecord(
            epoch,
            contrastive if config.losses in ("contrastive", "both") else None,
            hyper if config.losses in ("hypersphere", "both") else None,
        )
        self.history.append(record)
        self._step = 0
        self._sums.zero_()
        self._save()
        return record

    def _train_step(self, levels: list[Tensor], epoch: int) -> Tensor:
        config, network = self.config, self.network
        features = network.representation(levels).flatten(0, 1)
        losses = features.new_zeros(2)
        if config.losses in ("contrastive", "both"):
            chosen = self._contrastive_patches(len(features), epoch)
            z = network.projection(features if chosen is None else features[chosen])
            with torch.no_grad():
                target = network.target_representation(levels).flatten(0, 1)
                z_target = network.target_projection(target if chosen is None else target[chosen])
            losses[0] = relaxed_contrastive(
                z,
                z_target,
                alpha=config.alpha,
                sigma=config.sigma,
                margin=config.margin,
                neighbors=min(config.global_neighbors, len(z)),
                similarity_power=config.similarity_power,
                pair_source=config.pair_source,
                reduction=config.reduction,
            )
        if config.losses in ("hypersphere", "both"):
            losses[1] = hypersphere(
                features,
                self.bank.centres,
                min(config.neighbors, len(self.bank.centres)),
                config.radius,
                distance_power=config.distance_power,
            )
        total: Tensor = config.phi * losses[0] + losses[1]
        self._optimiser.zero_grad(set_to_none=True)
        total.backward()
        self._optimiser.step()
        network.update_target(config.target_momentum)
        found: Tensor = losses.detach().double().cpu()
        return found

    def _contrastive_patches(self, count: int, epoch: int) -> Tensor | None:
        limit = self.config.contrastive_patches
        if limit is None or limit >= count:
            return None
        generator = _generator((self.seed * 1_000_003 + epoch) * 1_000_003 + self._step + 1)
        return torch.randperm(count, generator=generator)[:limit].to(self.device)

    def _report(self, description: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(description, done, total)

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"bank.{name}": value for name, value in self.bank.state().items()}
        for index, moments in self._optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": value for name, value in moments.items()}
        tensors["sums"] = self._sums
        state = {"step": self._step, "history": [vars(record) for record in self.history]}
        self.checkpoint.save(self.stage, tensors, state)

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): value.to(self.device)
                for name, value in tensors.items()
                if name.startswith(prefix)
            }

        self.network.load_state_dict(part("network."))
        self.bank = BANKS[self.config.bank].from_state(part("bank."), momentum=self.config.bank_momentum)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in part("optimiser.").items():
            index, _, key = name.partition(".")
            # AdamW counts its steps on the CPU.
            moments.setdefault(int(index), {})[key] = value.cpu() if key == "step" else value
        optimiser = self._optimiser.state_dict()
        optimiser["state"] = moments
        self._optimiser.load_state_dict(optimiser)
        self._sums = tensors["sums"]
        self._step = int(state["step"])
        self.history = [EpochRecord(**record) for record in state["history"]]
