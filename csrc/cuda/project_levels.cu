// The multi-level 1x1 CoordConv on CUDA, forward and backward. A 1x1 convolution commutes with bilinear
// resizing, so every level is multiplied on its own grid, on tensor cores (tile_product.cuh), and one pass
// over the finest one's product adds the others' interpolation and the coordinates.
//
// Levels of any format and layout are pooled and split into the parts that tensor cores multiply (split.cuh)
// in one pass. Memory beyond inputs and outputs: these parts, the coarser levels' projections, and backward
// the gradient on the coarser grids and its parts.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "bilinear.cuh"
#include "common.cuh"
#include "maps.cuh"
#include "split.cuh"
#include "tile_product.cuh"

namespace pydefect::cuda {
namespace {

using torch::headeronly::ScalarType;
using Tensors = std::vector<Tensor>;
// 512 threads with 32 sums each: those of a group and of all groups fit into registers.
using Shape = TileShape<4, 4, 2, 4>;
using Product = TileProduct<Shape>;

constexpr int kThreads = 256;
constexpr int kMostLevels = 8;
constexpr int kConstants = 3;  // 1, row coordinate, column coordinate

struct Grid {
  int64_t batch;
  int height;
  int width;

  __host__ __device__ int64_t pixels() const { return batch * height * width; }
};

struct Pixel {
  int64_t image;
  int y;
  int x;

  __device__ Pixel(const Grid& grid, int64_t index)
      : image(index / (static_cast<int64_t>(grid.height) * grid.width)),
        y(static_cast<int>(index / grid.width % grid.height)),
        x(static_cast<int>(index % grid.width)) {}
};

// Row or column coordinate of a pixel: linear in [-1, 1], symmetric in the last bit as torch.linspace is.
__device__ float coordinate(int index, int length) {
  if (length == 1) return 0.0f;
  const float step = 2.0f / static_cast<float>(length - 1);
  return index < length / 2 ? -1.0f + step * static_cast<float>(index)
                            : 1.0f - step * static_cast<float>(length - 1 - index);
}

template <class Element>
struct Level {
  const Element* data;
  Grid grid;
  int channels;
  int64_t image_stride;
  int64_t channel_stride;
  int64_t row_stride;
  int64_t column_stride;
  bool pool;

  __device__ float at(const Pixel& pixel, int64_t channel) const {
    const Element* const from = data + pixel.image * image_stride + channel * channel_stride;
    if (!pool) return static_cast<float>(from[pixel.y * row_stride + pixel.x * column_stride]);
    float sum = 0.0f;
    for (int y = max(pixel.y - 1, 0); y <= min(pixel.y + 1, grid.height - 1); ++y) {
      for (int x = max(pixel.x - 1, 0); x <= min(pixel.x + 1, grid.width - 1); ++x) {
        sum += static_cast<float>(from[y * row_stride + x * column_stride]);
      }
    }
    return sum / 9.0f;
  }
};

// A level's pixels as rows to be split.
template <class Element>
struct LevelPixels {
  Level<Element> level;

  __device__ bool along_rows() const { return level.channel_stride != 1; }
  __device__ float at(int64_t pixel, int64_t channel) const {
    return level.at(Pixel(level.grid, pixel), channel);
  }
};

// A level's channels as rows to be split. With `constants` three more follow: those that the bias and the
// coordinates are multiplied with.
template <class Element>
struct LevelChannels {
  Level<Element> level;

