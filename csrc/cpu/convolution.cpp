// Convolutions on the CPU by Winograd's minimal filtering: a quarter of the
// multiplications.
//
// Lavin and Gray, Fast algorithms for convolutional neural networks, CVPR 2016. Tiles are independent of each
// other and every sum has one order, so that neither threads nor the other images of a batch change a result.
#include "kernels/convolution.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../checks.h"
#include "aligned.h"
#include "dispatch.h"
#include "maps.h"
#include "rounding.h"

namespace pydefect::cpu {
namespace {

constexpr const char* kName = "convolution";
constexpr int64_t kColumns = ConvolutionKernel::columns;
constexpr int64_t kDepth = ConvolutionKernel::depth;
// What the checks ask for is what the kernels read.
static_assert(kTileNumbers == kTileNumberCount && kColumns == kTileColumns && kDepth == kTileDepth);
// Tiles that are worked on together: with 256 channels their numbers are 2 MB, which second-level caches and
// their share of the third hold while all panels of weights go by.
constexpr int64_t kTogether = 56;
// Panels whose products are kept until they are transformed back: 1 MB of these tiles.
constexpr int64_t kPanels = 4;

Tensor convolution_tiles(const Tensor& weight_given) {
  check_convolution_tiles(weight_given);
  const Tensor weight = in_order("convolution_tiles", "weight", weight_given);
  const int64_t outputs = weight.size(0), inputs = weight.size(1), side = weight.size(2);
  const int64_t panels = divide_up(outputs, kColumns), depth = round_up(inputs, kDepth);
  Tensor tiles = torch::stable::new_empty(weight, {panels, kTileNumbers, depth, kColumns});
  const float* const from = static_cast<const float*>(weight.const_data_ptr());
  float* const to = static_cast<float*>(tiles.mutable_data_ptr());
  const ConvolutionKernel& kernel = PYDEFECT_ACTIVE_KERNEL(convolution_kernel);
  const int64_t size = side * side;
  torch::stable::parallel_for(0, panels * kTileNumbers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      float* const numbers = to + n * depth * kColumns;
      std::fill(numbers + inputs * kColumns, numbers + depth * kColumns, 0.0f);
    }
  });
  torch::stable::parallel_for(0, panels * inputs, 1, [&](int64_t begin, int64_t end) {
    AlignedBuffer<float> kernels(size * kColumns);
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t panel = pair / inputs, input = pair % inputs;
      for (int64_t c = 0; c < kColumns; ++c) {
        const int64_t output = panel * kColumns + c;
        const float* const one = from + (output * inputs + input) * size;
        for (int64_t i = 0; i < size; ++i)
          kernels.data()[i * kColumns + c] = output < outputs ? one[i] : 0.0f;
      }
      kernel.transform_weights(kernels.data(), side, to + (panel * kTileNumbers * depth + input) * kColumns,
                               depth * kColumns);
    }
  });
  return tiles;
}

// The tiles that cover the output, numbered image after image, row after row.
struct Tiling {
  MapSize in;
  MapSize out;
  int64_t side;
  int64_t padding;
  int64_t across = divide_up(out.width, side);
  int64_t down = divide_up(out.height, side);

  int64_t count() const { return out.images * down * across; }
};

struct Place {
  int64_t image;
  int64_t row;
  int64_t column;

  Place(const Tiling& tiling, int64_t tile)
      : image(tile / (tiling.down * tiling.across)),
        row(tile / tiling.across % tiling.down * tiling.side),
        column(tile % tiling.across * tiling.side) {}
};

// Pointers to the pixels of a tile, row by row; outside of the map to zeros.
class Pixels {
 public:
  Pixels(const MapSize& size, const float* maps, int64_t image, int64_t row, int64_t column, int64_t side,
         const float* zeros) {
    const float* const map = maps + image * size.image();
    for (int64_t n = 0; n < side * side; ++n) {
      const int64_t y = row + n / side, x = column + n % side;
      const bool inside = y >= 0 && y < size.height && x >= 0 && x < size.width;
      pixels_[n] = inside ? map + (y * size.width + x) * size.channels : zeros;
    }
  }

  const float* const* data() const { return pixels_; }

 private:
  const float* pixels_[kTileNumbers];
};

