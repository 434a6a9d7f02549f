// The multi-level 1x1 CoordConv on CUDA, forward and backward. A 1x1 convolution commutes with bilinear
// resizing, so every level is multiplied on its own grid, on tensor cores (tile_product.cuh): the coarser
// ones first, and the finest one's product ends in adding their interpolation and the coordinates.
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

// The gradient carried to a coarser grid: every output pixel's goes to the pixels that it was made of.
__global__ void carry_gradient(const float* gradient,  // [batch * height * width, dimension]
                               Grid fine, Grid coarse, int dimension,
                               float* carried) {  // [coarse pixels, dimension]
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < coarse.pixels() * dimension;
       i += int64_t{gridDim.x} * kThreads) {
    const Pixel pixel(coarse, i / dimension);
    const int d = static_cast<int>(i % dimension);
    const Reach rows = reach(pixel.y, coarse.height, fine.height);
    const Reach columns = reach(pixel.x, coarse.width, fine.width);
    float sum = 0.0f;
    for (int y = rows.first; y < rows.end; ++y) {
      const float row_weight = weight_of<float>(pixel.y, y, coarse.height, fine.height);
      if (row_weight == 0.0f) continue;
      for (int x = columns.first; x < columns.end; ++x) {
        const float weight = row_weight * weight_of<float>(pixel.x, x, coarse.width, fine.width);
        if (weight == 0.0f) continue;
        sum += weight * gradient[((pixel.image * fine.height + y) * fine.width + x) * dimension + d];
      }
    }
    carried[i] = sum;
  }
}

// --- Products
// ---------------------------------------------------------------------------------------------------

// Where a block's tile of products lies.
struct TilePlace {
  int64_t first_row;
  int64_t first_column;
  int64_t rows;     // of the operand from the first row on
  int64_t columns;  // of the other one
  int part;         // of the depth

  // Calls use(column, product) for this thread's products of half `half` of tile row r.
  template <class Use>
  __device__ void for_each_column(int r, int half, Product::Sums& sums, Use use) const {
#pragma unroll
    for (int c = 0; c < Shape::column_tiles; ++c) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        const int column = Shape::column(c, i);
        if (column < columns) use(static_cast<int>(first_column + column), sums[r][c][i]);
      }
    }
  }

  // Calls use(r, half, row) for this thread's rows.
  template <class Use>
  __device__ void for_each_row(Use use) const {
#pragma unroll
    for (int r = 0; r < Shape::row_tiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = Shape::row(r, 2 * half);
        if (row < rows) use(r, half, first_row + row);
      }
    }
  }
};

// Writes the products as they are; of a part of the depth, into its own matrix.
struct Store {
  float* to;  // [parts, rows, columns]
  int64_t rows;
  int64_t columns;

  __device__ void operator()(const TilePlace& place, Product::Sums& sums) const {
    place.for_each_row([&](int r, int half, int64_t row) {
      float* const out = to + (place.part * rows + row) * columns;
      place.for_each_column(r, half, sums, [&](int column, float value) { out[column] = value; });
    });
  }
};

struct CoarseLevel {
  const float* projected;  // [pixels, dimension]
  int height;
  int width;
};

// Adds the coarser levels' interpolation, the coordinates and the bias.
struct Fuse {
  float* out;  // [pixels, dimension]
  Grid grid;
  int dimension;
  const float* weight;  // the row coordinate's column of it; the next one is the column coordinate's
  int64_t weight_stride;
  const float* bias;  // [dimension] or null
  CoarseLevel coarse[kMostLevels];
  int coarse_count;

  __device__ void operator()(const TilePlace& place, Product::Sums& sums) const {
    for (int l = 0; l < coarse_count; ++l) {
      const CoarseLevel& level = coarse[l];
      place.for_each_row([&](int r, int half, int64_t row) {
        const Pixel pixel(grid, row);
        const Between<float> y = between<float>(pixel.y, level.height, grid.height);
        const Between<float> x = between<float>(pixel.x, level.width, grid.width);
        const int64_t image = pixel.image * level.height;
        // A neighbour without weight is not read: it may be NaN.
        const auto add = [&](int from_y, int from_x, float weight) {
          if (weight == 0.0f) return;
          const float* const from = level.projected + ((image + from_y) * level.width + from_x) * dimension;
          place.for_each_column(r, half, sums,
                                [&](int column, float& sum) { sum = fmaf(weight, from[column], sum); });
        };
        add(y.low, x.low, y.low_weight * x.low_weight);
        add(y.low, x.high, y.low_weight * x.high_weight);
        add(y.high, x.low, y.high_weight * x.low_weight);
        add(y.high, x.high, y.high_weight * x.high_weight);
      });
    }
    place.for_each_row([&](int r, int half, int64_t row) {
      const Pixel pixel(grid, row);
      const float y = coordinate(pixel.y, grid.height);
      const float x = coordinate(pixel.x, grid.width);
      place.for_each_column(r, half, sums, [&](int column, float value) {
        const float* const factors = weight + column * weight_stride;
        const float constant = bias == nullptr ? 0.0f : bias[column];
        out[row * dimension + column] = value + fmaf(x, factors[1], fmaf(y, factors[0], constant));
      });
    });
  }
};

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
template <class Finish>
__global__ void __launch_bounds__(Shape::threads)
    multiply(Operand a, Operand b, int part, const __grid_constant__ Finish finish) {
  const int64_t first_row = int64_t{blockIdx.x} * Shape::rows;
  const int64_t first_column = int64_t{blockIdx.y} * Shape::columns;
  const int begin = blockIdx.z * part;
  const Operand own_a(a, first_row);
  const Operand own_b(b, first_column);
  Product::Sums sums;
  Product::multiply_groups(own_a.rows, own_a.scales, own_b.rows, own_b.scales, begin, begin + part,
                           dynamic_shared_memory(), sums);
  finish(TilePlace{first_row, first_column, own_a.rows.count, own_b.rows.count, static_cast<int>(blockIdx.z)},
         sums);
}

