// The multi-level 1x1 CoordConv on CUDA, forward and backward. A 1x1 convolution commutes with bilinear
// resizing, so every level is multiplied on its own grid, on tensor cores (tile_product.cuh): the coarser
// ones first, and the finest one's product ends in adding their interpolation and the coordinates.
//
// Levels of any format and layout are written as float32 with neighbouring channels first, pooled on the way.
// Memory beyond inputs and outputs: that copy of the levels, the coarser levels' projections, and backward
// the gradient on the coarser grids.
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
#include "tile_product.cuh"

namespace pydefect::cuda {
namespace {

using torch::headeronly::ScalarType;
using Tensors = std::vector<Tensor>;
using Shape = TileShape<2, 4, 4, 4>;

constexpr int kThreads = 256;
constexpr int kMostLevels = 8;
constexpr int kTile = 32;      // pixels and channels that a block of `pack` turns at a time
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

  __device__ float at(const Pixel& pixel, int channel, bool pool) const {
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

// Block (x, y): pixels 32 x.., channels 32 y... Read along what lies together, written along the channels.
// With `constants` three channels follow: those that the bias and the coordinates are multiplied with.
template <class Element>
__global__ void pack(Level<Element> level, bool pool, bool constants, int stride,
                     float* packed) {  // [pixels, stride], zero beyond the channels
  __shared__ float tile[kTile][kTile + 1];
  const int64_t pixels = level.grid.pixels();
  const int64_t first_pixel = int64_t{blockIdx.x} * kTile;
  const int first_channel = blockIdx.y * kTile;
  const bool along_channels = level.channel_stride == 1;
  for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
    const int pixel_offset = along_channels ? i / kTile : i % kTile;
    const int channel_offset = along_channels ? i % kTile : i / kTile;
    const int64_t index = first_pixel + pixel_offset;
    const int channel = first_channel + channel_offset;
    if (index >= pixels) continue;
    const Pixel pixel(level.grid, index);
    const int constant = constants ? channel - level.channels : -1;
    float value = 0.0f;
    if (channel < level.channels) value = level.at(pixel, channel, pool);
    if (constant == 0) value = 1.0f;
    if (constant == 1) value = coordinate(pixel.y, level.grid.height);
    if (constant == 2) value = coordinate(pixel.x, level.grid.width);
    tile[pixel_offset][channel_offset] = value;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
    const int64_t index = first_pixel + i / kTile;
    const int channel = first_channel + i % kTile;
    if (index < pixels && channel < stride) packed[index * stride + channel] = tile[i / kTile][i % kTile];
  }
}

// Columns first_column.. of a matrix, with zeros up to the stride.
__global__ void pack_columns(const float* matrix,  // [rows, columns]
                             int64_t rows, int64_t columns, int64_t first_column, int count, int stride,
                             float* packed) {  // [rows, stride]
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < rows * stride;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t column = i % stride;
    packed[i] = column < count ? matrix[i / stride * columns + first_column + column] : 0.0f;
  }
}

// The gradient carried to a coarser grid: every output pixel's goes to the pixels that it was made of.
__global__ void carry_gradient(const float* gradient,  // [batch * height * width, dimension]
                               Grid fine, Grid coarse, int dimension, int stride,
                               float* carried) {  // [coarse pixels, stride]
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < coarse.pixels() * stride;
       i += int64_t{gridDim.x} * kThreads) {
    const Pixel pixel(coarse, i / stride);
    const int d = static_cast<int>(i % stride);
    float sum = 0.0f;
    if (d < dimension) {
      const Reach rows = reach(pixel.y, coarse.height, fine.height);
      const Reach columns = reach(pixel.x, coarse.width, fine.width);
      for (int y = rows.first; y < rows.end; ++y) {
        const float row_weight = weight_of<float>(pixel.y, y, coarse.height, fine.height);
        if (row_weight == 0.0f) continue;
        for (int x = columns.first; x < columns.end; ++x) {
          const float weight = row_weight * weight_of<float>(pixel.x, x, coarse.width, fine.width);
          if (weight == 0.0f) continue;
          sum += weight * gradient[((pixel.image * fine.height + y) * fine.width + x) * dimension + d];
        }
      }
    }
    carried[i] = sum;
  }
}

