#include "knn.h"

#include <cstdint>

#include "simd.h"

namespace pydefect::cpu::PYDEFECT_LEVEL {
namespace {

template <class V, int rows, int vectors>
bool score_tile(const float* queries, const float* panel, int64_t width, const float* thresholds,
                float* scores, uint32_t* hits) {
  constexpr int columns = vectors * V::lanes;
  typename V::type sums[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sums[r][v] = V::load(panel + v * V::lanes);
  }
  for (int64_t d = 0; d < width; ++d) {
    panel += columns;
    typename V::type bank[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) bank[v] = V::load(panel + v * V::lanes);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const typename V::type query = V::broadcast(queries[r]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[r][v] = V::multiply_add(query, bank[v], sums[r][v]);
    }
    queries += rows;
  }
  uint32_t any = 0;
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    const typename V::type threshold = V::broadcast(thresholds[r]);
    hits[r] = 0;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) hits[r] |= V::greater(sums[r][v], threshold) << (v * V::lanes);
    any |= hits[r];
  }
  if (any == 0) return false;
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) V::store(scores + r * columns + v * V::lanes, sums[r][v]);
  }
  return true;
}

template <class V>
float squared_distance(const float* a, const float* b, int64_t width) {
  constexpr int parts = 16 / V::lanes;
  typename V::type sums[parts] = {};
  int64_t d = 0;
  for (; d + 16 <= width; d += 16) {
#pragma GCC unroll 4
    for (int p = 0; p < parts; ++p) {
      const typename V::type difference = V::load(a + d + p * V::lanes) - V::load(b + d + p * V::lanes);
      sums[p] += difference * difference;
    }
  }
  float lanes[16];
  for (int p = 0; p < parts; ++p) V::store(lanes + p * V::lanes, sums[p]);
  for (int i = 0; d + i < width; ++i) {
    const float difference = a[d + i] - b[d + i];
    lanes[i] += difference * difference;
  }
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

}  // namespace

#if defined(__AVX512F__)
// 28 of the 32 registers hold sums, the others two bank vectors and a query element.
const KnnKernel knn_kernel{14, 32, score_tile<Simd, 14, 2>, squared_distance<Simd>};
#elif defined(__AVX2__)
// 12 of the 16 registers hold sums, the others two bank vectors and a query element.
const KnnKernel knn_kernel{6, 16, score_tile<Simd, 6, 2>, squared_distance<Simd>};
#else
const KnnKernel knn_kernel{4, 8, score_tile<Simd, 4, 2>, squared_distance<Simd>};
#endif

}  // namespace pydefect::cpu::PYDEFECT_LEVEL
