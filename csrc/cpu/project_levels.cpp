// The multi-level 1x1 CoordConv on the CPU, forward and backward.
//
// A 1x1 convolution commutes with bilinear resizing, so every level is multiplied on its own grid. Forward, a
// thread walks down the output's rows and keeps the few projected rows of the coarser levels that it needs;
// their interpolation is what a register tile starts with. Backward, the gradient is carried to the coarser
// grids row by row and multiplied with the levels there.
//
// Every output row, and every row of the weight's gradient, is computed by the same operations in the same
// order wherever the threads' shares begin and end.
#include "kernels/project_levels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../checks.h"
#include "aligned.h"
#include "bilinear.h"
#include "dispatch.h"
#include "rounding.h"

namespace pydefect::cpu {
namespace {

using torch::headeronly::ScalarType;
using Tensors = std::vector<Tensor>;

constexpr int64_t kDepth = ProjectLevelsKernel::depth;
// Pixels of a coarser level that are projected at a time: enough tiles to make use of a weight panel.
constexpr int64_t kPixelsAtOnce = 56;
// Pixels that are summed in registers before they join the weight's gradient.
constexpr int64_t kPixelsPerSum = 256;

// Levels are taken as they lie in memory as long as a pixel's channels are neighbours.
Tensors with_neighbouring_channels(const char* op, const Tensors& given) {
  Tensors levels;
  for (size_t i = 0; i < given.size(); ++i) {
    const bool neighbours = given[i].size(1) == 1 || given[i].stride(1) == 1;
    levels.push_back(
        neighbours ? given[i]
                   : in_order(op, level_name(i), given[i], torch::headeronly::MemoryFormat::ChannelsLast));
  }
  return levels;
}

Element element_of(const Tensor& level) {
  if (level.scalar_type() == ScalarType::BFloat16) return Element::bfloat16;
  if (level.scalar_type() == ScalarType::Half) return Element::float16;
  return Element::float32;
}

FeatureLevel view(const Tensor& level) {
  return {level.const_data_ptr(), element_of(level), level.size(1),   level.size(2),
          level.size(3),          level.stride(0),   level.stride(2), level.stride(3)};
}

// Row or column coordinate of a pixel: linear in [-1, 1], symmetric in the last bit as torch.linspace is.
float coordinate(int64_t index, int64_t length) {
  if (length == 1) return 0.0f;
  const float step = 2.0f / static_cast<float>(length - 1);
  return index < length / 2 ? -1.0f + step * static_cast<float>(index)
                            : 1.0f - step * static_cast<float>(length - 1 - index);
}

std::vector<float> coordinates(int64_t length) {
  std::vector<float> values(static_cast<size_t>(length));
  for (int64_t i = 0; i < length; ++i) values[static_cast<size_t>(i)] = coordinate(i, length);
  return values;
}

// Where each of an axis's output pixels lies on a coarser level.
struct Axis {
  Axis(int64_t input_size, int64_t output_size) {
    for (int64_t i = 0; i < output_size; ++i) {
      const Between<float> place = between<float>(i, input_size, output_size);
      low.push_back(static_cast<int32_t>(place.low));
      high.push_back(static_cast<int32_t>(place.high));
      low_weight.push_back(place.low_weight);
      high_weight.push_back(place.high_weight);
    }
  }

  Neighbours from(int64_t first) const {
    return {low.data() + first, high.data() + first, low_weight.data() + first, high_weight.data() + first};
  }

  std::vector<int32_t> low;
  std::vector<int32_t> high;
  std::vector<float> low_weight;
  std::vector<float> high_weight;
};

// The transpose of an Axis: which output pixels a coarser level's pixel goes into, a contiguous range for
// each.
class AxisGradient {
 public:
  AxisGradient(int64_t input_size, int64_t output_size)
      : first_(static_cast<size_t>(input_size), 0), weights_(static_cast<size_t>(input_size)) {
    for (int64_t i = 0; i < output_size; ++i) {
      const Between<float> place = between<float>(i, input_size, output_size);
      add(place.low, i, place.low_weight);
      if (place.high_weight != 0.0f) add(place.high, i, place.high_weight);
    }
  }

