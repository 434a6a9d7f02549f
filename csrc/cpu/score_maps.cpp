// Patch scores, bilinear upsampling and Gaussian smoothing on the CPU. The last two are linear and separable:
// along each axis they are one banded matrix, computed once. A row of patches is scored, spread to a row of
// pixels, and such rows are summed up to the map's rows.
//
// Every output row is computed by the same operations wherever the threads' shares begin and end.
#include "kernels/score_maps.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "aligned.h"
#include "bilinear.h"
#include "dispatch.h"
#include "rounding.h"

namespace pydefect::cpu {
namespace {

constexpr int64_t kBlock = ScoreMapsKernel::block;
// Axes whose matrices are kept; a program that scores images of ever new sizes starts over now and then.
constexpr size_t kAxesKept = 64;

// Both steps along one axis: pixel p is the sum of weights(p)[i] * patch[first(p) + i], i < count(p).
class Axis {
 public:
  Axis(int64_t patches, int64_t pixels, double sigma) {
    // scipy.ndimage.gaussian_filter1d(truncate=4, mode="reflect"), in double like there.
    const auto radius = static_cast<int64_t>(4.0 * sigma + 0.5);
    std::vector<double> gaussian;
    double total = 0.0;
    for (int64_t i = -radius; i <= radius; ++i) {
      const double x = static_cast<double>(i);
      gaussian.push_back(sigma > 0.0 ? std::exp(-0.5 * x * x / (sigma * sigma)) : 1.0);
      total += gaussian.back();
    }
    std::vector<double> weights(static_cast<size_t>(patches));
    for (int64_t p = 0; p < pixels; ++p) {
      std::fill(weights.begin(), weights.end(), 0.0);
      int64_t low = patches;
      int64_t high = -1;
      const auto add = [&](int64_t patch, double weight) {
        if (weight == 0.0) return;
        weights[static_cast<size_t>(patch)] += weight;
        low = std::min(low, patch);
        high = std::max(high, patch);
      };
      for (int64_t i = -radius; i <= radius; ++i) {
        const double share = gaussian[static_cast<size_t>(i + radius)] / total;
        const Between<double> place = between<double>(mirrored(p + i, pixels), patches, pixels);
        add(place.low, share * place.low_weight);
        add(place.high, share * place.high_weight);
      }
      rows_.push_back({low, high - low + 1, static_cast<int64_t>(weights_.size())});
      for (int64_t patch = low; patch <= high; ++patch) {
        weights_.push_back(static_cast<float>(weights[static_cast<size_t>(patch)]));
      }
    }
    make_blocks();
  }

  int64_t first(int64_t pixel) const { return rows_[static_cast<size_t>(pixel)].first; }
  int64_t count(int64_t pixel) const { return rows_[static_cast<size_t>(pixel)].count; }
  int64_t end(int64_t pixel) const { return first(pixel) + count(pixel); }
  const float* weights(int64_t pixel) const {
    return weights_.data() + rows_[static_cast<size_t>(pixel)].offset;
  }
  const std::vector<PixelBlock>& blocks() const { return blocks_; }

 private:
  struct Row {
    int64_t first;
    int64_t count;
    int64_t offset;
  };

  // The border repeats the picture mirrored, its last pixel included, as often as needed.
  static int64_t mirrored(int64_t index, int64_t size) {
    const int64_t within = ((index % (2 * size)) + 2 * size) % (2 * size);
    return within < size ? within : 2 * size - 1 - within;
  }

  void make_blocks() {
    const auto pixels = static_cast<int64_t>(rows_.size());
    int64_t size = 0;
    for (int64_t p = 0; p < pixels; p += kBlock) {
      PixelBlock block{first(p), 0, nullptr};
      for (int64_t i = p; i < std::min(p + kBlock, pixels); ++i)
        block.first = std::min(block.first, first(i));
      for (int64_t i = p; i < std::min(p + kBlock, pixels); ++i) {
        block.count = std::max(block.count, end(i) - block.first);
      }
      blocks_.push_back(block);
      size += block.count * kBlock;
    }
    block_weights_ = AlignedBuffer<float>(size);
    std::fill(block_weights_.data(), block_weights_.data() + size, 0.0f);
    float* to = block_weights_.data();
    for (int64_t p = 0; p < pixels; ++p) {
      PixelBlock& block = blocks_[static_cast<size_t>(p / kBlock)];
      if (p % kBlock == 0) {
        block.weights = to;
        to += block.count * kBlock;
      }
      float* const column = to - block.count * kBlock + p % kBlock;
      for (int64_t i = 0; i < count(p); ++i) column[(first(p) - block.first + i) * kBlock] = weights(p)[i];
    }
  }

