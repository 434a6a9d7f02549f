"""Cross-fitting epoch by epoch: thresholds and the number of epochs from images that no fold's detector has
seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pydefect.calibration import Calibration, held_out_calibration
from pydefect.conpatch.bank import MemoryBank
from pydefect.conpatch.config import ConPatchConfig
from pydefect.conpatch.network import ConPatchNetwork
from pydefect.conpatch.scorer import score_levels
from pydefect.conpatch.trainer import Trainer
from pydefect.crossfit import Fold, in_order, split_folds
from pydefect.errors import PydefectError
from pydefect.features import FeatureCache
from pydefect.ops import knn
from pydefect.persistence import Checkpoint
from pydefect.progress import ProgressBars

__all__ = ["CrossFit", "HeldOutScores", "Verdict", "blend_distance"]


def blend_distance(
    network: ConPatchNetwork,
    bank: MemoryBank,
    cache: FeatureCache,
    indices: Sequence[int],
    *,
    seed: int,
    device: torch.device,
) -> float:
    """How far half-and-half mixtures of unrelated normal patches lie from the bank.

    Such a mixture is no normal patch, yet varies as natural features do: the stand-in for a defect that
    normal images alone can give.

    Parameters
    ----------
    network, bank
        Of a detector that has not seen the images.
    cache, indices
        The images; patches of each are mixed with patches of the next, at most 256 of them, drawn at random.
    seed
        Of the draw.
    device
        Where network and bank are.

    Returns
    -------
    float
        Mean Euclidean distance to the nearest centre.
    """
    generator = torch.Generator().manual_seed(seed)
    previous = network.representation(cache.get([indices[-1]], device))[0]
    distances = []
    for index in indices:
        patches = network.representation(cache.get([index], device))[0]
        first, second = (torch.randperm(len(patches), generator=generator)[:256].to(device) for _ in range(2))
        # F is affine: mixing representations is mixing features.
        squared, _ = knn(torch.lerp(previous[first], patches[second], 0.5), bank.centres, 1, precision="bf16")
        distances.append(float(squared.sqrt().mean()))
        previous = patches
    return sum(distances) / len(distances)


@dataclass(frozen=True)
class HeldOutScores:
    """Scores of the normal images that one fold's detector has not seen, after one epoch.

    Attributes
    ----------
    image_scores, map_maxima
        One a held-out image.
    blend_distance
        See :func:`blend_distance`.
    """

    image_scores: tuple[float, ...]
    map_maxima: tuple[float, ...]
    blend_distance: float

    @property
    def separation(self) -> float:
        """Distance of mixed patches over the normal images' mean map maximum: signal over noise.

        It does not change when training merely shrinks the space.
        """
        noise = sum(self.map_maxima) / len(self.map_maxima)
        # Copies of one image give no noise at all where the bank holds every patch.
        return self.blend_distance / max(noise, 1e-12)


@dataclass(frozen=True)
class Verdict:
    """What the folds say about the detector that is to be trained on all images.

    Attributes
    ----------
    epochs
        How long to train.
    calibration
        Thresholds from held-out images after so many epochs; None without folds.
    image_scores
        Theirs, in the order of the images; empty without folds.
    separations
        Mean over the folds, before training and after every epoch.
    """

    epochs: int
    calibration: Calibration | None
    image_scores: list[float]
    separations: list[float]


class CrossFit:
    """Trains a detector on all folds but one, for every fold: no image calibrates one that has seen it.

    The held-out images also say when to stop: after the epoch with the largest separation.

    Parameters
    ----------
    cache
        The training images.
    size
        (height, width) of the network's input.
    config, seed, device, checkpoint
        See :class:`pydefect.conpatch.trainer.Trainer`; every fold is a stage of the checkpoint.
    bars
        Shows progress.
    """

    def __init__(
        self,
        cache: FeatureCache,
        size: tuple[int, int],
        config: ConPatchConfig,
        seed: int,
        device: torch.device,
        checkpoint: Checkpoint | None,
        bars: ProgressBars,
    ) -> None:
        self._cache, self._size, self._config, self._seed, self._device = cache, size, config, seed, device
        self._checkpoint, self._bars = checkpoint, bars
        self._folds = split_folds(len(cache), config.calibration_folds, seed)
        self._scores: dict[str, HeldOutScores] = {}

    def run(self) -> Verdict:
        """Train all folds, epoch by epoch."""
        config = self._config
        epochs = 0 if config.losses == "none" else config.epochs
        if not self._folds:
            return Verdict(epochs, None, [], [])
        self._load()
        trainers: list[Trainer] = []
        separations: list[float] = []
        best = 0
        for epoch in range(epochs + 1):
            for fold in self._folds:
                if epoch == 0:
                    trainers.append(self._trainer(fold))
                self._finish_epoch(trainers[fold.number], fold.number, epoch, fold.held_out)
            of_folds = [self._scores[f"{fold}/{epoch}"].separation for fold in range(len(trainers))]
            separations.append(sum(of_folds) / len(of_folds))
            if separations[epoch] > separations[best]:
                best = epoch
            elif config.early_stopping and epoch - best >= config.patience:
                break
        if not config.early_stopping:
            best = epochs
        chosen = [self._scores[f"{fold}/{best}"] for fold in range(len(trainers))]
        image_scores = in_order(self._folds, (fold.image_scores for fold in chosen))
        maxima = in_order(self._folds, (fold.map_maxima for fold in chosen))
        calibration = held_out_calibration(image_scores, maxima, config.false_alarm_rate)
        return Verdict(best, calibration, image_scores, separations)

    def _trainer(self, fold: Fold) -> Trainer:
        bars = self._bars

        def report(description: str, done: int, total: int) -> None:
            bars(f"{fold.title}: {description}", done, total)

        return Trainer(
            self._cache,
            fold.seen,
            self._config,
            self._seed,
            self._device,
            self._checkpoint,
            fold.stage,
            report,
        )

    def _finish_epoch(self, trainer: Trainer, fold: int, epoch: int, held_out: Sequence[int]) -> None:
        if f"{fold}/{epoch}" in self._scores:
            return
        if trainer.epoch < epoch:
            trainer.train_epoch()
        network, bank = trainer.network, trainer.scoring_bank()
        scores, maxima = [], []
        with torch.inference_mode():
            for index in held_out:
                levels = self._cache.get([index], self._device)
                image_scores, maps = score_levels(levels, network, bank, self._config, self._size)
                scores.append(float(image_scores[0]))
                maxima.append(float(maps.max()))
            blend = blend_distance(network, bank, self._cache, held_out, seed=self._seed, device=self._device)
        # A checkpoint could not hold them.
        if not all(map(math.isfinite, (*scores, *maxima, blend))):
            raise PydefectError(
                f"training: distances after epoch {epoch} are not finite; lower learning_rate"
            )
        self._scores[f"{fold}/{epoch}"] = HeldOutScores(tuple(scores), tuple(maxima), blend)
        if self._checkpoint is not None:
            self._checkpoint.save("held-out", {}, {key: vars(value) for key, value in self._scores.items()})

    def _load(self) -> None:
        saved = self._checkpoint.load("held-out") if self._checkpoint else None
        if saved is not None:
            for key, value in saved[1].items():
                self._scores[key] = HeldOutScores(
                    tuple(value["image_scores"]), tuple(value["map_maxima"]), value["blend_distance"]
                )
