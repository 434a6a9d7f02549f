"""How the installed native code was built, and what it uses on this machine."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version

import cv2
import torch

from pydefect import _native
from pydefect.ops._library import load_cuda_library, load_errors
from pydefect.version import VERSION

__all__ = ["BuildInfo", "build_info", "versions"]


@dataclass(frozen=True)
class BuildInfo:
    """Facts about one installation of pydefect; see :func:`build_info`.

    Attributes
    ----------
    version : str
        Version of the package.
    compiler : str
        C++ compiler and its version.
    torch_built_against, torch_running, torch_oldest : str
        PyTorch's version at build time, now, and the oldest one that the native libraries run on.
    pybind11 : str
        Version of pybind11.
    cpu_levels_compiled, cpu_levels_usable : tuple of str
        Instruction set levels with kernels of their own, and those of them that this CPU has; lowest first.
    cpu_level_active : str
        The level in use: the highest usable one, or what the variable ``PYDEFECT_CPU_LEVEL`` names.
    nvcc : str or None
        Version of the CUDA compiler; None if the build has no CUDA kernels.
    cuda_architectures : tuple of str
        CUDA architectures with kernels, as CMake writes them: "80-real" is machine code, "90" also PTX.
    cuda_kernels_loaded : bool
        Whether there is a CUDA device and the build has kernels for it.
    cuda_load_error : str or None
        Why the kernels did not load; None: they did, or there was no device or none to load.
    """

    version: str
    compiler: str
    torch_built_against: str
    torch_running: str
    torch_oldest: str
    pybind11: str
    cpu_levels_compiled: tuple[str, ...]
    cpu_levels_usable: tuple[str, ...]
    cpu_level_active: str
    nvcc: str | None
    cuda_architectures: tuple[str, ...]
    cuda_kernels_loaded: bool
    cuda_load_error: str | None

    def as_dict(self) -> dict[str, object]:
        """Return the facts as a dictionary, in the order above."""
        return asdict(self)


def build_info() -> BuildInfo:
    """Report how the installed native code was built.

    Returns
    -------
    BuildInfo
        The facts that ``pydefect info`` shows.

    Examples
    --------
    >>> from pydefect.buildinfo import build_info
    >>> build_info().cpu_levels_compiled[0]
    'portable'
    """
    facts = _native.build_info()
    return BuildInfo(
        version=facts["version"],
        compiler=facts["compiler"],
        torch_built_against=facts["torch_built_against"],
        torch_running=torch.__version__,
        torch_oldest=facts["torch_oldest"],
        pybind11=facts["pybind11"],
        cpu_levels_compiled=tuple(facts["cpu_levels_compiled"]),
        cpu_levels_usable=tuple(facts["cpu_levels_usable"]),
        cpu_level_active=facts["cpu_level_active"],
        nvcc=facts["nvcc"] or None,
        cuda_architectures=tuple(facts["cuda_architectures"]),
        cuda_kernels_loaded=load_cuda_library(),
        cuda_load_error=load_errors.get("cuda"),
    )


def versions() -> dict[str, str]:
    """Versions of pydefect, Python, the platform, and the packages that figures depend on."""
    return {
        "pydefect": VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        # OpenCV is installed under several names.
        "opencv": cv2.__version__,
        **{package: version(package) for package in ("numpy", "safetensors", "scipy", "typer")},
    }
