"""ConPatch: fit, score, go on with new images, save and load."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pydefect.backbones import build_backbone, weights_fingerprint
from pydefect.calibration import Calibration, held_out_calibration
from pydefect.conpatch.bank import BANKS, MemoryBank
from pydefect.conpatch.config import ConPatchConfig
from pydefect.conpatch.network import ConPatchNetwork
from pydefect.conpatch.trainer import Trainer
from pydefect.data.images import SkippedImage, open_images
from pydefect.detector import Detector, OnError, batches, known_length
from pydefect.errors import InputError, ModelFileError
from pydefect.features import FeatureCache, PatchFeatureExtractor
from pydefect.ops import knn, score_maps
from pydefect.persistence import Checkpoint, save_tensors
from pydefect.preprocessing import Preprocessing
from pydefect.progress import ProgressBars
from pydefect.version import VERSION

__all__ = ["ConPatchDetector", "HeldOutScores", "score_levels", "sensitivity"]

_EXTRACTION_BATCH = 8


def score_levels(
    levels: Sequence[Tensor],
    network: ConPatchNetwork,
    bank: MemoryBank,
    config: ConPatchConfig,
    size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Score patch features against the bank, section 3.5.

    Parameters
    ----------
    levels
        [B, C_l, H_l, W_l] float32 each.
    network, bank, config
        Of the detector.
    size
        (height, width) of the network's input.

    Returns
    -------
    image_scores
        [B]: maximum of the patch scores (9), or of the smoothed map.
    maps
        [B, height, width]: equation (12).
    """
    batch, _, height, width = levels[0].shape
    patches = network.representation(levels).flatten(0, 1)
    squared, _ = knn(patches, bank.centres, min(config.neighbors, len(bank.centres)))
    distances = squared.sqrt().reshape(batch, height, width, -1)
    scores, maps = score_maps(distances, size, config.smoothing, certainty=config.score == "certainty")
    # Rounding of the smoothing can leave a hair below zero.
    maps = maps.clamp_min(0)
    return (scores if config.image_score == "max_patch" else maps).flatten(1).amax(1), maps


def sensitivity(network: ConPatchNetwork) -> float:
    """How much F stretches an average change of its (balanced) backbone features.

    The root mean square of |F(p + e) - F(p)| over random directions e of unit length: |W|_F / sqrt(inputs),
    coordinates left out. A score in units of it does not change when training merely shrinks the space.
    """
    weight = network.representation.weight.detach()[:, :-2]
    return float(weight.norm() / weight.shape[1] ** 0.5)


@dataclass(frozen=True)
class HeldOutScores:
    """Scores of the normal images that one fold's detector has not seen, after one epoch.

    Attributes
    ----------
    image_scores, map_maxima
        One a held-out image.
    sensitivity
        Of that detector's network.
    """

    image_scores: tuple[float, ...]
    map_maxima: tuple[float, ...]
    sensitivity: float

    @property
    def relative_tail(self) -> float:
        """Mean map maximum over the sensitivity: the noise that a defect has to rise above."""
        return sum(self.map_maxima) / len(self.map_maxima) / self.sensitivity


