"""Cross-fitting: thresholds from normal images that the scoring detector has not seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pydefect.calibration import Calibration, held_out_calibration
from pydefect.errors import PydefectError
from pydefect.persistence import Checkpoint

__all__ = ["Fold", "cross_fit", "split_folds"]


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


def cross_fit(
    folds: Sequence[Fold],
    score_unseen: Callable[[Fold], tuple[Sequence[float], Sequence[float]]],
    *,
    false_alarm_rate: float,
    checkpoint: Checkpoint | None = None,
) -> Calibration | None:
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
    Calibration or None
        None without folds.

    Raises
    ------
    PydefectError
        A score is not finite.
    """
    if not folds:
        return None
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
    return held_out_calibration(
        [score for fold in folds for score in found[fold.stage][0]],
        [maximum for fold in folds for maximum in found[fold.stage][1]],
        false_alarm_rate,
    )
