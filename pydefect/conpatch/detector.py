"""ConPatch: fit, score, go on with new images, save and load."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from pydefect.backbones import build_backbone, weights_fingerprint
from pydefect.calibration import Calibration
from pydefect.conpatch.bank import BANKS, MemoryBank
from pydefect.conpatch.config import ConPatchConfig
from pydefect.conpatch.crossfit import CrossFit
from pydefect.conpatch.network import ConPatchNetwork
from pydefect.conpatch.scorer import score_levels
from pydefect.conpatch.trainer import Trainer
from pydefect.data.images import SkippedImage, open_images
from pydefect.data.layouts import training_images
from pydefect.detector import Detector, OnError, batches, known_length
from pydefect.errors import InputError, ModelFileError
from pydefect.features import FeatureCache, PatchFeatureExtractor, resolve_precision
from pydefect.persistence import Checkpoint, save_tensors
from pydefect.preprocessing import Preprocessing
from pydefect.progress import ProgressBars
from pydefect.version import VERSION

__all__ = ["ConPatchDetector"]

_EXTRACTION_BATCH = 8


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
        What the fit found: ``images``, ``epochs`` trained, ``history`` of losses, ``separation`` of
        held-out images before training and after every epoch.

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
        # Features of another precision are other features: the detector keeps to that of its fit.
        precision = resolve_precision(config.backbone_precision, device)
        config = dataclasses.replace(config, backbone_precision=precision)
        collection = open_images(images, on_error=on_error)
        preprocessing = Preprocessing.create(config.resize, config.crop)
        backbone = build_backbone(config.backbone, weights, seed=seed, progress=progress)
        extractor = PatchFeatureExtractor(backbone, config.levels, precision).to(device)
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
            verdict = CrossFit(cache, size, config, seed, device, kept, bars).run()
            trainer = Trainer(cache, range(len(cache)), config, seed, device, kept, progress=bars)
            while trainer.epoch < verdict.epochs:
                trainer.train_epoch()
            bank = trainer.scoring_bank()
        finally:
            bars.close()
        training = {
            "images": len(cache),
            "epochs": verdict.epochs,
            "history": [vars(record) for record in trainer.history],
            "separation": verdict.separations,
            # Without folders: a model file is handed on, and they are nobody's business.
            "skipped": [Path(skipped.name).name for skipped in collection.skipped],
        }
        return cls(
            config,
            extractor,
            trainer.network,
            bank,
            device=device,
            seed=seed,
            calibration=verdict.calibration,
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
        # A data set's root would bring its defective test images along.
        source = training_images(images) if isinstance(images, str | os.PathLike) else images
        collection = open_images(source, on_error=on_error)
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
        # Files from before there was a choice.
        config = ConPatchConfig.from_dict({"backbone_precision": "float32", **metadata["config"]})

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
        precision = resolve_precision(config.backbone_precision, device)
        extractor = PatchFeatureExtractor(backbone, config.levels, precision)
        channels = extractor.channels
        if sum(channels) + 2 != inputs:
            raise ModelFileError(f"model: F has {inputs} inputs, but the backbone gives {sum(channels) + 2}")
        network = ConPatchNetwork(
            channels, dimension, state["projection.weight"].shape[0], state["representation.input_scale"]
        )
        network.load_state_dict(state)
        return cls(
            config,
            extractor,
            network,
            BANKS[config.bank].from_state(part("bank."), momentum=config.bank_momentum),
            device=device,
            seed=metadata["seed"],
            calibration=Calibration.from_dict(metadata["calibration"]) if metadata["calibration"] else None,
            training=metadata["training"],
        )
