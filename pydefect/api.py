"""The public face: fit, score, evaluate, evaluate_maps, calibrate, load, export_onnx."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pydefect import evaluation, onnx_export, run
from pydefect.calibration import Calibration
from pydefect.contexts import for_training
from pydefect.data.layouts import (
    Dataset,
    defective_images,
    held_out_images,
    read_dataset,
    training_images,
    validation_images,
)
from pydefect.detector import Detector, OnError, resolve_device
from pydefect.errors import InputError, ModelFileError
from pydefect.evaluation import Evaluation, Maps
from pydefect.persistence import load_tensors
from pydefect.places import check_writable
from pydefect.registry import METHOD_NAMES, detector_type
from pydefect.scoring import Result

__all__ = ["calibrate", "evaluate", "evaluate_maps", "export_onnx", "fit", "load", "score"]


def fit(
    images: Any,
    *,
    method: str = "conpatch",
    preset: str = "default",
    validation: Any = None,
    backbone: str | None = None,
    weights: str | os.PathLike[str] = "imagenet",
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_error: OnError = "raise",
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **settings: Any,
) -> Detector:
    """Fit a detector on images of good products.

    Parameters
    ----------
    images
        A folder of good images (recursive; of a data set's category folder, and of a
        :class:`pydefect.data.Dataset`, the training part), a file, a list of paths, a uint8 or float array
        [H, W], [H, W, 3] or [N, H, W, 3], a list of arrays of any sizes, torch tensors, or any iterable of
        these; see ``docs/data.md``. Colours are RGB: pass OpenCV's frames as ``frame[..., ::-1]``.
    method
        ``"conpatch"`` (``docs/conpatch.md``); ``"dual_ae"``, the spatial-channel dual autoencoder, or
        ``"efficientad"`` (``docs/dual_ae.md``); or one to compare with: ``"patchcore"``, ``"padim"``,
        ``"spade"``, ``"cfa"``, ``"reconpatch"`` (``docs/baselines.md``); or a method of your own, which an
        installed package declares (``docs/own-methods.md``).
    preset
        ``"default"``, of ConPatch the settings that ``docs/study.md`` found; ``"paper"``: the paper's. What
        a paper leaves open, and where the code differs from it, is on the method's page.
    validation
        Normal images to calibrate on, of any kind that `images` may have, for methods that hold images out
        instead of training several times (``"dual_ae"``, ``"efficientad"``). None: of a data set's folder its
        validation images, where it has some (MVTec LOCO AD); else a part of `images`.
    backbone
        ``"resnet18"``, ``"resnet34"``, ``"resnet50"``, ``"wide_resnet50_2"``, ``"wide_resnet101_2"``, or one
        that an installed package declares (``docs/own-backbones.md``); None: the method's own,
        ``"resnet18"`` unless it says otherwise. For methods on a frozen backbone.
    weights
        The backbone's: ``"imagenet"`` (torchvision's published file, downloaded once), the path of a
        ``.pth``, ``.safetensors`` or ``.npz`` file with torchvision's names, or ``"random"``. Of no
        account to ``"dual_ae"`` and ``"efficientad"`` unless their ``teacher`` is a backbone.
    seed
        Same images, settings, seed, machine and number of threads: same detector, on the CPU to the bit.
    device
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"``; cards of compute capability 8.0 or later.
    on_error
        ``"raise"``: an unreadable image ends the work; ``"skip"``: it is left out and listed in the
        detector's ``training``.
    checkpoint
        A folder: interrupted training goes on from there when called again, with identical results. Ctrl-C
        waits for the step to end and saves it; a second one stops at once, at the last save.
    progress
        Show progress bars on standard error.
    settings
        Fields of the method's configuration, such as :class:`pydefect.conpatch.ConPatchConfig`; each
        detector class names its own as ``config_type``. All have ``resize``, ``crop``, ``region`` and
        ``ignore`` (``docs/data.md``) and ``false_alarm_rate``.

    Returns
    -------
    Detector
        With thresholds from held-out normal images, unless ``calibration_folds=0`` (as in ConPatch's preset
        ``"paper"``), ``held_out_share=0``, or there is but one image.
        ``detector.training["held_out_scores"]`` ranks these images, by name; a warning names those that score
        so far above the rest that they look defective.

    Raises
    ------
    InputError
        An argument or a setting is not allowed or none of the method's, or an image cannot be read; the
        message names it.
    WeightsNotFoundError
        The weights are not there and cannot be downloaded.

    References
    ----------
    Luo et al., Contrastive representation learning for industrial defect detection, Computer Science 52(1),
    2025, 210-220.

    Examples
    --------
    >>> import pydefect
    >>> from pydefect.data.procedural import render_product
    >>> import numpy as np
    >>> good = [render_product(np.random.default_rng(i), (64, 64))[0] for i in range(4)]
    >>> detector = pydefect.fit(good, weights="random", resize=64, crop=None, epochs=0, progress=False)
    >>> result = pydefect.score(detector, good, progress=False)
    >>> result.image_scores.shape, result.anomaly_maps[0].shape
    ((4,), (64, 64))
    """
    detector = detector_type(method)
    if on_error not in ("raise", "skip"):
        raise InputError(f"on_error: {on_error!r} given; allowed are 'raise', 'skip'")
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise InputError(f"seed: {seed!r} given; allowed are whole numbers from 0 to {2**32 - 1}")
    _check_path("weights", weights)
    if checkpoint is not None:
        _check_path("checkpoint", checkpoint)
        check_writable(checkpoint, "checkpoint")
    if backbone is not None:
        settings["backbone"] = backbone
    config = detector.config_type.from_preset(preset, **settings)
    source = images
    if isinstance(images, Dataset):
        if not images.train:
            raise InputError(f"images: the data set {images.name!r} has no training images")
        source = [sample.image for sample in images.train]
        if validation is None and detector.takes_validation:
            validation = [sample.image for sample in images.validation] or None
    elif isinstance(images, str | os.PathLike):
        source = training_images(images)
        if validation is None and detector.takes_validation:
            validation = validation_images(images) or None
    if isinstance(validation, str | os.PathLike):
        validation = held_out_images(validation, "validation")
    chosen = resolve_device(device, kernels=detector.needs_kernels)
    with for_training(chosen):
        return detector.fit(
            source,
            config,
            validation=validation,
            weights=os.fspath(weights),
            seed=int(seed),
            device=chosen,
            on_error=on_error,
            checkpoint=checkpoint,
            progress=progress,
        )


def _check_path(name: str, path: Any) -> None:
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"{name}: {_shown(path)} given; a path is needed")


def _shown(value: Any) -> str:
    # Swapped arguments bring whole arrays here.
    return (
        repr(value) if isinstance(value, int | float | None) else f"an object of type {type(value).__name__}"
    )


def _detector(detector: Detector | str | os.PathLike[str]) -> Detector:
    if isinstance(detector, Detector):
        return detector
    if not isinstance(detector, str | os.PathLike):
        raise InputError(
            f"detector: {_shown(detector)} given; allowed are a fitted detector or the path of a saved one"
        )
    return load(detector)


def _dataset(dataset: Dataset | str | os.PathLike[str]) -> Dataset:
    if isinstance(dataset, Dataset):
        return dataset
    _check_path("dataset", dataset)
    return read_dataset(dataset)


def score(
    detector: Detector | str | os.PathLike[str],
    images: Any,
    *,
    batch_size: int = 8,
    on_error: OnError = "raise",
    progress: bool = True,
) -> Result:
    """Score images.

    Parameters
    ----------
    detector
        A fitted detector, or the path of a saved one.
    images
        Whatever :func:`fit` takes but data sets; of a folder all images, recursively.
    batch_size
        Images at a time.
    on_error
        ``"raise"``: an unreadable image ends the work; ``"skip"``: it is left out and listed in
        ``Result.skipped``.
    progress
        Show a progress bar on standard error.

    Returns
    -------
    Result
        Image scores, anomaly maps at the images' own sizes, and with a calibration decisions and masks.

    Raises
    ------
    InputError
        An argument is not allowed, or an image cannot be read.
    ModelFileError
        ``detector`` is a path and no model file.
    """
    return _detector(detector).score(images, batch_size=batch_size, on_error=on_error, progress=progress)


def evaluate(
    detector: Detector | str | os.PathLike[str],
    dataset: Dataset | str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    batch_size: int = 8,
    on_error: OnError = "raise",
    progress: bool = True,
) -> Evaluation:
    """Measure a detector on a data set's labelled test images.

    Parameters
    ----------
    detector
        A fitted detector, or the path of a saved one.
    dataset
        The folder of one category, or what :func:`pydefect.data.layouts.read_dataset` made of it.
    out
        A folder for all that was said about every image, for reports and later analysis: scores, decisions,
        maps, times; see :mod:`pydefect.run`. An earlier run there is replaced.
    batch_size, on_error, progress
        See :func:`score`. With ``on_error="skip"`` an image whose mask cannot be read counts for the image
        metrics only, and a warning names it.

    Returns
    -------
    Evaluation
        AUROC, average precision and F1-max of images and of pixels (at the images' own sizes, inside what a
        crop left of them), AUPRO, sPRO for MVTec LOCO AD, AUROC and AUPRO of every kind of defect, time and
        memory.

    Raises
    ------
    InputError
        The folder is no data set, or has no labelled test images of both kinds; or `out` holds something
        else than a run.
    """
    if out is not None:
        _check_path("out", out)
        run.check_place(Path(out))
    found, labelled = _detector(detector), _dataset(dataset)
    if out is None:
        return evaluation.evaluate(
            found, labelled, batch_size=batch_size, on_error=on_error, progress=progress
        )
    return run.write_run(found, labelled, out, batch_size=batch_size, on_error=on_error, progress=progress)


def evaluate_maps(
    dataset: Dataset | str | os.PathLike[str],
    maps: Maps,
    *,
    image_scores: Mapping[Any, float] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure anomaly maps that another program made, as :func:`evaluate` measures a detector's.

    Parameters
    ----------
    dataset
        The folder of one category, or what :func:`pydefect.data.layouts.read_dataset` made of it.
    maps
        [H, W] float for every labelled test image, of the image's own size, any range, larger where it is
        more anomalous; compared as float32. One of

        - a folder with the maps as ``<defect>/<name>.tiff`` (MVTec's evaluation code) or in the places that
          the images have in the data set's folder (``pydefect score --maps``); ``.tif`` and ``.npy`` too,
        - a mapping from the samples of the data set's ``test``, or from the paths of their images,
        - a function of a sample, called once for each: no more than one map is held.
    image_scores
        A mapping with such keys; None: the maximum of each map.
    progress
        Show a progress bar on standard error.

    Returns
    -------
    Evaluation
        As :func:`evaluate` gives it; without decisions, times, memory and configuration, which are None and
        empty. All pixels of every image count.

    Raises
    ------
    InputError
        The folder is no data set, or has no labelled test images of both kinds; a map or score is missing
        (said of all before any is read, but for a function); or a map is not of its image's size, has no
        numbers [H, W] or one that is not finite, or cannot be read.

    Examples
    --------
    >>> import pydefect
    >>> evaluation = pydefect.evaluate_maps("bottle", "other-program/bottle/test")  # doctest: +SKIP
    >>> evaluation.to_dict()["pixel_aupro"]  # doctest: +SKIP
    """
    return evaluation.evaluate_maps(_dataset(dataset), maps, image_scores=image_scores, progress=progress)


