// What one instruction set level offers to the ReLU with average pooling: rows of maps [width, channels], of
// float32 or, as uint16_t, of bfloat16 numbers.
#pragma once

#include <cstdint>

#include "levels.h"

namespace pydefect::cpu {

template <class T>
struct ReluAvgPoolRows {
  // out[x][c] = the mean of relu over the cells 2 x - padding and the next of both rows. What lies beside the
  // rows is zero. The cells are added from left to right, the upper row first.
  void (*pool)(const T* upper,  // [width, channels], as the next
               const T* lower,  //
               const T* zeros,  // [channels]
               int64_t width, int64_t channels, int64_t padding, int64_t out_width,
               T* out);  // [out_width, channels]

  // d_map[x][c] = d_out[(x + padding) / 2][c] / 4 where map[x][c] is not 0 or less, and 0 elsewhere and where
  // there is no such d_out.
  void (*spread)(const T* d_out,  // [out_width, channels]
                 const T* map,    // [width, channels]
                 const T* zeros,  // [channels]
                 int64_t width, int64_t channels, int64_t padding, int64_t out_width,
                 T* d_map);  // [width, channels]
};

struct ReluAvgPoolKernel {
  ReluAvgPoolRows<float> float32;
  ReluAvgPoolRows<uint16_t> bfloat16;
};

PYDEFECT_KERNEL(ReluAvgPoolKernel, relu_avg_pool_kernel)

}  // namespace pydefect::cpu
