// What one instruction set level offers to the convolution by Winograd's minimal filtering: tiles of 6 x 6
// pixels become 36 numbers a channel, which are multiplied with the weights' one by one and added over
// channels, and give 4 x 4 pixels of the output for a kernel of 3 x 3, or 3 x 3 for one of 4 x 4.
#pragma once

#include <cstdint>

#include "levels.h"

namespace pydefect::cpu {

constexpr int64_t kTileSide = 6;
constexpr int64_t kTileNumbers = kTileSide * kTileSide;

// A tile of the output, for the channels of one panel.
struct OutputTile {
  const float* products;  // number n of channel c: products[n * number_stride + c]
  int64_t number_stride;  //
  const float* bias;      // [channels]
  const float* residual;  // as out; nullptr: none
  float* out;             // pixel (y, x) of channel c: out[y * row_stride + x * pixel_stride + c]
  int64_t row_stride;     //
  int64_t pixel_stride;   //
  int64_t rows;           // of the output that lie inside the map
  int64_t columns;        // likewise
  int64_t channels;       // of the panel that the output has
  bool relu;
};

struct ConvolutionKernel {
  static constexpr int depth = 16;    // channels of a block
  static constexpr int columns = 32;  // output channels of a panel

  int rows;  // tiles that are multiplied with a panel at once

  // Transforms the kernels of a panel for one channel of the input: number n of column c goes to
  // to[n * number_stride + c].
  void (*transform_weights)(const float* kernels,  // [side * side][columns], row by row
                            int64_t side,          // 3 or 4
                            float* to, int64_t number_stride);

  // Transforms a tile of the input: number n of channel c goes to
  // to[n * number_stride + c / depth * block_stride + c % depth]. Channels past the last one of a block are
  // zero.
  void (*transform_input)(const float* const* pixels,  // [36] of [channels], row by row
                          int64_t channels, float* to, int64_t block_stride, int64_t number_stride);

  // out[r][c] = sum over k of tiles[k / depth][r][k % depth] * panel[k][c], for r < count <= rows.
  void (*multiply)(int count,
                   const float* tiles,  // [blocks][count][depth]
                   const float* panel,  // [blocks * depth][columns]
                   int64_t blocks,
                   float* out);  // [count][columns]

  // Transforms back, by the side of the output's tiles: 3 or 4.
  void (*transform_output3)(const OutputTile& tile);
  void (*transform_output4)(const OutputTile& tile);

  // The last three are the adjoints of transform_output, multiply and transform_weights.

  // Transforms a tile of the output's gradient: number n of channel c goes to
  // to[n * number_stride + c / columns * panel_stride + c % columns]. Channels past the last one of a panel
  // are zero.
  void (*transform_gradient)(const float* const* pixels,  // [side * side] of [channels], row by row
                             int64_t side,                // 3 or 4
                             int64_t channels, float* to, int64_t panel_stride, int64_t number_stride);

  // sums[r][c] += sum over t < count of inputs[t][r] * outputs[t][c].
  void (*add_outer)(int64_t count,
                    const float* inputs,   // [count][depth]
                    const float* outputs,  // [count][columns]
                    float* sums);          // [depth][columns]

  // Transforms the sums of a panel for one channel of the input: number n of column c is
  // sums[n * number_stride + c].
  void (*transform_sums)(const float* sums, int64_t number_stride,
                         int64_t side,     // 3 or 4
                         float* kernels);  // [side * side][columns], row by row
};

PYDEFECT_KERNEL(ConvolutionKernel, convolution_kernel)

}  // namespace pydefect::cpu
