from typing import TypedDict

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
