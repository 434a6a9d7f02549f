#include "knn.h"

#include <cstdint>
#include <cstring>

#include "pack.h"
#include "simd.h"
#include "tiles.h"

namespace pydefect::cpu::PYDEFECT_LEVEL {
namespace {

template <class V, int rows, int vectors>
uint32_t score_tile(const float* queries, const float* panel, int64_t words, const float* thresholds,
                    float* scores, uint32_t* hits) {
  constexpr int columns = vectors * V::lanes;
  typename V::type sums[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sums[r][v] = V::load(panel + v * V::lanes);
  }
  for (int64_t w = 0; w < words; ++w) {
    panel += columns;
    typename V::type bank[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) bank[v] = V::load(panel + v * V::lanes);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const typename V::type query = V::broadcast(queries[r]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[r][v] = V::multiply_add(query, bank[v], sums[r][v]);
    }
    queries += rows;
  }
  uint32_t any = 0;
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    const typename V::type threshold = V::broadcast(thresholds[r]);
    hits[r] = 0;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) hits[r] |= V::greater(sums[r][v], threshold) << (v * V::lanes);
    any |= (hits[r] != 0 ? 1u : 0u) << r;
  }
  if (any == 0) return 0;
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) V::store(scores + r * columns + v * V::lanes, sums[r][v]);
  }
  return any;
}

// Elements d.. of row - centre, zero past the end.
template <class V>
typename V::type centred(const float* row, const float* centre, int64_t d, int64_t width) {
  return V::load_some(row + d, width - d) - V::load_some(centre + d, width - d);
}

template <class V>
float horizontal_sum(const typename V::type (&sums)[16 / V::lanes]) {
  constexpr int parts = 16 / V::lanes;
  typename V::type folded[parts];
  for (int p = 0; p < parts; ++p) folded[p] = sums[p];
#pragma GCC unroll 4
  for (int half = parts / 2; half > 0; half /= 2) {
    for (int p = 0; p < half; ++p) folded[p] += folded[p + half];
  }
  return V::sum(folded[0]);
}

// Distances to `count` rows at once: one sum alone would wait for each of its additions.
template <class V, int count>
void squared_distances_of(const float* query, const float* bank, int64_t width, const int32_t* rows,
                          float* distances) {
  constexpr int parts = 16 / V::lanes;
  typename V::type sums[count][parts] = {};
  const float* row[count];
  for (int i = 0; i < count; ++i) row[i] = bank + rows[i] * width;
  int64_t d = 0;
  for (; d + 16 <= width; d += 16) {
#pragma GCC unroll 4
    for (int p = 0; p < parts; ++p) {
      const typename V::type x = V::load(query + d + p * V::lanes);
#pragma GCC unroll 8
      for (int i = 0; i < count; ++i) {
        const typename V::type difference = x - V::load(row[i] + d + p * V::lanes);
        sums[i][p] += difference * difference;
      }
    }
  }
  if (d < width) {
    // Zeros past the end add nothing, and leave every bit of a sum as it is.
    for (int p = 0; p < parts && d < width; ++p, d += V::lanes) {
      const typename V::type x = V::load_some(query + d, width - d);
#pragma GCC unroll 8
      for (int i = 0; i < count; ++i) {
        const typename V::type difference = x - V::load_some(row[i] + d, width - d);
        sums[i][p] += difference * difference;
      }
    }
  }
  for (int i = 0; i < count; ++i) distances[i] = horizontal_sum<V>(sums[i]);
}

template <class V>
void squared_distances(const float* query, const float* bank, int64_t width, const int32_t* rows,
                       int64_t count, float* distances) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    squared_distances_of<V, 4>(query, bank, width, rows + i, distances + i);
  }
  if (i + 2 <= count) {
    squared_distances_of<V, 2>(query, bank, width, rows + i, distances + i);
    i += 2;
  }
  if (i < count) squared_distances_of<V, 1>(query, bank, width, rows + i, distances + i);
}

// Sums of squares in double precision, eight at a time whatever the level.
struct DoubleSums {
  using floats = float __attribute__((vector_size(32)));
  using doubles = double __attribute__((vector_size(64)));

  doubles sums = {};

  void add_squares(const float* values, const float* centre) {
    floats a, b;
    std::memcpy(&a, values, sizeof(a));
    std::memcpy(&b, centre, sizeof(b));
    const floats difference = a - b;  // rounded to float32, as packing does
    const doubles wide = __builtin_convertvector(difference, doubles);
    sums += wide * wide;
  }

  double total() const {
    double all = 0.0;
    for (int i = 0; i < 8; ++i) all += sums[i];
    return all;
  }
};

double centred_squared_norm(const float* row, int64_t width, const float* centre) {
  DoubleSums even, odd;
  int64_t d = 0;
  for (; d + 16 <= width; d += 16) {
    even.add_squares(row + d, centre + d);
    odd.add_squares(row + d + 8, centre + d + 8);
  }
  double rest = 0.0;
  for (; d < width; ++d) {
    const double difference = row[d] - centre[d];
    rest += difference * difference;
  }
  return even.total() + odd.total() + rest;
}

PackedSize measure(const float* row, int64_t width, const float* centre) {
  return {centred_squared_norm(row, width, centre), 0.0};
}

template <class V, int columns>
void pack(const float* from, int64_t stride, int64_t filled, int64_t width, const float* centre, float* to) {
  pack_panel<V, columns>(
      [=](int64_t r, int64_t d, int64_t) { return centred<V>(from + r * stride, centre, d, width); }, filled,
      width, to);
}