  __device__ bool along_rows() const { return level.channel_stride == 1; }
  __device__ float at(int64_t channel, int64_t index) const {
    const Pixel pixel(level.grid, index);
    if (channel < level.channels) return level.at(pixel, channel);
    if (channel == level.channels) return 1.0f;
    return channel == level.channels + 1 ? coordinate(pixel.y, level.grid.height)
                                         : coordinate(pixel.x, level.grid.width);
  }
};

// --- Products
// ---------------------------------------------------------------------------------------------------

// The coordinates and the bias, and the coarser levels interpolated, added to the finest one's projection.
struct CoarseLevel {
  const float* projected;  // [pixels, dimension]
  int height;
  int width;
};

struct Others {
  Grid grid;
  int dimension;
  const float* weight;  // the row coordinate's column of it; the next one is the column coordinate's
  int64_t weight_stride;
  const float* bias;  // [dimension] or null
  CoarseLevel coarse[kMostLevels];
  int coarse_count;
};

// A warp a pixel and some of its channels.
template <int width>
__global__ void add_others(const __grid_constant__ Others others,
                           float* __restrict__ out) {  // [pixels, dimension]
  const int lane = threadIdx.x % kWarp;
  const int64_t pixels = others.grid.pixels();
  for (int64_t index = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp; index < pixels;
       index += int64_t{gridDim.x} * (kThreads / kWarp)) {
    const Pixel pixel(others.grid, index);
    const float at_y = coordinate(pixel.y, others.grid.height);
    const float at_x = coordinate(pixel.x, others.grid.width);
    for (int c = lane * width; c < others.dimension; c += kWarp * width) {
      float* const own = out + index * others.dimension + c;
      auto sum = Channels<width>::load(own);
      for (int l = 0; l < others.coarse_count; ++l) {
        const CoarseLevel& level = others.coarse[l];
        const Between<float> y = between<float>(pixel.y, level.height, others.grid.height);
        const Between<float> x = between<float>(pixel.x, level.width, others.grid.width);
        // A neighbour without weight is not read: it may be NaN.
        const auto add = [&](int from_y, int from_x, float weight) {
          if (weight == 0.0f) return;
          const int64_t from = (pixel.image * level.height + from_y) * level.width + from_x;
          const auto here = Channels<width>::load(level.projected + from * others.dimension + c);
          Channels<width>::each([&](int i) { sum.of[i] = fmaf(weight, here.of[i], sum.of[i]); });
        };
        add(y.low, x.low, y.low_weight * x.low_weight);
        add(y.low, x.high, y.low_weight * x.high_weight);
        add(y.high, x.low, y.high_weight * x.low_weight);
        add(y.high, x.high, y.high_weight * x.high_weight);
      }
      Channels<width>::each([&](int i) {
        const float* const factors = others.weight + (c + i) * others.weight_stride;
        const float constant = others.bias == nullptr ? 0.0f : others.bias[c + i];
        sum.of[i] += fmaf(at_x, factors[1], fmaf(at_y, factors[0], constant));
      });
      sum.store(own);
    }
  }
}

// Rows that are split group by group, with their groups' scales.
struct Operand {
  SplitRows rows;
  const float* scales;  // [count, groups]

  explicit Operand(const SplitTensor& split)
      : rows(split.rows()), scales(split.scales.const_data_ptr<float>()) {}

