// What one instruction set level offers to the score maps.
#pragma once

#include <cstdint>

#include "levels.h"

namespace pydefect::cpu {

// Sixteen neighbouring pixels of a line, each a weighted sum of the same patches.
struct PixelBlock {
  int64_t first;         // patch
  int64_t count;         // patches
  const float* weights;  // [count][16]
};

struct ScoreMapsKernel {
  static constexpr int block = 16;

  // Equation (9) for `patches` patches with `neighbours` distances each.
  void (*patch_scores)(const float* distances, int64_t patches, int64_t neighbours, bool certainty,
                       float* scores);

  // One row of patches to a row of pixels, a whole number of blocks.
  void (*spread_row)(const float* patches, const PixelBlock* blocks, int64_t count, float* pixels);

  // to[c] = sum over i < count of weights[i] * from[i * stride + c], for c < width.
  void (*weighted_rows)(const float* from, int64_t stride, const float* weights, int64_t count, int64_t width,
                        float* to);
};

PYDEFECT_KERNEL(ScoreMapsKernel, score_maps_kernel)

}  // namespace pydefect::cpu