template <int rows, int vectors>
constexpr KnnScoring float32_scoring{1,
                                     rows,
                                     1,
                                     pack<Simd, rows>,
                                     pack<Simd, vectors * Simd::lanes>,
                                     measure,
                                     score_tile<Simd, rows, vectors>};

#if defined(__AVX512BF16__)

// Words of two bf16 elements each.
struct SimdPairs : Simd {
  static type multiply_add(type a, type b, type c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};

template <int columns>
void pack_bf16(const float* from, int64_t stride, int64_t filled, int64_t width, const float* centre,
               float* to) {
  const auto load = [=](int64_t r, int64_t w, int64_t) {
    const float* row = from + r * stride;
    const int64_t d = 2 * w;
    const __m512 low = centred<Simd>(row, centre, d, width);
    const __m512 high = d + 16 < width ? centred<Simd>(row, centre, d + 16, width) : Simd::zero();
    return reinterpret_cast<__m512>(_mm512_cvtne2ps_pbh(high, low));
  };
  pack_panel<SimdPairs, columns>(load, filled, (width + 1) / 2, to);
}

PackedSize measure_bf16(const float* row, int64_t width, const float* centre) {
  __m512 sums = Simd::zero();
  for (int64_t d = 0; d < width; d += 16) {
    const __m512 value = centred<Simd>(row, centre, d, width);
    const __m512i bits = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
    // Exact: the difference is made of the bits that rounding took away.
    const __m512 rounding = value - _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    sums = _mm512_fmadd_ps(rounding, rounding, sums);
  }
  return {centred_squared_norm(row, width, centre), Simd::sum(sums)};
}

template <int rows, int vectors>
constexpr KnnScoring bf16_scoring{
    2, rows, 1, pack_bf16<rows>, pack_bf16<vectors * 16>, measure_bf16, score_tile<SimdPairs, rows, vectors>};

#else

template <int rows, int vectors>
constexpr KnnScoring bf16_scoring{};

#endif

#if defined(__AMX_BF16__)

// A tile register holds 16 rows of 64 bytes. Four of the eight hold the sums of 32 queries and 32 rows of the
// bank, the others the words of a block of both.
constexpr int kTileRows = 32, kTileColumns = 32, kBlock = 16;

void pack_blocks(const float* from, int64_t stride, int64_t filled, int64_t width, const float* centre,
                 float* to) {
  for (int64_t d = 0; d < width; d += 2 * kBlock) {
    for (int64_t r = 0; r < kTileRows; ++r, to += kBlock) {
      __m512 low = Simd::zero(), high = Simd::zero();
      if (r < filled) {
        low = centred<Simd>(from + r * stride, centre, d, width);
        if (d + 16 < width) high = centred<Simd>(from + r * stride, centre, d + 16, width);
      }
      Simd::store(to, reinterpret_cast<__m512>(_mm512_cvtne2ps_pbh(high, low)));
    }
  }
}

uint32_t score_tile_amx(const float* queries, const float* panel, int64_t words, const float* thresholds,
                        float* scores, uint32_t* hits) {
  constexpr int64_t line = sizeof(float) * kTileColumns;
  // A stride of 0: every row of sums starts with the same numbers.
  _tile_loadd(0, panel, 0);
  _tile_loadd(1, panel + 16, 0);
  _tile_loadd(2, panel, 0);
  _tile_loadd(3, panel + 16, 0);
  panel += kTileColumns;
  for (int64_t w = 0; w < words; w += kBlock) {
    _tile_loadd(4, queries, 64);
    _tile_loadd(6, panel, line);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, panel + 16, line);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, queries + 16 * kBlock, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    queries += kTileRows * kBlock;
    panel += kTileColumns * kBlock;
  }
  _tile_stored(0, scores, line);
  _tile_stored(1, scores + 16, line);
  _tile_stored(2, scores + 16 * kTileColumns, line);
  _tile_stored(3, scores + 16 * kTileColumns + 16, line);
  uint32_t any = 0;
  for (int r = 0; r < kTileRows; ++r) {
    const __m512 threshold = Simd::broadcast(thresholds[r]);
    const float* of_row = scores + r * kTileColumns;
    hits[r] = Simd::greater(Simd::load(of_row), threshold) | Simd::greater(Simd::load(of_row + 16), threshold)
                                                                 << 16;
    any |= (hits[r] != 0 ? 1u : 0u) << r;
  }
  return any;
}

constexpr KnnScoring amx_scoring{2,
                                 kTileRows,
                                 kBlock,
                                 pack_blocks,
                                 pack_bf16<kTileColumns>,
                                 measure_bf16,
                                 score_tile_amx,
                                 configure_tiles,
                                 release_tiles};

#else

constexpr KnnScoring amx_scoring{};

#endif

template <int rows, int vectors>
constexpr KnnKernel kernel{vectors * Simd::lanes, float32_scoring<rows, vectors>, bf16_scoring<rows, vectors>,
                           amx_scoring, squared_distances<Simd>};

}  // namespace

#if defined(__AVX512F__)
// 28 of the 32 registers hold sums, the others two bank vectors and a query element.
const KnnKernel knn_kernel = kernel<14, 2>;
#elif defined(__AVX2__)
// 12 of the 16 registers hold sums, the others two bank vectors and a query element.
const KnnKernel knn_kernel = kernel<6, 2>;
#else
const KnnKernel knn_kernel = kernel<4, 2>;
#endif

}  // namespace pydefect::cpu::PYDEFECT_LEVEL