  __device__ Operand(const Operand& all, int64_t first)
      : rows(all.rows.from(first)), scales(all.scales + first * divide_up(all.rows.slices, kGroupSlices)) {}
};

// Block (x, y, z): rows x of a times rows y of b, over the z-th part of the groups.
__global__ void __launch_bounds__(Shape::threads)
    multiply(Operand a, Operand b, int part,
             float* __restrict__ products) {  // [parts, a's rows, b's rows]
  const int64_t first_row = int64_t{blockIdx.x} * Shape::rows;
  const int64_t first_column = int64_t{blockIdx.y} * Shape::columns;
  const int64_t columns = b.rows.count;
  const int begin = blockIdx.z * part;
  const Operand own_a(a, first_row);
  const Operand own_b(b, first_column);
  Product::Sums sums;
  Product::multiply_groups(own_a.rows, own_a.scales, own_b.rows, own_b.scales, begin, begin + part,
                           dynamic_shared_memory(), sums);
  const bool even = columns % 2 == 0;
#pragma unroll
  for (int r = 0; r < Shape::row_tiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = Shape::row(r, 2 * half);
      if (row >= own_a.rows.count) continue;
      float* const to = products + (blockIdx.z * a.rows.count + first_row + row) * columns + first_column;
#pragma unroll
      for (int c = 0; c < Shape::column_tiles; ++c) {
        const int column = Shape::column(c, 0);
        if (column >= own_b.rows.count) continue;
        const float first = sums[r][c][2 * half];
        const float second = sums[r][c][2 * half + 1];
        if (even) {
          *reinterpret_cast<float2*>(to + column) = make_float2(first, second);
        } else {
          to[column] = first;
          if (column + 1 < own_b.rows.count) to[column + 1] = second;
        }
      }
    }
  }
}

// `part` groups a block; 0: all.
void launch_product(const Device& device, const char* name, const SplitTensor& a, const SplitTensor& b,
                    int part, const Tensor& products) {
  const int64_t groups = groups_of(a.width);
  const int64_t each = part == 0 ? groups : part;
  const int64_t rows = a.parts.size(0);
  const int64_t columns = b.parts.size(0);
  device.launch(
      name, multiply,
      dim3(divide_up(rows, Shape::rows), divide_up(columns, Shape::columns), divide_up(groups, each)),
      Shape::threads, Product::shared_bytes, Operand(a), Operand(b), static_cast<int>(each),
      products.mutable_data_ptr<float>());
}

// Adds up the parts and writes the columns where they belong: a level's channels into the weight's gradient,
// of the finest level also the constants' into the bias's and the coordinates'.
__global__ void finish_weight_gradient(const float* parts,  // [part_count, dimension, columns]
                                       int part_count, int dimension, int channels, bool constants,
                                       int64_t first_column, int64_t inputs,
                                       float* weight,  // [dimension, inputs]
                                       float* bias) {  // [dimension]
  const int columns = channels + (constants ? kConstants : 0);
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < int64_t{dimension} * columns;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t d = i / columns;
    const int column = static_cast<int>(i % columns);
    float sum = 0.0f;
    for (int part = 0; part < part_count; ++part) {
      sum += parts[(static_cast<int64_t>(part) * dimension + d) * columns + column];
    }
    if (column < channels) {
      weight[d * inputs + first_column + column] = sum;
    } else if (column == channels) {
      bias[d] = sum;
    } else {
      weight[d * inputs + inputs - 2 + column - channels - 1] = sum;
    }
  }
}

// --- On the host
// ------------------------------------------------------------------------------------------------

Grid grid_of(const Tensor& level) {
  return {level.size(0), static_cast<int>(level.size(2)), static_cast<int>(level.size(3))};
}

void check_cuda_sizes(const char* op, const Tensors& levels) {
  check(levels.size() <= kMostLevels, op, ": on CUDA levels must hold at most ", kMostLevels,
        " tensors, got ", levels.size());
  const Grid grid = grid_of(levels[0]);
  check(grid.batch <= std::numeric_limits<int32_t>::max() / grid.height / grid.width, op,
        ": on CUDA levels[0] must have fewer than 2^31 pixels in all images, got ", levels[0].size(0), " x ",
        levels[0].size(2), " x ", levels[0].size(3));
}

// What a product's second matrix has a row for.
void check_cuda_rows(const char* op, const char* what, int64_t count) {
  constexpr int64_t kMost = kGridLimit * Shape::columns;
  check(count <= kMost, op, ": on CUDA there must be at most ", kMost, " ", what, ", got ", count);
}

// With one channel the stride says nothing.
int64_t channel_stride(const Tensor& level) {
  return level.size(1) == 1 ? 1 : level.stride(1);
}

template <class Element>
Level<Element> level_of(const Tensor& level, bool pool) {
  return {static_cast<const Element*>(level.const_data_ptr()),
          grid_of(level),
          static_cast<int>(level.size(1)),
          level.stride(0),
          channel_stride(level),
          level.stride(2),
          level.stride(3),
          pool};
}

// Splits a level as Rows<Element>, LevelPixels or LevelChannels, say.
template <template <class> class Rows>
SplitTensor split_level(const Device& device, const Tensor& level, bool pool, int64_t count, int64_t depth) {
  if (level.scalar_type() == ScalarType::BFloat16) {
    return split_by_group(device, level, Rows<__nv_bfloat16>{level_of<__nv_bfloat16>(level, pool)}, count,
                          depth);
  }
  if (level.scalar_type() == ScalarType::Half) {
    return split_by_group(device, level, Rows<__half>{level_of<__half>(level, pool)}, count, depth);
  }
  return split_by_group(device, level, Rows<float>{level_of<float>(level, pool)}, count, depth);
}

