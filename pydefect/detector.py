"""What every fitted detector can do, whatever its method."""

from __future__ import annotations

import math
import os
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from pydefect.calibration import Calibration, check_terms, held_out_calibration
from pydefect.config import MethodConfig
from pydefect.contexts import for_inference
from pydefect.cuda_graphs import ReplayedCalls
from pydefect.data.images import Image, ImageCollection, SkippedImage, open_images
from pydefect.errors import InputError, PydefectError
from pydefect.ops._library import load_cuda_library, load_errors
from pydefect.preprocessing import Preprocessing
from pydefect.progress import ProgressBars
from pydefect.scoring import Result, ScoredImage
from pydefect.version import VERSION

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Detector",
    "OnError",
    "batches",
    "check_network_inputs",
    "is_full",
    "known_length",
    "resolve_device",
]

OnError = Literal["raise", "skip"]

# Compute capability that the CUDA kernels need: asynchronous copies and bfloat16 products.
_OLDEST_CARD = (8, 0)
_NO_KERNELS = "this build of pydefect has no CUDA kernels; install it from source where nvcc is found"


def resolve_device(device: str | torch.device, *, kernels: bool = False) -> torch.device:
    """Return a usable device; ``"auto"`` is CUDA where a card is there that can be used, else the CPU.

    Parameters
    ----------
    device
        ``"auto"`` or a device of PyTorch's.
    kernels
        Whether CUDA is of no use without this package's kernels.

    Raises
    ------
    InputError
        The device is unknown, not there, too old for the kernels, or lacks those that are needed.

    Warns
    -----
    UserWarning
        There is a card, but ``"auto"`` is the CPU because this build has no kernels.
    """
    if device == "auto":
        if not torch.cuda.is_available() or torch.cuda.get_device_capability() < _OLDEST_CARD:
            return torch.device("cpu")
        if kernels and not load_cuda_library():
            if "cuda" not in load_errors:  # which were a warning when the library was loaded
                warnings.warn(f"device: the CPU works, not the CUDA device: {_NO_KERNELS}", stacklevel=3)
            return torch.device("cpu")
        return torch.device("cuda")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"device: {device!r} given; allowed are 'auto', 'cpu', 'cuda', 'cuda:0', ..."
        ) from error
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"device: {device!r} given; allowed are 'auto', 'cpu', 'cuda', 'cuda:0', ...")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device: {device!r} given, but {torch.cuda.device_count()} CUDA devices are there")
    if chosen.type == "cuda":
        capability = torch.cuda.get_device_capability(chosen)
        if capability < _OLDEST_CARD:
            raise InputError(
                f"device: {device!r} given, a card of compute capability {capability[0]}.{capability[1]}; "
                f"allowed are cards from {_OLDEST_CARD[0]}.{_OLDEST_CARD[1]} on, and 'cpu'"
            )
        if kernels and not load_cuda_library():
            raise InputError(f"device: {device!r} given, but {load_errors.get('cuda', _NO_KERNELS)}")
    return chosen


# Of a batch's images at their own size, beyond which it is not filled up: four of 20 megapixels in 8 bits.
_HELD_BYTES = 256 << 20


def is_full(batch: Sequence[Image], batch_size: int) -> bool:
    """Whether a batch has as many images as were asked for, or 256 MB of pixels: few large photographs do."""
    return len(batch) == batch_size or sum(image.pixels.nbytes for image in batch) >= _HELD_BYTES


def batches(
    images: ImageCollection, preprocessing: Preprocessing, batch_size: int
) -> Iterator[tuple[list[Image], Tensor]]:
    """Group consecutive images of one network size.

    A full batch (:func:`is_full`) does not wait for the image after it, which a camera may take much later.
    An image smaller than the crop is refused as one that cannot be read. Where the source fails, what it gave
    before comes first.

    Yields
    ------
    images, tensors
        At most ``batch_size`` images, and [B, 3, h, w] float32 of them, channels last in memory.
    """
    pending: list[Image] = []
    tensors: list[Tensor] = []
    try:
        for image in images:
            try:
                tensor = preprocessing(image.pixels)
            except InputError as error:
                images.refuse(image, str(error))
                continue
            if tensors and tensor.shape != tensors[0].shape:
                yield pending, _stack(tensors)
                pending, tensors = [], []
            pending.append(image)
            tensors.append(tensor)
            if is_full(pending, batch_size):
                yield pending, _stack(tensors)
                pending, tensors = [], []
    except Exception:
        if tensors:
            yield pending, _stack(tensors)
        raise
    if tensors:
        yield pending, _stack(tensors)


