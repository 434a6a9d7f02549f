// What one instruction set level offers to the relaxed contrastive loss. Vectors are handled in panels:
// `panel` rows side by side, [width, panel]. A panel serves as rows and as columns of a tile of pairs.
#pragma once

#include <cstdint>

#include "levels.h"

namespace pydefect::cpu {

constexpr int kLargestPanel = 48;

// Below this a squared distance counts as it, as in the reference: no gradient flows through such a pair.
constexpr float kLeastSquared = 1e-30f;

// Equations (1), (3) and (5): how a pair's distances become its label and its loss.
struct ContrastiveTerms {
  float alpha;
  float sigma;
  float margin;
  bool squared_similarity;  // exp(-d^2 / sigma) instead of exp(-d / sigma)
  bool pairwise;            // false: the label has no pairwise part, and the label products are not read
  bool cross;               // the label of (i, j) is not that of (j, i), and mirrored_products are read
};

// What is known about the patches of one panel, [panel] each.
struct PanelFacts {
  const float* norms;          // |z|^2
  const float* label_norms;    // |z'|^2
  const float* inverse_means;  // 1 / mean distance, equation (4)
  const float* slopes;         // mean over j of dL/d delta_ij * delta_ij
  const float* valid;          // 1 for a patch, 0 past the last one
};

// A tile of pairs: inner products [panel, panel], row i against column j.
struct PairTile {
  const float* products;           // z_i . z_j
  const float* label_products;     // z'_i . z'_j, or z_i . z'_j
  const float* mirrored_products;  // z'_i . z_j
  int rows;                        // of them patches
};

struct RelaxedContrastiveKernel {
  int panel;

  // panel[d][r] = rows[r][d] - centre[d]; zero from `count` on.
  void (*pack)(const float* rows,    // [count, width]
               int64_t count,        //
               int64_t width,        //
               const float* centre,  // [width]
               float* panel);        // [width, panel]

  // Squared norms of a panel's vectors, rounded as `products` rounds, so that coinciding vectors get a
  // distance of exactly 0.
  void (*norms)(const float* panel, int64_t width, float* norms);

  // products[i][j] = sum_d rows[d][i] * columns[d][j].
  void (*products)(const float* rows, const float* columns, int64_t width, float* products);

  // Adds up the tile's distances over its columns and over its rows.
  void (*add_distances)(const PairTile& tile, const PanelFacts& rows, const PanelFacts& columns,
                        float* row_sums,      // [panel]
                        float* column_sums);  // [panel]

  // Adds up loss and dL/d delta * delta of the pairs (i, j) over the columns, of the pairs (j, i) over the
  // rows.
  void (*add_terms)(const PairTile& tile, const PanelFacts& rows, const PanelFacts& columns,
                    const ContrastiveTerms& terms, float* row_losses, float* row_slopes, float* column_losses,
                    float* column_slopes);

  // pulls[i][j] = (dL/dd_ij + dL/dd_ji) / d_ij, of which dL/dz_i = sum_j pulls_ij (z_i - z_j); their sums
  // too.
  void (*find_pulls)(const PairTile& tile, const PanelFacts& rows, const PanelFacts& columns,
                     const ContrastiveTerms& terms, float* pulls, int64_t stride, float* row_sums,
                     float* column_sums);

  // sums[r] -= sum_d weights[r * row_stride + d * depth_stride] * vectors[d], where one of the strides is 1
  // and `vectors` lies as [width / panel, depth, panel]. Weights are read for whole tiles of eight rows.
  void (*subtract_weighted)(const float* weights, int64_t row_stride, int64_t depth_stride, int64_t rows,
                            int64_t depth, const float* vectors, int64_t width,
                            float* sums);  // [rows, width]

  // A vector's distances from some others: to the bit those that `products` leads to.
  void (*distances)(const float* vector,         // [width]
                    float norm,                  //
                    const float* const* others,  // [count] of [width]
                    const float* other_norms,    // [count]
                    int64_t count,               //
                    const float* centre,         // [width]
                    int64_t width,               //
                    float* distances);           // [count]
};

PYDEFECT_KERNEL(RelaxedContrastiveKernel, relaxed_contrastive_kernel)

}  // namespace pydefect::cpu
