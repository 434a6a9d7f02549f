from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

class _BuildInfo(TypedDict):
    version: str
    compiler: str
    torch_built_against: str
    torch_oldest: str
    pybind11: str
    cpu_levels_compiled: list[str]
    cpu_levels_usable: list[str]
    cpu_level_active: str
    nvcc: str
    cuda_architectures: list[str]

class _MachineLimits(TypedDict):
    float32_gflops: float
    bf16_gflops: float
    copy_gbs: float

def build_info() -> _BuildInfo: ...
def machine_limits(threads: int) -> _MachineLimits: ...

class _MetricsSummary(TypedDict):
    auroc: float
    average_precision: float
    f1_max: float
    f1_threshold: float
    pro: list[float]
    spro: list[float]

class _OperatingPoints(TypedDict):
    thresholds: NDArray[np.float32]
    true_positives: NDArray[np.int64]
    false_positives: NDArray[np.int64]
    pro: NDArray[np.float64]
    spro: NDArray[np.float64]

_Mask = np.ndarray[Any, np.dtype[np.bool_ | np.uint8 | np.uint16]]

class ScoreSet:
    def __init__(self) -> None: ...
    def add_labelled(self, scores: NDArray[np.float32], labels: NDArray[np.bool_], threads: int) -> None: ...
    def add_images(
        self,
        images: Sequence[tuple[NDArray[np.float32], _Mask | None, Sequence[tuple[_Mask, int]]]],
        threads: int,
    ) -> None: ...
    def merge(self, other: ScoreSet) -> None: ...
    @property
    def normal(self) -> int: ...
    @property
    def defective(self) -> int: ...
    @property
    def components(self) -> int: ...
    @property
    def regions(self) -> int: ...
    def summary(
        self, pro_limits: Sequence[float], spro_limits: Sequence[float], threads: int
    ) -> _MetricsSummary: ...
    def operating_points(self, step: float, threads: int) -> _OperatingPoints: ...
    def count_above(self, threshold: float) -> tuple[int, int]: ...
