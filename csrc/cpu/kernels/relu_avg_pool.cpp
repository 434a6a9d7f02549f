#include "relu_avg_pool.h"

#include <cstdint>

#include "../../bfloat16.h"

namespace pydefect::cpu::PYDEFECT_LEVEL {
namespace {

// NaN stays.
inline float relu(float value) {
  return value < 0.0f ? 0.0f : value;
}

template <class T>
void pool(const T* upper, const T* lower, const T* zeros, int64_t width, int64_t channels, int64_t padding,
          int64_t out_width, T* out) {
  for (int64_t x = 0; x < out_width; ++x) {
    const int64_t left = 2 * x - padding;
    const bool has_left = left >= 0;
    const bool has_right = left + 1 < width;
    const T* const a = has_left ? upper + left * channels : zeros;
    const T* const b = has_right ? upper + (left + 1) * channels : zeros;
    const T* const c = has_left ? lower + left * channels : zeros;
    const T* const d = has_right ? lower + (left + 1) * channels : zeros;
    T* const __restrict__ cell = out + x * channels;
    for (int64_t i = 0; i < channels; ++i) {
      const float sum = relu(widened(a[i])) + relu(widened(b[i])) + relu(widened(c[i])) + relu(widened(d[i]));
      narrow(sum * 0.25f, cell[i]);
    }
  }
}

template <class T>
void spread(const T* d_out, const T* map, const T* zeros, int64_t width, int64_t channels, int64_t padding,
            int64_t out_width, T* d_map) {
  for (int64_t x = 0; x < width; ++x) {
    const int64_t from = (x + padding) / 2;
    const T* const gradient = from < out_width ? d_out + from * channels : zeros;
    const T* const cell = map + x * channels;
    T* const __restrict__ to = d_map + x * channels;
    for (int64_t i = 0; i < channels; ++i) {
      // Not > 0, which is false for NaN.
      narrow(widened(cell[i]) <= 0.0f ? 0.0f : widened(gradient[i]) * 0.25f, to[i]);
    }
  }
}

}  // namespace

const ReluAvgPoolKernel relu_avg_pool_kernel{{pool<float>, spread<float>},
                                             {pool<uint16_t>, spread<uint16_t>}};

}  // namespace pydefect::cpu::PYDEFECT_LEVEL
