// A weighted sum of rows: one line of a banded matrix times a row-major matrix. As in simd.h, everything sits
// in an unnamed namespace.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace pydefect::cpu::PYDEFECT_LEVEL {
namespace {

template <class V, int vectors>
void weighted_columns(const float* from, int64_t stride, const float* weights, int64_t count, float* to) {
  typename V::type sums[vectors] = {};
  for (int64_t i = 0; i < count; ++i, from += stride) {
    const typename V::type weight = V::broadcast(weights[i]);
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      sums[v] = V::multiply_add(weight, V::load(from + v * V::lanes), sums[v]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) V::store(to + v * V::lanes, sums[v]);
}

// to[c] = sum over i < count of weights[i] * from[i * stride + c], for c < width; `to` lies apart from
// `from`.
template <class V>
void weighted_rows(const float* from, int64_t stride, const float* weights, int64_t count, int64_t width,
                   float* to) {
  int64_t c = 0;
  for (; c + 8 * V::lanes <= width; c += 8 * V::lanes) {
    weighted_columns<V, 8>(from + c, stride, weights, count, to + c);
  }
  for (; c + 2 * V::lanes <= width; c += 2 * V::lanes) {
    weighted_columns<V, 2>(from + c, stride, weights, count, to + c);
  }
  for (; c + V::lanes <= width; c += V::lanes) {
    weighted_columns<V, 1>(from + c, stride, weights, count, to + c);
  }
  if (c == width) return;
  // The rest is done in vectors too: whether a column belongs to the rest must not show in its rounding.
  if (width >= V::lanes) {
    weighted_columns<V, 1>(from + width - V::lanes, stride, weights, count, to + width - V::lanes);
    return;
  }
  typename V::type sum = V::zero();
  float values[V::lanes] = {};
  const size_t bytes = static_cast<size_t>(width) * sizeof(float);
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(values, from + i * stride, bytes);
    sum = V::multiply_add(V::broadcast(weights[i]), V::load(values), sum);
  }
  V::store(values, sum);
  std::memcpy(to, values, bytes);
}

}  // namespace
}  // namespace pydefect::cpu::PYDEFECT_LEVEL
