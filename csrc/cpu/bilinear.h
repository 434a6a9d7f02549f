// Bilinear resizing along one axis with half-pixel centres: F.interpolate(mode="bilinear",
// align_corners=False), in the arithmetic of `Real`.
#pragma once

#include <algorithm>
#include <cstdint>

namespace pydefect::cpu {

// An output pixel lies between the input pixels low and high (the same one at the border).
template <class Real>
struct Between {
  int64_t low;
  int64_t high;
  Real low_weight;
  Real high_weight;
};

template <class Real>
Between<Real> between(int64_t index, int64_t input_size, int64_t output_size) {
  if (input_size == output_size) return {index, index, Real{1}, Real{0}};
  const Real scale = static_cast<Real>(input_size) / static_cast<Real>(output_size);
  const Real position = std::max(scale * (static_cast<Real>(index) + Real{0.5}) - Real{0.5}, Real{0});
  const int64_t low = std::min(static_cast<int64_t>(position), input_size - 1);
  const Real share = std::clamp(position - static_cast<Real>(low), Real{0}, Real{1});
  return {low, std::min(low + 1, input_size - 1), Real{1} - share, share};
}

}  // namespace pydefect::cpu