  int64_t first(int64_t index) const { return first_[static_cast<size_t>(index)]; }
  int64_t count(int64_t index) const {
    return static_cast<int64_t>(weights_[static_cast<size_t>(index)].size());
  }
  const float* weights(int64_t index) const { return weights_[static_cast<size_t>(index)].data(); }

 private:
  void add(int64_t input, int64_t output, float weight) {
    std::vector<float>& weights = weights_[static_cast<size_t>(input)];
    if (weights.empty()) first_[static_cast<size_t>(input)] = output;
    weights.resize(static_cast<size_t>(output - first(input) + 1), 0.0f);
    weights.back() += weight;
  }

  std::vector<int64_t> first_;
  std::vector<std::vector<float>> weights_;
};

struct WeightMatrix {
  const float* data;
  int64_t rows;
  int64_t columns;
};

// Columns first_column.. of the weight, transposed, as panels of the kernel's width:
// [panel][channel][column]. What lies outside the weight is zero.
AlignedBuffer<float> pack_weight(const ProjectLevelsKernel& kernel, const WeightMatrix& weight,
                                 int64_t first_column, int64_t channels) {
  const int64_t depth = round_up(channels, kDepth);
  const int64_t panels = divide_up(weight.rows, kernel.columns);
  AlignedBuffer<float> packed(panels * depth * kernel.columns);
  torch::stable::parallel_for(0, panels, 4, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int64_t block = 0; block < depth; block += kDepth) {
        float* const to = packed.data() + (panel * depth + block) * kernel.columns;
        const int64_t filled = std::min(kDepth, channels - block);
        for (int64_t c = 0; c < kernel.columns; ++c) {
          const int64_t row = panel * kernel.columns + c;
          const float* const from = weight.data + row * weight.columns + first_column + block;
          for (int64_t k = 0; k < kDepth; ++k) {
            to[k * kernel.columns + c] = row < weight.rows && k < filled ? from[k] : 0.0f;
          }
        }
      }
    }
  });
  return packed;
}

// Multiplies packed pixels with every panel; `tiles` holds them tile after tile.
void project_pixels(const ProjectLevelsKernel& kernel, const float* tiles, int64_t pixels,
                    const AlignedBuffer<float>& panels, int64_t depth, int64_t panel_count, float* out,
                    int64_t out_stride) {
  const TileStart zero{};
  for (int64_t panel = 0; panel < panel_count; ++panel) {
    for (int64_t first = 0; first < pixels; first += kernel.rows) {
      const auto count = static_cast<int>(std::min<int64_t>(kernel.rows, pixels - first));
      kernel.project_tile(count, tiles + first * depth, panels.data() + panel * depth * kernel.columns,
                          depth / kDepth, zero, out + first * out_stride + panel * kernel.columns,
                          out_stride);
    }
  }
}

// Pixels first.. of an image as tiles: [tile][block][pixel][channel of the block].
void pack_tiles(const ProjectLevelsKernel& kernel, const FeatureLevel& level, int64_t image, int64_t first,
                int64_t count, bool pool, float* to) {
  const int64_t depth = round_up(level.channels, kDepth);
  for (int64_t i = 0; i < count; i += kernel.rows) {
    const int64_t filled = std::min<int64_t>(kernel.rows, count - i);
    kernel.pack_pixels(level, image, first + i, filled, pool, kDepth, to + i * depth, filled * kDepth);
  }
}

struct PackedLevel {
  FeatureLevel level;
  AlignedBuffer<float> weight;

  int64_t depth() const { return round_up(level.channels, kDepth); }
};

struct Projection {
  const ProjectLevelsKernel& kernel;
  std::vector<PackedLevel> levels;
  std::vector<Axis> row_axes;
  std::vector<Axis> column_axes;
  AlignedBuffer<float> constants;  // [3][columns]: bias, row coordinate's weight, column coordinate's
  std::vector<float> row_positions;
  std::vector<float> column_positions;
  bool pool;
  int64_t dimension;
  float* out;

  int64_t height() const { return levels[0].level.height; }
  int64_t width() const { return levels[0].level.width; }
  int64_t panels() const { return divide_up(dimension, kernel.columns); }
  int64_t columns() const { return panels() * kernel.columns; }
};