  std::vector<Row> rows_;
  std::vector<float> weights_;
  std::vector<PixelBlock> blocks_;
  AlignedBuffer<float> block_weights_;
};

std::shared_ptr<const Axis> axis(int64_t patches, int64_t pixels, double sigma) {
  static std::mutex mutex;
  static std::map<std::tuple<int64_t, int64_t, double>, std::shared_ptr<const Axis>> kept;
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<const Axis>& found = kept[{patches, pixels, sigma}];
  if (found) return found;
  const auto made = std::make_shared<const Axis>(patches, pixels, sigma);
  found = made;
  if (kept.size() > kAxesKept) kept.clear();
  return made;
}

struct Maps {
  const ScoreMapsKernel& kernel;
  const float* distances;  // [batch, rows, columns, neighbours]
  int64_t rows;
  int64_t columns;
  int64_t neighbours;
  bool certainty;
  const Axis& row_axis;
  const Axis& column_axis;
  int64_t height;
  int64_t width;
  float* scores;  // [batch, rows, columns]
  float* maps;    // [batch, height, width]

  int64_t padded_width() const { return static_cast<int64_t>(column_axis.blocks().size()) * kBlock; }
};

// Writes rows begin..end of one image's map, and the scores of the patch rows that these stand for.
void write_rows(const Maps& m, int64_t image, int64_t begin, int64_t end, float* patch_row, float* spread) {
  // Neighbouring shares both read the patch rows at their border; one of them writes their scores.
  const auto owned_from = [&](int64_t row) { return divide_up(row * m.rows, m.height); };
  const int64_t owned_first = owned_from(begin);
  const int64_t owned_end = owned_from(end);
  int64_t needed_first = m.rows;
  int64_t needed_end = 0;
  for (int64_t row = begin; row < end; ++row) {
    needed_first = std::min(needed_first, m.row_axis.first(row));
    needed_end = std::max(needed_end, m.row_axis.end(row));
  }
  for (int64_t row = std::min(owned_first, needed_first); row < std::max(owned_end, needed_end); ++row) {
    const bool owned = row >= owned_first && row < owned_end;
    const bool needed = row >= needed_first && row < needed_end;
    if (!owned && !needed) continue;
    const int64_t patch = (image * m.rows + row) * m.columns;
    float* const scores = owned ? m.scores + patch : patch_row;
    m.kernel.patch_scores(m.distances + patch * m.neighbours, m.columns, m.neighbours, m.certainty, scores);
    if (!needed) continue;
    m.kernel.spread_row(scores, m.column_axis.blocks().data(),
                        static_cast<int64_t>(m.column_axis.blocks().size()), spread + row * m.padded_width());
  }
  for (int64_t row = begin; row < end; ++row) {
    m.kernel.weighted_rows(spread + m.row_axis.first(row) * m.padded_width(), m.padded_width(),
                           m.row_axis.weights(row), m.row_axis.count(row), m.width,
                           m.maps + (image * m.height + row) * m.width);
  }
}

std::tuple<Tensor, Tensor> score_maps(const Tensor& distances_given, int64_t height, int64_t width,
                                      double sigma, bool certainty) {
  check_score_maps(distances_given, height, width, sigma);
  const Tensor distances = in_order("score_maps", "distances", distances_given);
  const int64_t batch = distances.size(0);
  Tensor scores = torch::stable::new_empty(distances, {batch, distances.size(1), distances.size(2)});
  Tensor maps = torch::stable::new_empty(distances, {batch, height, width});
  if (batch == 0) return {scores, maps};

  const std::shared_ptr<const Axis> row_axis = axis(distances.size(1), height, sigma);
  const std::shared_ptr<const Axis> column_axis = axis(distances.size(2), width, sigma);
  const Maps m{PYDEFECT_ACTIVE_KERNEL(score_maps_kernel),
               distances.const_data_ptr<float>(),
               distances.size(1),
               distances.size(2),
               distances.size(3),
               certainty,
               *row_axis,
               *column_axis,
               height,
               width,
               scores.mutable_data_ptr<float>(),
               maps.mutable_data_ptr<float>()};
  torch::stable::parallel_for(0, batch * height, 16, [&](int64_t begin, int64_t end) {
    AlignedBuffer<float> patch_row(m.columns);
    AlignedBuffer<float> spread(m.rows * m.padded_width());
    while (begin < end) {
      const int64_t image = begin / height;
      const int64_t image_end = std::min(end, (image + 1) * height);
      write_rows(m, image, begin - image * height, image_end - image * height, patch_row.data(),
                 spread.data());
      begin = image_end;
    }
  });
  return {scores, maps};
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, CPU, library) {
  library.impl("score_maps", TORCH_BOX(&score_maps));
}

}  // namespace
}  // namespace pydefect::cpu
