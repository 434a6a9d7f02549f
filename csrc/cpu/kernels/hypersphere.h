// What one instruction set level offers to the hypersphere loss.
#pragma once

#include <cstdint>

#include "levels.h"

namespace pydefect::cpu {

struct HypersphereKernel {
  // gradient = sum_j weights[j] (row - bank[centres[j]]), every product and sum rounded apart, in the order
  // of j: the same at every level.
  void (*pull)(const float* row,   // [width]
               const float* bank,  // [.., width]
               int64_t width,
               const int64_t* centres,  // [count]
               const float* weights,    // [count]
               int64_t count,
               float* gradient);  // [width]
};

PYDEFECT_KERNEL(HypersphereKernel, hypersphere_kernel)

}  // namespace pydefect::cpu
