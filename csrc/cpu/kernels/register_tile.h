// Products of a register tile: a few rows times a panel of columns. As in simd.h, everything sits in an
// unnamed namespace.
#pragma once

#include <cstdint>

#include "simd.h"

namespace pydefect::cpu::PYDEFECT_LEVEL {
namespace {

// sums[r][c] += sum over k of rows_of[k / depth][r][k % depth] * panel[k * stride + c], k from 0 on, for the
// columns of `vectors` vectors. Rows lie in blocks, so that one pointer leads to all of them.
template <class V, int rows, int vectors, int depth>
void add_products(const float* rows_of,  // [blocks][rows][depth]
                  const float* panel,    // [blocks * depth][stride]
                  int64_t stride, int64_t blocks, typename V::type (&sums)[rows][vectors]) {
  for (int64_t block = 0; block < blocks; ++block) {
    for (int k = 0; k < depth; ++k) {
      typename V::type weights[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) weights[v] = V::load(panel + v * V::lanes);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const typename V::type value = V::broadcast(rows_of[r * depth + k]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sums[r][v] = V::multiply_add(value, weights[v], sums[r][v]);
      }
      panel += stride;
    }
    rows_of += rows * depth;
  }
}

}  // namespace
}  // namespace pydefect::cpu::PYDEFECT_LEVEL
