"""Where backbone weights come from: torchvision's published files, or a file of the user's."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pydefect.errors import InputError, WeightsNotFoundError

__all__ = ["IMAGENET_WEIGHTS", "PublishedWeights", "cached_weights", "load_state_dict", "weights_fingerprint"]

WEIGHTS_DIR_VARIABLE = "PYDEFECT_WEIGHTS_DIR"


@dataclass(frozen=True)
class PublishedWeights:
    """A file that torchvision publishes."""

    filename: str
    sha256_prefix: str

    @property
    def url(self) -> str:
        """Where the file is published."""
        return f"https://download.pytorch.org/models/{self.filename}"


def _published(stem: str, sha256_prefix: str) -> PublishedWeights:
    return PublishedWeights(f"{stem}-{sha256_prefix}.pth", sha256_prefix)


# The IMAGENET1K_V1 weights: the ones of PatchCore, CFA and the paper (V2 features give worse anomaly maps).
IMAGENET_WEIGHTS: dict[str, PublishedWeights] = {
    "resnet18": _published("resnet18", "f37072fd"),
    "resnet34": _published("resnet34", "b627a593"),
    "resnet50": _published("resnet50", "0676ba61"),
    "wide_resnet50_2": _published("wide_resnet50_2", "95faca4d"),
    "wide_resnet101_2": _published("wide_resnet101_2", "32ee1156"),
}


def load_state_dict(source: str | os.PathLike[str], *, progress: bool = True) -> dict[str, Tensor]:
    """Load a state dict, without ever unpickling code.

    Parameters
    ----------
    source
        A key of :data:`IMAGENET_WEIGHTS`, or the path of a ``.pth``/``.pt`` (read with ``weights_only``),
        ``.safetensors`` or ``.npz`` file.
    progress
        Show a progress bar while downloading.

    Returns
    -------
    dict of str to Tensor
        CPU tensors under the names of the file.

    Raises
    ------
    WeightsNotFoundError
        The file does not exist, or is neither in ``PYDEFECT_WEIGHTS_DIR``, nor in torch hub's cache, nor
        downloadable.
    InputError
        The file is damaged, of an unknown type, or not the published one.
    """
    published = IMAGENET_WEIGHTS.get(os.fspath(source))
    if published is not None:
        return _read(_published_file(published, progress))
    path = Path(source)
    if not path.is_file():
        raise WeightsNotFoundError(
            f"weights: no file {str(path)!r}; give a .pth, .safetensors or .npz file, or 'imagenet'"
        )
    return _read(path)


def _published_file(published: PublishedWeights, progress: bool) -> Path:
    *offline, cached = _folders()
    for folder in offline:
        if (folder / published.filename).is_file():
            _check_digest(folder / published.filename, published.sha256_prefix)
            return folder / published.filename
    cached = cached / published.filename
    if not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Writes to a temporary file, checks the digest and renames.
            torch.hub.download_url_to_file(published.url, str(cached), published.sha256_prefix, progress)
        except (URLError, OSError, RuntimeError) as error:
            raise WeightsNotFoundError(
                f"weights: {published.filename} is not cached and could not be downloaded ({error}); "
                f"fetch {published.url} on another machine and put it into {cached.parent}, "
                f"or into a folder named by {WEIGHTS_DIR_VARIABLE}"
            ) from error
    return cached


def _folders() -> list[Path]:
    """Where published files are looked for: the user's offline folder, if named, and torch hub's cache."""
    offline = os.environ.get(WEIGHTS_DIR_VARIABLE)
    return [*([Path(offline)] if offline else []), Path(torch.hub.get_dir()) / "checkpoints"]


def cached_weights(backbone: str) -> Path | None:
    """Find a backbone's published file on this machine, without downloading.

    Parameters
    ----------
    backbone
        A key of :data:`IMAGENET_WEIGHTS`.

    Returns
    -------
    Path or None
        None where ``weights="imagenet"`` would have to download it.
    """
    files = (folder / IMAGENET_WEIGHTS[backbone].filename for folder in _folders())
    return next((file for file in files if file.is_file()), None)


def _check_digest(path: Path, prefix: str) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(prefix):
        raise InputError(
            f"weights: {path} is not the published file: its SHA-256 starts with {digest[:8]}, not {prefix}"
        )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix in (".pth", ".pt"):
            state = torch.load(path, map_location="cpu", weights_only=True)
        elif path.suffix == ".safetensors":
            state = load_file(path)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                state = {name: torch.from_numpy(archive[name]) for name in archive.files}
        else:
            raise InputError(
                f"weights: {path.name!r} has type {path.suffix!r}; allowed are .pth, .pt, .safetensors, .npz"
            )
    except (
        OSError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        SafetensorError,
        ValueError,
        TypeError,  # .npz: words instead of numbers, or one array without the archive
    ) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"weights: {path} cannot be read as a state dict: {error}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"weights: {path} holds no state dict (a mapping of names to tensors)")
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def weights_fingerprint(state: Mapping[str, Tensor]) -> str:
    """Digest names, shapes and values, so that a model file can say which weights it was fitted with.

    Returns
    -------
    str
        64 hexadecimal digits (SHA-256); step counters of batch normalisation are left out.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        if name.endswith("num_batches_tracked"):
            continue
        value = state[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}:{tuple(value.shape)};".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
