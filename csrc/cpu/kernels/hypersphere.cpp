#include "hypersphere.h"

#include <cstdint>

#include "simd.h"

namespace pydefect::cpu::PYDEFECT_LEVEL {
namespace {

// The pull on the elements d.. of a row, `vectors` vectors of them.
template <class V, int vectors>
void pull_on(const float* row, const float* bank, int64_t width, const int64_t* centres, const float* weights,
             int64_t count, int64_t d, typename V::type (&sums)[vectors]) {
  typename V::type values[vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    values[v] = V::load_some(row + d + v * V::lanes, width - d - v * V::lanes);
    sums[v] = V::zero();
  }
  for (int64_t j = 0; j < count; ++j) {
    const float* centre = bank + centres[j] * width + d;
    const typename V::type weight = V::broadcast(weights[j]);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      sums[v] += weight * (values[v] - V::load_some(centre + v * V::lanes, width - d - v * V::lanes));
    }
  }
}

template <class V>
void pull(const float* row, const float* bank, int64_t width, const int64_t* centres, const float* weights,
          int64_t count, float* gradient) {
  constexpr int vectors = 4;
  int64_t d = 0;
  for (; d + vectors * V::lanes <= width; d += vectors * V::lanes) {
    typename V::type sums[vectors];
    pull_on<V, vectors>(row, bank, width, centres, weights, count, d, sums);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) V::store(gradient + d + v * V::lanes, sums[v]);
  }
  for (; d < width; d += V::lanes) {
    typename V::type sums[1];
    pull_on<V, 1>(row, bank, width, centres, weights, count, d, sums);
    float last[V::lanes];
    V::store(last, sums[0]);
    for (int64_t i = 0; i < V::lanes && d + i < width; ++i) gradient[d + i] = last[i];
  }
}

}  // namespace

const HypersphereKernel hypersphere_kernel{pull<Simd>};

}  // namespace pydefect::cpu::PYDEFECT_LEVEL
