"""The native libraries: what they were built with, and that they load as they should."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pydefect import _native
from pydefect.buildinfo import build_info
from pydefect.cli import app
from pydefect.ops import _library

CUDA_LIBRARY = resources.files("pydefect") / "libpydefect_cuda.so"


def run_python(code, folder, **environment):
    # Not in the source folder, which Python would put in front of the installed package.
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_build_info_is_complete():
    info = build_info()
    assert info.version == metadata.version("pydefect-vision")
    assert info.torch_running == torch.__version__
    assert info.torch_oldest == "2.11"
    assert info.compiler
    assert info.pybind11[0].isdigit()
    assert info.cpu_levels_compiled[0] == "portable"
    assert set(info.cpu_levels_usable) <= set(info.cpu_levels_compiled)
    assert info.cpu_level_active in info.cpu_levels_usable
    assert (info.nvcc is None) == (info.cuda_architectures == ())
    assert next(iter(info.as_dict())) == "version"


def test_the_module_shares_no_types_with_others():
    # pybind11's registry is shared by all modules that name it alike, PyTorch's and SciPy's among them.
    names = re.findall(rb"__pybind11_internals_\w+", Path(_native.__file__).read_bytes())
    assert names
    assert all(b"_pydefect_" in name for name in names)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these levels are x86-64's")
def test_x86_levels_are_compiled():
    levels = build_info().cpu_levels_compiled
    # Compilers of before 2021, and systems other than Linux, leave out the last.
    assert ("portable", "avx2", "avx512", "avx512bf16", "amx")[: len(levels)] == levels
    assert len(levels) >= 4


def test_the_source_folder_says_that_it_is_not_compiled(tmp_path):
    shutil.copytree(
        Path(__file__).parents[1] / "pydefect",
        tmp_path / "pydefect",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    # As with a package that was installed: an editable one is found before the folder.
    code = "import sys; sys.meta_path = sys.meta_path[-3:]; import pydefect; pydefect.fit"
    result = run_python(code, tmp_path)
    assert f"ImportError: pydefect has no compiled code in {tmp_path / 'pydefect'}" in result.stderr
    assert "run Python in another one" in result.stderr


def test_the_source_folder_says_that_nothing_is_installed(tmp_path):
    shutil.copytree(
        Path(__file__).parents[1] / "pydefect", tmp_path / "pydefect", ignore=shutil.ignore_patterns("*.so")
    )
    # As in an environment of its own: only the standard library beside the folder.
    code = "import sys; sys.path[:] = ['', *(p for p in sys.path if 'python3' in p and '-packages' not in p)]"
    result = run_python(
        f"{code}; sys.meta_path = sys.meta_path[-3:]; import pydefect", tmp_path, PYTHONPATH=""
    )
    assert "ImportError: pydefect is not installed for this Python: install it" in result.stderr


def test_cuda_library_is_there_where_nvcc_was():
    library = resources.files("pydefect") / "libpydefect_cuda.so"
    assert library.is_file() == (build_info().nvcc is not None)


def test_cuda_library_is_loaded_only_with_a_device():
    assert build_info().cuda_kernels_loaded == (torch.cuda.is_available() and build_info().nvcc is not None)


def test_machine_limits_are_measured():
    limits = _native.machine_limits(2)
    assert limits["float32_gflops"] > 0
    assert limits["copy_gbs"] > 0
    # The machine's, not the level's that is in use.
    assert (limits["bf16_gflops"] > 0) == ("avx512bf16" in build_info().cpu_levels_usable)


def test_machine_limits_need_a_thread():
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        _native.machine_limits(0)


def test_missing_library_says_how_to_build(monkeypatch):
    _library.load_cpu_library.cache_clear()
    monkeypatch.setattr(_library, "_CPU_LIBRARY", "libmissing.so")
    with pytest.raises(ImportError, match=r"libmissing\.so is missing.*pip install"):
        _library.load_cpu_library()
    _library.load_cpu_library.cache_clear()


def test_a_library_that_does_not_load_says_why(monkeypatch, tmp_path):
    (tmp_path / "libbroken.so").write_bytes(b"no library")
    monkeypatch.setattr(_library.resources, "files", lambda _: tmp_path)
    with pytest.raises(
        ImportError, match=r"libbroken\.so does not load: .*too short.*needs 2\.11 or later; this is"
    ):
        _library._load("libbroken.so")


def test_a_cuda_library_that_does_not_load_leaves_the_cpu(monkeypatch, tmp_path):
    (tmp_path / "libpydefect_cuda.so").write_bytes(b"no library")
    monkeypatch.setattr(_library.resources, "files", lambda _: tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_library, "_with_kernels", {"cpu"})
    _library.load_cuda_library.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"the CPU works: .*_cuda\.so does not load: .*too short"):
            assert not _library.load_cuda_library()
        facts = build_info()
        with pytest.raises(RuntimeError, match=r"tensors on cuda:0: libpydefect_cuda\.so does not load"):
            _library.require_kernels(torch.device("cuda", 0))
        assert not facts.cuda_kernels_loaded
        assert "too short" in facts.cuda_load_error
        shown = CliRunner().invoke(app, ["info"])
        assert shown.exit_code == 0
        assert "instruction sets" in shown.stdout
        assert "too short" in shown.stdout
    finally:
        _library.load_errors.clear()
        _library.load_cuda_library.cache_clear()


def driver_library(compiled: int, known: int) -> ctypes.CDLL:
    """A library that answers as pydefect's CUDA one does."""

    class Library:
        @staticmethod
        def pydefect_cuda_versions(first, second):
            first._obj.value, second._obj.value = compiled, known

    return Library()


@pytest.mark.parametrize("known", [12080, 12090])
def test_a_driver_that_is_older_than_the_kernels(known):
    message = rf"compiled with CUDA 13\.0, and the driver knows CUDA 12\.{known % 1000 // 10}: update"
    with pytest.raises(ImportError, match=message):
        _library._check_driver(driver_library(13000, known))


@pytest.mark.parametrize("known", [0, 13000, 13020, 14000])
def test_drivers_that_serve(known):
    _library._check_driver(driver_library(13010, known))


@pytest.mark.skipif(not CUDA_LIBRARY.is_file(), reason="built without nvcc")
def test_the_cuda_library_tells_its_version():
    compiled, known = ctypes.c_int(-1), ctypes.c_int(-1)
    ctypes.CDLL(str(CUDA_LIBRARY)).pydefect_cuda_versions(ctypes.byref(compiled), ctypes.byref(known))
    assert _library._version(compiled) == ".".join(build_info().nvcc.split(".")[:2])
    assert known.value >= 0


def test_missing_cuda_kernels_say_what_to_do(monkeypatch):
    monkeypatch.setattr(_library, "load_cuda_library", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA kernels for tensors on cuda:0"):
        _library.require_kernels(torch.device("cuda", 0))
    _library.require_kernels(torch.device("cpu"))


def test_level_can_be_chosen(tmp_path):
    done = run_python(
        "from pydefect.buildinfo import build_info; print(build_info().cpu_level_active)",
        tmp_path,
        PYDEFECT_CPU_LEVEL="portable",
    )
    assert done.stdout.strip() == "portable", done.stderr


def test_unknown_level_is_an_error_that_lists_the_known(tmp_path):
    done = run_python(
        "from pydefect.buildinfo import build_info; build_info()", tmp_path, PYDEFECT_CPU_LEVEL="avx1024"
    )
    assert done.returncode != 0
    assert "PYDEFECT_CPU_LEVEL is 'avx1024'; this build on this CPU allows: portable" in done.stderr