class Convolution {
 public:
  Convolution(const Tiling& tiling, const float* maps, const float* tiles, const float* bias,
              const float* residual, bool relu, float* out)
      : kernel_(PYDEFECT_ACTIVE_KERNEL(convolution_kernel)),
        tiling_(tiling),
        maps_(maps),
        tiles_(tiles),
        bias_(bias),
        residual_(residual),
        relu_(relu),
        out_(out),
        blocks_(divide_up(tiling.in.channels, kDepth)),
        zeros_(static_cast<size_t>(tiling.in.channels)) {}

  void run() const {
    // As many for every thread, and no more than kTogether at a time; the results are the same for any cut.
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t rounds = divide_up(tiling_.count(), threads * kTogether);
    const int64_t together = divide_up(tiling_.count(), threads * rounds);
    torch::stable::parallel_for(0, divide_up(tiling_.count(), together), 1, [&](int64_t begin, int64_t end) {
      AlignedBuffer<float> numbers(kTileNumbers * together * blocks_ * kDepth);
      AlignedBuffer<float> products(kPanels * kTileNumbers * together * kColumns);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * together;
        work_on(first, std::min(together, tiling_.count() - first), numbers.data(), products.data());
      }
    });
  }

 private:
  void work_on(int64_t first, int64_t count, float* numbers, float* products) const {
    const int64_t number_stride = count * blocks_ * kDepth;
    // Groups of nearly one size: one of a tile or two would take as long as one of several.
    const int64_t most = divide_up(count, divide_up(count, int64_t{kernel_.rows}));
    for (int64_t group = 0; group < count; group += most) {
      const int64_t rows = std::min(most, count - group);
      for (int64_t r = 0; r < rows; ++r) {
        transform_input(first + group + r, numbers + group * blocks_ * kDepth + r * kDepth, rows * kDepth,
                        number_stride);
      }
    }
    const int64_t panels = divide_up(tiling_.out.channels, kColumns);
    const int64_t panel_size = blocks_ * kDepth * kColumns;
    for (int64_t some = 0; some < panels; some += kPanels) {
      const int64_t last = std::min(some + kPanels, panels);
      for (int64_t n = 0; n < kTileNumbers; ++n) {
        for (int64_t panel = some; panel < last; ++panel) {
          const float* const weights = tiles_ + (panel * kTileNumbers + n) * panel_size;
          float* const to = products + ((panel - some) * kTileNumbers + n) * count * kColumns;
          for (int64_t group = 0; group < count; group += most) {
            kernel_.multiply(static_cast<int>(std::min(most, count - group)),
                             numbers + n * number_stride + group * blocks_ * kDepth, weights, blocks_,
                             to + group * kColumns);
          }
        }
      }
      for (int64_t tile = 0; tile < count; ++tile) {
        for (int64_t panel = some; panel < last; ++panel) {
          const float* const from = products + (panel - some) * kTileNumbers * count * kColumns;
          transform_output(first + tile, panel * kColumns, from + tile * kColumns, count * kColumns);
        }
      }
    }
  }

  void transform_input(int64_t tile, float* to, int64_t block_stride, int64_t number_stride) const {
    const Place place(tiling_, tile);
    const Pixels pixels(tiling_.in, maps_, place.image, place.row - tiling_.padding,
                        place.column - tiling_.padding, kTileSide, zeros_.data());
    kernel_.transform_input(pixels.data(), tiling_.in.channels, to, block_stride, number_stride);
  }

  void transform_output(int64_t tile, int64_t channel, const float* products, int64_t number_stride) const {
    const Place place(tiling_, tile);
    const MapSize& out = tiling_.out;
    const int64_t at =
        place.image * out.image() + (place.row * out.width + place.column) * out.channels + channel;
    const OutputTile output = {products,
                               number_stride,
                               bias_ + channel,
                               residual_ == nullptr ? nullptr : residual_ + at,
                               out_ + at,
                               out.width * out.channels,
                               out.channels,
                               std::min(tiling_.side, out.height - place.row),
                               std::min(tiling_.side, out.width - place.column),
                               std::min(kColumns, out.channels - channel),
                               relu_};
    (tiling_.side == 3 ? kernel_.transform_output3 : kernel_.transform_output4)(output);
  }

  const ConvolutionKernel& kernel_;
  Tiling tiling_;
  const float* maps_;      // [images, height, width, channels]
  const float* tiles_;     // [panels, 36, channels in whole blocks, columns]
  const float* bias_;      // [channels of the output]
  const float* residual_;  // as out_, or nullptr
  bool relu_;
  float* out_;  // [images, height, width, channels]
  int64_t blocks_;
  std::vector<float> zeros_;
};