// --- Products
// ---------------------------------------------------------------------------------------------------

// Writes the product as it is; of a part of the depth, into its own matrix.
struct Store {
  float* to;  // [parts, rows, stride]
  int64_t rows;
  int64_t stride;

  __device__ void operator()(int64_t row, int column, float value, int part) const {
    to[(part * rows + row) * stride + column] = value;
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

  __device__ void operator()(int64_t row, int column, float value, int) const {
    const Pixel pixel(grid, row);
    float sum = bias == nullptr ? 0.0f : bias[column];
    sum += coordinate(pixel.y, grid.height) * weight[column * weight_stride];
    sum += coordinate(pixel.x, grid.width) * weight[column * weight_stride + 1];
    for (int l = 0; l < coarse_count; ++l) {
      const CoarseLevel& level = coarse[l];
      const Between<float> y = between<float>(pixel.y, level.height, grid.height);
      const Between<float> x = between<float>(pixel.x, level.width, grid.width);
      // A neighbour without weight is not read: it may be NaN.
      const auto add = [&](int from_y, int from_x, float weight) {
        if (weight == 0.0f) return;
        const int64_t at = (pixel.image * level.height + from_y) * level.width + from_x;
        sum += weight * level.projected[at * dimension + column];
      };
      add(y.low, x.low, y.low_weight * x.low_weight);
      add(y.low, x.high, y.low_weight * x.high_weight);
      add(y.high, x.low, y.high_weight * x.low_weight);
      add(y.high, x.high, y.high_weight * x.high_weight);
    }
    out[row * dimension + column] = value + sum;
  }
};

struct Matrix {
  const float* data;
  int64_t stride;
  int64_t count;  // vectors
};

template <Layout layout>
__device__ Vectors vectors_from(const Matrix& matrix, int64_t first) {
  const float* const data = matrix.data + (layout == Layout::kAlongDepth ? first * matrix.stride : first);
  const int64_t left = matrix.count - first;
  return {data, matrix.stride, static_cast<int>(left < kDimensionLimit ? left : kDimensionLimit),
          Vectors::is_aligned(data, matrix.stride)};
}

// Block (x, y, z): rows x, columns y of a's vectors times b's, over the z-th part of the depth.
template <Layout a_layout, Layout b_layout, class Finish>
__global__ void __launch_bounds__(Shape::threads)
    multiply(Matrix a, Matrix b, int depth, int part, Finish finish) {
  using Product = TileProduct<Shape, a_layout, b_layout>;
  float* const shared = reinterpret_cast<float*>(dynamic_shared_memory());
  const int64_t first_row = int64_t{blockIdx.x} * Shape::rows;
  const int first_column = blockIdx.y * Shape::columns;
  const int begin = blockIdx.z * part;
  typename Product::Sums sums;
  Product::multiply(vectors_from<a_layout>(a, first_row), vectors_from<b_layout>(b, first_column), begin,
                    min(begin + part, depth), shared, sums);
#pragma unroll
  for (int r = 0; r < Shape::row_tiles; ++r) {
#pragma unroll
    for (int c = 0; c < Shape::column_tiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = first_row + Shape::row(r, i);
        const int column = first_column + Shape::column(c, i);
        if (row < a.count && column < b.count) finish(row, column, sums[r][c][i], blockIdx.z);
      }
    }
  }
}