// `part` groups a block; 0: all.
template <class Finish>
void launch_product(const Device& device, const char* name, const SplitTensor& a, const SplitTensor& b,
                    int part, const Finish& finish) {
  const int64_t groups = groups_of(a.width);
  const int64_t each = part == 0 ? groups : part;
  const int64_t rows = a.parts.size(0);
  const int64_t columns = b.parts.size(0);
  device.launch(
      name, multiply<Finish>,
      dim3(divide_up(rows, Shape::rows), divide_up(columns, Shape::columns), divide_up(groups, each)),
      Shape::threads, Product::shared_bytes, Operand(a), Operand(b), static_cast<int>(each), finish);
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
  const Grid grid = grid_of(levels[0]);
  Tensor out = new_floats(weight, {grid.batch, int64_t{grid.height} * grid.width, dimension});
  if (grid.batch == 0) return out;

  Fuse fuse{};
  fuse.out = out.mutable_data_ptr<float>();
  fuse.grid = grid;
  fuse.dimension = dimension;
  fuse.weight = weight.const_data_ptr<float>() + inputs - 2;
  fuse.weight_stride = inputs;
  fuse.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  std::vector<Tensor> projections;
  int64_t column = levels[0].size(1);
  for (size_t l = 1; l < levels.size(); ++l) {
    const Grid own = grid_of(levels[l]);
    const int64_t channels = levels[l].size(1);
    const SplitTensor features = split_level<LevelPixels>(device, levels[l], pool, own.pixels(), channels);
    const Tensor projected = new_floats(weight, {own.pixels(), dimension});
    launch_product(device, "project_levels: coarse level", features,
                   split_weight(device, weight, column, channels), 0,
                   Store{projected.mutable_data_ptr<float>(), own.pixels(), dimension});
    fuse.coarse[fuse.coarse_count++] = {projected.const_data_ptr<float>(), own.height, own.width};
    projections.push_back(projected);
    column += channels;
  }
  const int64_t channels = levels[0].size(1);
  launch_product(device, "project_levels: finest level",
                 split_level<LevelPixels>(device, levels[0], pool, grid.pixels(), channels),
                 split_weight(device, weight, 0, channels), 0, fuse);
  return out;
}

// The gradient on a level's grid, [pixels, dimension].
Tensor gradient_on(const Device& device, const Tensor& gradient, const Grid& fine, const Grid& coarse) {
  const int64_t dimension = gradient.size(2);
  if (fine.height == coarse.height && fine.width == coarse.width) return gradient;
  Tensor carried = new_floats(gradient, {coarse.pixels(), dimension});
  device.launch("project_levels: carry_gradient", carry_gradient,
                blocks_for(device, divide_up(carried.numel(), kThreads)), kThreads, 0,
                gradient.const_data_ptr<float>(), fine, coarse, dimension, carried.mutable_data_ptr<float>());
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
    launch_product(device, "project_levels_weight_gradient: multiply", a, b, part,
                   Store{sums.mutable_data_ptr<float>(), dimension, columns});
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
  Tensor out = new_floats(gradient, {batch, level_height, level_width, channels});
  if (batch == 0) return out;

  const Grid fine{batch, static_cast<int>(height), static_cast<int>(width)};
  const Grid coarse{batch, static_cast<int>(level_height), static_cast<int>(level_width)};
  const Tensor d_out = gradient_on(device, gradient, fine, coarse);
  const MatrixRows pixels{d_out.const_data_ptr<float>(), dimension};
  const MatrixColumns columns{weight.const_data_ptr<float>(), channels};
  launch_product(device, "project_levels_level_gradient: multiply",
                 split_by_group(device, gradient, pixels, coarse.pixels(), dimension),
                 split_by_group(device, weight, columns, channels, dimension), 0,
                 Store{out.mutable_data_ptr<float>(), coarse.pixels(), channels});
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, PYDEFECT_CUDA_KEY, library) {
  library.impl("project_levels", TORCH_BOX(&project_levels));
  library.impl("project_levels_weight_gradient", TORCH_BOX(&project_levels_weight_gradient));
  library.impl("project_levels_level_gradient", TORCH_BOX(&project_levels_level_gradient));
}

}  // namespace
}  // namespace pydefect::cuda