Tensor convolution(const Tensor& maps_given, const Tensor& tiles_given, const Tensor& bias_given,
                   const std::optional<Tensor>& residual_given, int64_t kernel, int64_t padding, bool relu) {
  check_convolution(maps_given, tiles_given, bias_given, residual_given, kernel, padding);
  const Tensor maps = in_order(kName, "maps", maps_given);
  const Tensor tiles = in_order(kName, "tiles", tiles_given);
  const Tensor bias = in_order(kName, "bias", bias_given);
  std::optional<Tensor> residual;
  if (residual_given) residual = in_order(kName, "residual", *residual_given);
  const int64_t grown = 2 * padding - kernel + 1;
  Tensor output = torch::stable::new_empty(
      maps, {maps.size(0), maps.size(1) + grown, maps.size(2) + grown, bias.size(0)});
  if (output.numel() == 0) return output;
  const Tiling tiling = {MapSize(maps), MapSize(output), kTileSide + 1 - kernel, padding};
  Convolution(tiling, static_cast<const float*>(maps.const_data_ptr()),
              static_cast<const float*>(tiles.const_data_ptr()),
              static_cast<const float*>(bias.const_data_ptr()),
              residual ? static_cast<const float*>(residual->const_data_ptr()) : nullptr, relu,
              static_cast<float*>(output.mutable_data_ptr()))
      .run();
  return output;
}

// The gradient of the weights: numbers of the maps' tiles times numbers of the output gradient's, added up
// over tiles, and transformed at the end. Every sum belongs to one thread.
class WeightGradient {
 public:
  WeightGradient(const Tiling& tiling, const float* maps, const float* gradient)
      : kernel_(PYDEFECT_ACTIVE_KERNEL(convolution_kernel)),
        tiling_(tiling),
        maps_(maps),
        gradient_(gradient),
        blocks_(divide_up(tiling.in.channels, kDepth)),
        panels_(divide_up(tiling.out.channels, kColumns)),
        zeros_(static_cast<size_t>(std::max(tiling.in.channels, tiling.out.channels))) {}

  // To [outputs, side, side, inputs].
  void run(float* to) const {
    const int64_t tiles = tiling_.count(), together = std::min(kGathered, tiles);
    AlignedBuffer<float> inputs(kTileNumbers * blocks_ * kDepth * together);
    AlignedBuffer<float> outputs(kTileNumbers * panels_ * kColumns * together);
    // The last tiles' products are added block by block, and these transformed while they lie in a cache:
    // where the first tiles are the last ones, the sums, four times the weights, never lie anywhere else.
    const int64_t gatherings = divide_up(tiles, std::max<int64_t>(together, 1));
    AlignedBuffer<float> sums(gatherings > 1 ? panels_ * blocks_ * kBlockSums : 0);
    for (int64_t gathering = 0; gathering + 1 < gatherings; ++gathering) {
      gather(gathering * together, together, inputs.data(), outputs.data());
      add(gathering == 0, together, inputs.data(), outputs.data(), sums.data());
    }
    const int64_t first = std::max<int64_t>(gatherings - 1, 0) * together;
    gather(first, tiles - first, inputs.data(), outputs.data());
    torch::stable::parallel_for(0, panels_ * blocks_, 1, [&](int64_t begin, int64_t end) {
      AlignedBuffer<float> kernels(kDepth * kNumbersOfKernel * kColumns);
      AlignedBuffer<float> own(kBlockSums);
      for (int64_t part = begin; part < end; ++part) {
        float* const block_sums = gatherings > 1 ? sums.data() + part * kBlockSums : own.data();
        if (gatherings <= 1) std::fill(block_sums, block_sums + kBlockSums, 0.0f);
        for (int64_t n = 0; n < kTileNumbers; ++n) {
          add_block(n, part / blocks_, part % blocks_, tiles - first, inputs.data(), outputs.data(),
                    block_sums);
        }
        write_block(block_sums, part / blocks_, part % blocks_, kernels.data(), to);
      }
    });
  }

