// The arithmetic that one instruction set level can do at most: what benchmarks measure operators against.
#pragma once

#include <cstdint>

#include "levels.h"

namespace pydefect::cpu {

struct MachineLimitsKernel {
  // Multiplies and adds in registers only, for about `rounds` * `operations` operations; the result is there
  // to be stored somewhere, so that the work cannot be left out.
  float (*float32)(int64_t rounds);
  int64_t float32_operations;  // in one round

  // The same with bf16 products that are added up in float32; null where the level has no such instruction.
  float (*bf16)(int64_t rounds);
  int64_t bf16_operations;

  // The same with matrix instructions, for processors that have them.
  float (*amx)(int64_t rounds);
  int64_t amx_operations;
};

PYDEFECT_KERNEL(MachineLimitsKernel, machine_limits_kernel)

}  // namespace pydefect::cpu