class ConPatchDetector(Detector):
    """A fitted ConPatch detector; made by :func:`pydefect.fit` or :func:`pydefect.load`.

    Attributes
    ----------
    config
        Settings.
    extractor
        Frozen backbone.
    network
        F and g with their twins, [T, D] representations.
    bank
        M centres.
    training
        What the fit found: ``images``, ``epochs`` trained, ``history`` of losses, ``held_out`` tail an epoch.

    References
    ----------
    Luo et al., Contrastive representation learning for industrial defect detection, Computer Science 52(1),
    2025, 210-220.
    """

    method: ClassVar[str] = "conpatch"

    def __init__(
        self,
        config: ConPatchConfig,
        extractor: PatchFeatureExtractor,
        network: ConPatchNetwork,
        bank: MemoryBank,
        *,
        device: torch.device,
        seed: int,
        calibration: Calibration | None,
        training: Mapping[str, Any],
    ) -> None:
        self.config = config
        self.preprocessing = Preprocessing.create(config.resize, config.crop)
        self.extractor = extractor.to(device)
        self.network = network.to(device)
        self.bank = bank
        self.device = device
        self.seed = seed
        self.calibration = calibration
        self.training = dict(training)

    @classmethod
    def fit(
        cls,
        images: Any,
        config: ConPatchConfig,
        *,
        weights: str = "imagenet",
        seed: int = 0,
        device: torch.device,
        on_error: OnError = "raise",
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> ConPatchDetector:
        """Fit on normal images; see :func:`pydefect.fit`."""
        collection = open_images(images, on_error=on_error)
        preprocessing = Preprocessing.create(config.resize, config.crop)
        backbone = build_backbone(config.backbone, weights, seed=seed, progress=progress)
        extractor = PatchFeatureExtractor(backbone, config.levels).to(device)
        bars = ProgressBars(progress)
        try:
            cache = FeatureCache(config.cache_memory_mb << 20)
            digest = hashlib.sha256()
            total = known_length(collection)
            size = (0, 0)
            for group, tensors in batches(collection, preprocessing, _EXTRACTION_BATCH):
                size = (tensors.shape[2], tensors.shape[3])
                cache.append(extractor(tensors.to(device)))
                for image in group:
                    digest.update(str(image.pixels.shape).encode() + image.pixels.tobytes())
                bars("backbone features", len(cache), total)
            bars.close()
            if not len(cache):
                raise InputError("images: none could be read; at least one normal image is needed")
            run = {
                **config.to_dict(),
                "seed": seed,
                "images": digest.hexdigest(),
                "backbone_weights": weights_fingerprint(backbone.state_dict()),
            }
            kept = Checkpoint(checkpoint, run) if checkpoint is not None else None
            epochs, held_out = _CrossFit(cache, size, config, seed, device, kept, bars).run()
            trainer = Trainer(cache, range(len(cache)), config, seed, device, kept, progress=bars)
            while trainer.epoch < epochs:
                trainer.train_epoch()
            bank = trainer.scoring_bank()
        finally:
            bars.close()
        training = {
            "images": len(cache),
            "epochs": epochs,
            "history": [vars(record) for record in trainer.history],
            "held_out_tail": held_out.tails,
            "skipped": [skipped.name for skipped in collection.skipped],
        }
        return cls(
            config,
            extractor,
            trainer.network,
            bank,
            device=device,
            seed=seed,
            calibration=held_out.calibration,
            training=training,
        )

    @property
    def configuration(self) -> dict[str, Any]:
        """Method, seed and every setting."""
        return {"method": self.method, "seed": self.seed, **self.config.to_dict()}

    @torch.inference_mode()
    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Score a batch of network inputs; see :meth:`pydefect.detector.Detector.predict`."""
        size = (images.shape[2], images.shape[3])
        return score_levels(self.extractor(images), self.network, self.bank, self.config, size)

    @torch.inference_mode()
    def update(
        self, images: Any, *, on_error: OnError = "raise", progress: bool = False
    ) -> list[SkippedImage]:
        """Go on building the bank with new normal images; its size, and the network, stay as they are.

        The thresholds stay too: after a large change of the product, fit again.

        Parameters
        ----------
        images
            Whatever :func:`pydefect.fit` takes.
        on_error, progress
            See :func:`pydefect.fit`.

        Returns
        -------
        list of SkippedImage
            Files left out with ``on_error="skip"``.

        Raises
        ------
        InputError
            A file cannot be read, or an image does not fit the bank; the bank is then as it was before.
        """
        collection = open_images(images, on_error=on_error)
        bars = ProgressBars(progress)
        total, done = known_length(collection), 0
        momentum = self.config.bank_momentum
        bank = BANKS[self.config.bank].from_state(self.bank.state(), momentum=momentum)
        try:
            for group, tensors in batches(collection, self.preprocessing, _EXTRACTION_BATCH):
                for patches in self.network.representation(self.extractor(tensors.to(self.device))):
                    bank.update(patches)
                done += len(group)
                bars("memory bank", done, total)
        finally:
            bars.close()
        self.bank = bank
        self.training["images"] += done
        return list(collection.skipped)

    def save(self, path: str | os.PathLike[str], *, include_backbone: bool = True) -> None:
        """Write the model file; see :meth:`pydefect.detector.Detector.save`."""
        backbone = self.extractor.backbone.state_dict()
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"bank.{name}": value for name, value in self.bank.state().items()}
        if include_backbone:
            tensors |= {f"backbone.{name}": value for name, value in backbone.items()}
        metadata = {
            "format": 1,
            "method": self.method,
            "version": VERSION,
            "seed": self.seed,
            "config": self.config.to_dict(),
            "calibration": self.calibration.to_dict() if self.calibration else None,
            "training": self.training,
            "backbone_sha256": weights_fingerprint(backbone),
        }
        save_tensors(path, tensors, metadata)

    @classmethod
    def from_file(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        *,
        device: torch.device,
        weights: str | None,
    ) -> ConPatchDetector:
        """Rebuild a detector from a model file's content; see :func:`pydefect.load`."""
        config = ConPatchConfig.from_dict(metadata["config"])

        def part(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): value.to(device)
                for name, value in tensors.items()
                if name.startswith(prefix)
            }

        backbone_state = part("backbone.")
        if backbone_state:
            backbone = build_backbone(config.backbone, backbone_state)
        elif weights is None:
            raise ModelFileError(
                "weights: the model file has no backbone in it; "
                f"give the weights of {config.backbone} that it was fitted with"
            )
        else:
            backbone = build_backbone(config.backbone, weights, seed=metadata["seed"])
            if weights_fingerprint(backbone.state_dict()) != metadata["backbone_sha256"]:
                raise ModelFileError(
                    f"weights: {weights!r} are not the weights that the model was fitted with"
                )
        state = part("network.")
        dimension, inputs = state["representation.weight"].shape
        channels = PatchFeatureExtractor(backbone, config.levels).channels
        if sum(channels) + 2 != inputs:
            raise ModelFileError(f"model: F has {inputs} inputs, but the backbone gives {sum(channels) + 2}")
        network = ConPatchNetwork(
            channels, dimension, state["projection.weight"].shape[0], state["representation.input_scale"]
        )
        network.load_state_dict(state)
        return cls(
            config,
            PatchFeatureExtractor(backbone, config.levels),
            network,
            BANKS[config.bank].from_state(part("bank."), momentum=config.bank_momentum),
            device=device,
            seed=metadata["seed"],
            calibration=Calibration.from_dict(metadata["calibration"]) if metadata["calibration"] else None,
            training=metadata["training"],
        )


