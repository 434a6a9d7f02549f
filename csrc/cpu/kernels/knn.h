// What one instruction set level offers to the k-NN search.
#pragma once

#include <cstdint>

#include "levels.h"

namespace pydefect::cpu {

struct KnnKernel {
  int rows;     // queries in a tile
  int columns;  // bank rows in a panel, at most 32

  // scores[r][c] = panel[0][c] + sum_d queries[d][r] * panel[1 + d][c], and bit c of hits[r] tells whether
  // scores[r][c] > thresholds[r]. Where no bit is set the result is false and scores is left alone.
  bool (*score_tile)(const float* queries,     // [width, rows]
                     const float* panel,       // [1 + width, columns]
                     int64_t width,            //
                     const float* thresholds,  // [rows]
                     float* scores,            // [rows, columns]
                     uint32_t* hits);          // [rows]

  // The squared distance of two vectors, bit for bit the same at every level and on CUDA: sixteen partial
  // sums (element i goes to sum i % 16), product and sum rounded apart, then halves added to halves.
  float (*squared_distance)(const float* a, const float* b, int64_t width);
};

PYDEFECT_KERNEL(KnnKernel, knn_kernel)

}  // namespace pydefect::cpu
