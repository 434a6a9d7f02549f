// What one instruction set level offers to the k-NN search.
#pragma once

#include <cstdint>

#include "levels.h"

namespace pydefect::cpu {

// A vector less the centre: its squared norm, and the squared norm of what packing rounds away from it.
struct PackedSize {
  double squared_norm;
  double squared_rounding;
};

// One way of scoring candidates. Rows are packed less a centre into words of four bytes: a float32 element
// each, or two bf16 elements.
struct KnnScoring {
  int elements;  // of a vector, in a word

  // to[w * rows + r] = word w of row r of from[.., stride]; rows from `filled` on are zero. Queries come in
  // tiles of KnnKernel::rows, of which `to` needs room for 16 words more; the bank in panels of `columns`.
  void (*pack_queries)(const float* from, int64_t stride, int64_t filled, int64_t width, const float* centre,
                       float* to);
  void (*pack_bank)(const float* from, int64_t stride, int64_t filled, int64_t width, const float* centre,
                    float* to);
  PackedSize (*measure)(const float* row, int64_t width, const float* centre);

  // scores[r][c] = panel[0][c] + sum_w queries[w][r] . panel[1 + w][c], and bit c of hits[r] tells whether
  // scores[r][c] > thresholds[r]. Bit r of the result tells whether hits[r] has any; where that is 0, scores
  // is left alone.
  uint32_t (*score_tile)(const float* queries,     // [words, rows]
                         const float* panel,       // [1 + words, columns]
                         int64_t words,            //
                         const float* thresholds,  // [rows]
                         float* scores,            // [rows, columns]
                         uint32_t* hits);          // [rows]
};

struct KnnKernel {
  int rows;     // queries in a tile, at most 32
  int columns;  // bank rows in a panel, at most 32
  KnnScoring float32;
  KnnScoring bf16;  // `elements` is 0 where the level has no bf16 instructions

  // distances[i] = squared distance of `query` and row rows[i] of `bank`, bit for bit the same at every level
  // and on CUDA: sixteen partial sums (element i goes to sum i % 16), product and sum rounded apart, then
  // halves added to halves.
  void (*squared_distances)(const float* query,
                            const float* bank,  // [.., width]
                            int64_t width,
                            const int32_t* rows,  // [count]
                            int64_t count,
                            float* distances);  // [count]
};

PYDEFECT_KERNEL(KnnKernel, knn_kernel)

}  // namespace pydefect::cpu