template <Layout a_layout, Layout b_layout, class Finish>
void launch_product(const Device& device, const char* name, const Matrix& a, const Matrix& b, int depth,
                    int part, const Finish& finish) {
  device.launch(
      name, multiply<a_layout, b_layout, Finish>,
      dim3(divide_up(a.count, Shape::rows), divide_up(b.count, Shape::columns), divide_up(depth, part)),
      Shape::threads, TileProduct<Shape, a_layout, b_layout>::shared_bytes, a, b, depth, part, finish);
}

// Adds up the parts and writes the columns where they belong: a level's channels into the weight's gradient,
// of the finest level also the constants' into the bias's and the coordinates'.
__global__ void finish_weight_gradient(const float* parts,  // [part_count, dimension, stride]
                                       int part_count, int dimension, int stride, int channels,
                                       bool constants, int64_t first_column, int64_t inputs,
                                       float* weight,  // [dimension, inputs]
                                       float* bias) {  // [dimension]
  const int columns = channels + (constants ? kConstants : 0);
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < int64_t{dimension} * columns;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t d = i / columns;
    const int column = static_cast<int>(i % columns);
    float sum = 0.0f;
    for (int part = 0; part < part_count; ++part) {
      sum += parts[(static_cast<int64_t>(part) * dimension + d) * stride + column];
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

struct Packed {
  Tensor values;  // [pixels, stride]
  Grid grid;
  int channels;

  Matrix matrix() const { return {values.const_data_ptr<float>(), values.size(1), values.size(0)}; }
};

template <class Element>
void launch_pack(const Device& device, const Tensor& level, bool pool, bool constants, const Tensor& to) {
  const Grid grid = grid_of(level);
  const Level<Element> view{static_cast<const Element*>(level.const_data_ptr()),
                            grid,
                            static_cast<int>(level.size(1)),
                            level.stride(0),
                            channel_stride(level),
                            level.stride(2),
                            level.stride(3)};
  device.launch("project_levels: pack", pack<Element>,
                dim3(divide_up(grid.pixels(), kTile), divide_up(to.size(1), kTile)), kThreads, 0, view, pool,
                constants, to.size(1), to.mutable_data_ptr<float>());
}

Packed packed(const Device& device, const Tensor& level, bool pool, bool constants) {
  const Grid grid = grid_of(level);
  const int64_t channels = level.size(1) + (constants ? kConstants : 0);
  const Tensor values = new_floats(level, {grid.pixels(), round_up(channels, 4)});
  if (level.scalar_type() == ScalarType::BFloat16) {
    launch_pack<__nv_bfloat16>(device, level, pool, constants, values);
  } else if (level.scalar_type() == ScalarType::Half) {
    launch_pack<__half>(device, level, pool, constants, values);
  } else {
    launch_pack<float>(device, level, pool, constants, values);
  }
  return {values, grid, static_cast<int>(level.size(1))};
}

// [rows, count rounded up to 4]
Tensor packed_columns(const Device& device, const Tensor& matrix, int64_t first_column, int64_t count) {
  Tensor result = new_floats(matrix, {matrix.size(0), round_up(count, 4)});
  device.launch("project_levels: pack_columns", pack_columns,
                blocks_for(device, divide_up(result.numel(), kThreads)), kThreads, 0,
                matrix.const_data_ptr<float>(), matrix.size(0), matrix.size(1), first_column, count,
                result.size(1), result.mutable_data_ptr<float>());
  return result;
}

Matrix rows_of(const Tensor& matrix) {
  return {matrix.const_data_ptr<float>(), matrix.size(1), matrix.size(0)};
}

constexpr Layout kAlong = Layout::kAlongDepth;
constexpr Layout kAcross = Layout::kAcrossDepth;

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
    const Packed features = packed(device, levels[l], pool, false);
    const Tensor part = packed_columns(device, weight, column, features.channels);
    const Tensor projected = new_floats(weight, {features.grid.pixels(), dimension});
    launch_product<kAlong, kAlong>(
        device, "project_levels: coarse level", features.matrix(), rows_of(part), features.channels,
        features.channels, Store{projected.mutable_data_ptr<float>(), features.grid.pixels(), dimension});
    fuse.coarse[fuse.coarse_count++] = {projected.const_data_ptr<float>(), features.grid.height,
                                        features.grid.width};
    projections.push_back(projected);
    column += features.channels;
  }
  const Packed finest = packed(device, levels[0], pool, false);
  const Tensor part = packed_columns(device, weight, 0, finest.channels);
  launch_product<kAlong, kAlong>(device, "project_levels: finest level", finest.matrix(), rows_of(part),
                                 finest.channels, finest.channels, fuse);
  return out;
}

