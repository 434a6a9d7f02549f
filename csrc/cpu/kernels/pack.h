// Rows as the panels that register tiles read: element d of `columns` rows side by side.
#pragma once

#include <cstdint>

#include "simd.h"

namespace pydefect::cpu::PYDEFECT_LEVEL {
namespace {

// to[d * columns + r] = element d of row r, for d < width; rows from `rows` on are zero. `load(r, d, count)`
// gives the elements d.. of row r as a vector, of which `count` count: rows are transposed on the way from
// there, so whatever should happen to an element (a shift, a rounding) is done at full width. A panel
// narrower than a vector is written with overlapping stores: `to` needs room for V::lanes - columns values
// more.
template <class V, int columns, class Load>
void pack_panel(const Load& load, int64_t rows, int64_t width, float* to) {
  static_assert(columns % V::lanes == 0 || columns < V::lanes,
                "a partial vector would overwrite its neighbour");
  for (int first = 0; first < columns; first += V::lanes) {
    for (int64_t d = 0; d < width; d += V::lanes) {
      const int64_t count = width - d < V::lanes ? width - d : V::lanes;
      typename V::type block[V::lanes];
#pragma GCC unroll 16
      for (int r = 0; r < V::lanes; ++r) {
        block[r] = first + r < columns && first + r < rows ? load(first + r, d, count) : V::zero();
      }
      V::transpose(block);
      if (count == V::lanes) {
#pragma GCC unroll 16
        for (int i = 0; i < V::lanes; ++i) V::store(to + (d + i) * columns + first, block[i]);
      } else {
        for (int64_t i = 0; i < count; ++i) V::store(to + (d + i) * columns + first, block[i]);
      }
    }
  }
}

// Rows `stride` elements apart in memory, as they are.
template <class V, int columns>
void pack_panel(const float* from, int64_t stride, int64_t rows, int64_t width, float* to) {
  pack_panel<V, columns>(
      [=](int64_t r, int64_t d, int64_t count) { return V::load_some(from + r * stride + d, count); }, rows,
      width, to);
}

}  // namespace
}  // namespace pydefect::cpu::PYDEFECT_LEVEL