// A coarser level as one thread sees it: its last few projected rows, and their interpolation to the output
// row at hand.
class CoarseRows {
 public:
  CoarseRows(const Projection& projection, size_t index)
      : projection_(projection),
        packed_(projection.levels[index]),
        rows_(projection.row_axes[index]),
        step_(std::max<int64_t>(1, kPixelsAtOnce / packed_.level.width)),
        tiles_(step_at_most() * packed_.level.width * packed_.depth()),
        projected_(step_at_most() * row_size()),
        line_(row_size()) {}

  void begin_image() { end_ = 0; }

  // Interpolates to output row y; rows of the level past `last` will not be asked for in this image.
  void move_to(int64_t image, int64_t y, int64_t last) {
    const auto at = static_cast<size_t>(y);
    const int64_t low = rows_.low[at];
    const int64_t high = rows_.high[at];
    if (high >= end_) project(image, std::max(end_, low), std::min(low + step_, last) + 1);
    const float weights[2] = {rows_.low_weight[at], rows_.high_weight[at]};
    if (weights[1] == 0.0f || low == high) {
      const float both = weights[0] + (low == high ? weights[1] : 0.0f);
      combine(row(low), 0, &both, 1);
    } else {
      combine(row(low), row(high) - row(low), weights, 2);
    }
  }

  const float* line() const { return line_.data(); }

 private:
  int64_t step_at_most() const { return step_ + 1; }
  int64_t row_size() const { return packed_.level.width * projection_.columns(); }
  // The last step + 1 rows stay: those of a step, and the one before them.
  float* row(int64_t index) { return projected_.data() + index % step_at_most() * row_size(); }

  void combine(const float* from, int64_t stride, const float* weights, int64_t count) {
    projection_.kernel.weighted_rows(from, stride, weights, count, row_size(), line_.data());
  }

  void project(int64_t image, int64_t first, int64_t end) {
    const int64_t width = packed_.level.width;
    const int64_t columns = projection_.columns();
    while (first < end) {
      // Rows that lie one after another in the ring are projected together.
      const int64_t together = std::min(end - first, step_at_most() - first % step_at_most());
      const int64_t pixels = together * width;
      pack_tiles(projection_.kernel, packed_.level, image, first * width, pixels, projection_.pool,
                 tiles_.data());
      project_pixels(projection_.kernel, tiles_.data(), pixels, packed_.weight, packed_.depth(),
                     projection_.panels(), row(first), columns);
      first += together;
    }
    end_ = end;
  }

  const Projection& projection_;
  const PackedLevel& packed_;
  const Axis& rows_;
  int64_t step_;
  AlignedBuffer<float> tiles_;
  AlignedBuffer<float> projected_;
  AlignedBuffer<float> line_;
  int64_t end_ = 0;
};

// Writes the output rows begin..end, counted over all images.
void project_rows(const Projection& p, int64_t begin, int64_t end) {
  const ProjectLevelsKernel& kernel = p.kernel;
  const PackedLevel& finest = p.levels[0];
  const int64_t depth = finest.depth();
  std::vector<CoarseRows> coarse;
  coarse.reserve(p.levels.size());
  for (size_t l = 1; l < p.levels.size(); ++l) coarse.emplace_back(p, l);
  std::vector<CoarseLine> lines(coarse.size());
  AlignedBuffer<float> tiles(p.width() * depth);
  AlignedBuffer<float> constant(p.columns());
  AlignedBuffer<float> part_of_panel(int64_t{kernel.rows} * kernel.columns);

  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / p.height();
    const int64_t y = row % p.height();
    const int64_t last_y = std::min(end - image * p.height(), p.height()) - 1;
    for (size_t l = 0; l < coarse.size(); ++l) {
      if (row == begin || y == 0) coarse[l].begin_image();
      coarse[l].move_to(image, y, p.row_axes[l + 1].high[static_cast<size_t>(last_y)]);
    }
    const float weights[2] = {1.0f, p.row_positions[static_cast<size_t>(y)]};
    kernel.weighted_rows(p.constants.data(), p.columns(), weights, 2, p.columns(), constant.data());
    pack_tiles(kernel, finest.level, image, y * p.width(), p.width(), p.pool, tiles.data());

    float* const out_row = p.out + row * p.width() * p.dimension;
    for (int64_t panel = 0; panel < p.panels(); ++panel) {
      const int64_t column = panel * kernel.columns;
      const int64_t filled = std::min<int64_t>(kernel.columns, p.dimension - column);
      for (int64_t x = 0; x < p.width(); x += kernel.rows) {
        const auto count = static_cast<int>(std::min<int64_t>(kernel.rows, p.width() - x));
        for (size_t l = 0; l < coarse.size(); ++l) {
          lines[l] = {coarse[l].line() + column, p.columns(), p.column_axes[l + 1].from(x)};
        }
        const TileStart start{constant.data() + column, p.constants.data() + 2 * p.columns() + column,
                              p.column_positions.data() + x, lines.data(),
                              static_cast<int64_t>(lines.size())};
        const bool whole = filled == kernel.columns;
        float* const out = out_row + x * p.dimension + column;
        kernel.project_tile(count, tiles.data() + x * depth,
                            finest.weight.data() + panel * depth * kernel.columns, depth / kDepth, start,
                            whole ? out : part_of_panel.data(), whole ? p.dimension : kernel.columns);
        if (whole) continue;
        for (int64_t r = 0; r < count; ++r) {
          const float* const from = part_of_panel.data() + r * kernel.columns;
          std::copy(from, from + filled, out + r * p.dimension);
        }
      }
    }
  }
}

