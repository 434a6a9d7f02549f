// csrc/cpu/bilinear.h on the device: bilinear resizing along one axis with half-pixel centres,
// F.interpolate(mode="bilinear", align_corners=False).
#pragma once

#include <limits>

#include "common.cuh"
#include "maps.cuh"

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

// --- The adjoint of upsampling, of maps [images, height, width, channels]
// ----------------------------------------------------------------------

struct PlaneSize {
  int height;
  int width;

  __host__ __device__ int64_t positions() const { return int64_t{height} * width; }
};

constexpr int kGatherThreads = 128;
// Their weights fit the shared memory that a block may ask for on every card from compute capability 8.0 on.
constexpr int64_t kMostRowsAndColumns = (99 << 10) / sizeof(float);

// Every coarse position gathers from the fine ones that it is in, a block a coarse position.
template <int width>
static __global__ void gather_upsampled(const float* __restrict__ fine_maps, int channels, PlaneSize fine,
                                        PlaneSize coarse, float* __restrict__ coarse_maps) {
  float* const row_weights = reinterpret_cast<float*>(dynamic_shared_memory());  // [fine.height]
  float* const column_weights = row_weights + fine.height;                       // [fine.width]
  const int64_t image = blockIdx.x / coarse.positions();
  const auto position = static_cast<int>(blockIdx.x % coarse.positions());
  const int coarse_y = position / coarse.width;
  const int coarse_x = position % coarse.width;
  const Reach rows = reach(coarse_y, coarse.height, fine.height);
  const Reach columns = reach(coarse_x, coarse.width, fine.width);
  for (int y = rows.first + static_cast<int>(threadIdx.x); y < rows.end; y += kGatherThreads) {
    row_weights[y] = weight_of<float>(coarse_y, y, coarse.height, fine.height);
  }
  for (int x = columns.first + static_cast<int>(threadIdx.x); x < columns.end; x += kGatherThreads) {
    column_weights[x] = weight_of<float>(coarse_x, x, coarse.width, fine.width);
  }
  __syncthreads();
  const float* const own = fine_maps + image * fine.positions() * channels;
  for (int c = threadIdx.x * width; c < channels; c += kGatherThreads * width) {
    Channels<width> sum{};
    for (int y = rows.first; y < rows.end; ++y) {
      if (row_weights[y] == 0.0f) continue;
#pragma unroll 4
      for (int x = columns.first; x < columns.end; ++x) {
        const float weight = row_weights[y] * column_weights[x];
        // What has no weight is not read: it may be NaN.
        if (weight == 0.0f) continue;
        const auto here = Channels<width>::load(own + (int64_t{y} * fine.width + x) * channels + c);
        Channels<width>::each([&](int i) { sum.of[i] += weight * here.of[i]; });
      }
    }
    sum.store(coarse_maps + int64_t{blockIdx.x} * channels + c);
  }
}

inline void launch_adjoint(const Device& device, const char* name, const float* fine_maps, int64_t images,
                           int channels, PlaneSize fine, PlaneSize coarse, float* coarse_maps) {
  check(int64_t{fine.height} + fine.width <= kMostRowsAndColumns, name,
        ": on CUDA maps that others are upsampled to must have at most ", kMostRowsAndColumns,
        " rows and columns together, got ", fine.height, " and ", fine.width);
  check(images * coarse.positions() <= std::numeric_limits<int32_t>::max(), name,
        ": on CUDA coarse maps must have fewer than 2^31 positions in all images, got ", images, " x ",
        coarse.height, " x ", coarse.width);
  with_width(are_wide(channels, {fine_maps, coarse_maps}), [&](auto width) {
    device.launch(name, gather_upsampled<width>, static_cast<unsigned>(images * coarse.positions()),
                  kGatherThreads, sizeof(float) * static_cast<size_t>(fine.height + fine.width), fine_maps,
                  channels, fine, coarse, coarse_maps);
  });
}

}  // namespace pydefect::cuda
