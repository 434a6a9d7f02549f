#include "relaxed_contrastive.h"

#include <cstdint>

#include "pack.h"
#include "simd.h"

namespace pydefect::cpu::PYDEFECT_LEVEL {
namespace {

constexpr int kVectors = 3;
constexpr int kPanel = kVectors * Simd::lanes;
#if defined(__AVX512F__)
constexpr int kRows = 8;  // 24 registers of sums, three of columns, one of a row's element
#else
constexpr int kRows = 4;  // 12 of 16 registers
#endif
static_assert(kPanel <= kLargestPanel && kPanel % kRows == 0);

using Vector = Simd::type;

void pack(const float* rows, int64_t count, int64_t width, const float* centre, float* panel) {
  pack_panel<Simd, kPanel>(
      [=](int64_t r, int64_t d, int64_t some) {
        return Simd::load_some(rows + r * width + d, some) - Simd::load_some(centre + d, some);
      },
      count, width, panel);
}

void norms(const float* panel, int64_t width, float* norms) {
  Vector sums[kVectors] = {};
  for (int64_t d = 0; d < width; ++d) {
    for (int v = 0; v < kVectors; ++v) {
      const Vector element = Simd::load(panel + d * kPanel + v * Simd::lanes);
      sums[v] = Simd::multiply_add(element, element, sums[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) Simd::store(norms + v * Simd::lanes, sums[v]);
}

// sums[r][c] = sum_d weights[r * row_stride + d * depth_stride] * columns[d * kPanel + c]; with `unit_rows`
// the row stride is 1, else the depth stride is.
template <bool unit_rows>
inline void multiply_tile(const float* weights, int64_t stride, const float* columns, int64_t depth,
                          Vector (&sums)[kRows][kVectors]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Simd::zero();
  }
  for (int64_t d = 0; d < depth; ++d) {
    Vector column[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) column[v] = Simd::load(columns + v * Simd::lanes);
    columns += kPanel;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vector weight = Simd::broadcast(unit_rows ? weights[r] : weights[r * stride]);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sums[r][v] = Simd::multiply_add(weight, column[v], sums[r][v]);
    }
    weights += unit_rows ? stride : 1;
  }
}

void products(const float* rows, const float* columns, int64_t width, float* products) {
  for (int first = 0; first < kPanel; first += kRows) {
    Vector sums[kRows][kVectors];
    multiply_tile<true>(rows + first, kPanel, columns, width, sums);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) {
        Simd::store(products + (first + r) * kPanel + v * Simd::lanes, sums[r][v]);
      }
    }
  }
}

// |x - y|^2 = |x|^2 + |y|^2 - 2 x.y. The order of the operands lets NaN through.
inline Vector squared_distance(Vector norm, Vector other_norm, Vector product) {
  const Vector squared = Simd::multiply_add(Simd::broadcast(-2.0f), product, norm + other_norm);
  return Simd::maximum(Simd::broadcast(kLeastSquared), squared);
}

// Zero past the last patch: a product with 0 would leave NaN where a term overflows.
inline Vector of_patches(const float* valid, Vector values) {
  return Simd::where_greater(Simd::load(valid), Simd::zero(), values);
}

void add_distances(const PairTile& tile, const PanelFacts& rows, const PanelFacts& columns, float* row_sums,
                   float* column_sums) {
  Vector column_sum[kVectors];
  for (int v = 0; v < kVectors; ++v) column_sum[v] = Simd::load(column_sums + v * Simd::lanes);
  for (int r = 0; r < tile.rows; ++r) {
    const Vector norm = Simd::broadcast(rows.norms[r]);
    Vector row_sum = Simd::zero();
    for (int v = 0; v < kVectors; ++v) {
      const int c = v * Simd::lanes;
      const Vector distance = of_patches(
          columns.valid + c, Simd::square_root(squared_distance(norm, Simd::load(columns.norms + c),
                                                                Simd::load(tile.products + r * kPanel + c))));
      row_sum += distance;
      column_sum[v] += distance;
    }
    row_sums[r] += Simd::sum(row_sum);
  }
  for (int v = 0; v < kVectors; ++v) Simd::store(column_sums + v * Simd::lanes, column_sum[v]);
}

// What depends on the pair's label alone.
template <bool squared>
inline Vector label(Vector norm, Vector other_norm, Vector product, const ContrastiveTerms& terms) {
  Vector distance = squared_distance(norm, other_norm, product);
  if (!squared) distance = Simd::square_root(distance);
  return Simd::broadcast(terms.alpha) * Simd::exponential(distance * Simd::broadcast(-1.0f / terms.sigma));
}

// The labels w_ij and w_ji of a vector of pairs.
template <bool squared>
inline void labels(const PairTile& tile, const PanelFacts& rows, const PanelFacts& columns,
                   const ContrastiveTerms& terms, int r, int c, Vector& forth, Vector& back) {
  forth = back = Simd::zero();
  if (!terms.pairwise) return;
  const Vector column_norms = Simd::load(columns.label_norms + c);
  const Vector product = Simd::load(tile.label_products + r * kPanel + c);
  if (!terms.cross) {
    forth = back = label<squared>(Simd::broadcast(rows.label_norms[r]), column_norms, product, terms);
    return;
  }
  forth = label<squared>(Simd::broadcast(rows.norms[r]), column_norms, product, terms);
  back = label<squared>(Simd::broadcast(rows.label_norms[r]), Simd::load(columns.norms + c),
                        Simd::load(tile.mirrored_products + r * kPanel + c), terms);
}

template <bool squared>
void add_terms_of(const PairTile& tile, const PanelFacts& rows, const PanelFacts& columns,
                  const ContrastiveTerms& terms, float* row_losses, float* row_slopes, float* column_losses,
                  float* column_slopes) {
  const Vector margin = Simd::broadcast(terms.margin);
  Vector column_loss[kVectors];
  Vector column_slope[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    column_loss[v] = Simd::load(column_losses + v * Simd::lanes);
    column_slope[v] = Simd::load(column_slopes + v * Simd::lanes);
  }
  for (int r = 0; r < tile.rows; ++r) {
    const Vector norm = Simd::broadcast(rows.norms[r]);
    const Vector inverse_mean = Simd::broadcast(rows.inverse_means[r]);
    Vector row_loss = Simd::zero();
    Vector row_slope = Simd::zero();
    for (int v = 0; v < kVectors; ++v) {
      const int c = v * Simd::lanes;
      const Vector distance = Simd::square_root(
          squared_distance(norm, Simd::load(columns.norms + c), Simd::load(tile.products + r * kPanel + c)));
      Vector forth, back;
      labels<squared>(tile, rows, columns, terms, r, c, forth, back);
      const auto add = [&](Vector relative, Vector weight, Vector& losses, Vector& slopes) {
        const Vector repulsion = Simd::maximum(Simd::zero(), margin - relative);
        const Vector repulsion_squared = repulsion * repulsion;
        const Vector loss = Simd::multiply_add(
            weight, Simd::multiply_add(relative, relative, -repulsion_squared), repulsion_squared);
        const Vector half_slope = Simd::multiply_add(weight, relative + repulsion, -repulsion);
        losses += of_patches(columns.valid + c, loss);
        slopes += of_patches(columns.valid + c, relative * (half_slope + half_slope));
      };
      add(distance * inverse_mean, forth, row_loss, row_slope);
      add(distance * Simd::load(columns.inverse_means + c), back, column_loss[v], column_slope[v]);
    }
    row_losses[r] += Simd::sum(row_loss);
    row_slopes[r] += Simd::sum(row_slope);
  }
  for (int v = 0; v < kVectors; ++v) {
    Simd::store(column_losses + v * Simd::lanes, column_loss[v]);
    Simd::store(column_slopes + v * Simd::lanes, column_slope[v]);
  }
}

void add_terms(const PairTile& tile, const PanelFacts& rows, const PanelFacts& columns,
               const ContrastiveTerms& terms, float* row_losses, float* row_slopes, float* column_losses,
               float* column_slopes) {
  const auto add = terms.squared_similarity ? add_terms_of<true> : add_terms_of<false>;
  add(tile, rows, columns, terms, row_losses, row_slopes, column_losses, column_slopes);
}

template <bool squared>
void find_pulls_of(const PairTile& tile, const PanelFacts& rows, const PanelFacts& columns,
                   const ContrastiveTerms& terms, float* pulls, int64_t stride, float* row_sums,
                   float* column_sums) {
  const Vector margin = Simd::broadcast(terms.margin);
  Vector column_sum[kVectors];
  for (int v = 0; v < kVectors; ++v) column_sum[v] = Simd::load(column_sums + v * Simd::lanes);
  // dL/dd_ij = (dL/d delta_ij - slope_i) / mean_i: through delta itself and through the row's mean.
  const auto derivative = [&](Vector distance, Vector weight, Vector inverse_mean, Vector slope) {
    const Vector relative = distance * inverse_mean;
    const Vector repulsion = Simd::maximum(Simd::zero(), margin - relative);
    const Vector half_slope = Simd::multiply_add(weight, relative + repulsion, -repulsion);
    return inverse_mean * (half_slope + half_slope - slope);
  };
  for (int r = 0; r < tile.rows; ++r) {
    const Vector norm = Simd::broadcast(rows.norms[r]);
    const Vector inverse_mean = Simd::broadcast(rows.inverse_means[r]);
    const Vector slope = Simd::broadcast(rows.slopes[r]);
    Vector row_sum = Simd::zero();
    for (int v = 0; v < kVectors; ++v) {
      const int c = v * Simd::lanes;
      const Vector squared_distances =
          squared_distance(norm, Simd::load(columns.norms + c), Simd::load(tile.products + r * kPanel + c));
      const Vector distance = Simd::square_root(squared_distances);
      Vector forth, back;
      labels<squared>(tile, rows, columns, terms, r, c, forth, back);
      const Vector both =
          derivative(distance, forth, inverse_mean, slope) +
          derivative(distance, back, Simd::load(columns.inverse_means + c), Simd::load(columns.slopes + c));
      const Vector pull =
          of_patches(columns.valid + c,
                     Simd::where_greater(squared_distances, Simd::broadcast(kLeastSquared), both / distance));
      Simd::store(pulls + r * stride + c, pull);
      row_sum += pull;
      column_sum[v] += pull;
    }
    row_sums[r] += Simd::sum(row_sum);
  }
  for (int r = tile.rows; r < kPanel; ++r) {
    for (int v = 0; v < kVectors; ++v) Simd::store(pulls + r * stride + v * Simd::lanes, Simd::zero());
  }
  for (int v = 0; v < kVectors; ++v) Simd::store(column_sums + v * Simd::lanes, column_sum[v]);
}

void find_pulls(const PairTile& tile, const PanelFacts& rows, const PanelFacts& columns,
                const ContrastiveTerms& terms, float* pulls, int64_t stride, float* row_sums,
                float* column_sums) {
  const auto find = terms.squared_similarity ? find_pulls_of<true> : find_pulls_of<false>;
  find(tile, rows, columns, terms, pulls, stride, row_sums, column_sums);
}

template <bool unit_rows>
void subtract_weighted_of(const float* weights, int64_t stride, int64_t rows, int64_t depth,
                          const float* vectors, int64_t width, float* sums) {
  for (int64_t first = 0; first < width; first += kPanel, vectors += depth * kPanel) {
    const int64_t columns = width - first < kPanel ? width - first : kPanel;
    for (int64_t row = 0; row < rows; row += kRows) {
      Vector tile[kRows][kVectors];
      multiply_tile<unit_rows>(weights + row * (unit_rows ? 1 : stride), stride, vectors, depth, tile);
      float tile_sums[kRows][kPanel];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) Simd::store(tile_sums[r] + v * Simd::lanes, tile[r][v]);
      }
      for (int r = 0; r < kRows && row + r < rows; ++r) {
        float* to = sums + (row + r) * width + first;
        for (int64_t c = 0; c < columns; ++c) to[c] -= tile_sums[r][c];
      }
    }
  }
}