def calibrate(
    detector: Detector,
    dataset: Dataset | str | os.PathLike[str] | None = None,
    *,
    normal: Any = None,
    defective: Any = None,
    false_alarm_rate: float = 0.01,
    confidence: float = 0.95,
    guaranteed: bool = False,
    batch_size: int = 8,
    on_error: OnError = "raise",
    progress: bool = True,
) -> Calibration:
    """Set a detector's thresholds: by held-out normal images, or by labelled ones.

    - With ``normal``: for a false-alarm rate, by good images that the fit did not see.
    - With neither ``normal`` nor ``dataset``: for another rate, by the held-out scores that the detector
      keeps from its fit or from an earlier call.
    - With ``dataset``: where F1 is largest over labelled test images, image and pixel level apart, equations
      (10) and (11). Metrics at these thresholds are then no longer those of unseen images.

    See ``docs/calibration.md``.

    Parameters
    ----------
    detector
        Its calibration is replaced.
    dataset
        The folder of one category, or what :func:`pydefect.data.layouts.read_dataset` made of it; its test
        images are used.
    normal
        Whatever :func:`fit` takes; of a data set's folder or list only a validation part is taken. The images
        should come from the same line as those to be judged later, and from more than one day.
    defective
        The same for defective images (of a data set's category those of its test part): they are scored and
        counted, and have no part in the thresholds.
    false_alarm_rate
        Share of normal images that may be called defective, and of those that may get a mask.
    confidence
        Of the interval in :attr:`Calibration.interval`, and of the guarantee.
    guaranteed
        False: the rate is kept on average; True: it is kept with ``confidence``, which takes more images.
    batch_size, on_error, progress
        See :func:`score`.

    Returns
    -------
    Calibration
        Also set on the detector; :func:`score` then gives a probability for every image. A warning is given
        where the images are too few for the rate.

    Raises
    ------
    InputError
        Arguments of two ways at once; no labelled images of both kinds, or no masks; no normal images; no
        scores are kept; or an argument is not allowed.

    References
    ----------
    Vovk et al., Algorithmic learning in a random world, 2005 (conformal prediction); Clopper and Pearson,
    Biometrika 26, 1934; Pickands, Annals of Statistics 3, 1975.
    """
    if not isinstance(detector, Detector):
        raise InputError(f"detector: {_shown(detector)} given; a fitted detector is needed")
    if dataset is not None:
        if normal is not None or defective is not None:
            raise InputError("dataset: given together with normal or defective; choose one way to calibrate")
        return evaluation.calibrate(
            detector, _dataset(dataset), batch_size=batch_size, on_error=on_error, progress=progress
        )
    if normal is None:
        if defective is not None:
            raise InputError("defective: given without normal; thresholds need normal images")
        return detector.set_false_alarm_rate(false_alarm_rate, confidence=confidence, guaranteed=guaranteed)
    return detector.calibrate(
        held_out_images(normal) if isinstance(normal, str | os.PathLike) else normal,
        defective=defective_images(defective) if isinstance(defective, str | os.PathLike) else defective,
        false_alarm_rate=false_alarm_rate,
        confidence=confidence,
        guaranteed=guaranteed,
        batch_size=batch_size,
        on_error=on_error,
        progress=progress,
    )


