// What one instruction set level offers to the selective fusion module. Maps are [positions, channels].
#pragma once

#include <cstdint>

#include "levels.h"

namespace pydefect::cpu {

struct SelectiveFusionKernel {
  // sums[c] += sum_p a[p][c] + b[p][c]
  void (*add_sums)(const float* a, const float* b, int64_t positions, int64_t channels, float* sums);

  // sums[c] += sum_p a[p][c] * b[p][c]
  void (*add_products)(const float* a, const float* b, int64_t positions, int64_t channels, float* sums);

  // out[p][c] = map[p][c] * scale[c] + shift[c]
  void (*scale_shift)(const float* map, const float* scale, const float* shift, int64_t positions,
                      int64_t channels, float* out);

  // The same for an `out` that no cache will hold: written past the caches where its place in memory allows
  // it, which spares the reading of every line that is about to be overwritten.
  void (*scale_shift_streamed)(const float* map, const float* scale, const float* shift, int64_t positions,
                               int64_t channels, float* out);
};

PYDEFECT_KERNEL(SelectiveFusionKernel, selective_fusion_kernel)

}  // namespace pydefect::cpu
