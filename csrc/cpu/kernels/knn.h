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
  int elements;  // of a vector, in a word; 0 where the level has no such instructions
  int rows;      // queries in a tile, at most 32
  int block;     // words that follow one another in a packed query; packed rows have a multiple of them

  // Word w of row r of from[.., stride] goes to query_word(w, r) of a tile of queries, for which `to` needs
  // room for 16 words more, and to w * columns + r of a panel of the bank. Rows from `filled` on are zero.
  void (*pack_queries)(const float* from, int64_t stride, int64_t filled, int64_t width, const float* centre,
                       float* to);
  void (*pack_bank)(const float* from, int64_t stride, int64_t filled, int64_t width, const float* centre,
                    float* to);
  PackedSize (*measure)(const float* row, int64_t width, const float* centre);

  // scores[r][c] = panel[0][c] + sum_w query[w][r] . panel[1 + w][c], and bit c of hits[r] tells whether
  // scores[r][c] > thresholds[r]. Bit r of the result tells whether hits[r] has any; where that is 0, scores
  // says nothing.
  uint32_t (*score_tile)(const float* queries,     // [words / block, rows, block]
                         const float* panel,       // [1 + words, columns]
                         int64_t words,            //
                         const float* thresholds,  // [rows]
                         float* scores,            // [rows, columns]
                         uint32_t* hits);          // [rows]

  // Called by a thread before its first tile and after its last one; null where there is nothing to do.
  void (*begin)() = nullptr;
  void (*end)() = nullptr;

  int64_t query_word(int64_t word, int64_t row) const {
    return (word / block * rows + row) * block + word % block;
  }
};

struct KnnKernel {
  int columns;  // bank rows in a panel, at most 32
  KnnScoring float32;
  KnnScoring bf16;
  KnnScoring amx;  // bf16 with matrix instructions, for processors that have them

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