// The weight's columns of a level, as rows of its channels: [dimension, channels].
SplitTensor split_weight(const Device& device, const Tensor& weight, int64_t first_column, int64_t channels) {
  const MatrixRows rows{weight.const_data_ptr<float>() + first_column, weight.size(1)};
  return split_by_group(device, weight, rows, weight.size(0), channels);
}

Tensor project_levels(const Tensors& levels, const Tensor& weight_given,
                      const std::optional<Tensor>& bias_given, bool pool) {
  check_project_levels(levels, weight_given, bias_given);
  const Device device(weight_given);
  const Tensor weight = in_order("project_levels", "weight", weight_given);
  std::optional<Tensor> bias;
  if (bias_given) bias = in_order("project_levels", "bias", *bias_given);
  const int dimension = static_cast<int>(weight.size(0));
  const int64_t inputs = weight.size(1);
  check_cuda_sizes("project_levels", levels);
  check_cuda_rows("project_levels", "rows of weight", dimension);
  const Grid grid = grid_of(levels[0]);
  Tensor out = new_floats(weight, {grid.batch, int64_t{grid.height} * grid.width, dimension});
  if (grid.batch == 0) return out;

  Others others{};
  others.grid = grid;
  others.dimension = dimension;
  others.weight = weight.const_data_ptr<float>() + inputs - 2;
  others.weight_stride = inputs;
  others.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  std::vector<Tensor> projections;
  bool wide = are_wide(dimension, {out.const_data_ptr<float>()});
  int64_t column = 0;
  for (size_t l = 0; l < levels.size(); ++l) {
    const Grid own = grid_of(levels[l]);
    const int64_t channels = levels[l].size(1);
    const Tensor projected = l == 0 ? out : new_floats(weight, {own.pixels(), dimension});
    launch_product(device, "project_levels: multiply",
                   split_level<LevelPixels>(device, levels[l], pool, own.pixels(), channels),
                   split_weight(device, weight, column, channels), 0, projected);
    column += channels;
    if (l == 0) continue;
    others.coarse[others.coarse_count++] = {projected.const_data_ptr<float>(), own.height, own.width};
    wide = wide && are_wide(dimension, {projected.const_data_ptr<float>()});
    projections.push_back(projected);
  }
  with_width(wide, [&](auto width) {
    device.launch("project_levels: add_others", add_others<width>,
                  blocks_for(device, divide_up(grid.pixels(), kThreads / kWarp)), kThreads, 0, others,
                  out.mutable_data_ptr<float>());
  });
  return out;
}

// The gradient on a level's grid, [pixels, dimension].
Tensor gradient_on(const Device& device, const Tensor& gradient, const Grid& fine, const Grid& coarse) {
  const int64_t dimension = gradient.size(2);
  if (fine.height == coarse.height && fine.width == coarse.width) return gradient;
  Tensor carried = new_floats(gradient, {coarse.pixels(), dimension});
  launch_adjoint(device, "project_levels: gather_upsampled", gradient.const_data_ptr<float>(), fine.batch,
                 static_cast<int>(dimension), {fine.height, fine.width}, {coarse.height, coarse.width},
                 carried.mutable_data_ptr<float>());
  return carried;
}

