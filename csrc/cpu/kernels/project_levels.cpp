#include "project_levels.h"

#include <cstdint>
#include <cstring>

#include "register_tile.h"
#include "simd.h"
#include "weighted_rows.h"

namespace pydefect::cpu::PYDEFECT_LEVEL {
namespace {

template <class V>
struct Float32 {
  using value = float;
  static typename V::type load(const float* from) { return V::load(from); }
};

template <class V>
struct Bfloat16 {
  using value = uint16_t;
  static typename V::type load(const uint16_t* from) { return V::load_bfloat16(from); }
};

template <class V>
struct Float16 {
  using value = uint16_t;
  static typename V::type load(const uint16_t* from) { return V::load_float16(from); }
};

// As many lanes as there are channels left; zero in the others.
template <class V, class Format>
typename V::type load_part(const typename Format::value* from, int64_t count) {
  if (count >= V::lanes) return Format::load(from);
  typename Format::value values[V::lanes] = {};
  std::memcpy(values, from, static_cast<size_t>(count) * sizeof(values[0]));
  return Format::load(values);
}

template <class V, class Format, bool pool>
void pack_pixels_as(const FeatureLevel& level, int64_t image, int64_t first, int64_t count, int64_t block,
                    float* to, int64_t block_stride) {
  const auto* const data =
      static_cast<const typename Format::value*>(level.data) + image * level.image_stride;
  int64_t y = first / level.width;
  int64_t x = first % level.width;
  for (int64_t i = 0; i < count; ++i) {
    // The rows and columns of the neighbourhood that lie inside the image.
    const int64_t top = pool && y > 0 ? y - 1 : y;
    const int64_t bottom = pool && y + 1 < level.height ? y + 1 : y;
    const int64_t left = pool && x > 0 ? x - 1 : x;
    const int64_t right = pool && x + 1 < level.width ? x + 1 : x;
    float* block_start = to + i * block;
    for (int64_t channel = 0; channel < level.channels; channel += block, block_start += block_stride) {
      for (int64_t c = 0; c < block; c += V::lanes) {
        const int64_t left_over = level.channels - channel - c;
        typename V::type value = V::zero();
        if (left_over > 0) {
          const auto* const from = data + channel + c;
          if constexpr (pool) {
            for (int64_t row = top; row <= bottom; ++row) {
              for (int64_t column = left; column <= right; ++column) {
                value += load_part<V, Format>(from + row * level.row_stride + column * level.pixel_stride,
                                              left_over);
              }
            }
            value *= V::broadcast(1.0f / 9.0f);
          } else {
            value = load_part<V, Format>(from + y * level.row_stride + x * level.pixel_stride, left_over);
          }
        }
        V::store(block_start + c, value);
      }
    }
    if (++x == level.width) {
      x = 0;
      ++y;
    }
  }
}

template <class V>
void pack_pixels(const FeatureLevel& level, int64_t image, int64_t first, int64_t count, bool pool,
                 int64_t block, float* to, int64_t block_stride) {
  using Pack = void (*)(const FeatureLevel&, int64_t, int64_t, int64_t, int64_t, float*, int64_t);
  static constexpr Pack packs[3][2] = {
      {pack_pixels_as<V, Float32<V>, false>, pack_pixels_as<V, Float32<V>, true>},
      {pack_pixels_as<V, Bfloat16<V>, false>, pack_pixels_as<V, Bfloat16<V>, true>},
      {pack_pixels_as<V, Float16<V>, false>, pack_pixels_as<V, Float16<V>, true>},
  };
  packs[static_cast<int>(level.element)][pool ? 1 : 0](level, image, first, count, block, to, block_stride);
}

template <class V, int rows, int vectors>
void project_tile_of(const float* pixels, const float* panel, int64_t blocks, const TileStart& start,
                     float* out, int64_t out_stride) {
  constexpr int columns = vectors * V::lanes;
  typename V::type sums[rows][vectors] = {};
  add_products<V, rows, vectors, ProjectLevelsKernel::depth>(pixels, panel, columns, blocks, sums);
  if (start.constant != nullptr) {
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const typename V::type position = V::broadcast(start.positions[r]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        sums[r][v] += V::multiply_add(position, V::load(start.slope + v * V::lanes),
                                      V::load(start.constant + v * V::lanes));
      }
    }
    for (int64_t l = 0; l < start.line_count; ++l) {
      const CoarseLine& line = start.lines[l];
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const float* const low = line.values + line.neighbours.low[r] * line.stride;
        const float* const high = line.values + line.neighbours.high[r] * line.stride;
        const typename V::type low_weight = V::broadcast(line.neighbours.low_weight[r]);
        const typename V::type high_weight = V::broadcast(line.neighbours.high_weight[r]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          sums[r][v] = V::multiply_add(low_weight, V::load(low + v * V::lanes), sums[r][v]);
          sums[r][v] = V::multiply_add(high_weight, V::load(high + v * V::lanes), sums[r][v]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) V::store(out + r * out_stride + v * V::lanes, sums[r][v]);
  }
}

// A tile of fewer pixels takes less time: chooses the loop that is compiled for `count`.
template <class V, int rows, int vectors>
void project_tile(int count, const float* pixels, const float* panel, int64_t blocks, const TileStart& start,
                  float* out, int64_t out_stride) {
  if constexpr (rows > 1) {
    if (count < rows) {
      project_tile<V, rows - 1, vectors>(count, pixels, panel, blocks, start, out, out_stride);
      return;
    }
  }
  project_tile_of<V, rows, vectors>(pixels, panel, blocks, start, out, out_stride);
}

template <class V, int rows, int vectors>
void accumulate_tile(const float* gradients, const float* features, int64_t count, float* sums_of_tile) {
  constexpr int columns = vectors * V::lanes;
  typename V::type sums[rows][vectors] = {};
  for (int64_t i = 0; i < count; ++i) {
    typename V::type feature[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) feature[v] = V::load(features + v * V::lanes);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const typename V::type gradient = V::broadcast(gradients[r]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[r][v] = V::multiply_add(gradient, feature[v], sums[r][v]);
    }
    gradients += rows;
    features += columns;
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      float* const sum = sums_of_tile + r * columns + v * V::lanes;
      V::store(sum, V::load(sum) + sums[r][v]);
    }
  }
}

template <int rows>
void deal_row(const float* from, int64_t width, float* to, int64_t tile_stride) {
  for (; width >= rows; width -= rows, from += rows, to += tile_stride) {
    std::memcpy(to, from, rows * sizeof(float));
  }
  if (width > 0) {
    for (int64_t r = 0; r < rows; ++r) to[r] = r < width ? from[r] : 0.0f;
  }
}

template <class V, int rows>
constexpr ProjectLevelsKernel kernel() {
  return {
      rows,           2 * V::lanes,    pack_pixels<V>, project_tile<V, rows, 2>, accumulate_tile<V, rows, 2>,
      deal_row<rows>, weighted_rows<V>};
}

}  // namespace

// Two vectors of `rows` sums each leave registers for two vectors of the panel and a pixel's value.
#if defined(__AVX512F__)
const ProjectLevelsKernel project_levels_kernel = kernel<Simd, 14>();
#elif defined(__AVX2__)
const ProjectLevelsKernel project_levels_kernel = kernel<Simd, 6>();
#else
const ProjectLevelsKernel project_levels_kernel = kernel<Simd, 4>();
#endif

}  // namespace pydefect::cpu::PYDEFECT_LEVEL
