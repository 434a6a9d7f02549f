"""What the baselines share: a model fitted on cached patch features, and the detector around it."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from pydefect.calibration import Calibration, highest_held_out
from pydefect.crossfit import Fold, cross_fit, split_folds
from pydefect.errors import PydefectError
from pydefect.feature_detector import FeatureConfig, FeatureDetector, TrainingFeatures
from pydefect.features import FeatureCache, PatchFeatureExtractor
from pydefect.persistence import Checkpoint
from pydefect.progress import ProgressBars

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BaselineDetector", "Context", "PatchModel", "each_image"]


class Context:
    """Where and how one model is fitted.

    Attributes
    ----------
    seed
        Of every random choice.
    device
        Where the model lives.
    checkpoint, stage
        Where and under which name a training keeps its state; None: nowhere.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        checkpoint: Checkpoint | None = None,
        stage: str = "final",
        title: str = "",
        bars: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.seed, self.device = seed, torch.device(device)
        self.checkpoint, self.stage = checkpoint, stage
        self._title, self._bars = title, bars

    def generator(self, *numbers: int) -> torch.Generator:
        """Return a generator that depends on the seed and these numbers alone: none is kept for resuming."""
        seed = self.seed
        for number in numbers:
            seed = (seed * 1_000_003 + number) % 2**63
        return torch.Generator().manual_seed(seed)

    def report(self, description: str, done: int, total: int) -> None:
        """Show progress."""
        if self._bars is not None:
            self._bars(f"{self._title}: {description}" if self._title else description, done, total)


def each_image(
    cache: FeatureCache, indices: Sequence[int], context: Context, description: str
) -> Iterator[list[Tensor]]:
    """Yield the levels of one image after the other, [1, C_l, H_l, W_l] each, and show progress."""
    for done, index in enumerate(indices, start=1):
        yield cache.get([index], context.device)
        context.report(description, done, len(indices))


class PatchModel(ABC):
    """A baseline's fitted state.

    Attributes
    ----------
    found
        What the fit found, as JSON values for the detector's ``training``.
    """

    found: dict[str, Any]

    @classmethod
    @abstractmethod
    def fit(cls, cache: FeatureCache, indices: Sequence[int], config: Any, context: Context) -> Self:
        """Fit on some of the cached images.

        Parameters
        ----------
        cache, indices
            The training images.
        config
            The method's settings.
        context
            Seed, device, checkpoint, progress.
        """

    @abstractmethod
    def score(self, levels: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Score a batch; see :meth:`pydefect.feature_detector.FeatureDetector.score_features`."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return what a model file needs."""

    @classmethod
    @abstractmethod
    def from_state(cls, state: Mapping[str, Tensor], config: Any) -> Self:
        """Read what :meth:`state` returned."""


class BaselineDetector(FeatureDetector):
    """A detector around a :class:`PatchModel`, calibrated by cross-fitting.

    Attributes
    ----------
    model
        The fitted state.
    """

    model_type: ClassVar[type[PatchModel]]

    def __init__(
        self,
        config: FeatureConfig,
        extractor: PatchFeatureExtractor,
        model: PatchModel,
        *,
        device: torch.device,
        seed: int,
        calibration: Calibration | None,
        training: Mapping[str, Any],
    ) -> None:
        super().__init__(
            config, extractor, device=device, seed=seed, calibration=calibration, training=training
        )
        self.model = model

    @classmethod
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
        """Fit a model for every fold, calibrate with them, then fit on all images."""
        cache = features.cache

        def fit(indices: Sequence[int], stage: str, title: str) -> PatchModel:
            context = Context(
                seed=seed, device=device, checkpoint=checkpoint, stage=stage, title=title, bars=bars
            )
            model = cls.model_type.fit(cache, indices, config, context)
            _check_found(model)
            return model

        @torch.inference_mode()
        def scores_of(model: PatchModel, fold: Fold) -> tuple[list[float], list[float]]:
            scores, maxima = [], []
            for done, index in enumerate(fold.held_out, start=1):
                image_scores, maps = model.score(cache.get([index], device), features.size)
                _check_scores(model, image_scores, maps, features.size)
                scores.append(float(image_scores[0]))
                maxima.append(float(maps.max()))
                bars(f"{fold.title}: scoring", done, len(fold.held_out))
            return scores, maxima

        calibration, image_scores = cross_fit(
            split_folds(len(cache), config.calibration_folds, seed),
            lambda fold: scores_of(fit(fold.seen, fold.stage, fold.title), fold),
            false_alarm_rate=config.false_alarm_rate,
            checkpoint=checkpoint,
        )
        model = fit(range(len(cache)), "final", "")
        return cls(
            config,
            extractor,
            model,
            device=device,
            seed=seed,
            calibration=calibration,
            training={
                **model.found,
                "held_out_scores": highest_held_out(features.seen.names, image_scores),
            },
        )

    @torch.inference_mode()
    def score_features(self, levels: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Score patch features."""
        return self.model.score(levels, size)

    def tensors(self) -> dict[str, Tensor]:
        """Return the model's state."""
        return {f"model.{name}": value for name, value in self.model.state().items()}

    @classmethod
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
        """Rebuild the model."""
        state = {name.removeprefix("model."): value for name, value in tensors.items()}
        return cls(
            config,
            extractor,
            cls.model_type.from_state(state, config),
            device=device,
            seed=seed,
            calibration=calibration,
            training=training,
        )


def _check_found(model: PatchModel) -> None:
    """Refuse a model that cannot be saved before the others are fitted: somebody else may have written it."""
    found = getattr(model, "found", None)
    try:
        if not isinstance(found, dict):
            raise TypeError(f"{type(found).__name__} given")
        json.dumps(found, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PydefectError(
            f"method: {type(model).__name__} must have found after a fit, a dict of JSON values: {error}"
        ) from error


def _check_scores(model: PatchModel, image_scores: Tensor, maps: Tensor, size: tuple[int, int]) -> None:
    shapes = tuple(image_scores.shape), tuple(maps.shape)
    least = float(torch.cat([image_scores.flatten(), maps.flatten(), maps.new_full((1,), math.inf)]).min())
    if shapes != ((1,), (1, *size)) or least < 0:
        raise PydefectError(
            f"method: {type(model).__name__}.score must give scores [B] and maps [B, {size[0]}, {size[1]}], "
            f"numbers >= 0; for one image it gave {shapes[0]} and {shapes[1]}, the least of them {least:g}"
        )
