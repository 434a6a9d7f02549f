// Which of the compiled instruction set levels this machine runs. No PyTorch here: the pybind11 module
// reports the same facts.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

namespace pydefect::cpu {

// amx: the loops of avx512bf16, but for those that a kernel's table has for matrix instructions.
enum class Level { portable, avx2, avx512, avx512bf16, amx };

const char* name(Level level);

// The levels this build holds kernels for, lowest first.
const std::vector<Level>& compiled_levels();

// Those of the compiled levels that this processor (and operating system) can run.
std::vector<Level> usable_levels();

// The highest usable level, or the one that the environment variable PYDEFECT_CPU_LEVEL names; throws
// std::runtime_error for a level that is unknown or not usable here. Read once, at the first call.
Level active_level();

// The table of inner loops of `level`, out of those of all levels that have one, lowest first.
template <class Kernel, class... Higher>
const Kernel& kernel_at(Level level, const Kernel& portable, const Higher&... higher) {
  const Kernel* const kernels[] = {&portable, &higher...};
  return *kernels[std::min(static_cast<size_t>(level), sizeof...(higher))];
}

#ifdef PYDEFECT_X86_KERNELS
#define PYDEFECT_KERNEL_AT(level, name) \
  ::pydefect::cpu::kernel_at(level, portable::name, avx2::name, avx512::name, avx512bf16::name)
#else
#define PYDEFECT_KERNEL_AT(level, name) ::pydefect::cpu::kernel_at(level, portable::name)
#endif
#define PYDEFECT_ACTIVE_KERNEL(name) PYDEFECT_KERNEL_AT(active_level(), name)

}  // namespace pydefect::cpu
