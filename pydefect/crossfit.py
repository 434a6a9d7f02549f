"""Cross-fitting: thresholds from normal images that the scoring detector has not seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from pydefect.calibration import Calibration, held_out_calibration
from pydefect.errors import PydefectError
from pydefect.persistence import Checkpoint

__all__ = ["Fold", "cross_fit", "in_order", "split_folds"]


@dataclass(frozen=True)
class Fold:
    """A part of the training images and the rest of them.

    Attributes
    ----------
    number, folds
        0..folds - 1.
    seen, held_out
        Ascending indices of the images to fit on and of those to score.
    """

    number: int
    folds: int
    seen: Sequence[int]
    held_out: Sequence[int]

    @property
    def title(self) -> str:
        """For progress bars: "fold 1/3"."""
        return f"fold {self.number + 1}/{self.folds}"

    @property
    def stage(self) -> str:
        """For checkpoints: "fold-0"."""
        return f"fold-{self.number}"


def split_folds(images: int, folds: int, seed: int) -> list[Fold]:
    """Split the images at random into folds of nearly one size.

    Parameters
    ----------
    images
        Their number.
    folds
        At most so many; no more than there are images.
    seed
        Of the split.

    Returns
    -------
    list of Fold
        Every image is held out once; empty where nothing can be held out (no folds, or one image).
    """
    folds = min(folds, images)
    if folds < 2:
        return []
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = [sorted(order[number::folds]) for number in range(folds)]
    return [
        Fold(number, folds, sorted(set(range(images)).difference(hidden)), hidden)
        for number, hidden in enumerate(held_out)
    ]


def in_order(folds: Sequence[Fold], values: Iterable[Sequence[float]]) -> list[float]:
    """Put the values of every fold's held-out images in the order of the images."""
    found = {
        index: value
        for fold, of_fold in zip(folds, values, strict=True)
        for index, value in zip(fold.held_out, of_fold, strict=True)
    }
    return [found[index] for index in range(len(found))]


def cross_fit(
    folds: Sequence[Fold],
    score_unseen: Callable[[Fold], tuple[Sequence[float], Sequence[float]]],
    *,
    false_alarm_rate: float,
    checkpoint: Checkpoint | None = None,
) -> tuple[Calibration | None, list[float]]:
    """Calibrate a method: each fold is scored by a detector fitted on the others.

    Parameters
    ----------
    folds
        From :func:`split_folds`.
    score_unseen
        Fits on ``fold.seen`` and returns the image scores and the map maxima of ``fold.held_out``.
    false_alarm_rate
        Share of normal images that may be called defective.
    checkpoint
        Keeps the scores of finished folds (stage ``held-out``).

    Returns
    -------
    calibration
        None without folds.
    image_scores
        Of every image when it was held out, in the order of the images; empty without folds.

    Raises
    ------
    PydefectError
        A score is not finite.
    """
    if not folds:
        return None, []
    saved = checkpoint.load("held-out") if checkpoint is not None else None
    found: dict[str, list[list[float]]] = dict(saved[1]) if saved is not None else {}
    for fold in folds:
        if fold.stage in found:
            continue
        scores, maxima = score_unseen(fold)
        if not all(map(math.isfinite, (*scores, *maxima))):
            raise PydefectError(
                f"{fold.title}: scores of the held-out images are not finite; lower learning_rate, if the "
                "method has one"
            )
        found[fold.stage] = [list(scores), list(maxima)]
        if checkpoint is not None:
            checkpoint.save("held-out", {}, found)
    image_scores, maxima = (in_order(folds, [found[fold.stage][which] for fold in folds]) for which in (0, 1))
    return held_out_calibration(image_scores, maxima, false_alarm_rate), image_scores
