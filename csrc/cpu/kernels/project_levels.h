// What one instruction set level offers to the multi-level projection.
#pragma once

#include <cstdint>

#include "levels.h"

namespace pydefect::cpu {

enum class Element { float32, bfloat16, float16 };

// A feature level; the channels of a pixel are neighbours in memory. Strides count elements.
struct FeatureLevel {
  const void* data;
  Element element;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t image_stride;
  int64_t row_stride;
  int64_t pixel_stride;

  int64_t pixels() const { return height * width; }
};

// The two pixels of a coarser level's line that a pixel of the output lies between, and their weights.
struct Neighbours {
  const int32_t* low;
  const int32_t* high;
  const float* low_weight;
  const float* high_weight;
};

// A coarser level's part of a tile: one line of its projection, interpolated between its rows already.
struct CoarseLine {
  const float* values;  // [width of the level][stride]
  int64_t stride;
  Neighbours neighbours;  // by pixel of the tile
};

// What the sums of a tile start with: constant[c] + positions[r] * slope[c] + the coarser levels' parts.
struct TileStart {
  const float* constant;   // [columns], or nullptr: zero, and nothing of what follows is added
  const float* slope;      // [columns]
  const float* positions;  // by pixel of the tile
  const CoarseLine* lines;
  int64_t line_count;
};

struct ProjectLevelsKernel {
  static constexpr int depth = 16;  // channels of a block

  int rows;     // pixels (backward: rows of the weight) in a tile
  int columns;  // columns of a panel, at most 32

  // Copies pixels first..first + count of an image, in row-major order, to float32: channel c of pixel i goes
  // to to[c / block * block_stride + i * block + c % block]. Channels past the last one of a block are zero.
  // With `pool` each pixel is the mean of its 3x3 neighbourhood, pixels outside the image counting as zeros.
  // `block` is a multiple of 4, 8 or 16 at levels of as many lanes.
  void (*pack_pixels)(const FeatureLevel& level, int64_t image, int64_t first, int64_t count, bool pool,
                      int64_t block, float* to, int64_t block_stride);

  // out[r][c] = start + sum over k of pixels[k / depth][r][k % depth] * panel[k][c], for r < pixel_count <=
  // rows.
  void (*project_tile)(int pixel_count,
                       const float* pixels,  // [blocks][pixel_count][depth]
                       const float* panel,   // [blocks * depth][columns]
                       int64_t blocks, const TileStart& start, float* out, int64_t out_stride);

  // sums[r][c] += sum over i of gradients[i][r] * features[i][c].
  void (*accumulate_tile)(const float* gradients,  // [count][rows]
                          const float* features,   // [count][columns]
                          int64_t count,
                          float* sums);  // [rows][columns]

  // Deals the `width` values of a row out to tiles: value i goes to to[i / rows * tile_stride + i % rows].
  // The last tile is filled up with zeros.
  void (*deal_row)(const float* from, int64_t width, float* to, int64_t tile_stride);

  // to[c] = sum over i < count of weights[i] * from[i * stride + c], for c < width.
  void (*weighted_rows)(const float* from, int64_t stride, const float* weights, int64_t count, int64_t width,
                        float* to);
};

PYDEFECT_KERNEL(ProjectLevelsKernel, project_levels_kernel)

}  // namespace pydefect::cpu
