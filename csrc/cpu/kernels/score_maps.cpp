#include "score_maps.h"

#include <cstdint>
#include <cstring>

#include "simd.h"
#include "weighted_rows.h"

namespace pydefect::cpu::PYDEFECT_LEVEL {
namespace {

// Distance number k of as many patches as there are lanes; the last patch stands in for missing ones.
template <class V>
typename V::type load_distances(const float* distances, int64_t patches, int64_t neighbours, int64_t k) {
  float values[V::lanes];
  for (int i = 0; i < V::lanes; ++i) {
    values[i] = distances[(i < patches ? i : patches - 1) * neighbours + k];
  }
  return V::load(values);
}

template <class V>
void patch_scores(const float* distances, int64_t patches, int64_t neighbours, bool certainty,
                  float* scores) {
  for (; patches > 0; patches -= V::lanes, distances += V::lanes * neighbours, scores += V::lanes) {
    typename V::type nearest = load_distances<V>(distances, patches, neighbours, 0);
    for (int64_t k = 1; k < neighbours; ++k) {
      const typename V::type distance = load_distances<V>(distances, patches, neighbours, k);
      // NaN wins, as in torch.amin.
      nearest = (distance < nearest) | (distance != distance) ? distance : nearest;
    }
    if (certainty) {
      // exp(-S) / sum exp(-D_k), divided through by exp(-S): no underflow however large the distances are.
      typename V::type sum = V::zero();
      for (int64_t k = 0; k < neighbours; ++k) {
        const typename V::type exponent = nearest - load_distances<V>(distances, patches, neighbours, k);
        sum += exponent == exponent ? V::exponential(exponent) : exponent;
      }
      nearest /= sum;
    }
    if (patches >= V::lanes) {
      V::store(scores, nearest);
    } else {
      float values[V::lanes];
      V::store(values, nearest);
      std::memcpy(scores, values, static_cast<size_t>(patches) * sizeof(float));
    }
  }
}

template <class V>
void spread_row(const float* patches, const PixelBlock* blocks, int64_t count, float* pixels) {
  constexpr int vectors = ScoreMapsKernel::block / V::lanes;
  for (int64_t b = 0; b < count; ++b, pixels += ScoreMapsKernel::block) {
    typename V::type sums[vectors] = {};
    const float* const from = patches + blocks[b].first;
    const float* weights = blocks[b].weights;
    for (int64_t i = 0; i < blocks[b].count; ++i, weights += ScoreMapsKernel::block) {
      const typename V::type patch = V::broadcast(from[i]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        sums[v] = V::multiply_add(patch, V::load(weights + v * V::lanes), sums[v]);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) V::store(pixels + v * V::lanes, sums[v]);
  }
}

}  // namespace

const ScoreMapsKernel score_maps_kernel{patch_scores<Simd>, spread_row<Simd>, weighted_rows<Simd>};

}  // namespace pydefect::cpu::PYDEFECT_LEVEL
