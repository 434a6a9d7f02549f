// Spatial reunion on the CPU. The upsampled map, the gate and the gated map exist in registers only: of the
// gated map the 3x3 convolution to one channel needs nine dot products a position, which one pass takes. The
// backward pass computes the gate again and finishes all gradients in one pass. Images go one after the
// other, so that what is read again is still in the cache.
#include "kernels/spatial_reunion.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "dispatch.h"
#include "maps.h"
#include "rounding.h"

namespace pydefect::cpu {
namespace {

constexpr const char* kName = "spatial_reunion";
constexpr int64_t kTaps = 9;

// How the position weights are normalised, as pydefect/ops/spatial_reunion.py numbers it.
enum Normalisation : int64_t { kNone, kMean, kSoftmax };

// Where each line of the fine grid comes from: half-pixel centres, as align_corners=False.
std::vector<Blend> blends(int64_t fine, int64_t coarse) {
  std::vector<Blend> result(static_cast<size_t>(fine));
  const double scale = static_cast<double>(coarse) / static_cast<double>(fine);
  for (int64_t i = 0; i < fine; ++i) {
    const double from = std::max(0.0, (static_cast<double>(i) + 0.5) * scale - 0.5);
    const int64_t first = std::min(static_cast<int64_t>(from), coarse - 1);
    result[static_cast<size_t>(i)] = {first, std::min(first + 1, coarse - 1),
                                      static_cast<float>(from - static_cast<double>(first))};
  }
  return result;
}

// Blocks of rows, at most 32 of them: each block of the backward pass has a sum of the size of the weight.
Blocks row_blocks(const MapSize& size) {
  return {size.height, divide_up(size.height, 32)};
}

// The offset, in rows or columns, from a position to the one that a tap of the convolution looks at.
constexpr int64_t row_offset(int64_t tap) {
  return tap / 3 - 1;
}
constexpr int64_t column_offset(int64_t tap) {
  return tap % 3 - 1;
}

struct Span {
  int64_t begin;
  int64_t end;
};

// The indices of 0..length whose neighbour at `offset` is within 0..length too.
Span inside(int64_t length, int64_t offset) {
  return {std::max<int64_t>(0, -offset), length - std::max<int64_t>(0, offset)};
}

// attention = normalised(bias + sum_k taps[k] shifted to where tap k is looked at from)
void attend(const float* taps,  // [height, 9, width]
            float bias, const MapSize& size, int64_t normalisation,
            float* attention) {  // [height, width]
  const int64_t positions = size.positions();
  std::fill(attention, attention + positions, bias);
  for (int64_t k = 0; k < kTaps; ++k) {
    const Span rows = inside(size.height, row_offset(k));
    const Span columns = inside(size.width, column_offset(k));
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      const float* from = taps + ((y + row_offset(k)) * kTaps + k) * size.width + column_offset(k);
      float* to = attention + y * size.width;
      for (int64_t x = columns.begin; x < columns.end; ++x) to[x] += from[x];
    }
  }
  if (normalisation == kMean) {
    for (int64_t p = 0; p < positions; ++p) attention[p] /= static_cast<float>(positions);
  } else if (normalisation == kSoftmax) {
    const float largest = *std::max_element(attention, attention + positions);
    double sum = 0.0;
    for (int64_t p = 0; p < positions; ++p) {
      attention[p] = std::exp(attention[p] - largest);
      sum += attention[p];
    }
    for (int64_t p = 0; p < positions; ++p) attention[p] = static_cast<float>(attention[p] / sum);
  }
}

// The gradient before the normalisation, in place; returns its sum, the gradient of the bias.
double attend_backward(const float* attention, int64_t positions, int64_t normalisation, float* gradient) {
  if (normalisation == kMean) {
    for (int64_t p = 0; p < positions; ++p) gradient[p] /= static_cast<float>(positions);
  } else if (normalisation == kSoftmax) {
    double mean = 0.0;
    for (int64_t p = 0; p < positions; ++p) mean += static_cast<double>(attention[p]) * gradient[p];
    for (int64_t p = 0; p < positions; ++p) {
      gradient[p] = static_cast<float>(attention[p] * (gradient[p] - mean));
    }
  }
  double sum = 0.0;
  for (int64_t p = 0; p < positions; ++p) sum += gradient[p];
  return sum;
}

// What position x of row y passes on to the nine values that look at it: d_taps[k][x].
void taps_gradient(const float* gradient,  // [height, width]
                   int64_t y, const MapSize& size,
                   float* d_taps) {  // [9, width]
  std::fill(d_taps, d_taps + kTaps * size.width, 0.0f);
  for (int64_t k = 0; k < kTaps; ++k) {
    const int64_t row = y - row_offset(k);
    if (row < 0 || row >= size.height) continue;
    const Span columns = inside(size.width, -column_offset(k));
    const float* from = gradient + row * size.width - column_offset(k);
    for (int64_t x = columns.begin; x < columns.end; ++x) d_taps[k * size.width + x] = from[x];
  }
}

std::tuple<Tensor, Tensor> spatial_reunion(const Tensor& features_given, const Tensor& local_given,
                                           const Tensor& coarse_given, const Tensor& weight_given,
                                           const Tensor& bias_given, int64_t normalisation) {
  check_spatial_reunion(features_given, local_given, coarse_given, weight_given, bias_given, normalisation);
  const MapSize size(features_given);
  const MapSize coarse_size(coarse_given);
  const int64_t channels = size.channels;
  const int64_t line = size.width * channels;
  const int64_t coarse_line = coarse_size.width * channels;

  const Tensor features = in_order(kName, "features", features_given);
  const Tensor local = in_order(kName, "local", local_given);
  const Tensor coarse = in_order(kName, "coarse", coarse_given);
  const Tensor weight = in_order(kName, "weight", weight_given);
  Tensor output = new_map(features);
  Tensor attention = torch::stable::new_empty(features, {size.images, size.positions()});

  const SpatialReunionKernel& kernel = PYDEFECT_ACTIVE_KERNEL(spatial_reunion_kernel);
  const float bias = *bias_given.const_data_ptr<float>();
  const std::vector<Blend> rows = blends(size.height, coarse_size.height);
  const std::vector<Blend> columns = blends(size.width, coarse_size.width);
  const Blocks lines = row_blocks(size);
  const Blocks blocks = position_blocks(size);
  BlockSums sums(blocks.count(), channels);
  std::vector<float> taps(static_cast<size_t>(kTaps * size.positions()));
  for (int64_t image = 0; image < size.images; ++image) {
    const float* map = features.const_data_ptr<float>() + image * size.image();
    const float* own = local.const_data_ptr<float>() + image * size.image();
    const float* grid = coarse.const_data_ptr<float>() + image * coarse_size.image();
    lines.for_each([&](int64_t, int64_t begin, int64_t end) {
      AlignedBuffer<float> up(coarse_line);
      for (int64_t y = begin; y < end; ++y) {
        const Blend& row = rows[static_cast<size_t>(y)];
        kernel.blend(grid + row.first * coarse_line, grid + row.second * coarse_line, row.share, coarse_line,
                     up.data());
        kernel.gate_row(map + y * line, own + y * line, up.data(), columns.data(),
                        weight.const_data_ptr<float>(), size.width, channels,
                        taps.data() + y * kTaps * size.width);
      }
    });
    float* weights = attention.mutable_data_ptr<float>() + image * size.positions();
    attend(taps.data(), bias, size, normalisation, weights);
    blocks.for_each([&](int64_t block, int64_t begin, int64_t end) {
      kernel.add_weighted(map + begin * channels, weights + begin, end - begin, channels, sums.start(block));
    });
    std::vector<float> context(static_cast<size_t>(channels), 0.0f);
    sums.add_to(context.data());
    float* out = output.mutable_data_ptr<float>() + image * size.image();
    blocks.for_each([&](int64_t, int64_t begin, int64_t end) {
      kernel.add(map + begin * channels, context.data(), end - begin, channels, out + begin * channels);
    });
  }
  return {output, attention};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> spatial_reunion_backward(
    const Tensor& d_output_given, const Tensor& features_given, const Tensor& local_given,
    const Tensor& coarse_given, const Tensor& weight_given, const Tensor& attention_given,
    int64_t normalisation) {
  check_spatial_reunion_backward(d_output_given, features_given, local_given, coarse_given, weight_given,
                                 attention_given, normalisation);
  const MapSize size(features_given);
  const MapSize coarse_size(coarse_given);
  const int64_t channels = size.channels;
  const int64_t line = size.width * channels;
  const int64_t coarse_line = coarse_size.width * channels;

  const Tensor d_output = in_order(kName, "d_output", d_output_given);
  const Tensor features = in_order(kName, "features", features_given);
  const Tensor local = in_order(kName, "local", local_given);
  const Tensor coarse = in_order(kName, "coarse", coarse_given);
  const Tensor weight = in_order(kName, "weight", weight_given);
  const Tensor attention = in_order(kName, "attention", attention_given);
  Tensor d_features = new_map(features);
  Tensor d_local = new_map(features);
  Tensor d_coarse =
      torch::stable::new_zeros(features, {size.images, coarse_size.height, coarse_size.width, channels});
  Tensor d_weight = torch::stable::new_zeros(features, {kTaps, channels});
  Tensor d_bias = torch::stable::new_zeros(features, {1});

  const SpatialReunionKernel& kernel = PYDEFECT_ACTIVE_KERNEL(spatial_reunion_kernel);
  const std::vector<Blend> rows = blends(size.height, coarse_size.height);
  const std::vector<Blend> columns = blends(size.width, coarse_size.width);
  const Blocks lines = row_blocks(size);
  const Blocks blocks = position_blocks(size);
  const Blocks coarse_lines(coarse_size.height, 1);
  BlockSums context_sums(blocks.count(), channels);
  BlockSums weight_sums(lines.count(), kTaps * channels);
  AlignedBuffer<float> gradient(size.positions());
  // Every row's gradient with respect to the coarse map upsampled across rows.
  AlignedBuffer<float> d_up(size.height * coarse_line);
  double bias_sum = 0.0;
  for (int64_t image = 0; image < size.images; ++image) {
    const float* d_out = d_output.const_data_ptr<float>() + image * size.image();
    const float* map = features.const_data_ptr<float>() + image * size.image();
    const float* own = local.const_data_ptr<float>() + image * size.image();
    const float* grid = coarse.const_data_ptr<float>() + image * coarse_size.image();
    const float* weights = attention.const_data_ptr<float>() + image * size.positions();
    blocks.for_each([&](int64_t block, int64_t begin, int64_t end) {
      kernel.add_weighted(d_out + begin * channels, nullptr, end - begin, channels,
                          context_sums.start(block));
    });
    std::vector<float> d_context(static_cast<size_t>(channels), 0.0f);
    context_sums.add_to(d_context.data());
    blocks.for_each([&](int64_t, int64_t begin, int64_t end) {
      kernel.dot(map + begin * channels, d_context.data(), end - begin, channels, gradient.data() + begin);
    });
    bias_sum += attend_backward(weights, size.positions(), normalisation, gradient.data());

    float* d_map = d_features.mutable_data_ptr<float>() + image * size.image();
    float* d_own = d_local.mutable_data_ptr<float>() + image * size.image();
    lines.for_each([&](int64_t block, int64_t begin, int64_t end) {
      AlignedBuffer<float> up(coarse_line);
      AlignedBuffer<float> d_taps(kTaps * size.width);
      float* own_weight_sums = weight_sums.start(block);
      for (int64_t y = begin; y < end; ++y) {
        const Blend& row = rows[static_cast<size_t>(y)];
        kernel.blend(grid + row.first * coarse_line, grid + row.second * coarse_line, row.share, coarse_line,
                     up.data());
        taps_gradient(gradient.data(), y, size, d_taps.data());
        kernel.gate_row_backward(d_out + y * line, map + y * line, own + y * line, up.data(), columns.data(),
                                 weight.const_data_ptr<float>(), weights + y * size.width, d_context.data(),
                                 d_taps.data(), size.width, coarse_size.width, channels, d_map + y * line,
                                 d_own + y * line, d_up.data() + y * coarse_line, own_weight_sums);
      }
    });
    weight_sums.add_to(d_weight.mutable_data_ptr<float>());

    float* d_grid = d_coarse.mutable_data_ptr<float>() + image * coarse_size.image();
    coarse_lines.for_each([&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t y = 0; y < size.height; ++y) {
          const Blend& row = rows[static_cast<size_t>(y)];
          const float share =
              (row.first == i ? 1.0f - row.share : 0.0f) + (row.second == i ? row.share : 0.0f);
          if (row.first == i || row.second == i) {
            kernel.add_scaled(d_up.data() + y * coarse_line, share, coarse_line, d_grid + i * coarse_line);
          }
        }
      }
    });
  }
  *d_bias.mutable_data_ptr<float>() = static_cast<float>(bias_sum);
  return {d_features, d_local, d_coarse, d_weight, d_bias};
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, CPU, library) {
  library.impl("spatial_reunion", TORCH_BOX(&spatial_reunion));
  library.impl("spatial_reunion_backward", TORCH_BOX(&spatial_reunion_backward));
}

}  // namespace
}  // namespace pydefect::cpu
