#include "selective_fusion.h"

#include <cstdint>

#include "channels.h"
#include "simd.h"

namespace pydefect::cpu::PYDEFECT_LEVEL {
namespace {

void add_sums(const float* a, const float* b, int64_t positions, int64_t channels, float* sums) {
  over_positions<4>(positions, [&]<int group>(int64_t p) {
    over_channels(channels, [&](int64_t c, auto part) {
      Simd::type sum = part.load(sums + c);
#pragma GCC unroll 4
      for (int i = 0; i < group; ++i) {
        const int64_t at = (p + i) * channels + c;
        sum += part.load(a + at) + part.load(b + at);
      }
      part.store(sums + c, sum);
    });
  });
}

void scale_shift(const float* map, const float* scale, const float* shift, int64_t positions,
                 int64_t channels, float* out) {
  for (int64_t p = 0; p < positions; ++p) {
    over_channels(channels, [&](int64_t c, auto part) {
      const int64_t at = p * channels + c;
      part.store(out + at,
                 Simd::multiply_add(part.load(map + at), part.load(scale + c), part.load(shift + c)));
    });
  }
}

void scale_shift_streamed(const float* map, const float* scale, const float* shift, int64_t positions,
                          int64_t channels, float* out) {
  // Every row begins at a whole vector where the first does and the channels are whole vectors.
  constexpr size_t kAlignment = sizeof(Simd::type);
  if (reinterpret_cast<uintptr_t>(out) % kAlignment != 0 || channels % Simd::lanes != 0) {
    scale_shift(map, scale, shift, positions, channels, out);
    return;
  }
  for (int64_t p = 0; p < positions; ++p) {
    for (int64_t c = 0; c < channels; c += Simd::lanes) {
      const int64_t at = p * channels + c;
      Simd::stream(out + at,
                   Simd::multiply_add(Simd::load(map + at), Simd::load(scale + c), Simd::load(shift + c)));
    }
  }
  Simd::finish_streams();
}

}  // namespace

const SelectiveFusionKernel selective_fusion_kernel{add_sums, add_products, scale_shift,
                                                    scale_shift_streamed};

}  // namespace pydefect::cpu::PYDEFECT_LEVEL