@dataclass(frozen=True)
class _HeldOut:
    calibration: Calibration | None
    tails: list[float]


class _CrossFit:
    """Trains a detector on all folds but one, for every fold: no image calibrates a detector that has seen
    it.

    The held-out images also say when to stop: after the epoch in which their scores, in units of the
    network's sensitivity, are lowest.
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
        folds = min(config.calibration_folds, len(cache))
        order = torch.randperm(len(cache), generator=torch.Generator().manual_seed(seed)).tolist()
        self._held_out = [sorted(order[fold::folds]) for fold in range(folds)] if folds > 1 else []
        self._scores: dict[str, HeldOutScores] = {}

    def run(self) -> tuple[int, _HeldOut]:
        """Return how many epochs to train, and the calibration at that epoch."""
        config = self._config
        epochs = 0 if config.losses == "none" else config.epochs
        if not self._held_out:
            return epochs, _HeldOut(None, [])
        self._load()
        trainers: list[Trainer] = []
        tails: list[float] = []
        best = 0
        for epoch in range(epochs + 1):
            for fold, held_out in enumerate(self._held_out):
                if epoch == 0:
                    trainers.append(self._trainer(fold, held_out))
                self._finish_epoch(trainers[fold], fold, epoch, held_out)
            tails.append(sum(self._scores[f"{fold}/{epoch}"].relative_tail for fold in range(len(trainers))))
            if tails[epoch] < tails[best]:
                best = epoch
            elif config.early_stopping and epoch - best >= config.patience:
                break
        if not config.early_stopping:
            best = epochs
        chosen = [self._scores[f"{fold}/{best}"] for fold in range(len(trainers))]
        calibration = held_out_calibration(
            [score for fold in chosen for score in fold.image_scores],
            [maximum for fold in chosen for maximum in fold.map_maxima],
            config.false_alarm_rate,
        )
        return best, _HeldOut(calibration, [tail / len(trainers) for tail in tails])

    def _trainer(self, fold: int, held_out: Sequence[int]) -> Trainer:
        hidden = set(held_out)
        seen = [index for index in range(len(self._cache)) if index not in hidden]
        bars = self._bars

        def report(description: str, done: int, total: int) -> None:
            bars(f"fold {fold + 1}/{len(self._held_out)}: {description}", done, total)

        return Trainer(
            self._cache,
            seen,
            self._config,
            self._seed,
            self._device,
            self._checkpoint,
            f"fold-{fold}",
            report,
        )

    def _finish_epoch(self, trainer: Trainer, fold: int, epoch: int, held_out: Sequence[int]) -> None:
        if f"{fold}/{epoch}" in self._scores:
            return
        if trainer.epoch < epoch:
            trainer.train_epoch()
        scores, maxima = [], []
        for image_score, maximum in self._score(trainer, held_out):
            scores.append(image_score)
            maxima.append(maximum)
        self._scores[f"{fold}/{epoch}"] = HeldOutScores(
            tuple(scores), tuple(maxima), sensitivity(trainer.network)
        )
        if self._checkpoint is not None:
            self._checkpoint.save("held-out", {}, {key: vars(value) for key, value in self._scores.items()})

    @torch.inference_mode()
    def _score(self, trainer: Trainer, held_out: Sequence[int]) -> Iterator[tuple[float, float]]:
        bank = trainer.scoring_bank()
        for index in held_out:
            levels = self._cache.get([index], self._device)
            scores, maps = score_levels(levels, trainer.network, bank, self._config, self._size)
            yield float(scores[0]), float(maps.max())

    def _load(self) -> None:
        saved = self._checkpoint.load("held-out") if self._checkpoint else None
        if saved is not None:
            for key, value in saved[1].items():
                self._scores[key] = HeldOutScores(
                    tuple(value["image_scores"]), tuple(value["map_maxima"]), value["sensitivity"]
                )
