"""Model files and checkpoints: safetensors and JSON, written whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from safetensors.torch import save_file
from torch import Tensor, uint8

from pydefect.errors import InputError, ModelFileError
from pydefect.places import check_writable, is_written_into

__all__ = [
    "Checkpoint",
    "alone_in",
    "content_digest",
    "file_version",
    "folder_written_atomically",
    "load_tensors",
    "opened_checkpoint",
    "remove_left",
    "replace_metadata",
    "save_tensors",
    "working_folder",
    "write_atomically",
]

_METADATA_KEY = "pydefect"
_DIGEST_KEY = "sha256"

# In a working folder.
_NEW, _OLD, _LOCK = "new", "old", "pydefect.lock"
_RANDOM_LETTERS = 8  # that tempfile puts at the end of a name


def write_atomically(path: str | os.PathLike[str], content: bytes, *, durable: bool = True) -> None:
    """Write a file so that readers see the old content or the new one, never a part.

    Parameters
    ----------
    path
        Its folder is made when missing. A link stays, and the file it leads to is written. What is no regular
        file, such as a device or a pipe, is written into as it is; so is this program's own output.
        What is replaced hands its permissions on.
    content
        The whole file.
    durable
        Wait until it is on the disk, so that a power cut leaves it whole as well. For a small file that takes
        longer than all else.
    """
    if is_written_into(path):
        with open(path, "ab") as file:
            file.write(content)
        return
    with _replacing(path, durable=durable) as temporary:
        temporary.write_bytes(content)


@contextmanager
def _replacing(path: str | os.PathLike[str], *, durable: bool) -> Iterator[Path]:
    """Write a regular file atomically; see :func:`write_atomically`.

    Yields
    ------
    pathlib.Path
        An empty file beside it, which takes its place when the block ends, and is removed if an exception
        leaves the block.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, mode = _new_file(path)
    try:
        with suppress(FileNotFoundError):
            mode = stat.S_IMODE(path.stat().st_mode)
            # What was for its owner only stays so in the meantime; the owner has to be able to write.
            os.chmod(temporary, mode | stat.S_IRUSR | stat.S_IWUSR)
        yield temporary
        # By its name: whoever wrote may have put another file there, as safetensors does.
        if durable:
            handle = os.open(temporary, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno is None:
            raise
        # A full disk is reported of no file, or of one that is gone.
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _new_file(path: Path) -> tuple[Path, int]:
    """Make an empty file beside another, and say what permissions it has. tempfile's are for their owner
    only; a model is an ordinary file."""
    while True:
        file = path.with_name(f".{path.name}.{secrets.token_hex(_RANDOM_LETTERS // 2)}")
        with suppress(FileExistsError):
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                return file, stat.S_IMODE(os.fstat(handle).st_mode)
            finally:
                os.close(handle)


@contextmanager
def folder_written_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a folder so that readers see the old one or the new one, never a part.

    A folder cannot replace another in one step, so for an instant between the two there is none.

    Parameters
    ----------
    path
        The folder above it is made when missing. An existing folder is replaced with all that is in it.

    Yields
    ------
    pathlib.Path
        An empty folder beside it, which takes its place when the block ends, and is removed if an exception
        leaves the block.
    """
    # Its own name, not one that leads there by way of the current folder: a rename takes "." and ".." for
    # other folders.
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with working_folder(path.parent, f".{path.name}.") as temporary:
        new, old = temporary / _NEW, temporary / _OLD
        new.mkdir()
        try:
            yield new
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            # It is reported of no file, or of one that is gone.
            raise OSError(error.errno, error.strerror, str(path)) from error
        try:
            if path.exists():
                path.rename(old)
            new.rename(path)
        except BaseException:  # Ctrl-C too: what is in the working folder is removed
            if old.exists() and not path.exists():
                old.rename(path)
            raise


@contextmanager
def working_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Make a folder for what is not finished yet, and remove what killed programs have left.

    Parameters
    ----------
    parent, prefix
        The folder that it is made in, and what its name begins with; see :func:`remove_left`.

    Yields
    ------
    pathlib.Path
        The folder, which is removed with all that is in it when the block ends.
    """
    remove_left(parent, prefix)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        with ExitStack() as lock:
            # Where there are no locks there is none to be found, and nobody removes the folder.
            with suppress(OSError):
                file = lock.enter_context(open(folder / "unlocked", "wb"))
                fcntl.flock(file, fcntl.LOCK_EX)
                # Nobody sees it before it is locked.
                os.rename(folder / "unlocked", folder / _LOCK)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_left(parent: Path, prefix: str) -> None:
    """Remove those of :func:`working_folder`, by their prefix, whose programs have been killed."""
    for folder in parent.glob(f"{glob.escape(prefix)}{'?' * _RANDOM_LETTERS}"):
        if _is_left(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_left(folder: Path) -> bool:
    """Whether the program that made a working folder has ended: the system has opened its lock then."""
    if (folder / _OLD).exists() and (folder / _NEW).exists():  # killed between the two renames
        return False
    try:
        with open(folder / _LOCK, "r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def alone_in(folder: Path, name: str) -> Iterator[None]:
    """Keep out others that add to a folder's files: the last to end would drop what others added.

    The system takes the lock off a program that is killed. On a file system without locks nobody is kept out.

    Parameters
    ----------
    folder
        Which is there.
    name
        Of the argument that asks for it, for the message.

    Raises
    ------
    InputError
        Another program, or another call of this one, is at it.
    """
    handle = os.open(folder, os.O_RDONLY)
    _held.add(handle)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"{name}: another program is at work in {folder}; wait until it has ended"
                ) from None
        yield
    finally:
        if handle in _held:  # else this is a forked process, which has let go of it
            _held.remove(handle)
            os.close(handle)


# Handles of the locked folders. A forked process has them too, and would keep the lock of a killed one.
_held: set[int] = set()


def _let_go() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write tensors and JSON metadata into one safetensors file, atomically.

    Parameters
    ----------
    path
        The file.
    tensors
        Any device; tensors that share memory are written apart. Nothing may change them meanwhile.
    metadata
        JSON values, under the key ``pydefect`` of the file's own metadata; a SHA-256 of everything is added.
    """
    plain = _apart({name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()})
    # In the JSON: safetensors writes several keys of its own metadata in an order that changes.
    text = json.dumps({**metadata, _DIGEST_KEY: _digest(metadata, plain)}, allow_nan=False)
    if is_written_into(path):
        write_atomically(path, serialise(plain, metadata={_METADATA_KEY: text}))
        return
    with _replacing(path, durable=True) as temporary:
        try:
            # Not the bytes of all, which would be in memory twice more.
            save_file(plain, temporary, metadata={_METADATA_KEY: text})
        except SafetensorError as error:
            # Its words for what the system says of a full disk, among others.
            if said := re.search(r"\b(?:os error|code:) (\d+)", str(error)):
                raise OSError(int(said[1]), os.strerror(int(said[1]))) from error
            raise


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy what shares memory with another, or is a part of a larger one, which safetensors refuses."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.nbytes
        found[name] = tensor if whole and storage.data_ptr() not in seen else tensor.clone()
        seen.add(storage.data_ptr())
    return found


def _digest(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Digest all that a file holds: one wrong bit gives other scores, and nothing else would tell."""
    digest = hashlib.sha256(json.dumps(metadata).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.reshape(-1).view(uint8).numpy().data)
    return digest.hexdigest()


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote.

    Returns
    -------
    tensors, metadata
        CPU tensors; JSON values.

    Raises
    ------
    ModelFileError
        No such file, damaged, changed since, or not written by pydefect.
    """
    if not Path(path).is_file():
        raise ModelFileError(f"model: no file {os.fspath(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = _metadata_of(file, path)
            # Copies: what the file gives is a map of it, and would change or vanish with its content.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise ModelFileError(
            f"model: {os.fspath(path)!r} is damaged or no safetensors file: {error}"
        ) from error
    # Files from before there were digests have none.
    digest = metadata.pop(_DIGEST_KEY, None)
    if digest is not None and digest != _digest(metadata, tensors):
        raise ModelFileError(f"model: {os.fspath(path)!r} is damaged: it does not hold what was written")
    return tensors, metadata


def _metadata_of(file: Any, path: str | os.PathLike[str]) -> dict[str, Any]:
    header = file.metadata() or {}
    metadata = json.loads(header[_METADATA_KEY]) if _METADATA_KEY in header else None
    if not isinstance(metadata, dict):
        raise ModelFileError(f"model: {os.fspath(path)!r} was not written by pydefect")
    return metadata


def content_digest(path: str | os.PathLike[str], *, version: object) -> str | None:
    """Return the SHA-256 that a file of :func:`save_tensors` says of all that it holds.

    Parameters
    ----------
    path
        A file that has been loaded.
    version
        What :func:`file_version` said before it was loaded.

    Returns
    -------
    str or None
        None for a file from before there were digests.

    Raises
    ------
    ModelFileError
        The file is another one by now.
    """
    with safe_open(path, framework="pt") as file:
        digest: str | None = _metadata_of(file, path).get(_DIGEST_KEY)
    _check_version(path, version)
    return digest


def file_version(path: str | os.PathLike[str]) -> object:
    """Tell a file from one that is written in its place.

    Returns
    -------
    object
        Equal as long as it is the same file with the same content, by device, inode, size and time of change.

    Raises
    ------
    ModelFileError
        There is none.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise ModelFileError(f"model: no file {os.fspath(path)!r}") from error
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _check_version(path: str | os.PathLike[str], version: object) -> None:
    if file_version(path) != version:
        raise ModelFileError(f"model: {os.fspath(path)!r} was replaced in the meantime; it stays as it is")


def replace_metadata(
    path: str | os.PathLike[str],
    changes: Mapping[str, Any],
    *,
    version: object,
    out: str | os.PathLike[str] | None = None,
) -> None:
    """Change entries of a file's metadata and leave its tensors as they are, atomically.

    Parameters
    ----------
    path
        What :func:`save_tensors` wrote.
    changes
        JSON values.
    version
        What :func:`file_version` said when the file was read that the changes are of.
    out
        The file to write; None: ``path`` itself.

    Raises
    ------
    ModelFileError
        See :func:`load_tensors`; or the file is another one by now.
    """
    tensors, metadata = load_tensors(path)
    _check_version(path, version)
    save_tensors(path if out is None else out, tensors, {**metadata, **changes})


class Checkpoint:
    """A folder in which a training run keeps its state, stage by stage.

    Parameters
    ----------
    folder
        Made when missing.
    run
        JSON values that say what is trained on what: a folder can only be resumed by the same run.
    """

    def __init__(self, folder: str | os.PathLike[str], run: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        check_writable(self.folder, "checkpoint")
        self._run = json.loads(json.dumps(run))  # as it comes back

    def save(self, stage: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Replace a stage's state."""
        metadata = {"run": self._run, "state": dict(state)}
        save_tensors(self.folder / f"{stage}.safetensors", tensors, metadata)

    def load(self, stage: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return a stage's state, or None where the stage has not begun.

        Raises
        ------
        InputError
            The folder belongs to another run; the message names what differs.
        """
        path = self.folder / f"{stage}.safetensors"
        # What a run that was killed in the middle of a save has left.
        for pattern in (f".{glob.escape(path.name)}.*", ".tmp??????"):  # ours, and safetensors' own
            for unfinished in self.folder.glob(pattern):
                unfinished.unlink(missing_ok=True)
        if not path.exists():
            return None
        tensors, metadata = load_tensors(path)
        theirs = metadata.get("run", {})
        # A setting that is not set may be one that the version which saved did not know.
        differing = sorted(name for name in {*self._run, *theirs} if self._run.get(name) != theirs.get(name))
        if differing:
            raise InputError(
                f"checkpoint: {str(self.folder)!r} holds another run (it differs in {', '.join(differing)}); "
                "repeat that run's settings to resume it, or name another folder"
            )
        return tensors, metadata["state"]


@contextmanager
def opened_checkpoint(
    folder: str | os.PathLike[str] | None, run: Mapping[str, Any]
) -> Iterator[Checkpoint | None]:
    """Keep a training run's folder to oneself: two that save there would end, or overwrite, each other.

    Parameters
    ----------
    folder
        None: nothing is kept.
    run
        See :class:`Checkpoint`.

    Yields
    ------
    Checkpoint or None
        None without a folder.

    Raises
    ------
    InputError
        The folder cannot be written to, or another training is at work in it.
    """
    if folder is None:
        yield None
        return
    checkpoint = Checkpoint(folder, run)
    checkpoint.folder.mkdir(parents=True, exist_ok=True)
    with alone_in(checkpoint.folder, "checkpoint"):
        yield checkpoint
