"""Loads the native libraries that hold the operators."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from importlib import resources

import torch

from pydefect import _native

_CPU_LIBRARY = "libpydefect_cpu.so"
_CUDA_LIBRARY = "libpydefect_cuda.so"
# Types of devices; filled when the libraries are loaded. A plain global: torch.compile reads it where it
# could not trace the loading.
_with_kernels: set[str] = set()
# Of types of devices whose library is there and does not load, the reason.
load_errors: dict[str, str] = {}


def _load(name: str) -> bool:
    library = resources.files("pydefect") / name
    if not library.is_file():
        return False
    with resources.as_file(library) as path:
        try:
            torch.ops.load_library(path)
        except OSError as error:
            # PyTorch's own message leaves out what the loader said.
            facts = _native.build_info()
            raise ImportError(
                f"{name} does not load: {error.__cause__ or error}. It was built with PyTorch "
                f"{facts['torch_built_against']} and needs {facts['torch_oldest']} or later; this is "
                f"{torch.__version__}. Install pydefect again from its source folder: `pip install .`"
            ) from error
    return True


@functools.cache
def load_cpu_library() -> None:
    """Load the operators' schemas and CPU kernels.

    Raises
    ------
    ImportError
        If the library is missing, that is, if the package was copied instead of installed, or does not load.
    """
    if not _load(_CPU_LIBRARY):
        raise ImportError(
            f"pydefect is not built: {_CPU_LIBRARY} is missing from the installed package. "
            "Install it from its source folder: `pip install .` or `pip install --no-build-isolation -e .`"
        )
    _with_kernels.add("cpu")


@functools.cache
def load_cuda_library() -> bool:
    """Load the operators' CUDA kernels where there is a CUDA device; tell whether they are there.

    Where they do not load, a warning says why, and the CPU's do their work.
    """
    try:
        loaded = torch.cuda.is_available() and _load(_CUDA_LIBRARY)
        if loaded:
            with resources.as_file(resources.files("pydefect") / _CUDA_LIBRARY) as path:
                _check_driver(ctypes.CDLL(os.fspath(path)))
    except ImportError as error:
        load_errors["cuda"] = str(error)
        warnings.warn(f"no CUDA kernels, the CPU works: {error}", stacklevel=2)
        return False
    if loaded:
        _with_kernels.add("cuda")
    return loaded


def _check_driver(library: ctypes.CDLL) -> None:
    """Raise an ImportError where the driver is older than the CUDA that the kernels were compiled with.

    They load all the same, and each of their operators would end in an error.
    """
    compiled, known = ctypes.c_int(), ctypes.c_int()
    library.pydefect_cuda_versions(ctypes.byref(compiled), ctypes.byref(known))
    # A driver serves all minor versions of its CUDA. 0: there is none to ask, and the operators will tell.
    if 0 < known.value // 1000 < compiled.value // 1000:
        raise ImportError(
            f"{_CUDA_LIBRARY} was compiled with CUDA {_version(compiled)}, and the driver knows CUDA "
            f"{_version(known)}: update the driver, or install pydefect from source with its nvcc"
        )


def _version(number: ctypes.c_int) -> str:
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def has_kernels(device: torch.device) -> bool:
    """Tell whether this build has native kernels for tensors on `device`, and may use them.

    What is being exported shall run where there are none of ours.
    """
    return device.type in _with_kernels and not torch.compiler.is_exporting()


def require_kernels(device: torch.device) -> None:
    """Raise a RuntimeError that says what to do where this build has no kernels for `device`."""
    if device.type == "cuda" and not has_kernels(device):
        if "cuda" in load_errors:
            raise RuntimeError(f"no CUDA kernels for tensors on {device}: {load_errors['cuda']}")
        raise RuntimeError(
            f"this build of pydefect has no CUDA kernels for tensors on {device}: move them to the CPU, "
            "or install pydefect from source where nvcc is found"
        )
