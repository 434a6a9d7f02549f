#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

#ifdef PYDEFECT_AMX_KERNELS
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pydefect::cpu {
namespace {

#ifdef PYDEFECT_AMX_KERNELS

// Linux saves the tiles of those processes only that have asked it to: ARCH_REQ_XCOMP_PERM for XTILEDATA.
bool tiles_are_permitted() {
  static const bool permitted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return permitted;
}

#endif

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
#ifdef PYDEFECT_AMX_KERNELS
    case Level::amx:
      return runs_here(Level::avx512bf16) && __builtin_cpu_supports("amx-tile") &&
             __builtin_cpu_supports("amx-bf16") && tiles_are_permitted();
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
    case Level::amx:
      return "amx";
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
  static const std::vector<Level> levels{
      Level::portable,
#ifdef PYDEFECT_X86_KERNELS
      Level::avx2,     Level::avx512, Level::avx512bf16,
#endif
#ifdef PYDEFECT_AMX_KERNELS
      Level::amx,
#endif
  };
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
