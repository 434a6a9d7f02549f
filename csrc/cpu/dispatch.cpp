#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace pydefect::cpu {
namespace {

bool runs_here(Level level) {
  switch (level) {
    case Level::portable:
      return true;
#ifdef PYDEFECT_X86_KERNELS
    case Level::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Level::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
    case Level::avx512bf16:
      return runs_here(Level::avx512) && __builtin_cpu_supports("avx512bf16");
#endif
    default:
      return false;
  }
}

Level choose_level() {
  const std::vector<Level> usable = usable_levels();
  const char* wanted = std::getenv("PYDEFECT_CPU_LEVEL");
  if (wanted == nullptr || *wanted == '\0') return usable.back();
  std::string allowed;
  for (const Level level : usable) {
    if (wanted == std::string(name(level))) return level;
    allowed += std::string(allowed.empty() ? "" : ", ") + name(level);
  }
  throw std::runtime_error("PYDEFECT_CPU_LEVEL is '" + std::string(wanted) +
                           "'; this build on this CPU allows: " + allowed);
}

}  // namespace

const char* name(Level level) {
  switch (level) {
    case Level::avx512bf16:
      return "avx512bf16";
    case Level::avx512:
      return "avx512";
    case Level::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

const std::vector<Level>& compiled_levels() {
#ifdef PYDEFECT_X86_KERNELS
  static const std::vector<Level> levels{Level::portable, Level::avx2, Level::avx512, Level::avx512bf16};
#else
  static const std::vector<Level> levels{Level::portable};
#endif
  return levels;
}

std::vector<Level> usable_levels() {
  std::vector<Level> levels;
  for (const Level level : compiled_levels()) {
    if (runs_here(level)) levels.push_back(level);
  }
  return levels;
}

Level active_level() {
  static const Level level = choose_level();
  return level;
}

}  // namespace pydefect::cpu