Tensor project_levels(const Tensors& levels_given, const Tensor& weight_given,
                      const std::optional<Tensor>& bias_given, bool pool) {
  check_project_levels(levels_given, weight_given, bias_given);
  const Tensors levels = with_neighbouring_channels("project_levels", levels_given);
  const Tensor weight = in_order("project_levels", "weight", weight_given);
  const int64_t batch = levels[0].size(0);
  const int64_t dimension = weight.size(0);
  const int64_t inputs = weight.size(1);
  Tensor out = torch::stable::new_empty(weight, {batch, levels[0].size(2) * levels[0].size(3), dimension});
  if (batch == 0) return out;

  const ProjectLevelsKernel& kernel = PYDEFECT_ACTIVE_KERNEL(project_levels_kernel);
  const WeightMatrix matrix{weight.const_data_ptr<float>(), dimension, inputs};
  Projection p{kernel,
               {},
               {},
               {},
               AlignedBuffer<float>(3 * round_up(dimension, kernel.columns)),
               coordinates(levels[0].size(2)),
               coordinates(levels[0].size(3)),
               pool,
               dimension,
               out.mutable_data_ptr<float>()};
  int64_t column = 0;
  for (const Tensor& level : levels) {
    p.levels.push_back({view(level), pack_weight(kernel, matrix, column, level.size(1))});
    p.row_axes.emplace_back(level.size(2), levels[0].size(2));
    p.column_axes.emplace_back(level.size(3), levels[0].size(3));
    column += level.size(1);
  }
  std::fill(p.constants.data(), p.constants.data() + 3 * p.columns(), 0.0f);
  std::optional<Tensor> bias;
  if (bias_given) bias = in_order("project_levels", "bias", *bias_given);
  for (int64_t d = 0; d < dimension; ++d) {
    p.constants.data()[d] = bias ? bias->const_data_ptr<float>()[d] : 0.0f;
    p.constants.data()[p.columns() + d] = matrix.data[d * inputs + column];
    p.constants.data()[2 * p.columns() + d] = matrix.data[d * inputs + column + 1];
  }
  torch::stable::parallel_for(0, batch * p.height(), 1,
                              [&](int64_t begin, int64_t end) { project_rows(p, begin, end); });
  return out;
}

// One level in the weight's gradient. The rows of the weight are dealt out to tiles, and a thread has some of
// the tiles: everything here is addressed by tile, or by the columns of the output gradient that a tile
// stands for.
struct LevelSums {
  FeatureLevel level;
  AxisGradient rows;
  AxisGradient columns;
  bool on_finest_grid;
  int64_t panels;
  int64_t capacity;                // pixels of a tile's buffer
  AlignedBuffer<float> features;   // [panel][pixel of the image][column]
  AlignedBuffer<float> gradients;  // [tile][capacity][row of the tile]
  AlignedBuffer<float> sums;       // [tile][panel][row of the tile][column]
};

struct WeightGradient {
  const ProjectLevelsKernel& kernel;
  const float* gradient;  // [batch * height * width][dimension]
  int64_t dimension;
  int64_t height;
  int64_t width;
  std::vector<float> row_positions;
  std::vector<float> column_positions;
  std::vector<float> ones;
  std::vector<LevelSums> levels;
  AlignedBuffer<float> interpolated_rows;  // [width][dimension]
  AlignedBuffer<float> row_buffer;         // [dimension]
  AlignedBuffer<float> constants;          // [3][dimension]: as in Projection