std::tuple<Tensor, Tensor> project_levels_weight_gradient(const Tensor& gradient_given, const Tensors& levels,
                                                          bool pool) {
  check_project_levels_weight_gradient(gradient_given, levels);
  const Device device(gradient_given);
  const Tensor gradient = in_order("project_levels_weight_gradient", "gradient", gradient_given);
  const int dimension = static_cast<int>(gradient.size(2));
  const int64_t inputs = projection_inputs(levels);
  check_cuda_sizes("project_levels_weight_gradient", levels);
  for (const Tensor& level : levels) {
    check_cuda_rows("project_levels_weight_gradient", "channels of a level", level.size(1) + kConstants);
  }
  Tensor weight = torch::stable::new_zeros(gradient, {dimension, inputs});
  Tensor bias = torch::stable::new_zeros(gradient, {dimension});
  if (gradient.size(0) == 0) return {weight, bias};

  int64_t column = 0;
  for (size_t l = 0; l < levels.size(); ++l) {
    const bool finest = l == 0;
    const Grid own = grid_of(levels[l]);
    const int64_t channels = levels[l].size(1);
    const int64_t columns = channels + (finest ? kConstants : 0);
    const Tensor d_out = gradient_on(device, gradient, grid_of(levels[0]), own);
    const SplitTensor a = split_by_group(
        device, gradient, MatrixColumns{d_out.const_data_ptr<float>(), dimension}, dimension, own.pixels());
    const SplitTensor b = split_level<LevelChannels>(device, levels[l], pool, columns, own.pixels());
    const int64_t tiles = divide_up(dimension, Shape::rows) * divide_up(columns, Shape::columns);
    const int64_t groups = groups_of(own.pixels());
    // About two blocks wait for every multiprocessor; a part is worth a thousand pixels at least.
    const int64_t splits = std::clamp<int64_t>(divide_up(2 * device.multiprocessors(), tiles), 1,
                                               std::max<int64_t>(1, groups / 8));
    const int part = static_cast<int>(divide_up(groups, splits));
    const int parts = static_cast<int>(divide_up(groups, part));
    const Tensor sums = new_floats(gradient, {parts, dimension, columns});
    launch_product(device, "project_levels_weight_gradient: multiply", a, b, part, sums);
    device.launch("project_levels_weight_gradient: finish", finish_weight_gradient,
                  blocks_for(device, divide_up(dimension * columns, kThreads)), kThreads, 0,
                  sums.const_data_ptr<float>(), parts, dimension, static_cast<int>(channels), finest, column,
                  inputs, weight.mutable_data_ptr<float>(), bias.mutable_data_ptr<float>());
    column += channels;
  }
  return {weight, bias};
}

// The gradient of one level before the pooling, [batch, level's height, level's width, channels]; `weight`
// holds the level's columns.
Tensor project_levels_level_gradient(const Tensor& gradient_given, const Tensor& weight_given, int64_t height,
                                     int64_t width, int64_t level_height, int64_t level_width) {
  check_project_levels_level_gradient(gradient_given, weight_given, height, width, level_height, level_width);
  const Device device(gradient_given);
  const Tensor gradient = in_order("project_levels_level_gradient", "gradient", gradient_given);
  const Tensor weight = in_order("project_levels_level_gradient", "weight", weight_given);
  const int64_t batch = gradient.size(0);
  const int dimension = static_cast<int>(gradient.size(2));
  const int channels = static_cast<int>(weight.size(1));
  check_cuda_rows("project_levels_level_gradient", "columns of weight", channels);
  Tensor out = new_floats(gradient, {batch, level_height, level_width, channels});
  if (batch == 0) return out;

  const Grid fine{batch, static_cast<int>(height), static_cast<int>(width)};
  const Grid coarse{batch, static_cast<int>(level_height), static_cast<int>(level_width)};
  const Tensor d_out = gradient_on(device, gradient, fine, coarse);
  const MatrixRows pixels{d_out.const_data_ptr<float>(), dimension};
  const MatrixColumns columns{weight.const_data_ptr<float>(), channels};
  launch_product(device, "project_levels_level_gradient: multiply",
                 split_by_group(device, gradient, pixels, coarse.pixels(), dimension),
                 split_by_group(device, weight, columns, channels, dimension), 0, out);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, PYDEFECT_CUDA_KEY, library) {
  library.impl("project_levels", TORCH_BOX(&project_levels));
  library.impl("project_levels_weight_gradient", TORCH_BOX(&project_levels_weight_gradient));
  library.impl("project_levels_level_gradient", TORCH_BOX(&project_levels_level_gradient));
}

}  // namespace
}  // namespace pydefect::cuda
