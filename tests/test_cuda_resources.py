"""CI's table of what the CUDA kernels take: kernels are named after their file, whatever nvcc calls it."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "check_cuda_resources.py"


@pytest.mark.skipif(not SCRIPT.exists(), reason="a source distribution, which leaves CI's scripts out")
@pytest.mark.skipif(shutil.which("c++filt") is None, reason="names are read with c++filt")
@pytest.mark.parametrize("digest", ["fc81c366", "51536670"])
def test_a_kernel_is_named_after_its_file(digest):
    spec = importlib.util.spec_from_file_location("check_cuda_resources", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    file = f"{digest}_16_assign_unique_cu_9288a821_16778"
    space = f"_GLOBAL__N__{file}"
    symbol = f"_ZN8pydefect4cuda{len(space)}{space}4walkEPKfS3_PKllliiPiPl"
    assert module.kernel_name(symbol) == "assign_unique.cu: walk"
