"""Find defects on industrial products after training on defect-free images only.

>>> import pydefect
>>> detector = pydefect.fit("bottle/train/good", seed=0)  # doctest: +SKIP
>>> result = pydefect.score(detector, "bottle/test")  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pydefect import version as _version

if TYPE_CHECKING:
    from pydefect.api import calibrate, evaluate, evaluate_maps, export_onnx, fit, load, score
    from pydefect.calibration import Calibration
    from pydefect.detector import Detector
    from pydefect.errors import InputError, ModelFileError, PydefectError, WeightsNotFoundError
    from pydefect.evaluation import Evaluation
    from pydefect.scoring import Region, Result

__version__ = _version.VERSION

# Loaded on first use: `pydefect --help` must not wait for torch.
_ROOMS = {
    "Calibration": "pydefect.calibration",
    "Detector": "pydefect.detector",
    "Evaluation": "pydefect.evaluation",
    "InputError": "pydefect.errors",
    "ModelFileError": "pydefect.errors",
    "PydefectError": "pydefect.errors",
    "Region": "pydefect.scoring",
    "Result": "pydefect.scoring",
    "WeightsNotFoundError": "pydefect.errors",
    "calibrate": "pydefect.api",
    "evaluate": "pydefect.api",
    "evaluate_maps": "pydefect.api",
    "export_onnx": "pydefect.api",
    "fit": "pydefect.api",
    "load": "pydefect.api",
    "score": "pydefect.api",
}

__all__ = [
    "Calibration",
    "Detector",
    "Evaluation",
    "InputError",
    "ModelFileError",
    "PydefectError",
    "Region",
    "Result",
    "WeightsNotFoundError",
    "__version__",
    "calibrate",
    "evaluate",
    "evaluate_maps",
    "export_onnx",
    "fit",
    "load",
    "score",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(importlib.import_module(_ROOMS[name]), name)
    if name == "_native":
        # `from pydefect import _native` asks here first.
        try:
            return importlib.import_module("pydefect._native")
        except ModuleNotFoundError as error:
            raise ImportError(
                f"pydefect has no compiled code in {__path__[0]}. If that is the source folder, where Python "
                "looks first: run Python in another one. If not: install pydefect from its source folder, "
                "`pip install .`"
            ) from error
    raise AttributeError(f"module 'pydefect' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
