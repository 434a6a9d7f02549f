// pydefect._native: what takes NumPy arrays or plain values and is no tensor operator. Here: how this build
// was made, for `pydefect info`, and what this machine can do at most, for the benchmarks; the metrics bind
// themselves.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "../cpu/dispatch.h"
#include "machine_limits.h"
#include "metrics_bindings.h"

namespace py = pybind11;

namespace {

std::vector<std::string> names(const std::vector<pydefect::cpu::Level>& levels) {
  std::vector<std::string> result;
  for (const auto level : levels) result.emplace_back(pydefect::cpu::name(level));
  return result;
}

std::vector<std::string> split_list(const std::string& list) {
  std::vector<std::string> items;
  for (size_t from = 0; from < list.size();) {
    const size_t to = std::min(list.find(',', from), list.size());
    items.push_back(list.substr(from, to - from));
    from = to + 1;
  }
  return items;
}

std::string pybind11_version() {
  return std::to_string(PYBIND11_VERSION_MAJOR) + '.' + std::to_string(PYBIND11_VERSION_MINOR) + '.' +
         std::to_string(PYBIND11_VERSION_MICRO);
}

py::dict build_info() {
  py::dict info;
  info["version"] = PYDEFECT_VERSION;
  info["compiler"] = PYDEFECT_COMPILER;
  info["torch_built_against"] = PYDEFECT_TORCH_VERSION;
  info["torch_oldest"] = PYDEFECT_TORCH_TARGET;
  info["pybind11"] = pybind11_version();
  info["cpu_levels_compiled"] = names(pydefect::cpu::compiled_levels());
  info["cpu_levels_usable"] = names(pydefect::cpu::usable_levels());
  info["cpu_level_active"] = pydefect::cpu::name(pydefect::cpu::active_level());
  info["nvcc"] = PYDEFECT_NVCC_VERSION;
  info["cuda_architectures"] = split_list(PYDEFECT_CUDA_ARCHITECTURES);
  return info;
}

py::dict machine_limits(int threads) {
  if (threads < 1)
    throw py::value_error("machine_limits: threads must be at least 1, got " + std::to_string(threads));
  pydefect::MachineLimits limits;
  {
    const py::gil_scoped_release release;
    limits = pydefect::measure_machine_limits(threads);
  }
  py::dict result;
  result["float32_gflops"] = limits.float32_gflops;
  result["bf16_gflops"] = limits.bf16_gflops;
  result["copy_gbs"] = limits.copy_gbs;
  return result;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native parts of pydefect that are no tensor operators.";
  module.def("build_info", &build_info, "How this build was made and which instruction sets it uses here.");
  module.def(
      "machine_limits", &machine_limits, py::arg("threads"),
      "What so many threads reach together here: float32 and bf16 multiply-adds, in 10^9 operations a second "
      "(0 where there is no bf16), and copying memory, in 10^9 bytes read and written a second.");
  pydefect::bind_metrics(module);
}
