"""The compressed memory bank: M centres, built as a stream whatever the number of images (section 3.2,
algorithm 1).

Every builder begins with the first image and goes on one image at a time; size, memory and cost an image do
not depend on how many images there are, and a fitted bank can go on with new ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from pydefect.errors import InputError
from pydefect.kmeans import assigned_patches, kmeans, nearest_centres
from pydefect.ops import assign_unique, kcenter_reduce

__all__ = [
    "BANKS",
    "BankBuilder",
    "EmaBank",
    "KCenterBank",
    "KMeansBank",
    "MemoryBank",
    "PositionMeanBank",
    "bank_size",
    "build_bank",
]

BankBuilder = Literal["ema", "position_mean", "kmeans", "kcenter"]


class MemoryBank(ABC):
    """Centres of the normal patches.

    Attributes
    ----------
    centres
        [M, D] float32.
    """

    centres: Tensor

    @abstractmethod
    def update(self, patches: Tensor) -> None:
        """Go on with one more normal image, [T, D] float32."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return what a model file needs so that the bank can go on later; ``centres`` among it."""

    @classmethod
    @abstractmethod
    def from_state(cls, state: Mapping[str, Tensor], *, momentum: float) -> MemoryBank:
        """Read what :meth:`state` returned."""


class EmaBank(MemoryBank):
    """Exponential moving average of each centre's own patch: algorithm 1 as printed, one thing apart.

    The first image, of whose patches the first centres are the means, does not move them once more.
    """

    def __init__(self, centres: Tensor, momentum: float) -> None:
        self.centres = centres
        self.momentum = momentum

    @classmethod
    def start(cls, patches: Tensor, size: int, momentum: float) -> EmaBank:
        """Begin with the k-means centres of the first image (line 1)."""
        return cls(kmeans(patches, size)[0], momentum)

    def update(self, patches: Tensor) -> None:
        """C <- (1 - beta) C + beta C^NN (lines 3 to 8)."""
        if len(patches) < len(self.centres):
            raise InputError(
                f"images: {len(patches)} patches; "
                f"bank='ema' needs one for each of {len(self.centres)} centres"
            )
        self.centres = torch.lerp(self.centres, patches[assign_unique(self.centres, patches)], self.momentum)

    def state(self) -> dict[str, Tensor]:
        """Return ``centres``."""
        return {"centres": self.centres}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], *, momentum: float) -> EmaBank:
        """Read what :meth:`state` returned."""
        return cls(state["centres"], momentum)


class PositionMeanBank(MemoryBank):
    """Running mean of the patches at every position of the grid, as CFA's published code begins its bank."""

    def __init__(self, centres: Tensor, images: Tensor) -> None:
        self.centres = centres
        self.images = images

    @classmethod
    def start(cls, patches: Tensor, size: int) -> PositionMeanBank:
        """Begin with the first image's patches."""
        if size != len(patches):
            raise InputError(
                f"gamma, max_bank_size: {size} centres for {len(patches)} patches an image; "
                "bank='position_mean' has one centre a patch: allowed are gamma=1 and no smaller limit"
            )
        return cls(patches.clone(), torch.ones((), device=patches.device))

    def update(self, patches: Tensor) -> None:
        """Move every centre to the mean of what its position has shown."""
        if patches.shape != self.centres.shape:
            raise InputError(
                f"images: {len(patches)} patches; "
                f"bank='position_mean' has one centre for each of {len(self.centres)}"
            )
        self.images = self.images + 1
        self.centres = torch.lerp(self.centres, patches, 1 / self.images)

    def state(self) -> dict[str, Tensor]:
        """Return ``centres`` and the number of ``images``."""
        return {"centres": self.centres, "images": self.images}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], *, momentum: float) -> PositionMeanBank:
        """Read what :meth:`state` returned."""
        return cls(state["centres"], state["images"])


class KMeansBank(MemoryBank):
    """Mini-batch k-means with an image as the batch.

    References
    ----------
    Sculley, Web-scale k-means clustering, WWW 2010.
    """

    def __init__(self, centres: Tensor, counts: Tensor) -> None:
        self.centres = centres
        self.counts = counts

    @classmethod
    def start(cls, patches: Tensor, size: int) -> KMeansBank:
        """Begin with the k-means centres of the first image."""
        return cls(*kmeans(patches, size))

    def update(self, patches: Tensor) -> None:
        """Move every patch's nearest centre to the mean of what that centre has received."""
        nearest = nearest_centres(patches, self.centres)[1]
        sums, received = assigned_patches(patches, nearest, len(self.centres))
        self.counts = self.counts + received
        self.centres = self.centres + (sums - received.unsqueeze(1) * self.centres) / self.counts.unsqueeze(1)

    def state(self) -> dict[str, Tensor]:
        """Return ``centres`` and the ``counts`` of patches that they have received."""
        return {"centres": self.centres, "counts": self.counts}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], *, momentum: float) -> KMeansBank:
        """Read what :meth:`state` returned."""
        return cls(state["centres"], state["counts"])


