// Which of the compiled instruction set levels this machine runs. No PyTorch here: the pybind11 module
// reports the same facts.
#pragma once

#include <string>
#include <vector>

namespace pydefect::cpu {

enum class Level { portable, avx2, avx512 };

const char* name(Level level);

// The levels this build holds kernels for, lowest first.
const std::vector<Level>& compiled_levels();

// Those of the compiled levels that this processor (and operating system) can run.
std::vector<Level> usable_levels();

// The highest usable level, or the one that the environment variable PYDEFECT_CPU_LEVEL names; throws
// std::runtime_error for a level that is unknown or not usable here. Read once, at the first call.
Level active_level();

}  // namespace pydefect::cpu
