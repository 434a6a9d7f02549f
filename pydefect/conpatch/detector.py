"""ConPatch: fit, score, go on with new images, save and load."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pydefect.backbones import ResNet
from pydefect.calibration import Calibration, highest_held_out
from pydefect.conpatch.bank import BANKS, MemoryBank
from pydefect.conpatch.config import ConPatchConfig
from pydefect.conpatch.crossfit import CrossFit
from pydefect.conpatch.network import ConPatchNetwork
from pydefect.conpatch.scorer import score_levels
from pydefect.conpatch.trainer import Trainer
from pydefect.contexts import for_inference
from pydefect.data.images import SkippedImage, open_images
from pydefect.data.layouts import training_images
from pydefect.data.seen import FilePrints
from pydefect.detector import OnError, batches, known_length
from pydefect.errors import InputError, ModelFileError
from pydefect.feature_detector import (
    EXTRACTION_BATCH,
    FeatureConfig,
    FeatureDetector,
    TrainingFeatures,
    tensors_under,
)
from pydefect.features import PatchFeatureExtractor
from pydefect.persistence import Checkpoint
from pydefect.progress import ProgressBars
from pydefect.randomness import seeded

__all__ = ["ConPatchDetector"]


# Of detectors that are updated: each update goes on from the bank that the one before has left. Not in the
# detectors, which may be copied and pickled.
_locks: WeakKeyDictionary[ConPatchDetector, threading.RLock] = WeakKeyDictionary()
_choosing = threading.Lock()


def _updating(detector: ConPatchDetector) -> threading.RLock:
    with _choosing:
        return _locks.setdefault(detector, threading.RLock())


class ConPatchDetector(FeatureDetector):
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
        What the fit found: ``images``, ``epochs`` trained, ``history`` of losses, ``separation`` of
        held-out images before training and after every epoch.

    References
    ----------
    Luo et al., Contrastive representation learning for industrial defect detection, Computer Science 52(1),
    2025, 210-220.
    """

    method: ClassVar[str] = "conpatch"
    config_type: ClassVar[type[FeatureConfig]] = ConPatchConfig
    config: ConPatchConfig

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
        super().__init__(
            config, extractor, device=device, seed=seed, calibration=calibration, training=training
        )
        self.network = network.to(device)
        self.bank = bank

    @classmethod
    def fit_features(
        cls,
        features: TrainingFeatures,
        extractor: PatchFeatureExtractor,
        config: ConPatchConfig,
        *,
        seed: int,
        device: torch.device,
        checkpoint: Checkpoint | None,
        bars: ProgressBars,
    ) -> ConPatchDetector:
        """Cross-fit, then train on all images as long as the folds say."""
        cache = features.cache
        verdict = CrossFit(cache, features.size, config, seed, device, checkpoint, bars).run()
        trainer = Trainer(cache, range(len(cache)), config, seed, device, checkpoint, progress=bars)
        while trainer.epoch < verdict.epochs:
            trainer.train_epoch()
        return cls(
            config,
            extractor,
            trainer.network,
            trainer.scoring_bank(),
            device=device,
            seed=seed,
            calibration=verdict.calibration,
            training={
                "epochs": verdict.epochs,
                "history": [vars(record) for record in trainer.history],
                "separation": verdict.separations,
                "held_out_scores": highest_held_out(features.seen.names, verdict.image_scores),
            },
        )

    def score_features(self, levels: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Score patch features, section 3.5."""
        return score_levels(levels, self.network, self.bank, self.config, size)

    @torch.inference_mode()
    def update(
        self, images: Any, *, on_error: OnError = "raise", progress: bool = False
    ) -> list[SkippedImage]:
        """Go on building the bank with new normal images; its size, and the network, stay as they are.

        See :meth:`pydefect.detector.Detector.update`. After a large change of the product, fit again.
        Calls at the same time come one after the other.
        """
        # A data set's root would bring its defective test images along.
        source = training_images(images) if isinstance(images, str | os.PathLike) else images
        collection = open_images(source, on_error=on_error)
        bars = ProgressBars(progress)
        total, done = known_length(collection), 0
        prints, kinds = FilePrints(), set(self.training.get("pixels", []))
        momentum = self.config.bank_momentum
        with _updating(self):
            bank = BANKS[self.config.bank].from_state(self.bank.state(), momentum=momentum)
            try:
                for group, tensors in batches(collection, self.preprocessing, EXTRACTION_BATCH):
                    with for_inference(self.device):
                        represented = self.network.representation(self.features(tensors.to(self.device)))
                        for image, patches in zip(group, represented, strict=True):
                            try:
                                bank.update(patches)
                            except InputError as error:
                                collection.refuse(image, str(error).removeprefix("images: "))
                            else:
                                done += 1
                                prints.add(image)
                                kinds.add(image.pixels.dtype.name)
                    bars("memory bank", done, total)
            finally:
                bars.close()
            if not done and not collection.skipped:
                raise InputError("images: there are none in it")
            self.bank = bank
            self.training["images"] += done
            self.training["files"] = list(dict.fromkeys([*self.training.get("files", []), *prints]))
            self.training["pixels"] = sorted(kinds)
            return list(collection.skipped)

    def captured_state(self) -> MemoryBank | None:
        """Return the bank, which :meth:`update` replaces by another; None with a backbone of another package,
        which may wait for the device."""
        return self.bank if type(self.extractor.backbone) is ResNet else None

    def tensors(self) -> dict[str, Tensor]:
        """Return the network and the bank."""
        network = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        return network | {f"bank.{name}": value for name, value in self.bank.state().items()}

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        extractor: PatchFeatureExtractor,
        config: ConPatchConfig,
        *,
        device: torch.device,
        seed: int,
        calibration: Calibration | None,
        training: Mapping[str, Any],
    ) -> ConPatchDetector:
        """Rebuild network and bank."""
        state = tensors_under("network.", tensors, device)
        dimension, inputs = state["representation.weight"].shape
        channels = extractor.channels
        if sum(channels) + 2 != inputs:
            raise ModelFileError(f"model: F has {inputs} inputs, but the backbone gives {sum(channels) + 2}")
        with seeded(0):  # its weights are replaced
            network = ConPatchNetwork(
                channels, dimension, state["projection.weight"].shape[0], state["representation.input_scale"]
            )
        network.load_state_dict(state)
        bank = tensors_under("bank.", tensors, device)
        return cls(
            config,
            extractor,
            network,
            BANKS[config.bank].from_state(bank, momentum=config.bank_momentum),
            device=device,
            seed=seed,
            calibration=calibration,
            training=training,
        )
