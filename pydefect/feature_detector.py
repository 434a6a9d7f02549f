"""What detectors have in common that score patch features of a frozen backbone."""

from __future__ import annotations

import dataclasses
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from pydefect.backbones import BACKBONE_NAMES, build_backbone, weights_fingerprint
from pydefect.calibration import Calibration
from pydefect.config import MethodConfig
from pydefect.data.images import open_images
from pydefect.data.seen import SeenImages
from pydefect.declared import METHODS, declaring_package
from pydefect.detector import Detector, OnError, batches, check_network_inputs, known_length
from pydefect.errors import InputError, ModelFileError
from pydefect.features import (
    FeatureCache,
    PatchFeatureExtractor,
    check_levels,
    resolve_precision,
    whole_patches,
)
from pydefect.persistence import Checkpoint, opened_checkpoint, save_tensors
from pydefect.preprocessing import Preprocessing
from pydefect.progress import ProgressBars

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["EXTRACTION_BATCH", "FeatureConfig", "FeatureDetector", "TrainingFeatures", "tensors_under"]

EXTRACTION_BATCH = 8


@dataclass(frozen=True)
class FeatureConfig(MethodConfig):
    """Settings of every method that works on patch features."""

    RANGES: ClassVar[Mapping[str, tuple[float, float]]] = {
        **MethodConfig.RANGES,
        "calibration_folds": (0, float("inf")),
        "cache_memory_mb": (0, float("inf")),
    }

    backbone: str = "resnet18"
    """One of :data:`pydefect.backbones.BACKBONE_NAMES`: a ResNet, or what an installed package declares
    (``docs/own-backbones.md``)."""
    levels: tuple[int, ...] = (2, 3)
    """Backbone levels, ascending out of 1, 2, 3; the first one gives the patch grid."""
    backbone_precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the backbone; see :func:`pydefect.features.resolve_precision`. A fitted detector keeps
    what ``"auto"`` meant for it, and scores with that on every machine."""
    calibration_folds: int = 3
    """Parts of the training set that calibrate the threshold in turn, each with a detector that has not seen
    it; 0: no threshold."""
    cache_memory_mb: int = 2048
    """Backbone features beyond this go to a temporary file."""

    def __post_init__(self) -> None:
        """Check every setting before any work is done."""
        super().__post_init__()
        BACKBONE_NAMES.check_known(self.backbone)
        object.__setattr__(self, "levels", check_levels(self.levels))
        if self.calibration_folds == 1:
            raise InputError("calibration_folds: 1 given; allowed are 0 (no threshold) and 2 or more")


@dataclass(frozen=True)
class TrainingFeatures:
    """The training images as patch features.

    Attributes
    ----------
    cache
        Their features.
    size
        (height, width) of the network's input, in whole patches.
    seen
        What is kept of them.
    """

    cache: FeatureCache
    size: tuple[int, int]
    seen: SeenImages

    @classmethod
    def extract(
        cls,
        images: Any,
        preprocessing: Preprocessing,
        extractor: PatchFeatureExtractor,
        *,
        memory_budget: int,
        device: torch.device,
        on_error: OnError,
        bars: ProgressBars,
    ) -> TrainingFeatures:
        """Run the backbone over all images.

        Raises
        ------
        InputError
            There are none, or one cannot be read.
        """
        collection = open_images(images, on_error=on_error)
        cache, seen, size = FeatureCache(memory_budget), SeenImages(), (0, 0)
        total = known_length(collection)
        for group, tensors in batches(collection, preprocessing, EXTRACTION_BATCH):
            tensors = whole_patches(tensors, extractor.strides)
            size = (tensors.shape[2], tensors.shape[3])
            cache.append(extractor(tensors.to(device)))
            for image in group:
                seen.add(image)
            bars("backbone features", len(cache), total)
        bars.close()
        if not len(cache):
            raise InputError("images: none could be read; at least one normal image is needed")
        seen.skip(collection.skipped)
        return cls(cache, size, seen)


class FeatureDetector(Detector):
    """A detector on patch features of a frozen backbone.

    Attributes
    ----------
    config
        Settings.
    extractor
        Frozen backbone.
    """

    needs_kernels: ClassVar[bool] = True
    config: FeatureConfig
    config_type: ClassVar[type[FeatureConfig]]
    average: ClassVar[bool] = True
    """Whether features are averaged over 3x3 neighbourhoods."""

    def __init__(
        self,
        config: FeatureConfig,
        extractor: PatchFeatureExtractor,
        *,
        device: torch.device,
        seed: int,
        calibration: Calibration | None,
        training: Mapping[str, Any],
    ) -> None:
        self.config = config
        self.preprocessing = config.preprocessing
        self.extractor = extractor.to(device)
        self.device = device
        self.seed = seed
        self.calibration = calibration
        self.training = dict(training)

    @classmethod
    @abstractmethod
    def fit_features(
        cls,
        features: TrainingFeatures,
        extractor: PatchFeatureExtractor,
        config: Any,
        *,
        seed: int,
        device: torch.device,
        checkpoint: Checkpoint | None,
        bars: ProgressBars,
    ) -> Self:
        """Fit and calibrate on the features of normal images.

        Parameters
        ----------
        features, extractor
            What to fit on, and where it came from.
        config
            Of :attr:`config_type`.
        seed, device
            See :func:`pydefect.fit`.
        checkpoint
            Keeps the state of every stage; None: nothing is kept.
        bars
            Shows progress.

        Returns
        -------
        Detector
            Its ``training`` holds what the method adds.
        """

    @abstractmethod
    def score_features(self, levels: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Score the patch features of a batch.

        Parameters
        ----------
        levels
            [B, C_l, H_l, W_l] float32 each.
        size
            (height, width) of the network's input.

        Returns
        -------
        image_scores, anomaly_maps
            [B] and [B, height, width] float32, >= 0.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return what a model file needs besides the backbone."""

    @classmethod
    @abstractmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        extractor: PatchFeatureExtractor,
        config: Any,
        *,
        device: torch.device,
        seed: int,
        calibration: Calibration | None,
        training: Mapping[str, Any],
    ) -> Self:
        """Rebuild a detector from what :meth:`tensors` returned (on the device) and the rest of its parts."""

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
    ) -> Self:
        """Fit on normal images; see :meth:`pydefect.detector.Detector.fit`."""
        if validation is not None:
            raise InputError("validation: given, but this method calibrates by folds of its training images")
        # Features of another precision are other features: the detector keeps to that of its fit.
        precision = resolve_precision(config.backbone_precision, device)
        config = dataclasses.replace(config, backbone_precision=precision)
        preprocessing = config.preprocessing
        backbone = build_backbone(config.backbone, weights, seed=seed, progress=progress)
        extractor = PatchFeatureExtractor(backbone, config.levels, precision, cls.average).to(device)
        bars = ProgressBars(progress)
        try:
            features = TrainingFeatures.extract(
                images,
                preprocessing,
                extractor,
                memory_budget=config.cache_memory_mb << 20,
                device=device,
                on_error=on_error,
                bars=bars,
            )
            run = {
                **config.to_dict(),
                "method": cls.method,
                # Another version may fit and score otherwise: None for what is pydefect's own.
                "package": declaring_package(METHODS, cls.method),
                "backbone_package": BACKBONE_NAMES.package_of(config.backbone),
                "seed": seed,
                "images": features.seen.digest,
                "backbone_weights": weights_fingerprint(backbone.state_dict()),
            }
            with opened_checkpoint(checkpoint, run) as kept:
                detector = cls.fit_features(
                    features, extractor, config, seed=seed, device=device, checkpoint=kept, bars=bars
                )
        finally:
            bars.close()
        detector.training |= {
            "images": len(features.cache),
            "skipped": features.seen.skipped,
            "files": features.seen.prints,
            "pixels": features.seen.pixels,
        }
        return detector

    def features(self, images: Tensor) -> list[Tensor]:
        """Compute the patch features of network inputs, rounded as the cache rounds those of a fit.

        Parameters
        ----------
        images
            Network inputs, as :meth:`predict` takes them.

        Returns
        -------
        list of Tensor
            [B, C_l, H_l, W_l] float32 a level, of values that float16 has.

        Notes
        -----
        An image then scores as its copy among the held-out ones did: unrounded, it would lie beside the
        threshold that copies set.
        """
        whole = whole_patches(images, self.extractor.strides)
        return [level.half().float() for level in self.extractor(whole)]

    @torch.inference_mode()
    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Score a batch of network inputs; see :meth:`pydefect.detector.Detector.predict`."""
        check_network_inputs(images, self.preprocessing.input_size, self.device)
        height, width = images.shape[2:]
        whole = whole_patches(images, self.extractor.strides)
        image_scores, maps = self.score_features(self.features(whole), (whole.shape[2], whole.shape[3]))
        return image_scores, maps[:, :height, :width].contiguous()

    def save(self, path: str | os.PathLike[str], *, include_backbone: bool = True) -> None:
        """Write the model file; see :meth:`pydefect.detector.Detector.save`."""
        backbone = self.extractor.backbone.state_dict()
        tensors = self.tensors()
        if include_backbone:
            tensors |= {f"backbone.{name}": value for name, value in backbone.items()}
        save_tensors(path, tensors, {**self.metadata(), "backbone_sha256": weights_fingerprint(backbone)})

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
        name = metadata["config"]["backbone"]
        if name not in (known := BACKBONE_NAMES.names()):
            raise ModelFileError(
                f"model: fitted with the backbone {name!r}, which is not known here; install the package "
                f"that declares it, or a version of pydefect that has it (known are {', '.join(known)})"
            )
        # Files from before there was a choice of precision.
        config = cls.config_type.from_dict({"backbone_precision": "float32", **metadata["config"]})
        backbone_state = tensors_under("backbone.", tensors, device)
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
        precision = resolve_precision(config.backbone_precision, device)
        return cls.from_tensors(
            {name: value.to(device) for name, value in tensors.items() if not name.startswith("backbone.")},
            PatchFeatureExtractor(backbone, config.levels, precision, cls.average),
            config,
            device=device,
            seed=metadata["seed"],
            calibration=Calibration.from_dict(metadata["calibration"]) if metadata["calibration"] else None,
            training=metadata["training"],
        )


def tensors_under(
    prefix: str, tensors: Mapping[str, Tensor], device: torch.device | str
) -> dict[str, Tensor]:
    """Take the tensors whose names begin with a prefix, named without it, to a device."""
    return {
        name.removeprefix(prefix): value.to(device)
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
