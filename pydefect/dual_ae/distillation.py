"""Distillation of a teacher: a patch description network learns what a backbone says about patches.

Every number drawn depends on the seed and the step alone, so that a run can stop after any step and go on
later with identical results.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from pydefect.backbones import ARCHITECTURES, build_backbone, weights_fingerprint
from pydefect.config import Settings
from pydefect.contexts import for_training
from pydefect.data.ahead import done_ahead, idle_workers
from pydefect.data.images import draw_image, list_image_files, read_image
from pydefect.data.textures import texture
from pydefect.dual_ae.frozen import ChannelStatistics, arithmetic
from pydefect.dual_ae.optimisers import Optimiser, Optimisers
from pydefect.dual_ae.pdn import PDN, Size, output_size
from pydefect.dual_ae.teacher import BackboneTeacher
from pydefect.errors import InputError, PydefectError
from pydefect.features import resolve_precision
from pydefect.interruption import saved_between_steps
from pydefect.persistence import Checkpoint, opened_checkpoint, save_tensors
from pydefect.places import check_file_writable
from pydefect.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from pydefect.randomness import seeded

__all__ = [
    "Distillation",
    "DistillationConfig",
    "DistillationImages",
    "explained_variance",
    "pretrain_teacher",
    "source_statistics",
]

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Progress = Callable[[str, int, int | None], None]

# Seconds between checkpoints; saving takes some 50 ms.
_CHECKPOINT_INTERVAL = 60.0
# Steps whose mean loss becomes a record of the history.
_RECORD = 100
# The last step of a falling rate still has a hundredth of it.
_FLOOR = 0.01
# Factor of the last convolution's weights before the first step.
_FIRST_ANSWER = 0.1
# Share of a step in the normalisation's running statistics: windows of few images make those of a step noisy.
_STATISTICS_MOMENTUM = 0.02
# Which numbers a generator is for; the second part of its seed.
_TRAINING, _HELD_OUT, _SPLIT, _PARTS = range(4)


@dataclass(frozen=True)
class DistillationConfig(Settings):
    """Settings of a distillation; the defaults are EfficientAD's (section 4 and appendix A.2 of its paper).

    Raises
    ------
    InputError
        A value is not allowed.
    """

    TITLE: ClassVar[str] = "a distillation"
    RANGES: ClassVar[Mapping[str, tuple[float, float]]] = {
        "image_size": (40, math.inf),
        "part": (36, math.inf),
        "batch_size": (1, math.inf),
        "steps": (1, math.inf),
        "learning_rate": (0, math.inf),
        "weight_decay": (0, math.inf),
        "warmup": (0, math.inf),
        "decay": (0, 1),
        "procedural": (0, 1),
        "windows": (1, math.inf),
        "grey": (0, 1),
        "statistics_images": (2, math.inf),
        "held_out": (0, 0.9),
    }

    size: Size = "small"
    """The PDN."""
    padding: bool = True
    """Zeros around the PDN's maps while it learns. Without them all cells of a crop see nothing but pixels,
    which pays with small crops; the weights serve both forms."""
    image_size: int = 256
    """Edge of the PDN's square input in pixels; the source sees the same window at twice this size."""
    part: int | None = None
    """Edge of the square part of the windows, another one every step, on which the PDN learns; None: all of
    them. Neighbouring cells say much the same, so that many windows with few cells each teach more in the
    same time than few windows with many; the source still sees what lies around. Only without padding."""
    batch_size: int = 16
    """Windows a step."""
    steps: int = 60_000
    """Steps in all."""
    learning_rate: float = 1e-4
    """Of the optimiser."""
    weight_decay: float = 1e-5
    """Of the optimiser; Adam adds it to the gradient, Muon takes it off the weights."""
    optimiser: Optimiser = "adam"
    """``"muon"``: the convolutions' weights move in directions whose singular values are all alike, by the
    size of Adam's steps (``torch.optim.Muon``, ``match_rms_adamw``); biases and normalisations stay with
    Adam. Fewer steps reach the same loss."""
    batch_normalisation: bool = False
    """In front of every ReLU while the PDN learns; folded into the convolutions at the end, so that the
    teacher is a plain PDN."""
    warmup: int = 0
    """Steps over which the rate rises to its value."""
    decay: float = 0.0
    """Share of the steps, at the end, over which the rate falls in a straight line, to a hundredth. Until
    then a run depends on neither: it can be resumed with another number of steps and another share."""
    procedural: float = 0.0
    """Share of procedural images among all; 1 without folders."""
    windows: int = 4
    """Windows cut out of a procedural image, one a step."""
    grey: float = 0.1
    """Share of images without colour."""
    statistics_images: int = 2_000
    """Windows from which mean and standard deviation of every channel of the source are taken."""
    held_out: float = 0.05
    """Share of each folder's images that are measured on and never learned from."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the convolutions of both networks. ``"auto"``: bfloat16 on processors and cards with instructions
    for it. Weights, their updates and the loss are float32."""

    def __post_init__(self) -> None:
        """Check every setting before any work is done."""
        super().__post_init__()
        for name in ("image_size", "part"):
            if (getattr(self, name) or 0) % 4:
                raise InputError(f"{name}: {getattr(self, name)} given; it must be divisible by 4")
        if self.part is not None and (self.padding or self.part > self.image_size):
            raise InputError(
                f"part: {self.part} given; it needs padding=False and an image_size of at least as much"
            )

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        rate = self.learning_rate * min(1.0, (step + 1) / (self.warmup + 1))
        begin = self.decay_begins
        if step < begin:
            return rate
        return rate * (1 - (1 - _FLOOR) * (step + 1 - begin) / (self.steps - begin))

    @property
    def decay_begins(self) -> int:
        """First step with a falling rate; the number of steps where there is none."""
        return self.steps - round(self.decay * self.steps)