def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    weights: str | os.PathLike[str] | None = None,
) -> Detector:
    """Load a saved detector.

    Parameters
    ----------
    path
        What ``detector.save`` wrote.
    device
        See :func:`fit`.
    weights
        Needed only when the file was saved without its backbone; see :func:`fit`.

    Returns
    -------
    Detector
        Scores as the saved one did.

    Raises
    ------
    ModelFileError
        No such file, damaged, of a newer format, of a method that is not installed here, or the weights are
        not those of the fit.
    InputError
        The package that declares the method cannot be used.
    """
    resolve_device(device)  # before any work
    _check_path("path", path)
    if weights is not None:
        _check_path("weights", weights)
    tensors, metadata = load_tensors(path)
    method, known = metadata.get("method"), METHOD_NAMES.names()
    if metadata.get("format") != 1 or not isinstance(method, str):
        raise ModelFileError(
            f"model: {os.fspath(path)!r} has format {metadata.get('format')!r} and method {method!r}; "
            f"this version of pydefect reads format 1 of {', '.join(known)}"
        )
    if method not in known:
        # Where it came from is said, and never imported: a file is no reason to run code.
        where = f" ({metadata['class']})" if "class" in metadata else ""
        raise ModelFileError(
            f"model: {os.fspath(path)!r} was fitted with the method {method!r}{where}, which is not known "
            "here; install the package that declares it, or a version of pydefect that has it (known are "
            f"{', '.join(known)})"
        )
    found = detector_type(method)
    chosen = resolve_device(device, kernels=found.needs_kernels)
    with for_training(chosen):
        try:
            return found.from_file(
                tensors, metadata, device=chosen, weights=None if weights is None else os.fspath(weights)
            )
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            # What is wrong with weights that were given is said of them.
            if isinstance(error, ModelFileError) or (isinstance(error, InputError) and weights is not None):
                raise
            raise ModelFileError(
                f"model: {os.fspath(path)!r} is damaged or of another version of pydefect "
                f"({metadata.get('version')}): {error}"
            ) from error