  const float* at(int64_t image, int64_t y) const {
    return gradient + (image * height + y) * width * dimension;
  }
};

// The walk of one thread's tiles down an image.
class WeightGradientWalk {
 public:
  WeightGradientWalk(WeightGradient& gradient, int64_t image, int64_t first_tile, int64_t end_tile)
      : g_(gradient),
        image_(image),
        first_tile_(first_tile),
        end_tile_(end_tile),
        column_(first_tile * gradient.kernel.rows),
        width_(std::min(end_tile * gradient.kernel.rows, gradient.dimension) - column_),
        places_(gradient.levels.size()) {}

  void run() {
    for (int64_t y = 0; y < g_.height; ++y) {
      add_constants(y);
      for (size_t l = 0; l < g_.levels.size(); ++l) add_rows_up_to(l, y);
    }
    for (size_t l = 0; l < g_.levels.size(); ++l) multiply(l);
  }

 private:
  // Pixels multiplied already, pixels waiting in the tiles' buffers.
  struct Place {
    int64_t done = 0;
    int64_t waiting = 0;
  };

  void add_constants(int64_t y) {
    float* const sum = g_.row_buffer.data() + column_;
    float* const bias = g_.constants.data() + column_;
    float* const row_weight = bias + g_.dimension;
    float* const column_weight = row_weight + g_.dimension;
    const float* const from = g_.at(image_, y) + column_;
    const float position = g_.row_positions[static_cast<size_t>(y)];
    g_.kernel.weighted_rows(from, g_.dimension, g_.ones.data(), g_.width, width_, sum);
    for (int64_t d = 0; d < width_; ++d) {
      bias[d] += sum[d];
      row_weight[d] += position * sum[d];
    }
    g_.kernel.weighted_rows(from, g_.dimension, g_.column_positions.data(), g_.width, width_, sum);
    for (int64_t d = 0; d < width_; ++d) column_weight[d] += sum[d];
  }

  // Takes in the rows of a level whose gradient depends on the output's rows up to y only.
  void add_rows_up_to(size_t index, int64_t y) {
    LevelSums& sums = g_.levels[index];
    Place& place = places_[index];
    for (;;) {
      const int64_t row = (place.done + place.waiting) / sums.level.width;
      if (row == sums.level.height || sums.rows.first(row) + sums.rows.count(row) - 1 > y) return;
      if (place.waiting + sums.level.width > sums.capacity) multiply(index);
      add_row(sums, place, row);
      place.waiting += sums.level.width;
    }
  }

  void add_row(LevelSums& sums, const Place& place, int64_t row) {
    const int64_t tile_stride = sums.capacity * g_.kernel.rows;
    float* const to = sums.gradients.data() + first_tile_ * tile_stride + place.waiting * g_.kernel.rows;
    const auto deal = [&](const float* from, int64_t x) {
      g_.kernel.deal_row(from, width_, to + x * g_.kernel.rows, tile_stride);
    };
    if (sums.on_finest_grid) {
      const float* const from = g_.at(image_, row) + column_;
      for (int64_t x = 0; x < g_.width; ++x) deal(from + x * g_.dimension, x);
      return;
    }
    float* const interpolated = g_.interpolated_rows.data() + column_;
    const float* const from = g_.at(image_, sums.rows.first(row)) + column_;
    for (int64_t x = 0; x < g_.width; ++x) {
      g_.kernel.weighted_rows(from + x * g_.dimension, g_.width * g_.dimension, sums.rows.weights(row),
                              sums.rows.count(row), width_, interpolated + x * g_.dimension);
    }
    float* const pixel = g_.row_buffer.data() + column_;
    for (int64_t x = 0; x < sums.level.width; ++x) {
      g_.kernel.weighted_rows(interpolated + sums.columns.first(x) * g_.dimension, g_.dimension,
                              sums.columns.weights(x), sums.columns.count(x), width_, pixel);
      deal(pixel, x);
    }
  }