void subtract_weighted(const float* weights, int64_t row_stride, int64_t depth_stride, int64_t rows,
                       int64_t depth, const float* vectors, int64_t width, float* sums) {
  if (row_stride == 1) {
    subtract_weighted_of<true>(weights, depth_stride, rows, depth, vectors, width, sums);
  } else {
    subtract_weighted_of<false>(weights, row_stride, rows, depth, vectors, width, sums);
  }
}

inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

void distances(const float* vector, float norm, const float* const* others, const float* other_norms,
               int64_t count, const float* centre, int64_t width, float* distances) {
  // One sum depends on its last addition; several together keep the processor busy.
  constexpr int64_t kTogether = 8;
  for (int64_t first = 0; first < count; first += kTogether) {
    const int64_t some = count - first < kTogether ? count - first : kTogether;
    const float* together[kTogether];
    for (int64_t t = 0; t < kTogether; ++t) together[t] = others[first + (t < some ? t : 0)];
    float products[kTogether] = {};
    for (int64_t d = 0; d < width; ++d) {
      const float element = vector[d] - centre[d];
#pragma GCC unroll 8
      for (int64_t t = 0; t < kTogether; ++t) {
        products[t] = multiply_add(element, together[t][d] - centre[d], products[t]);
      }
    }
    for (int64_t t = 0; t < some; ++t) {
      const float squared = multiply_add(-2.0f, products[t], norm + other_norms[first + t]);
      distances[first + t] = __builtin_sqrtf(squared < kLeastSquared ? kLeastSquared : squared);
    }
  }
}

}  // namespace

const RelaxedContrastiveKernel relaxed_contrastive_kernel{
    kPanel, pack, norms, products, add_distances, add_terms, find_pulls, subtract_weighted, distances};

}  // namespace pydefect::cpu::PYDEFECT_LEVEL