class DistillationImages:
    """Windows of images: of folders, drawn procedurally, or both in a given share.

    Parameters
    ----------
    folders
        Folders of images, read recursively, or image files. All images are equally likely.
    config
        Settings.
    seed
        Of all that is drawn.

    Attributes
    ----------
    training, held_out
        Paths of the images that are learned from and of those that are measured on.

    Raises
    ------
    InputError
        A folder is missing or has no image; there is no image to learn from; or there are no folders and
        ``procedural`` is not 1.
    """

    def __init__(
        self, folders: Sequence[str | os.PathLike[str]], config: DistillationConfig, seed: int
    ) -> None:
        self.config = config
        self.seed = seed
        self.training: list[Path] = []
        self.held_out: list[Path] = []
        if not folders and config.procedural < 1:
            raise InputError(
                f"images: no folder given, and procedural is {config.procedural}; name a folder, or set "
                "procedural=1 for procedural images only"
            )
        for number, folder in enumerate(map(Path, folders)):
            if not folder.exists():
                raise InputError(f"images: there is no folder {str(folder)!r}")
            files = list_image_files(folder) if folder.is_dir() else [folder]
            if not files:
                raise InputError(f"images: no image in the folder {str(folder)!r}")
            apart = int(config.held_out * len(files))
            order = np.random.default_rng([seed, _SPLIT, number]).permutation(len(files))
            self.held_out += [files[i] for i in sorted(order[:apart])]
            self.training += [files[i] for i in sorted(order[apart:])]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Draw the windows of a step.

        Parameters
        ----------
        step
            Whole number >= 0.

        Returns
        -------
        images, enlarged
            [B, 3, S, S] and [B, 3, 2 S, 2 S] float32, normalised, channels last in memory: what the PDN sees,
            and the same windows as the source sees them.
        """
        return _to_networks(self._windows(step))

    def stream(
        self, steps: range, device: torch.device, workers: int | None = None
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield the windows of one step after the other.

        Parameters
        ----------
        steps
            One after the other.
        device
            Where the tensors go.
        workers
            Processes that draw and read ahead; 0: everything is done here when it is needed; None: as many as
            the device leaves idle.

        Yields
        ------
        tuple of Tensor
            As :meth:`batch`.
        """
        workers = idle_workers(device) if workers is None else workers
        # The steps that share their drawings are one process's.
        together = self.config.windows if self.config.procedural or not self.training else 1
        first = range(steps.start // together * together, steps.stop, together)
        runs = [range(max(step, steps.start), min(step + together, steps.stop)) for step in first]
        make = partial(self._windows_of, runs)
        if workers == 0:
            found: Iterator[Iterator[tuple[Pixels, Pixels]]] = map(make, range(len(runs)))
        else:
            found = map(iter, done_ahead(partial(_listed, make), range(len(runs)), workers, ahead=1))
        for run in found:
            for windows in run:
                yield _to_networks(windows, device)

    def _windows_of(self, runs: Sequence[range], number: int) -> Iterator[tuple[Pixels, Pixels]]:
        return (self._windows(step) for step in runs[number])

    def measured(self, kind: Literal["procedural", "images"], count: int) -> tuple[Tensor, Tensor] | None:
        """Return windows that no step draws: of procedural images, or of the folders' held-out ones.

        Parameters
        ----------
        kind
            Which images.
        count
            Windows at most.

        Returns
        -------
        images, enlarged
            As :meth:`batch`; None where there are none.
        """
        pairs = []
        numbers = range(count if kind == "procedural" else min(count, len(self.held_out)))
        for number in numbers:
            if kind == "procedural":
                pixels = texture((self.seed, _HELD_OUT, number), 2 * self.config.image_size)
            else:
                # Evenly over all folders and, in each, over the order of the names.
                path = self.held_out[number * len(self.held_out) // len(numbers)]
                try:
                    pixels = _as_bytes(read_image(path))
                except InputError as error:
                    # A finished training is worth more than one of the images that it is measured on.
                    warnings.warn(f"{error}; it is left out of what is measured", stacklevel=2)
                    continue
            rng = np.random.default_rng([self.seed, _HELD_OUT, number])
            pairs.append(_cut(rng, pixels, self.config.image_size, 0.0))
        return _to_networks(_stacked(pairs)) if pairs else None

    def _windows(self, step: int) -> tuple[Pixels, Pixels]:
        return _stacked([self._window(step, place) for place in range(self.config.batch_size)])

    def _window(self, step: int, place: int) -> tuple[Pixels, Pixels]:
        config = self.config
        rng = np.random.default_rng([self.seed, _TRAINING, step, place])
        if not self.training or rng.random() < config.procedural:
            # Places change to another image one after the other, not all in one step.
            drawing = (step + place) // config.windows * config.batch_size + place
            pixels = _drawn(self.seed, drawing, 2 * config.image_size)
        else:
            pixels = _as_bytes(draw_image(self.training, rng))
        return _cut(rng, pixels, config.image_size, config.grey)


@lru_cache(maxsize=64)
def _drawn(seed: int, number: int, edge: int) -> Pixels:
    return texture((seed, _TRAINING, number), edge)


def _as_bytes(pixels: np.ndarray[Any, Any]) -> Pixels:
    return pixels if pixels.dtype == np.uint8 else np.rint(pixels * 255).astype(np.uint8)


def _cut(rng: np.random.Generator, pixels: Pixels, edge: int, grey: float) -> tuple[Pixels, Pixels]:
    """A square window one to two edges wide, as far as the image reaches; resized to one edge and to two."""
    short = min(pixels.shape[:2])
    if short < edge:
        size = [max(edge, round(side * edge / short)) for side in pixels.shape[:2]]
        pixels = np.asarray(cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_LINEAR), np.uint8)
        short = edge
    window = round(edge * (min(2 * edge, short) / edge) ** rng.random())
    top, left = (int(rng.integers(side - window + 1)) for side in pixels.shape[:2])
    pixels = pixels[top : top + window, left : left + window, ::1]
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    if rng.random() < grey:
        luma = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY)
        pixels = np.repeat(np.asarray(luma, np.uint8)[..., None], 3, 2)
    pixels = np.ascontiguousarray(pixels)
    images = []
    for side in (edge, 2 * edge):
        # Area: no aliasing where the window shrinks; where it grows, pixels in between are interpolated.
        how = cv2.INTER_AREA if side < window else cv2.INTER_LINEAR
        resized = cv2.resize(pixels, (side, side), interpolation=how)
        images.append(np.asarray(resized, np.uint8))
    return images[0], images[1]


