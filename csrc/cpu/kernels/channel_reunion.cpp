#include "channel_reunion.h"

#include <cstdint>

#include "channels.h"
#include "simd.h"

namespace pydefect::cpu::PYDEFECT_LEVEL {
namespace {

// Positions whose map values stay in L1 between the dot products and their use.
constexpr int kGroup = 4;

// dots[i] = sum_c vector[c] * map[i][c]
template <int group>
void dot(const float* map, const float* vector, int64_t channels, float* dots) {
  Simd::type sums[group] = {};
  over_channels(channels, [&](int64_t c, auto part) {
    const Simd::type values = part.load(vector + c);
#pragma GCC unroll 4
    for (int i = 0; i < group; ++i) {
      sums[i] = Simd::multiply_add(values, part.load(map + i * channels + c), sums[i]);
    }
  });
  for (int i = 0; i < group; ++i) dots[i] = Simd::sum(sums[i]);
}

void pool(const float* map, const float* direction, float bias, int64_t positions, int64_t channels,
          float* weights, float* pooled) {
  over_positions<kGroup>(positions, [&]<int group>(int64_t p) {
    const float* rows = map + p * channels;
    dot<group>(rows, direction, channels, weights + p);
    for (int i = 0; i < group; ++i) weights[p + i] += bias;
    over_channels(channels, [&](int64_t c, auto part) {
      Simd::type sum = part.load(pooled + c);
#pragma GCC unroll 4
      for (int i = 0; i < group; ++i) {
        sum = Simd::multiply_add(Simd::broadcast(weights[p + i]), part.load(rows + i * channels + c), sum);
      }
      part.store(pooled + c, sum);
    });
  });
}

void scale(const float* map, const float* factors, int64_t positions, int64_t channels, float* out) {
  for (int64_t p = 0; p < positions; ++p) {
    over_channels(channels, [&](int64_t c, auto part) {
      const int64_t at = p * channels + c;
      part.store(out + at, part.load(map + at) * part.load(factors + c));
    });
  }
}

void backward(const float* d_out, const float* map, const float* scale, const float* direction,
              const float* d_pooled, const float* weights, int64_t positions, int64_t channels, float* d_map,
              float* d_direction, float* d_bias) {
  over_positions<kGroup>(positions, [&]<int group>(int64_t p) {
    const int64_t first = p * channels;
    float d_weights[group];
    dot<group>(map + first, d_pooled, channels, d_weights);
    for (int i = 0; i < group; ++i) *d_bias += d_weights[i];
    over_channels(channels, [&](int64_t c, auto part) {
      const Simd::type factor = part.load(scale + c);
      const Simd::type towards = part.load(direction + c);
      const Simd::type pooled = part.load(d_pooled + c);
      Simd::type sum = part.load(d_direction + c);
#pragma GCC unroll 4
      for (int i = 0; i < group; ++i) {
        const int64_t at = first + i * channels + c;
        const Simd::type d_weight = Simd::broadcast(d_weights[i]);
        Simd::type value = part.load(d_out + at) * factor;
        value = Simd::multiply_add(Simd::broadcast(weights[p + i]), pooled, value);
        part.store(d_map + at, Simd::multiply_add(d_weight, towards, value));
        sum = Simd::multiply_add(d_weight, part.load(map + at), sum);
      }
      part.store(d_direction + c, sum);
    });
  });
}

}  // namespace

const ChannelReunionKernel channel_reunion_kernel{pool, scale, add_products, backward};

}  // namespace pydefect::cpu::PYDEFECT_LEVEL