// The gradient on a level's grid, [pixels, stride].
Matrix gradient_on(const Device& device, const Tensor& gradient, const Grid& fine, const Grid& coarse,
                   std::optional<Tensor>& keep) {
  const int64_t dimension = gradient.size(2);
  if (fine.height == coarse.height && fine.width == coarse.width) {
    return {gradient.const_data_ptr<float>(), dimension, fine.pixels()};
  }
  keep = new_floats(gradient, {coarse.pixels(), round_up(dimension, 4)});
  device.launch("project_levels: carry_gradient", carry_gradient,
                blocks_for(device, divide_up(keep->numel(), kThreads)), kThreads, 0,
                gradient.const_data_ptr<float>(), fine, coarse, dimension, keep->size(1),
                keep->mutable_data_ptr<float>());
  return rows_of(*keep);
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
    const Packed features = packed(device, levels[l], pool, finest);
    std::optional<Tensor> carried;
    Matrix d_out = gradient_on(device, gradient, grid_of(levels[0]), features.grid, carried);
    Matrix values = features.matrix();
    const int pixels = static_cast<int>(features.grid.pixels());
    d_out.count = dimension;  // the pixels are the depth
    values.count = values.stride;
    const int64_t tiles = divide_up(dimension, Shape::rows) * divide_up(values.count, Shape::columns);
    // About two blocks wait for every multiprocessor; a part is worth a thousand pixels at least.
    const int64_t splits = std::clamp<int64_t>(divide_up(2 * device.multiprocessors(), tiles), 1,
                                               std::max<int64_t>(1, pixels / 1024));
    const int part = static_cast<int>(round_up(divide_up(pixels, splits), kSlice));
    const int parts = static_cast<int>(divide_up(pixels, part));
    const Tensor sums = new_floats(gradient, {parts, dimension, values.stride});
    launch_product<kAcross, kAcross>(device, "project_levels_weight_gradient: multiply", d_out, values,
                                     pixels, part,
                                     Store{sums.mutable_data_ptr<float>(), dimension, values.stride});
    device.launch("project_levels_weight_gradient: finish", finish_weight_gradient,
                  blocks_for(device, divide_up(int64_t{dimension} * values.stride, kThreads)), kThreads, 0,
                  sums.const_data_ptr<float>(), parts, dimension, values.stride, features.channels, finest,
                  column, inputs, weight.mutable_data_ptr<float>(), bias.mutable_data_ptr<float>());
    column += features.channels;
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
  std::optional<Tensor> carried;
  const Matrix d_out = gradient_on(device, gradient, fine, coarse, carried);
  const Tensor part = packed_columns(device, weight, 0, channels);
  const Matrix b{part.const_data_ptr<float>(), part.size(1), channels};
  launch_product<kAlong, kAcross>(device, "project_levels_level_gradient: multiply", d_out, b, dimension,
                                  dimension, Store{out.mutable_data_ptr<float>(), coarse.pixels(), channels});
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, PYDEFECT_CUDA_KEY, library) {
  library.impl("project_levels", TORCH_BOX(&project_levels));
  library.impl("project_levels_weight_gradient", TORCH_BOX(&project_levels_weight_gradient));
  library.impl("project_levels_level_gradient", TORCH_BOX(&project_levels_level_gradient));
}

}  // namespace
}  // namespace pydefect::cuda