def _listed(make: Callable[[int], Iterator[Any]], number: int) -> list[Any]:
    return list(make(number))


def _stacked(pairs: Sequence[tuple[Pixels, Pixels]]) -> tuple[Pixels, Pixels]:
    images, enlarged = (np.stack(part) for part in zip(*pairs, strict=True))
    return images, enlarged


def _to_networks(windows: tuple[Pixels, Pixels], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(values, device=device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    images, enlarged = (
        torch.from_numpy(part).to(device).permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)
        for part in windows
    )
    return images, enlarged


def source_statistics(
    source: BackboneTeacher,
    images: DistillationImages,
    device: torch.device,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel of the source over the first windows of a run.

    Parameters
    ----------
    source
        The frozen source.
    images
        Of the run; its configuration says how many windows.
    device
        Where the source computes.
    progress
        Told of every batch.

    Returns
    -------
    mean, std
        [1, 384, 1, 1] float32, of the device.
    """
    steps = math.ceil(images.config.statistics_images / images.config.batch_size)
    statistics = ChannelStatistics()
    for step, (_, enlarged) in enumerate(images.stream(range(steps), device)):
        statistics.add(source.enlarged(enlarged))
        if progress is not None:
            progress("statistics", step + 1, steps)
    mean, std = (value[None, :, None, None].to(device) for value in statistics.result())
    return mean, std


@torch.inference_mode()
def explained_variance(
    network: nn.Module, images: Tensor, targets: Tensor, padding: bool
) -> dict[str, float]:
    """Share of the targets' variance that a network explains, 1 - (squared error) / (squared deviation).

    Parameters
    ----------
    network
        A PDN: images to [B, 384, h, w].
    images
        [B, 3, H, W] float32, normalised.
    targets
        [B, 384, h', w'] float32, on the grid of a padded PDN.
    padding
        Whether the network's grid is that one too, or the inner part of it.

    Returns
    -------
    dict
        ``"layer2"``, ``"layer3"`` (the first third of the channels and the others) and ``"both"``; 1 is
        perfect, 0 as good as the channels' means over these images.
    """
    errors, deviations = (torch.zeros(targets.shape[1], dtype=torch.float64) for _ in range(2))
    inner = _on_grid(targets, images, padding)
    mean = inner.mean((0, 2, 3), keepdim=True)
    for image, target in zip(images.split(8), inner.split(8), strict=True):
        errors += (network(image).float() - target).square().sum((0, 2, 3)).double().cpu()
        deviations += (target - mean).square().sum((0, 2, 3)).double().cpu()
    third = len(errors) // 3
    return {
        name: 1 - float(errors[part].sum() / deviations[part].sum())
        for name, part in (
            ("layer2", slice(0, third)),
            ("layer3", slice(third, None)),
            ("both", slice(None)),
        )
    }


def _on_grid(targets: Tensor, images: Tensor, padding: bool) -> Tensor:
    """The cells of an unpadded PDN out of those of a padded one: 16 pixels, or 4 cells, from the edge."""
    if padding:
        return targets
    rows, columns = output_size((images.shape[2], images.shape[3]), padding=False)
    return targets[:, :, 4 : 4 + rows, 4 : 4 + columns]


@dataclass
class Distillation:
    """One run, which can stop after any step and go on later.

    Parameters
    ----------
    config
        Settings.
    images
        What is learned from.
    source
        The frozen source, on the device.
    seed
        Of the network's start; the images have their own.
    device
        Where both networks compute.
    checkpoint
        Where the state is kept; None: nowhere.
    progress
        Told of every finished step.

    Attributes
    ----------
    network
        The learning network: a PDN, with ``batch_normalisation`` one that has more layers; :meth:`teacher`
        is the plain PDN that it stands for.
    mean, std
        Of the source's channels.
    step
        Finished steps.
    history
        (finished steps, mean loss of the last 100).
    """

    config: DistillationConfig
    images: DistillationImages
    source: BackboneTeacher
    seed: int
    device: torch.device
    checkpoint: Checkpoint | None = None
    progress: Progress | None = None
    network: nn.Sequential = field(init=False)
    mean: Tensor = field(init=False)
    std: Tensor = field(init=False)
    step: int = field(init=False, default=0)
    history: list[tuple[int, float]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        """Restore the checkpoint, or begin."""
        plain = _fresh_network(self.config, self.seed, self.images.batch(0)[0])
        network = _with_normalisation(plain) if self.config.batch_normalisation else plain
        self.network = network.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        decay = self.config.weight_decay
        self._optimisers = Optimisers(
            self.network, self.config.optimiser, self.config.learning_rate, decay, muon_decay=decay
        )
        self._losses: list[float] = []
        saved = self.checkpoint.load("teacher") if self.checkpoint else None
        if saved is None:
            self.mean, self.std = source_statistics(self.source, self.images, self.device, self.progress)
            # Of 2,000 windows through a large source they take long.
            self._save()
        else:
            self._restore(*saved)

    def teacher(self) -> PDN:
        """The plain PDN that the learning network stands for now, in eval mode; a copy where it is folded."""
        if isinstance(self.network, PDN):
            return self.network.eval()
        return _folded(self.network, self.config).eval()

    def run(self) -> PDN:
        """Train to the last step.

        Returns
        -------
        PDN
            :meth:`teacher`.

        Raises
        ------
        PydefectError
            The loss is no longer finite.
        """
        save = self._save if self.checkpoint else None
        steps = range(self.step, self.config.steps)
        with (
            saved_between_steps(save, _CHECKPOINT_INTERVAL) as between_steps,
            closing(self.images.stream(steps, self.device)) as stream,
        ):
            for images, enlarged in stream:
                loss = self._train_step(images, enlarged)
                self.step += 1
                # In every step: a checkpoint could not hold it.
                if not math.isfinite(loss):
                    raise PydefectError(
                        f"distillation: the loss of step {self.step} is not finite; lower learning_rate"
                    )
                self._losses.append(loss)
                if self.step % _RECORD == 0 or self.step == self.config.steps:
                    self.history.append((self.step, sum(self._losses) / len(self._losses)))
                    self._losses = []
                between_steps()
                if self.progress is not None:
                    self.progress("distillation", self.step, self.config.steps)
        self._save()
        return self.teacher()

    def measure(self, count: int = 64) -> dict[str, dict[str, float]]:
        """Explained variance on windows that no step draws.

        Parameters
        ----------
        count
            Windows of each kind at most.

        Returns
        -------
        dict
            ``"procedural"`` and, with held-out images, ``"images"``: what :func:`explained_variance` returns.
        """
        found: dict[str, dict[str, float]] = {}
        kinds: tuple[Literal["procedural", "images"], ...] = ("procedural", "images")
        for kind in kinds:
            windows = self.images.measured(kind, count)
            if windows is not None:
                images, enlarged = (part.to(self.device) for part in windows)
                targets = torch.cat([self._target(part) for part in enlarged.split(8)])
                found[kind] = explained_variance(self.teacher(), images, targets, self.config.padding)
        return found

    def _target(self, enlarged: Tensor) -> Tensor:
        return (self.source.enlarged(enlarged) - self.mean) / self.std

    def _train_step(self, images: Tensor, enlarged: Tensor) -> float:
        target = _on_grid(self._target(enlarged), images, self.config.padding)
        if self.config.part is not None:
            images, target = self._part(images, target)
        with arithmetic(resolve_precision(self.config.precision, self.device), self.device):
            described = self.network(images.contiguous(memory_format=torch.channels_last))
        loss = F.mse_loss(described.float(), target)
        self.network.zero_grad(set_to_none=True)
        loss.backward()
        self._optimisers.step(self.config.rate(self.step))
        return float(loss.detach())

    def _part(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The step's part of windows, and of their cells on an unpadded PDN's grid."""
        part = self.config.part
        assert part is not None
        rng = np.random.default_rng([self.images.seed, _PARTS, self.step])
        row, column = (int(place) for place in rng.integers((self.config.image_size - part) // 4 + 1, size=2))
        rows, columns = output_size((part, part), padding=False)
        return (
            images[:, :, 4 * row : 4 * row + part, 4 * column : 4 * column + part],
            target[:, :, row : row + rows, column : column + columns],
        )

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= self._optimisers.state()
        tensors |= {"mean": self.mean, "std": self.std}
        state = {
            "step": self.step,
            "steps": self.config.steps,
            "decay": self.config.decay,
            "losses": self._losses,
            "history": [list(record) for record in self.history],
        }
        self.checkpoint.save("teacher", tensors, state)

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        step = int(state["step"])
        before = replace(self.config, steps=int(state["steps"]), decay=float(state["decay"]))
        if before != self.config:
            # Up to here the rate must have been the same under both plans.
            same_until = min(before.decay_begins, self.config.decay_begins)
            if step > same_until:
                raise InputError(
                    f"steps: {self.config.steps} with decay={self.config.decay:g} given, but the checkpoint "
                    f"is at step {step} of {before.steps} with decay={before.decay:g}, and under one of the "
                    f"two the rate falls from step {same_until} on; repeat the former to resume it, or name "
                    "another folder"
                )
        self.network.load_state_dict(
            {
                name.removeprefix("network."): value.to(self.device)
                for name, value in tensors.items()
                if name.startswith("network.")
            }
        )
        self._optimisers.restore(tensors)
        self.mean, self.std = (tensors[name].to(self.device) for name in ("mean", "std"))
        self.step = step
        self._losses = list(state["losses"])
        self.history = [(int(at), float(loss)) for at, loss in state["history"]]


def _with_normalisation(network: PDN) -> nn.Sequential:
    """The same network with batch normalisation in front of every ReLU."""
    layers: list[nn.Module] = []
    for module in network:
        if isinstance(module, nn.ReLU):
            convolution = layers[-1]
            assert isinstance(convolution, nn.Conv2d)
            layers.append(nn.BatchNorm2d(convolution.out_channels, momentum=_STATISTICS_MOMENTUM))
        layers.append(module)
    return nn.Sequential(*layers)


def _folded(network: nn.Sequential, config: DistillationConfig) -> PDN:
    """The plain PDN that says the same as a network with batch normalisation in eval mode."""
    with seeded(0):  # its weights are replaced
        plain = PDN(config.size, padding=config.padding)
    folded: list[nn.Conv2d] = []
    for module in copy.deepcopy(network).eval():
        if isinstance(module, nn.Conv2d):
            folded.append(module)
        elif isinstance(module, nn.BatchNorm2d):
            folded[-1] = fuse_conv_bn_eval(folded[-1], module)
    convolutions = [module for module in plain if isinstance(module, nn.Conv2d)]
    for convolution, source in zip(convolutions, folded, strict=True):
        convolution.load_state_dict(source.state_dict())
    return plain.to(next(network.parameters()).device).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


@torch.no_grad()
def _fresh_network(config: DistillationConfig, seed: int, images: Tensor) -> PDN:
    """A PDN whose maps have mean 0 and variance 1 in front of every ReLU over some images (data-dependent
    start, as of Mishkin and Matas, 2016), and which answers nearly 0: learning begins at once, with any
    depth."""
    with seeded(seed):  # its weights are replaced
        network = PDN(config.size, padding=config.padding)
    generator = torch.Generator().manual_seed(seed)
    convolutions = [module for module in network if isinstance(module, nn.Conv2d)]
    maps = images
    for module in network:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
            if module is convolutions[-1]:
                module.weight.mul_(_FIRST_ANSWER)
                break
            answers = module(maps)
            mean, std = answers.mean((0, 2, 3)), answers.std((0, 2, 3)).clamp_min(1e-6)
            module.weight.div_(std[:, None, None, None])
            module.bias.sub_(mean / std)
        maps = module(maps)
    return network


def pretrain_teacher(
    out: str | os.PathLike[str],
    images: Sequence[str | os.PathLike[str]] = (),
    *,
    source: str = "wide_resnet101_2",
    weights: str | os.PathLike[str] = "imagenet",
    seed: int = 0,
    device: torch.device | str = "cpu",
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Distil a teacher and write its file.

    Parameters
    ----------
    out
        A safetensors file: the PDN's weights as float16 under the names of a sequential network, and how they
        were made under the key ``pydefect`` of its metadata.
        :func:`pydefect.dual_ae.teacher.load_teacher` reads it.
    images
        Folders of images of any kind, read recursively; none: procedural images only.
    source
        The backbone whose layers 2 and 3 are imitated: a key of :data:`pydefect.backbones.ARCHITECTURES`.
    weights
        Its weights: ``"imagenet"``, a file, or ``"random"``.
    seed
        Same images, settings, seed, machine and number of threads: same teacher.
    device
        Where to compute.
    checkpoint
        A folder: an interrupted run goes on from there when called again, with identical results.
    progress
        Told of every finished step.
    settings
        Fields of :class:`DistillationConfig`. Without folders ``procedural`` is 1.

    Returns
    -------
    dict
        What the file says about how it was made: settings, source, images, losses, held-out explained
        variance and seconds of this call.

    Raises
    ------
    InputError
        An argument is not allowed, `out` cannot be written, or an image cannot be read.
    WeightsNotFoundError
        The weights are not there.

    References
    ----------
    Batzner et al., EfficientAD, WACV 2024, appendix A.2.
    """
    if source not in ARCHITECTURES:
        raise InputError(f"source: {source!r} is not known; allowed are {', '.join(ARCHITECTURES)}")
    if os.path.isdir(out):
        raise InputError(f"out: {os.fspath(out)!r} is a folder; name a file in it")
    check_file_writable(out, "out")
    if not images:
        settings.setdefault("procedural", 1.0)
    device = torch.device(device)
    config = DistillationConfig.from_preset("default", **settings)
    collection = DistillationImages(images, config, seed)
    with for_training(device):
        backbone = build_backbone(source, os.fspath(weights))
        fingerprint = weights_fingerprint(backbone.state_dict())
        target = BackboneTeacher(backbone, True, resolve_precision(config.precision, device)).to(device)
        begun = time.perf_counter()
        run = _identity(config, collection, source, fingerprint, seed)
        with opened_checkpoint(checkpoint, run) as kept:
            distillation = Distillation(config, collection, target, seed, device, kept, progress)
            resumed = distillation.step
            network = distillation.run()
        about: dict[str, Any] = {
            "kind": "teacher",
            "settings": config.to_dict(),
            "seed": seed,
            "source": source,
            "source_fingerprint": fingerprint,
            "images": {"folders": len(images), "files": len(collection.training)},
            "explained_variance": distillation.measure(),
            "history": _thinned(distillation.history),
            "seconds": round(time.perf_counter() - begun, 1),
            "resumed_at_step": resumed,
            "machine": {
                "device": device.type,
                "processor": platform.machine(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            },
        }
    save_tensors(out, {name: value.half() for name, value in network.state_dict().items()}, about)
    return about


def _identity(
    config: DistillationConfig, images: DistillationImages, source: str, fingerprint: str, seed: int
) -> Mapping[str, Any]:
    """What a checkpoint is of; when the rate falls may change until it does (see ``decay``)."""
    settings = {name: value for name, value in config.to_dict().items() if name not in ("steps", "decay")}
    files = [[path.name, path.stat().st_size] for path in (*images.training, *images.held_out)]
    # A digest: the names of a million files would be a part of every checkpoint.
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return {**settings, "seed": seed, "source": source, "weights": fingerprint, "images": digest}


def _thinned(history: Sequence[tuple[int, float]], records: int = 60) -> list[tuple[int, float]]:
    """At most so many records, the last one among them."""
    stride = math.ceil(len(history) / records) or 1
    return [(step, round(loss, 5)) for step, loss in history[::-1][::stride][::-1]]