class KCenterBank(MemoryBank):
    """Greedy k-centre over a stream: the bank and the patches that it does not cover are reduced to M again.

    A patch nearer to a centre than the bank's covering radius adds nothing and is dropped at once, so that
    from the second dozen of images on only a few patches an image are looked at twice. Rare normal patches
    stay, where averages lose them.

    References
    ----------
    Gonzalez, Clustering to minimize the maximum intercluster distance, 1985; Charikar et al., Incremental
    clustering and dynamic information retrieval, STOC 1997 (dropping what the current radius covers).
    """

    def __init__(self, centres: Tensor, squared_radius: Tensor) -> None:
        self.centres = centres
        self.squared_radius = squared_radius
        # Squared distances between the centres, [M, M]: kept from one reduction to the next. None: the next
        # one measures them.
        self._table: Tensor | None = None

    @classmethod
    def start(cls, patches: Tensor, size: int) -> KCenterBank:
        """Begin with the k-centres of the first image."""
        bank = cls(patches[:1], torch.full((), -1.0, device=patches.device))
        bank._reduce(patches[1:], size)
        return bank

    def update(self, patches: Tensor) -> None:
        """Reduce the centres and the uncovered patches to M again."""
        self._reduce(patches, len(self.centres))

    def _reduce(self, patches: Tensor, size: int) -> None:
        uncovered = (nearest_centres(patches, self.centres)[0] > self.squared_radius).nonzero()[:, 0]
        if not len(uncovered):
            return
        new = patches[uncovered]
        chosen, self.squared_radius, self._table = kcenter_reduce(self.centres, new, size, self._table)
        # Without their union, which would have another size for every image: such blocks riddle the heap.
        before = len(self.centres)
        centres = self.centres[chosen.clamp_max(before - 1)]
        added = (chosen >= before).nonzero()[:, 0]
        centres[added] = new[chosen[added] - before]
        self.centres = centres

    def state(self) -> dict[str, Tensor]:
        """Return ``centres`` (in the order of choice) and ``squared_radius``."""
        return {"centres": self.centres, "squared_radius": self.squared_radius}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], *, momentum: float) -> KCenterBank:
        """Read what :meth:`state` returned."""
        return cls(state["centres"], state["squared_radius"])


BANKS: dict[str, type[MemoryBank]] = {
    "ema": EmaBank,
    "position_mean": PositionMeanBank,
    "kmeans": KMeansBank,
    "kcenter": KCenterBank,
}


def bank_size(patches: int, gamma: float, limit: int | None = None) -> int:
    """M of an image of T patches: T / gamma, rounded, at least 1 and at most ``limit``."""
    size = max(1, round(patches / gamma))
    return size if limit is None else min(size, limit)


def build_bank(
    images: Iterable[Tensor],
    builder: BankBuilder,
    *,
    gamma: float = 4.0,
    max_size: int | None = None,
    momentum: float = 0.1,
) -> MemoryBank:
    """Build a bank over a stream of images.

    Parameters
    ----------
    images
        [T, D] float32 representations, one image at a time, in order; at least one.
    builder
        ``"ema"``, ``"position_mean"``, ``"kmeans"`` or ``"kcenter"``.
    gamma
        Patches of an image for one centre.
    max_size
        Centres at most; None: no limit.
    momentum
        beta of algorithm 1, for ``"ema"``.

    Returns
    -------
    MemoryBank
        M = T / gamma centres, or ``max_size`` where these are fewer.

    Raises
    ------
    InputError
        ``gamma`` or ``max_size`` does not fit the builder.
    """
    stream = iter(images)
    first = next(stream)
    size = bank_size(len(first), gamma, max_size)
    bank: MemoryBank
    if builder == "ema":
        bank = EmaBank.start(first, size, momentum)
    elif builder == "position_mean":
        bank = PositionMeanBank.start(first, size)
    elif builder == "kmeans":
        bank = KMeansBank.start(first, size)
    else:
        bank = KCenterBank.start(first, size)
    for patches in stream:
        bank.update(patches)
    return bank
