// csrc/cpu/bilinear.h on the device: bilinear resizing along one axis with half-pixel centres,
// F.interpolate(mode="bilinear", align_corners=False).
#pragma once

#include "common.cuh"

namespace pydefect::cuda {

// An output pixel lies between the input pixels low and high (the same one at the border).
template <class Real>
struct Between {
  int low;
  int high;
  Real low_weight;
  Real high_weight;
};

template <class Real>
__device__ Between<Real> between(int64_t index, int input_size, int64_t output_size) {
  if (input_size == output_size) return {static_cast<int>(index), static_cast<int>(index), Real{1}, Real{0}};
  const Real scale = static_cast<Real>(input_size) / static_cast<Real>(output_size);
  const Real at = scale * (static_cast<Real>(index) + Real{0.5}) - Real{0.5};
  const Real position = at > Real{0} ? at : Real{0};
  const int low = min(static_cast<int>(position), input_size - 1);
  const Real beyond = position - static_cast<Real>(low);
  const Real share = beyond > Real{1} ? Real{1} : beyond < Real{0} ? Real{0} : beyond;
  return {low, min(low + 1, input_size - 1), Real{1} - share, share};
}

// How much of an input pixel is in an output pixel.
template <class Real>
__device__ Real weight_of(int input, int64_t output, int input_size, int64_t output_size) {
  const Between<Real> place = between<Real>(output, input_size, output_size);
  return (place.low == input ? place.low_weight : Real{0}) +
         (place.high == input ? place.high_weight : Real{0});
}

// The output pixels that an input pixel may be in: first <= index < end.
struct Reach {
  int first;
  int end;
};

__device__ inline Reach reach(int input, int input_size, int output_size) {
  if (input_size == output_size) return {input, input + 1};
  const float scale = static_cast<float>(output_size) / static_cast<float>(input_size);
  // One pixel more on both sides for the rounding; the pixels at the border take all that lies beyond.
  const int first = input == 0 ? 0 : static_cast<int>(scale * (static_cast<float>(input) - 0.5f)) - 2;
  const int end = input == input_size - 1 ? output_size
                                          : static_cast<int>(scale * (static_cast<float>(input) + 1.5f)) + 3;
  return {max(first, 0), min(end, output_size)};
}

}  // namespace pydefect::cuda
