"""The dual autoencoder: fit, score, save and load."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pydefect.backbones import ARCHITECTURES, weights_fingerprint
from pydefect.calibration import Calibration, held_out_calibration, highest_held_out
from pydefect.data.images import open_images
from pydefect.data.seen import SeenImages
from pydefect.detector import Detector, OnError, batches, check_network_inputs, known_length
from pydefect.dual_ae.augmentation import PenaltyImages
from pydefect.dual_ae.config import DualAEConfig, EfficientADConfig, check_input_size
from pydefect.dual_ae.frozen import ChannelStatistics, NormalisedTeacher
from pydefect.dual_ae.network import DualNetwork
from pydefect.dual_ae.scorer import MapScales, Scorer, placed_maps
from pydefect.dual_ae.teacher import SHIPPED_TEACHER, load_teacher
from pydefect.dual_ae.trainer import Trainer, build_network
from pydefect.errors import InputError, ModelFileError
from pydefect.features import FeatureCache, resolve_precision
from pydefect.persistence import opened_checkpoint, save_tensors
from pydefect.preprocessing import Preprocessing
from pydefect.progress import ProgressBars

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["DualAEDetector", "EfficientADDetector", "TrainingImages"]

_BATCH = 8


@dataclass(frozen=True)
class TrainingImages:
    """Normal images as network inputs.

    Attributes
    ----------
    cache
        [3, H, W] an image.
    seen
        What is kept of them.
    """

    cache: FeatureCache
    seen: SeenImages

    @classmethod
    def read(
        cls,
        images: Any,
        preprocessing: Preprocessing,
        *,
        what: str,
        memory_budget: int,
        device: torch.device,
        on_error: OnError,
        bars: ProgressBars,
    ) -> TrainingImages:
        """Read and resize all images.

        Raises
        ------
        InputError
            There are none, one cannot be read, or their sizes differ and nothing resizes them.
        """
        collection = open_images(images, on_error=on_error)
        cache, seen = FeatureCache(memory_budget, device=device), SeenImages()
        total = known_length(collection)
        for group, tensors in batches(collection, preprocessing, _BATCH):
            cache.append([tensors])
            for image in group:
                seen.add(image)
            bars(f"reading {what}", len(cache), total)
        bars.close()
        if not len(cache):
            raise InputError(f"{what}: none could be read; at least one normal image is needed")
        seen.skip(collection.skipped)
        return cls(cache, seen)


class DualAEDetector(Detector):
    """A fitted dual autoencoder; made by :func:`pydefect.fit` or :func:`pydefect.load`.

    Attributes
    ----------
    config
        Settings.
    teacher
        Frozen, normalised over the training images.
    network
        Student, autoencoders and modules.
    scales
        Of the maps, from held-out normal images.
    training
        What the fit found: ``images`` and ``held_out`` (their numbers), ``steps``, ``history`` of losses,
        ``skipped``, ``files``, ``pixels``, ``held_out_scores``; the last says nothing of images that were
        trained on.

    References
    ----------
    Liang and Chen, dual autoencoder for industrial anomaly detection; Batzner et al., EfficientAD, WACV 2024.
    """

    method: ClassVar[str] = "dual_ae"
    takes_validation: ClassVar[bool] = True
    config: DualAEConfig
    config_type: ClassVar[type[DualAEConfig]] = DualAEConfig

    def __init__(
        self,
        config: DualAEConfig,
        teacher: NormalisedTeacher,
        network: DualNetwork,
        scales: MapScales,
        *,
        device: torch.device,
        seed: int,
        calibration: Calibration | None,
        training: Mapping[str, Any],
    ) -> None:
        self.config = config
        self.preprocessing = config.preprocessing
        self.teacher = teacher
        self.network = network.to(device).eval()
        self._scorer = Scorer(self.network, teacher)
        self.scales = scales
        self.device = device
        self.seed = seed
        self.calibration = calibration
        self.training = dict(training)

    @classmethod
    def fit(
        cls,
        images: Any,
        config: Any,
        *,
        validation: Any = None,
        weights: str = "imagenet",
        seed: int = 0,
        device: torch.device,
        on_error: OnError = "raise",
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool = True,
        until: int | None = None,
    ) -> Self:
        """Fit on normal images; see :meth:`pydefect.detector.Detector.fit`.

        With `until` training stops after so many steps of the schedule in all, and the detector is that of
        this moment; with a checkpoint a later call goes on from there.
        """
        config = dataclasses.replace(
            config,
            precision=resolve_precision(config.precision, device),
            steps=config.default_steps(device.type) if config.steps is None else config.steps,
        )
        preprocessing = config.preprocessing
        # `weights` are a backbone's; a teacher's file that is missing is not replaced by them.
        teacher = _load_teacher(config, device, weights if config.teacher in ARCHITECTURES else None)
        bars = ProgressBars(progress)
        # Network inputs are small beside the teacher's maps of them, which get what is left.
        budget = config.cache_memory_mb << 20
        reading: dict[str, Any] = {"on_error": on_error, "bars": bars, "memory_budget": budget // 4}
        reading["device"] = device
        try:
            given = TrainingImages.read(images, preprocessing, what="images", **reading)
            _, height, width = given.cache.shapes[0]
            check_input_size("images", (height, width), config.padding)
            penalty = None
            if config.penalty != "none":
                penalty = PenaltyImages(
                    config.penalty, preprocessing, (height, width), seed, config.penalty_pool
                )
            seen = [given.seen]
            train, part = _split(len(given.cache), config.held_out_share, seed)
            held_out, others, names = given.cache, part, given.seen.names
            if validation is not None:
                kept = TrainingImages.read(validation, preprocessing, what="validation", **reading)
                if kept.cache.shapes != given.cache.shapes:
                    raise InputError(
                        "validation: images of another size than the training images'; set resize"
                    )
                train, held_out, names = list(range(len(given.cache))), kept.cache, kept.seen.names
                others = range(len(names))
                seen.append(kept.seen)
            run = {
                **config.to_dict(),
                "method": cls.method,
                "seed": seed,
                "images": " ".join(part.digest for part in seen),
                "teacher": weights_fingerprint(teacher.network.state_dict()),
                "penalty": penalty.identity if penalty else "none",
            }
            with opened_checkpoint(checkpoint, run) as state:
                features = _teacher_features(teacher, given.cache, train, device, budget - budget // 4, bars)
                trainer = Trainer(
                    given.cache,
                    train,
                    features,
                    teacher,
                    penalty,
                    preprocessing,
                    config,
                    seed,
                    device,
                    state,
                    progress=bars,
                )
                trainer.train(until)
            network = trainer.network.eval()
            # On a card they would keep the graph's memory for as long as there is the detector.
            network.zero_grad(set_to_none=True)
            # Without held-out images the maps' scales come from those seen; thresholds cannot.
            measured, which = (held_out, others) if len(others) else (given.cache, train)
            scorer, maps = Scorer(network, teacher), []
            for done, index in enumerate(which, start=1):
                (image,) = measured.get([index], device)
                maps.append(tuple(one.cpu() for one in scorer(image)))
                bars("held-out images", done, len(which))
            scales = MapScales.fit(maps, config.low_quantile, config.high_quantile)
        finally:
            bars.close()
        calibration = None
        combined: list[float] = []
        if len(others):
            placed = [placed_maps(one, scales, (height, width), config.padding) for one in maps]
            maxima = {
                name: [float(maps[name].max()) for maps in placed] for name in ("anomaly", "local", "global")
            }
            combined = maxima.pop("anomaly")
            calibration = held_out_calibration(
                combined, combined, config.false_alarm_rate, part_maxima=maxima
            )
        return cls(
            config,
            teacher,
            network,
            scales,
            device=device,
            seed=seed,
            calibration=calibration,
            training={
                "images": len(train),
                "held_out": len(others),
                "steps": trainer.step,
                "history": [vars(record) for record in trainer.history],
                "held_out_scores": highest_held_out([names[index] for index in others], combined),
                "skipped": [name for part in seen for name in part.skipped],
                "files": [one for part in seen for one in part.prints],
                "pixels": sorted({kind for part in seen for kind in part.pixels}),
            },
        )

    @property
    def configuration(self) -> dict[str, Any]:
        """Method, seed and every setting; of files and folders the last name."""
        named = super().configuration
        return {**named, **{name: Path(named[name]).name for name in ("teacher", "penalty")}}

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Score a batch of network inputs; see :meth:`pydefect.detector.Detector.predict`."""
        scores, maps = self.predict_maps(images)
        return scores, maps["anomaly"]

    @torch.inference_mode()
    def predict_maps(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Score a batch; the parts of the map are ``"local"`` and ``"global"``."""
        size = self.network.image_size
        check_network_inputs(images, size, self.device)
        # As the held-out images came out of the cache: what is equal must score equal.
        found = self._scorer(images.half().float())
        maps = placed_maps(found, self.scales, size, self.config.padding)
        return maps["anomaly"].flatten(1).amax(1), maps

    def save(self, path: str | os.PathLike[str], *, include_backbone: bool = True) -> None:
        """Write the model file; its backbone is the teacher. See :meth:`pydefect.detector.Detector.save`."""
        teacher = self.teacher.network.state_dict()
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {"statistics.mean": self.teacher.mean, "statistics.std": self.teacher.std}
        if include_backbone:
            tensors |= {f"teacher.{name}": value for name, value in teacher.items()}
        metadata = self.metadata()
        # Without folders: a model file is handed on, and they are nobody's business.
        metadata["config"] |= {name: self.configuration[name] for name in ("teacher", "penalty")}
        save_tensors(
            path,
            tensors,
            {
                **metadata,
                "image_size": list(self.network.image_size),
                "scales": self.scales.to_dict(),
                "teacher_sha256": weights_fingerprint(teacher),
            },
        )

    @classmethod
    def from_file(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        *,
        device: torch.device,
        weights: str | None,
    ) -> Self:
        """Rebuild a detector from a model file; see :meth:`pydefect.detector.Detector.from_file`."""
        config = cls.config_type.from_dict(metadata["config"])

        def part(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
            }

        state = part("teacher.")
        if not state and weights is None and config.teacher != SHIPPED_TEACHER:
            raise ModelFileError(
                "weights: the model file has no teacher in it; give the file of the weights that it was "
                f"fitted with ({config.teacher})"
            )
        teacher = _load_teacher(config, device, weights, state)
        if weights_fingerprint(teacher.network.state_dict()) != metadata["teacher_sha256"]:
            raise ModelFileError(f"weights: {weights!r} is not the teacher that the model was fitted with")
        statistics = part("statistics.")
        teacher.set_statistics(statistics["mean"].to(device), statistics["std"].to(device))
        network = build_network(config, (metadata["image_size"][0], metadata["image_size"][1]), 0)
        network.load_state_dict(part("network."))
        return cls(
            config,
            teacher,
            network,
            MapScales.from_dict(metadata["scales"]),
            device=device,
            seed=metadata["seed"],
            calibration=Calibration.from_dict(metadata["calibration"]) if metadata["calibration"] else None,
            training=metadata["training"],
        )


class EfficientADDetector(DualAEDetector):
    """EfficientAD: :class:`DualAEDetector` without the paper's additions, one setting apart.

    References
    ----------
    Batzner et al., EfficientAD: Accurate visual anomaly detection at millisecond-level latencies, WACV 2024.
    """

    method: ClassVar[str] = "efficientad"
    config_type: ClassVar[type[DualAEConfig]] = EfficientADConfig


def _split(count: int, share: float, seed: int) -> tuple[list[int], Sequence[int]]:
    """Which images to train on and which to hold out; of a single image nothing is held out."""
    out = min(count - 1, max(1, round(count * share))) if share > 0 else 0
    order = np.random.default_rng((seed, 2)).permutation(count).tolist()
    return sorted(order[out:]), sorted(order[:out])


def _load_teacher(
    config: DualAEConfig,
    device: torch.device,
    weights: str | None,
    state: Mapping[str, Tensor] | None = None,
) -> NormalisedTeacher:
    """Load the teacher that the settings name; `state` is that of a model file, where it has one."""
    precision = resolve_precision(config.precision, device)
    how: dict[str, Any] = {"padding": config.padding, "precision": precision}
    if config.teacher in ARCHITECTURES:
        network = load_teacher(
            config.teacher, config.size, weights="random" if state else weights or "imagenet", **how
        )
        if state:
            network.load_state_dict(state)
    else:
        # The file's name in a model file says nothing about where it is now: `weights` does.
        network = load_teacher(state or weights or config.teacher, config.size, **how)
    return NormalisedTeacher(network.to(device), precision)


def _teacher_features(
    teacher: NormalisedTeacher,
    images: FeatureCache,
    train: Sequence[int],
    device: torch.device,
    memory_budget: int,
    bars: ProgressBars,
) -> FeatureCache:
    """Run the teacher over the training images: keep its own output of each, and set its statistics."""
    statistics, features = ChannelStatistics(), FeatureCache(memory_budget, device=device)
    for index in train:
        (image,) = images.get([index], device)
        found = teacher.describe(image).float()
        statistics.add(found)
        features.append([found])
        bars("teacher", len(features), len(train))
    mean, std = statistics.result()
    teacher.set_statistics(mean.to(device), std.to(device))
    return features