def export_onnx(
    detector: Detector | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    image_size: int | Sequence[int] | None = None,
    batch_size: int = 1,
    pixels: onnx_export.Pixels = "auto",
) -> None:
    """Write a fitted detector as an ONNX file, for programs without Python and PyTorch; see ``docs/onnx.md``.

    The graph takes ``images``, [batch_size, H, W, 3] RGB, and gives ``image_scores`` [batch_size] and
    ``anomaly_maps`` [batch_size, h, w] float32 at the network input's size; the dual autoencoder's also
    ``local_maps`` and ``global_maps``. The file's metadata hold ``method``, ``pydefect_version``,
    ``preprocessing``, ``configuration`` and ``calibration`` (JSON), ``image_threshold``, ``pixel_threshold``,
    and for the parts ``local_threshold`` and ``global_threshold``.

    Parameters
    ----------
    detector
        A fitted detector on the CPU, or the path of a saved one.
    path
        The file to write, atomically; an existing one is replaced.
    image_size
        (height, width) of the images, or one number for a square; None: any, which the graph resizes as the
        detector does. At the detector's own size there is no resize in it.
    batch_size
        Images at a time, fixed.
    pixels
        ``"uint8"``, ``"float32"`` in 0..1 (a 16-bit image divided by 65535), or ``"auto"``: float32 where the
        detector has learned from images of more than 8 bits, or from floating point arrays. A detector is
        wrong about pixels that another conversion brought to 8 bits.

    Raises
    ------
    InputError
        An argument is not allowed; a package that writes ONNX is missing (the extra ``onnx`` names them);
        the detector resizes nothing and no size is given, or is larger than an ONNX file can be.
    ModelFileError
        ``detector`` is a path and no model file.
    PydefectError
        The file, run by ONNX Runtime on an image of noise, does not agree with the detector; then nothing is
        written.

    Notes
    -----
    PyTorch's tracing is a state of the whole process: what other threads score meanwhile is computed as in
    the graph, slower and in float32.

    The graph computes in float32. Scores of a detector that was fitted in bfloat16 differ by what that rounds
    (see ``docs/conpatch.md``), those of a float32 one by the order of sums.
    """
    onnx_export.export_onnx(
        _detector(detector), path, image_size=image_size, batch_size=batch_size, pixels=pixels
    )