def _stack(tensors: list[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0].unsqueeze(0)
    return torch.stack([tensor.permute(1, 2, 0) for tensor in tensors]).permute(0, 3, 1, 2)


def check_network_inputs(images: Tensor, size: tuple[int, int] | None, device: torch.device) -> None:
    """Refuse what a detector cannot score, or would score as something else.

    Parameters
    ----------
    images
        Shall be [B, 3, h, w] float32 with B >= 1.
    size
        (h, w) of the images that the detector was fitted on; None: those had sizes of their own.
    device
        The detector's.

    Raises
    ------
    InputError
        They are not: another type, shape, size or device.
    """
    if not isinstance(images, Tensor):
        raise InputError(f"images: {type(images).__name__} given; a tensor [B, 3, h, w] is needed")
    shape = list(images.shape)
    if images.dim() != 4 or shape[1] != 3 or 0 in shape:
        raise InputError(f"images: the shape {shape} given; allowed is [B, 3, h, w] with B >= 1")
    if images.dtype != torch.float32:
        raise InputError(f"images: {images.dtype} given; allowed is torch.float32")
    if images.device.type != device.type:
        raise InputError(f"images: on {images.device}; the detector computes on {device}")
    if size is not None and tuple(shape[2:]) != size:
        raise InputError(
            f"images: {shape[2]} x {shape[3]} pixels given; the detector was fitted on {size[0]} x {size[1]}"
        )


def known_length(images: ImageCollection) -> int | None:
    """Number of images, or None for a stream whose end nobody knows."""
    try:
        return len(images)
    except TypeError:
        return None


class Detector(ABC):
    """A fitted detector.

    A method is a subclass: the abstract members here are all that :func:`pydefect.fit`, :func:`pydefect.load`
    and the command line ask of it, and one line in ``pydefect/registry.py``, or an entry point of a package
    of one's own (``docs/own-methods.md``), makes them know it. Methods on patch features of a frozen backbone
    take most of it from :class:`pydefect.feature_detector.FeatureDetector`.

    Attributes
    ----------
    method
        Name in the registry, or that of the entry point.
    takes_validation
        Whether :meth:`fit` calibrates on a data set's validation images where there are some.
    needs_kernels
        Whether the method computes on CUDA with this package's kernels only; False: PyTorch's operators serve
        as well.
    config_type
        Type of the settings: its ``from_preset`` takes what a user gives to :func:`pydefect.fit`.
    config
        Settings.
    seed
        Of the fit.
    preprocessing
        From pixels to network input and back: `config.preprocessing`, which knows region and ignore.
    calibration
        Thresholds; None: the detector scores but does not decide.
    device
        Where it computes.
    training
        What the fit found, as JSON values: ``images`` (their number), ``skipped`` (names), ``files`` (by what
        theirs are known again, :func:`pydefect.data.seen.file_print`), ``pixels`` (their types),
        ``held_out_scores`` ([name, score] of the images that scored highest when a detector scored them that
        had not seen them, at most 20, the highest first; see ``docs/calibration.md``), and what the method
        adds. Models of earlier versions lack scores, files and pixels.
    """

    method: ClassVar[str]
    takes_validation: ClassVar[bool] = False
    needs_kernels: ClassVar[bool] = False
    config_type: ClassVar[type[MethodConfig]]
    config: MethodConfig
    seed: int
    preprocessing: Preprocessing
    calibration: Calibration | None
    device: torch.device
    training: dict[str, Any]

    @classmethod
    @abstractmethod
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
        """Fit on normal images.

        Parameters
        ----------
        images
            Whatever :func:`pydefect.data.images.open_images` takes.
        config
            Of :attr:`config_type`.
        validation
            Normal images kept from training, for methods that say ``takes_validation``; None: the method
            keeps some of `images`.
        weights, seed, device, on_error, checkpoint, progress
            See :func:`pydefect.fit`.

        Returns
        -------
        Detector
            Fitted, and calibrated unless the settings say otherwise.

        Raises
        ------
        InputError
            A setting does not fit the images, or an image cannot be read.
        WeightsNotFoundError
            The weights are not there and cannot be downloaded.
        """

    @classmethod
    @abstractmethod
    def from_file(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        *,
        device: torch.device,
        weights: str | None,
    ) -> Self:
        """Rebuild a detector from a model file's content.

        Parameters
        ----------
        tensors, metadata
            What :meth:`save` wrote; the metadata are :meth:`metadata` and what the method adds.
        device
            Where it will compute.
        weights
            Needed only when the file was saved without its backbone; see :func:`pydefect.fit`.

        Returns
        -------
        Detector
            Scores as the saved one did.

        Raises
        ------
        ModelFileError
            The weights are missing or not those of the fit.
        AttributeError, LookupError, TypeError, ValueError, RuntimeError
            The content is not what it should be; :func:`pydefect.load` makes a ModelFileError of them.
        """

    @property
    def configuration(self) -> dict[str, Any]:
        """Method, seed and every setting as JSON values."""
        return {"method": self.method, "seed": self.seed, **self.config.to_dict()}

    def metadata(self) -> dict[str, Any]:
        """Return what every model file says of itself, as JSON values."""
        place = type(self)
        is_own = not place.__module__.startswith("pydefect.")
        return {
            "format": 1,
            "method": self.method,
            # For whoever has the file and not the package.
            **({"class": f"{place.__module__}:{place.__qualname__}"} if is_own else {}),
            "version": VERSION,
            "seed": self.seed,
            "config": self.config.to_dict(),
            "calibration": self.calibration.to_dict() if self.calibration else None,
            "training": self.training,
        }

    @abstractmethod
    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Score a batch of network inputs.

        Parameters
        ----------
        images
            [B, 3, h, w] float32, normalised.

        Returns
        -------
        image_scores
            [B] float32, >= 0.
        anomaly_maps
            [B, h, w] float32, >= 0.

        Raises
        ------
        InputError
            See :func:`check_network_inputs`. Nothing looks at the values, which would wait for a card: of NaN
            some processors make scores.
        """

    def predict_maps(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Score a batch, and say what its anomaly maps are made of.

        A method whose anomaly map has parts that mean something on their own (such as a local and a global
        one) overrides this; everything that streams, stores or shows maps then carries them along.

        Parameters
        ----------
        images
            [B, 3, h, w] float32, normalised.

        Returns
        -------
        image_scores
            [B] float32, >= 0.
        maps
            [B, h, w] float32, >= 0, each: ``"anomaly"``, the one that decides, and the parts by name.
        """
        image_scores, anomaly_maps = self.predict(images)
        return image_scores, {"anomaly": anomaly_maps}

    def captured_state(self) -> object | None:
        """Return what :meth:`predict_maps` reads besides the images and another call may replace.

        Images that come one by one are scored on a card by replaying a CUDA graph, which is captured anew
        where another object is returned. None: no graph can capture it, because something waits for the
        device.
        """
        return None

    @abstractmethod
    def save(self, path: str | os.PathLike[str], *, include_backbone: bool = True) -> None:
        """Write the model file, atomically.

        Parameters
        ----------
        path
            One safetensors file with JSON metadata.
        include_backbone
            True: self-contained. False: the file says which backbone weights it needs, and
            :func:`pydefect.load` takes them.
        """

    def stream(
        self,
        images: Any,
        *,
        batch_size: int = 8,
        on_error: OnError = "raise",
        progress: bool = False,
        skipped: list[SkippedImage] | None = None,
    ) -> Iterator[ScoredImage]:
        """Score images one batch at a time: nothing is held but the current batch.

        Parameters
        ----------
        images
            Whatever :func:`pydefect.data.images.open_images` takes.
        batch_size
            Images at a time.
        on_error
            ``"raise"``: an unreadable file ends the work; ``"skip"``: it is left out.
        progress
            Show a progress bar.
        skipped
            Filled with the files left out.

        Yields
        ------
        ScoredImage
            In the order of the images; :meth:`decide` makes a decision of one.

        Raises
        ------
        InputError
            ``images`` or ``batch_size`` is not allowed, or a file cannot be read.
        PydefectError
            A score or an anomaly map is not finite.
        """
        if not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise InputError(f"batch_size: {batch_size!r} given; allowed are whole numbers from 1 on")
        collection = open_images(images, on_error=on_error)
        bars = ProgressBars(progress)
        total, done = known_length(collection), 0
        predict: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]] = self.predict_maps
        if batch_size == 1 and self.captured_state() is not None:
            predict = ReplayedCalls(self.predict_maps, self.captured_state)
        told = 0

        def tell() -> None:
            nonlocal told
            if skipped is not None:
                skipped.extend(collection.skipped[told:])
                told = len(collection.skipped)

        try:
            began = time.perf_counter()
            for group, tensors in batches(collection, self.preprocessing, batch_size):
                try:
                    with for_inference(self.device):
                        image_scores, maps = predict(tensors.to(self.device))
                except InputError as error:  # of their size, which is one in a group
                    for image in group:
                        collection.refuse(image, str(error).removeprefix("images: "))
                    began = time.perf_counter()
                    continue
                scores = image_scores.tolist()
                for image, score in zip(group, scores, strict=True):
                    # NaN is not over any threshold: it would pass for good.
                    if not math.isfinite(score):
                        raise PydefectError(
                            f"{image.name}: the score is {score}; the model, or the image, holds numbers "
                            "that are not finite"
                        )
                tell()
                maps = {name: some.cpu() for name, some in maps.items()}
                finite = maps["anomaly"].flatten(1).isfinite().all(1).tolist()
                if False in finite:
                    name = group[finite.index(False)].name
                    raise PydefectError(f"{name}: the anomaly map holds numbers that are not finite")
                share = (time.perf_counter() - began) / len(group)
                for index, (image, score) in enumerate(zip(group, scores, strict=True)):
                    began = time.perf_counter()
                    size = (image.pixels.shape[0], image.pixels.shape[1])
                    anomaly_map = self.preprocessing.to_original(maps["anomaly"][index], size).numpy()
                    seconds = share + time.perf_counter() - began
                    done += 1
                    bars("scoring", done, total)
                    yield ScoredImage(
                        name=image.name,
                        path=image.path,
                        image_score=score,
                        anomaly_map=anomaly_map,
                        scored_box=self.preprocessing.scored_box(size),
                        network_maps={name: some[index].numpy() for name, some in maps.items()},
                        seconds=seconds,
                        ignored=self.preprocessing.ignored(size),
                    )
                began = time.perf_counter()
        finally:
            bars.close()
            tell()

    def score(
        self, images: Any, *, batch_size: int = 8, on_error: OnError = "raise", progress: bool = False
    ) -> Result:
        """Score images and hold all their maps; see :meth:`stream` for the parameters.

        Returns
        -------
        Result
            Scores, maps and, with a calibration, decisions.

        Raises
        ------
        InputError
            As :meth:`stream`, or there are no images: an iterator that has been read before has none left.
        PydefectError
            A score or an anomaly map is not finite.
        """
        skipped: list[SkippedImage] = []
        stream = self.stream(
            images, batch_size=batch_size, on_error=on_error, progress=progress, skipped=skipped
        )
        result = self._decided(stream)
        if not len(result) and not skipped:
            raise InputError("images: there are none in it")
        return replace(result, skipped=skipped)

    def decide(self, scored: ScoredImage) -> Result:
        """Decide about one image of a stream; nothing is scored again.

        Parameters
        ----------
        scored
            What :meth:`stream` of this detector yielded.

        Returns
        -------
        Result
            Of length 1, equal to :meth:`score` of that image: thresholds and probabilities of the present
            calibration, parts of the map, masks and regions.

        Raises
        ------
        InputError
            `scored` is something else.
        """
        if not isinstance(scored, ScoredImage):
            raise InputError(
                f"scored: {type(scored).__name__} given; allowed is one ScoredImage that stream yielded"
            )
        return self._decided([scored])

    def _decided(self, images: Iterable[ScoredImage]) -> Result:
        result = Result.collect(map(self._with_parts, images))
        return result if self.calibration is None else result.calibrated(self.calibration)

    def _with_parts(self, scored: ScoredImage) -> ScoredImage:
        """Add the parts of the map at the original size, which a stream leaves out for speed."""
        height, width = scored.anomaly_map.shape
        parts = {
            name: self.preprocessing.to_original(torch.from_numpy(values), (height, width)).numpy()
            for name, values in scored.network_maps.items()
            if name != "anomaly"
        }
        return replace(scored, part_maps=parts)

    def update(
        self, images: Any, *, on_error: OnError = "raise", progress: bool = False
    ) -> list[SkippedImage]:
        """Go on learning from new normal images, for methods that can; the thresholds stay as they are.

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
            The method cannot; a file cannot be read, there are no images, or one does not fit. The detector
            is then as it was before.
        """
        raise InputError(
            f"update: {self.method} cannot go on learning; fit again with the old and the new images"
        )

    def calibrate(
        self,
        normal: Any,
        *,
        defective: Any = None,
        false_alarm_rate: float = 0.01,
        confidence: float = 0.95,
        guaranteed: bool = False,
        batch_size: int = 8,
        on_error: OnError = "raise",
        progress: bool = False,
    ) -> Calibration:
        """Set the thresholds by normal images that the fit did not see.

        Parameters
        ----------
        normal, defective
            Whatever :func:`pydefect.data.images.open_images` takes. Defective images are scored and counted;
            they have no part in the thresholds.
        false_alarm_rate, confidence, guaranteed
            See :func:`pydefect.calibration.held_out_calibration`.
        batch_size, on_error, progress
            See :meth:`stream`; files that are left out are named in a warning each.

        Returns
        -------
        Calibration
            Also set on the detector.

        Raises
        ------
        InputError
            An argument is not allowed, an image cannot be read, or there is no normal one; the detector's
            calibration is then as it was.
        """
        check_terms(false_alarm_rate, confidence)
        how: dict[str, Any] = {"batch_size": batch_size, "on_error": on_error, "progress": progress}
        scores, maxima = [], []
        parts: dict[str, list[float]] = {}
        how["skipped"] = []
        for scored in self.stream(normal, **how):
            scores.append(scored.image_score)
            maxima.append(float(scored.anomaly_map.max()))
            for name, score in scored.part_scores.items():
                parts.setdefault(name, []).append(score)
        if not scores:
            raise InputError(
                "normal: there are no images in it; at least one held-out normal image is needed"
            )
        found = [] if defective is None else [one.image_score for one in self.stream(defective, **how)]
        for skipped in how["skipped"]:
            warnings.warn(f"{skipped.name}: {skipped.reason}; left out of the calibration", stacklevel=2)
        self.calibration = held_out_calibration(
            scores,
            maxima,
            false_alarm_rate,
            confidence=confidence,
            guaranteed=guaranteed,
            defective_scores=found,
            part_maxima=parts,
        )
        return self.calibration

    def set_false_alarm_rate(
        self, false_alarm_rate: float, *, confidence: float = 0.95, guaranteed: bool = False
    ) -> Calibration:
        """Choose another false-alarm rate from the held-out scores that the detector keeps.

        Parameters
        ----------
        false_alarm_rate, confidence, guaranteed
            See :func:`pydefect.calibration.held_out_calibration`.

        Returns
        -------
        Calibration
            Also set on the detector.

        Raises
        ------
        InputError
            No held-out scores are there, or the rate is not allowed.
        """
        if self.calibration is None or self.calibration.source != "held_out":
            raise InputError(
                "false_alarm_rate: the detector keeps no scores of held-out normal images to choose it from"
            )
        self.calibration = held_out_calibration(
            self.calibration.image_scores,
            self.calibration.map_maxima,
            false_alarm_rate,
            confidence=confidence,
            guaranteed=guaranteed,
            defective_scores=self.calibration.defective_scores,
            part_maxima=self.calibration.part_maxima,
        )
        return self.calibration