 private:
  // Tiles that are gathered before their products are added: fewer, and the sums go through memory more
  // often.
  static constexpr int64_t kGathered = 192;
  static constexpr int64_t kNumbersOfKernel = 16;
  static constexpr int64_t kBlockSums = kTileNumbers * kDepth * kColumns;

  void gather(int64_t first, int64_t count, float* inputs, float* outputs) const {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        transform(first + tile, inputs + tile * kDepth, outputs + tile * kColumns, count);
      }
    });
  }

  // Number by number, of which a panel of the outputs' stays in a cache.
  void add(bool first, int64_t count, const float* inputs, const float* outputs, float* sums) const {
    torch::stable::parallel_for(0, kTileNumbers * panels_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t n = part / panels_, panel = part % panels_;
        for (int64_t block = 0; block < blocks_; ++block) {
          float* const block_sums = sums + (panel * blocks_ + block) * kBlockSums;
          if (first) std::fill_n(block_sums + n * kDepth * kColumns, kDepth * kColumns, 0.0f);
          add_block(n, panel, block, count, inputs, outputs, block_sums);
        }
      }
    });
  }

  void add_block(int64_t n, int64_t panel, int64_t block, int64_t count, const float* inputs,
                 const float* outputs, float* block_sums) const {
    kernel_.add_outer(count, inputs + (n * blocks_ + block) * count * kDepth,
                      outputs + (n * panels_ + panel) * count * kColumns, block_sums + n * kDepth * kColumns);
  }

  void transform(int64_t tile, float* inputs, float* outputs, int64_t count) const {
    const Place place(tiling_, tile);
    kernel_.transform_input(Pixels(tiling_.in, maps_, place.image, place.row - tiling_.padding,
                                   place.column - tiling_.padding, kTileSide, zeros_.data())
                                .data(),
                            tiling_.in.channels, inputs, count * kDepth, count * blocks_ * kDepth);
    kernel_.transform_gradient(
        Pixels(tiling_.out, gradient_, place.image, place.row, place.column, tiling_.side, zeros_.data())
            .data(),
        tiling_.side, tiling_.out.channels, outputs, count * kColumns, count * panels_ * kColumns);
  }

  void write_block(const float* sums, int64_t panel, int64_t block, float* kernels, float* to) const {
    const int64_t side = kTileSide + 1 - tiling_.side, size = side * side;
    const int64_t depth = std::min(kDepth, tiling_.in.channels - block * kDepth);
    for (int64_t d = 0; d < depth; ++d) {
      kernel_.transform_sums(sums + d * kColumns, kDepth * kColumns, side, kernels + d * size * kColumns);
    }
    const int64_t columns = std::min(kColumns, tiling_.out.channels - panel * kColumns);
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t i = 0; i < size; ++i) {
        float* const some = to + ((panel * kColumns + c) * size + i) * tiling_.in.channels + block * kDepth;
        for (int64_t d = 0; d < depth; ++d) some[d] = kernels[(d * size + i) * kColumns + c];
      }
    }
  }

  const ConvolutionKernel& kernel_;
  Tiling tiling_;
  const float* maps_;      // [images, height, width, channels]
  const float* gradient_;  // [images, height, width, channels]
  int64_t blocks_;
  int64_t panels_;
  std::vector<float> zeros_;
};

Tensor convolution_weight_gradient(const Tensor& gradient_given, const Tensor& maps_given, int64_t kernel,
                                   int64_t padding) {
  check_convolution_weight_gradient(gradient_given, maps_given, kernel, padding);
  const char* op = "convolution_weight_gradient";
  const Tensor gradient = in_order(op, "gradient", gradient_given);
  const Tensor maps = in_order(op, "maps", maps_given);
  const Tensor result = torch::stable::new_empty(maps, {gradient.size(3), kernel, kernel, maps.size(3)});
  const Tiling tiling = {MapSize(maps), MapSize(gradient), kTileSide + 1 - kernel, padding};
  WeightGradient(tiling, static_cast<const float*>(maps.const_data_ptr()),
                 static_cast<const float*>(gradient.const_data_ptr()))
      .run(static_cast<float*>(result.mutable_data_ptr()));
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, CPU, library) {
  library.impl("convolution", TORCH_BOX(&convolution));
  library.impl("convolution_tiles", TORCH_BOX(&convolution_tiles));
  library.impl("convolution_weight_gradient", TORCH_BOX(&convolution_weight_gradient));
}

}  // namespace
}  // namespace pydefect::cpu