  // Multiplies the waiting pixels' gradients with their features.
  void multiply(size_t index) {
    LevelSums& sums = g_.levels[index];
    Place& place = places_[index];
    const int64_t columns = g_.kernel.columns;
    const int64_t tile_size = g_.kernel.rows * columns;
    for (int64_t panel = 0; panel < sums.panels; ++panel) {
      const float* const features =
          sums.features.data() + (panel * sums.level.pixels() + place.done) * columns;
      for (int64_t tile = first_tile_; tile < end_tile_; ++tile) {
        g_.kernel.accumulate_tile(sums.gradients.data() + tile * sums.capacity * g_.kernel.rows, features,
                                  place.waiting, sums.sums.data() + (tile * sums.panels + panel) * tile_size);
      }
    }
    place.done += place.waiting;
    place.waiting = 0;
  }

  WeightGradient& g_;
  int64_t image_;
  int64_t first_tile_;
  int64_t end_tile_;
  int64_t column_;
  int64_t width_;
  std::vector<Place> places_;
};

void pack_features(const WeightGradient& g, LevelSums& sums, int64_t image, bool pool) {
  torch::stable::parallel_for(0, sums.level.pixels(), 64, [&](int64_t begin, int64_t end) {
    g.kernel.pack_pixels(sums.level, image, begin, end - begin, pool, g.kernel.columns,
                         sums.features.data() + begin * g.kernel.columns,
                         sums.level.pixels() * g.kernel.columns);
  });
}

// Writes the sums of the rows of one tile into the gradient [dimension][inputs].
void write_tile(const WeightGradient& g, int64_t tile, float* weight, int64_t inputs) {
  const int64_t columns = g.kernel.columns;
  for (int64_t r = 0; r < g.kernel.rows && tile * g.kernel.rows + r < g.dimension; ++r) {
    const int64_t d = tile * g.kernel.rows + r;
    float* to = weight + d * inputs;
    for (const LevelSums& sums : g.levels) {
      for (int64_t panel = 0; panel < sums.panels; ++panel) {
        const float* const from =
            sums.sums.data() + ((tile * sums.panels + panel) * g.kernel.rows + r) * columns;
        const int64_t filled = std::min(columns, sums.level.channels - panel * columns);
        to = std::copy(from, from + filled, to);
      }
    }
    to[0] = g.constants.data()[g.dimension + d];
    to[1] = g.constants.data()[2 * g.dimension + d];
  }
}

std::tuple<Tensor, Tensor> project_levels_weight_gradient(const Tensor& gradient_given,
                                                          const Tensors& levels_given, bool pool) {
  check_project_levels_weight_gradient(gradient_given, levels_given);
  const Tensors levels = with_neighbouring_channels("project_levels_weight_gradient", levels_given);
  const Tensor gradient = in_order("project_levels_weight_gradient", "gradient", gradient_given);
  const int64_t batch = gradient.size(0);
  const int64_t dimension = gradient.size(2);
  int64_t inputs = 2;
  for (const Tensor& level : levels) inputs += level.size(1);
  Tensor weight = torch::stable::new_zeros(gradient, {dimension, inputs});
  Tensor bias = torch::stable::new_zeros(gradient, {dimension});
  if (batch == 0) return {weight, bias};

  const ProjectLevelsKernel& kernel = PYDEFECT_ACTIVE_KERNEL(project_levels_kernel);
  const int64_t tiles = divide_up(dimension, kernel.rows);
  WeightGradient g{kernel,
                   gradient.const_data_ptr<float>(),
                   dimension,
                   levels[0].size(2),
                   levels[0].size(3),
                   coordinates(levels[0].size(2)),
                   coordinates(levels[0].size(3)),
                   std::vector<float>(static_cast<size_t>(levels[0].size(3)), 1.0f),
                   {},
                   AlignedBuffer<float>(levels[0].size(3) * dimension),
                   AlignedBuffer<float>(dimension),
                   AlignedBuffer<float>(3 * dimension)};
  std::fill(g.constants.data(), g.constants.data() + 3 * dimension, 0.0f);
  for (const Tensor& tensor : levels) {
    const FeatureLevel level = view(tensor);
    const int64_t panels = divide_up(level.channels, kernel.columns);
    const int64_t capacity = std::min(level.pixels(), std::max(kPixelsPerSum, level.width));
    const int64_t sums = tiles * panels * kernel.rows * kernel.columns;
    g.levels.push_back({level, AxisGradient(level.height, g.height), AxisGradient(level.width, g.width),
                        level.height == g.height && level.width == g.width, panels, capacity,
                        AlignedBuffer<float>(panels * level.pixels() * kernel.columns),
                        AlignedBuffer<float>(tiles * capacity * kernel.rows), AlignedBuffer<float>(sums)});
    std::fill(g.levels.back().sums.data(), g.levels.back().sums.data() + sums, 0.0f);
  }
  for (int64_t image = 0; image < batch; ++image) {
    for (LevelSums& sums : g.levels) pack_features(g, sums, image, pool);
    torch::stable::parallel_for(
        0, tiles, 1, [&](int64_t begin, int64_t end) { WeightGradientWalk(g, image, begin, end).run(); });
  }
  torch::stable::parallel_for(0, tiles, 4, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      write_tile(g, tile, weight.mutable_data_ptr<float>(), inputs);
    }
  });
  std::copy(g.constants.data(), g.constants.data() + dimension, bias.mutable_data_ptr<float>());
  return {weight, bias};
}

