// ReLU and average pooling of 2 x 2 cells on CUDA: a thread has neighbouring channels of a cell of what is
// written, 16 bytes where their number and the maps' places allow it. Both passes take what copying takes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>

#include "../bfloat16.h"
#include "../checks.h"
#include "common.cuh"

namespace pydefect::cuda {
namespace {

constexpr const char* kName = "relu_avg_pool";
constexpr int kThreads = 256;

template <class T, int width>
struct alignas(sizeof(T) * width) Channels {
  T of[width];
};

// Rows of maps [images, height, width, channels], and of the halved ones.
struct Sizes {
  int64_t images;
  int64_t height;
  int64_t half_height;
  int width;
  int half_width;
  int channels;
  int padding;
};

template <class T, int width>
__global__ void pool_rows(const T* __restrict__ maps, Sizes size,
                          T* __restrict__ output) {  // [images, half_height, half_width, channels]
  const int pieces = size.channels / width;
  const int place = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  const int x = place / pieces;
  const int channel = place % pieces * width;
  if (x >= size.half_width) return;
  const int left = 2 * x - size.padding;
  for (int64_t row = blockIdx.y; row < size.images * size.half_height; row += gridDim.y) {
    const int64_t image = row / size.half_height * size.height;
    const int64_t upper = 2 * (row % size.half_height) - size.padding;
    float sums[width] = {};
#pragma unroll
    for (int cell = 0; cell < 4; ++cell) {
      const int64_t from_y = upper + cell / 2;
      const int from_x = left + cell % 2;
      if (from_y < 0 || from_y >= size.height || from_x < 0 || from_x >= size.width) continue;
      const auto values = *reinterpret_cast<const Channels<T, width>*>(
          maps + ((image + from_y) * size.width + from_x) * size.channels + channel);
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const float value = widened(values.of[i]);
        sums[i] += value < 0.0f ? 0.0f : value;  // NaN stays
      }
    }
    Channels<T, width> means;
#pragma unroll
    for (int i = 0; i < width; ++i) narrow(sums[i] * 0.25f, means.of[i]);
    *reinterpret_cast<Channels<T, width>*>(output + (row * size.half_width + x) * size.channels + channel) =
        means;
  }
}

template <class T, int width>
__global__ void spread_rows(const T* __restrict__ d_output,  // [images, half_height, half_width, channels]
                            const T* __restrict__ maps, Sizes size, T* __restrict__ d_maps) {
  const int pieces = size.channels / width;
  const int place = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  const int x = place / pieces;
  const int channel = place % pieces * width;
  if (x >= size.width) return;
  const int half_x = (x + size.padding) / 2;
  for (int64_t row = blockIdx.y; row < size.images * size.height; row += gridDim.y) {
    const int64_t half_y = (row % size.height + size.padding) / 2;
    const int64_t at = (row * size.width + x) * size.channels + channel;
    Channels<T, width> gradient{};
    // An odd last row or column is in no mean.
    if (half_y < size.half_height && half_x < size.half_width) {
      const int64_t half_row = row / size.height * size.half_height + half_y;
      gradient = *reinterpret_cast<const Channels<T, width>*>(
          d_output + (half_row * size.half_width + half_x) * size.channels + channel);
    }
    const auto values = *reinterpret_cast<const Channels<T, width>*>(maps + at);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      // Not > 0, which is false for NaN.
      narrow(widened(values.of[i]) <= 0.0f ? 0.0f : widened(gradient.of[i]) * 0.25f, gradient.of[i]);
    }
    *reinterpret_cast<Channels<T, width>*>(d_maps + at) = gradient;
  }
}

Sizes sizes_of(const Tensor& maps, int64_t padding) {
  check(maps.size(2) * maps.size(3) < kDimensionLimit, kName,
        ": on CUDA a row of maps must have fewer than 2^30 elements, got ", maps.size(2) * maps.size(3));
  return {maps.size(0),
          maps.size(1),
          halved(maps.size(1), padding),
          static_cast<int>(maps.size(2)),
          static_cast<int>(halved(maps.size(2), padding)),
          static_cast<int>(maps.size(3)),
          static_cast<int>(padding)};
}

dim3 grid_of(int64_t rows, int64_t cells, int pieces) {
  return dim3(
      static_cast<unsigned>(divide_up(cells * pieces, kThreads)),
      static_cast<unsigned>(rows < kGridLimit ? rows : kGridLimit));  // a block goes on with later ones
}

// Calls launch(T{}, std::integral_constant<int, width>) for the maps' type and as many channels a thread as
// make 16 bytes, or one.
template <class Launch>
void with_type_and_width(const Tensor& maps, std::initializer_list<const void*> pointers, Launch launch) {
  const int fitting = is_float(maps) ? 4 : 8;
  bool wide = maps.size(3) % fitting == 0;
  for (const void* pointer : pointers) wide = wide && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  if (is_float(maps)) {
    if (wide) {
      launch(float{}, std::integral_constant<int, 4>{});
    } else {
      launch(float{}, std::integral_constant<int, 1>{});
    }
  } else if (wide) {
    launch(uint16_t{}, std::integral_constant<int, 8>{});
  } else {
    launch(uint16_t{}, std::integral_constant<int, 1>{});
  }
}

Tensor relu_avg_pool(const Tensor& maps_given, int64_t padding) {
  check_relu_avg_pool(maps_given, padding);
  const Device device(maps_given);
  const Tensor maps = in_order(kName, "maps", maps_given);
  const Sizes size = sizes_of(maps, padding);
  Tensor output =
      torch::stable::new_empty(maps, {size.images, size.half_height, size.half_width, size.channels});
  if (size.images == 0) return output;
  const void* const from = maps.const_data_ptr();
  void* const to = output.mutable_data_ptr();
  with_type_and_width(maps, {from, to}, [&](auto type, auto width) {
    using T = decltype(type);
    device.launch("relu_avg_pool: pool_rows", pool_rows<T, width>,
                  grid_of(size.images * size.half_height, size.half_width, size.channels / width), kThreads,
                  0, static_cast<const T*>(from), size, static_cast<T*>(to));
  });
  return output;
}

Tensor relu_avg_pool_backward(const Tensor& d_output_given, const Tensor& maps_given, int64_t padding) {
  check_relu_avg_pool_backward(d_output_given, maps_given, padding);
  const Device device(maps_given);
  const Tensor d_output = in_order(kName, "d_output", d_output_given);
  const Tensor maps = in_order(kName, "maps", maps_given);
  const Sizes size = sizes_of(maps, padding);
  Tensor d_maps = torch::stable::empty_like(maps);
  if (size.images == 0) return d_maps;
  const void* const gradient = d_output.const_data_ptr();
  const void* const from = maps.const_data_ptr();
  void* const to = d_maps.mutable_data_ptr();
  with_type_and_width(maps, {gradient, from, to}, [&](auto type, auto width) {
    using T = decltype(type);
    device.launch("relu_avg_pool_backward: spread_rows", spread_rows<T, width>,
                  grid_of(size.images * size.height, size.width, size.channels / width), kThreads, 0,
                  static_cast<const T*>(gradient), static_cast<const T*>(from), size, static_cast<T*>(to));
  });
  return d_maps;
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, PYDEFECT_CUDA_KEY, library) {
  library.impl("relu_avg_pool", TORCH_BOX(&relu_avg_pool));
  library.impl("relu_avg_pool_backward", TORCH_BOX(&relu_avg_pool_backward));
}

}  // namespace
}  // namespace pydefect::cuda
