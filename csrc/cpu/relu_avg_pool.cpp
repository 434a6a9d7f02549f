// ReLU and average pooling of 2 x 2 cells on the CPU: each pass reads its maps once and writes once, where
// PyTorch's operators write a map in between and read it again.
#include "kernels/relu_avg_pool.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../checks.h"
#include "dispatch.h"
#include "maps.h"

namespace pydefect::cpu {
namespace {

constexpr const char* kName = "relu_avg_pool";
constexpr int64_t kGrain = 4;  // rows, below which threads are not worth waking

template <class T>
void pool_rows(const ReluAvgPoolRows<T>& rows, const Tensor& maps, int64_t padding, Tensor& output) {
  const MapSize size(maps);
  const MapSize half(output);
  const std::vector<T> zeros(static_cast<size_t>(size.width * size.channels));
  const T* const from = static_cast<const T*>(maps.const_data_ptr());
  T* const to = static_cast<T*>(output.mutable_data_ptr());
  torch::stable::parallel_for(0, size.images * half.height, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* const image = from + row / half.height * size.image();
      const auto row_of = [&](int64_t y) {
        return y >= 0 && y < size.height ? image + y * size.width * size.channels : zeros.data();
      };
      const int64_t upper = 2 * (row % half.height) - padding;
      rows.pool(row_of(upper), row_of(upper + 1), zeros.data(), size.width, size.channels, padding,
                half.width, to + row * half.width * size.channels);
    }
  });
}

template <class T>
void spread_rows(const ReluAvgPoolRows<T>& rows, const Tensor& d_output, const Tensor& maps, int64_t padding,
                 Tensor& d_maps) {
  const MapSize size(maps);
  const MapSize half(d_output);
  const std::vector<T> zeros(static_cast<size_t>(half.width * size.channels));
  const T* const gradient = static_cast<const T*>(d_output.const_data_ptr());
  const T* const from = static_cast<const T*>(maps.const_data_ptr());
  T* const to = static_cast<T*>(d_maps.mutable_data_ptr());
  torch::stable::parallel_for(0, size.images * size.height, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t y = (row % size.height + padding) / 2;
      const T* const of_row =
          y < half.height ? gradient + row / size.height * half.image() + y * half.width * size.channels
                          : zeros.data();
      const int64_t at = row * size.width * size.channels;
      rows.spread(of_row, from + at, zeros.data(), size.width, size.channels, padding, half.width, to + at);
    }
  });
}

Tensor relu_avg_pool(const Tensor& maps_given, int64_t padding) {
  check_relu_avg_pool(maps_given, padding);
  const Tensor maps = in_order(kName, "maps", maps_given);
  Tensor output = torch::stable::new_empty(
      maps, {maps.size(0), halved(maps.size(1), padding), halved(maps.size(2), padding), maps.size(3)});
  const ReluAvgPoolKernel& kernel = PYDEFECT_ACTIVE_KERNEL(relu_avg_pool_kernel);
  if (is_float(maps)) {
    pool_rows(kernel.float32, maps, padding, output);
  } else {
    pool_rows(kernel.bfloat16, maps, padding, output);
  }
  return output;
}

Tensor relu_avg_pool_backward(const Tensor& d_output_given, const Tensor& maps_given, int64_t padding) {
  check_relu_avg_pool_backward(d_output_given, maps_given, padding);
  const Tensor d_output = in_order(kName, "d_output", d_output_given);
  const Tensor maps = in_order(kName, "maps", maps_given);
  Tensor d_maps = torch::stable::empty_like(maps);
  const ReluAvgPoolKernel& kernel = PYDEFECT_ACTIVE_KERNEL(relu_avg_pool_kernel);
  if (is_float(maps)) {
    spread_rows(kernel.float32, d_output, maps, padding, d_maps);
  } else {
    spread_rows(kernel.bfloat16, d_output, maps, padding, d_maps);
  }
  return d_maps;
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, CPU, library) {
  library.impl("relu_avg_pool", TORCH_BOX(&relu_avg_pool));
  library.impl("relu_avg_pool_backward", TORCH_BOX(&relu_avg_pool_backward));
}

}  // namespace
}  // namespace pydefect::cpu