// The gradient of one level before the pooling, [batch, level's height, level's width, channels]; `weight`
// holds the level's columns.
Tensor project_levels_level_gradient(const Tensor& gradient_given, const Tensor& weight_given, int64_t height,
                                     int64_t width, int64_t level_height, int64_t level_width) {
  check_project_levels_level_gradient(gradient_given, weight_given, height, width, level_height, level_width);
  const Tensor gradient = in_order("project_levels_level_gradient", "gradient", gradient_given);
  // The product takes the weight from the other side.
  const Tensor weight =
      in_order("project_levels_level_gradient", "weight", torch::stable::transpose(weight_given, 0, 1));
  const int64_t batch = gradient.size(0);
  const int64_t dimension = gradient.size(2);
  const int64_t channels = weight.size(0);
  Tensor out = torch::stable::new_empty(gradient, {batch, level_height, level_width, channels});
  if (batch == 0) return out;

  const ProjectLevelsKernel& kernel = PYDEFECT_ACTIVE_KERNEL(project_levels_kernel);
  const AlignedBuffer<float> packed =
      pack_weight(kernel, {weight.const_data_ptr<float>(), channels, dimension}, 0, dimension);
  const int64_t depth = round_up(dimension, kDepth);
  const int64_t panels = divide_up(channels, kernel.columns);
  const int64_t padded = panels * kernel.columns;
  const AxisGradient rows(level_height, height);
  const AxisGradient columns(level_width, width);
  const float* const from = gradient.const_data_ptr<float>();
  float* const to = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, batch * level_height, 1, [&](int64_t begin, int64_t end) {
    AlignedBuffer<float> interpolated(width * dimension);
    AlignedBuffer<float> level_row(level_width * dimension);
    AlignedBuffer<float> tiles(level_width * depth);
    AlignedBuffer<float> products(level_width * padded);
    const FeatureLevel view{level_row.data(),        Element::float32,        dimension, 1, level_width,
                            level_width * dimension, level_width * dimension, dimension};
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / level_height;
      const int64_t y = row % level_height;
      kernel.weighted_rows(from + (image * height + rows.first(y)) * width * dimension, width * dimension,
                           rows.weights(y), rows.count(y), width * dimension, interpolated.data());
      for (int64_t x = 0; x < level_width; ++x) {
        kernel.weighted_rows(interpolated.data() + columns.first(x) * dimension, dimension,
                             columns.weights(x), columns.count(x), dimension,
                             level_row.data() + x * dimension);
      }
      pack_tiles(kernel, view, 0, 0, level_width, false, tiles.data());
      project_pixels(kernel, tiles.data(), level_width, packed, depth, panels, products.data(), padded);
      for (int64_t x = 0; x < level_width; ++x) {
        const float* const product = products.data() + x * padded;
        std::copy(product, product + channels, to + (row * level_width + x) * channels);
      }
    }
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, CPU, library) {
  library.impl("project_levels", TORCH_BOX(&project_levels));
  library.impl("project_levels_weight_gradient", TORCH_BOX(&project_levels_weight_gradient));
  library.impl("project_levels_level_gradient", TORCH_BOX(&project_levels_level_gradient));
}

}  // namespace
}  // namespace pydefect::cpu
