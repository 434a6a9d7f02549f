#include "spatial_reunion.h"

#include <cstdint>
#include <cstring>

#include "channels.h"
#include "simd.h"

namespace pydefect::cpu::PYDEFECT_LEVEL {
namespace {

constexpr int kTaps = 9;
// Two positions share the taps' weights in the forward pass: 18 sums stay in registers where there are 32.
constexpr int kForwardGroup = 2;
// In the backward pass, a tap's weights and gradients stay in registers for as many positions.
constexpr int kBackwardGroup = 8;

Simd::type sigmoid(Simd::type x) {
  const Simd::type one = Simd::broadcast(1.0f);
  return one / (one + Simd::exponential(-x));
}

Simd::type blended(Simd::type a, Simd::type b, Simd::type share) {
  return Simd::multiply_add(share, b - a, a);
}

void blend(const float* a, const float* b, float share, int64_t count, float* out) {
  const Simd::type second = Simd::broadcast(share);
  over_channels(count, [&](int64_t i, auto part) {
    part.store(out + i, blended(part.load(a + i), part.load(b + i), second));
  });
}

void add_scaled(const float* from, float factor, int64_t count, float* to) {
  const Simd::type factors = Simd::broadcast(factor);
  over_channels(count, [&](int64_t i, auto part) {
    part.store(to + i, Simd::multiply_add(factors, part.load(from + i), part.load(to + i)));
  });
}

void gate_row(const float* features, const float* local, const float* coarse, const Blend* columns,
              const float* weight, int64_t width, int64_t channels, float* taps) {
  over_positions<kForwardGroup>(width, [&]<int group>(int64_t x) {
    Simd::type sums[group][kTaps] = {};
    over_channels(channels, [&](int64_t c, auto part) {
      Simd::type gated[group];
#pragma GCC unroll 2
      for (int i = 0; i < group; ++i) {
        const Blend& column = columns[x + i];
        const int64_t at = (x + i) * channels + c;
        const Simd::type up =
            blended(part.load(coarse + column.first * channels + c),
                    part.load(coarse + column.second * channels + c), Simd::broadcast(column.share));
        gated[i] = part.load(local + at) * sigmoid(up + part.load(features + at));
      }
#pragma GCC unroll 9
      for (int k = 0; k < kTaps; ++k) {
        const Simd::type factor = part.load(weight + k * channels + c);
#pragma GCC unroll 2
        for (int i = 0; i < group; ++i) sums[i][k] = Simd::multiply_add(factor, gated[i], sums[i][k]);
      }
    });
    for (int i = 0; i < group; ++i) {
#pragma GCC unroll 9
      for (int k = 0; k < kTaps; ++k) taps[k * width + x + i] = Simd::sum(sums[i][k]);
    }
  });
}

void add_weighted(const float* map, const float* weights, int64_t positions, int64_t channels, float* sums) {
  over_positions<4>(positions, [&]<int group>(int64_t p) {
    over_channels(channels, [&](int64_t c, auto part) {
      Simd::type sum = part.load(sums + c);
#pragma GCC unroll 4
      for (int i = 0; i < group; ++i) {
        const Simd::type factor = Simd::broadcast(weights ? weights[p + i] : 1.0f);
        sum = Simd::multiply_add(factor, part.load(map + (p + i) * channels + c), sum);
      }
      part.store(sums + c, sum);
    });
  });
}

void dot(const float* map, const float* vector, int64_t positions, int64_t channels, float* dots) {
  over_positions<4>(positions, [&]<int group>(int64_t p) {
    Simd::type sums[group] = {};
    over_channels(channels, [&](int64_t c, auto part) {
      const Simd::type values = part.load(vector + c);
#pragma GCC unroll 4
      for (int i = 0; i < group; ++i) {
        sums[i] = Simd::multiply_add(values, part.load(map + (p + i) * channels + c), sums[i]);
      }
    });
    for (int i = 0; i < group; ++i) dots[p + i] = Simd::sum(sums[i]);
  });
}

void add(const float* map, const float* vector, int64_t positions, int64_t channels, float* out) {
  for (int64_t p = 0; p < positions; ++p) {
    over_channels(channels, [&](int64_t c, auto part) {
      const int64_t at = p * channels + c;
      part.store(out + at, part.load(map + at) + part.load(vector + c));
    });
  }
}

void gate_row_backward(const float* d_out, const float* features, const float* local, const float* coarse,
                       const Blend* columns, const float* weight, const float* position_weights,
                       const float* d_context, const float* d_taps, int64_t width, int64_t coarse_width,
                       int64_t channels, float* d_features, float* d_local, float* d_coarse,
                       float* d_weight) {
  const Simd::type one = Simd::broadcast(1.0f);
  std::memset(d_coarse, 0, static_cast<size_t>(coarse_width * channels) * sizeof(float));
  for (int64_t first = 0; first < width; first += kBackwardGroup) {
    const int64_t last = first + kBackwardGroup < width ? first + kBackwardGroup : width;
    over_channels(channels, [&](int64_t c, auto part) {
      Simd::type factors[kTaps];
      Simd::type sums[kTaps];
#pragma GCC unroll 9
      for (int k = 0; k < kTaps; ++k) {
        factors[k] = part.load(weight + k * channels + c);
        sums[k] = part.load(d_weight + k * channels + c);
      }
      const Simd::type context = part.load(d_context + c);
      for (int64_t x = first; x < last; ++x) {
        const Blend& column = columns[x];
        const int64_t at = x * channels + c;
        const int64_t left = column.first * channels + c;
        const int64_t right = column.second * channels + c;
        const Simd::type share = Simd::broadcast(column.share);
        const Simd::type up = blended(part.load(coarse + left), part.load(coarse + right), share);
        const Simd::type open = sigmoid(up + part.load(features + at));
        const Simd::type value = part.load(local + at);
        const Simd::type gated = value * open;
        Simd::type d_gated = Simd::zero();
#pragma GCC unroll 9
        for (int k = 0; k < kTaps; ++k) {
          const Simd::type d_tap = Simd::broadcast(d_taps[k * width + x]);
          d_gated = Simd::multiply_add(d_tap, factors[k], d_gated);
          sums[k] = Simd::multiply_add(d_tap, gated, sums[k]);
        }
        part.store(d_local + at, d_gated * open);
        const Simd::type d_sum = d_gated * gated * (one - open);
        part.store(d_features + at, Simd::multiply_add(Simd::broadcast(position_weights[x]), context,
                                                       part.load(d_out + at) + d_sum));
        part.store(d_coarse + left, Simd::multiply_add(one - share, d_sum, part.load(d_coarse + left)));
        part.store(d_coarse + right, Simd::multiply_add(share, d_sum, part.load(d_coarse + right)));
      }
#pragma GCC unroll 9
      for (int k = 0; k < kTaps; ++k) part.store(d_weight + k * channels + c, sums[k]);
    });
  }
}

}  // namespace

const SpatialReunionKernel spatial_reunion_kernel{blend, add_scaled, gate_row,         add_weighted,
                                                  dot,   add,        gate_row_backward};

}  // namespace pydefect::cpu::PYDEFECT_LEVEL
