#include "squared_distances.h"

#include <cstdint>

#include "simd.h"

namespace pydefect::cpu::PYDEFECT_LEVEL {
namespace {

// Partial sums of one distance: element i goes to sum i % 16.
constexpr int kSums = 16;

// Halves added to halves.
template <class V>
float total(typename V::type* parts) {
  for (int half = kSums / V::lanes / 2; half > 0; half /= 2) {
    for (int p = 0; p < half; ++p) parts[p] += parts[p + half];
  }
  return V::sum(parts[0]);
}

#if defined(__AVX512F__)
// The totals of sixteen distances at once: each step halves two vectors into one, so lane i ends as the total
// of sums[i]. Adding up one by one takes half as long again as all the subtracting and multiplying.
inline void totals(Simd::type* sums, float* distances) {
  using Places = int32_t __attribute__((vector_size(64)));
  constexpr Places lower[] = {
      {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23},
      {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27},
      {0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29},
      {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30},
  };
  int half = 8;
#pragma GCC unroll 4
  for (int step = 0; step < 4; ++step, half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      const Simd::type first = sums[2 * i];
      const Simd::type second = sums[2 * i + 1];
      sums[i] = __builtin_shuffle(first, second, lower[step]) +
                __builtin_shuffle(first, second, lower[step] + half);
    }
  }
  Simd::store(distances, sums[0]);
}
#endif

template <class V, int rows, int columns>
struct Tile {
  static constexpr int parts = kSums / V::lanes;

  typename V::type sums[rows * columns * parts] = {};

  // Adds the squares of the sixteen differences that begin at element `from`.
  void add(const float* const* a, const float* const* b, int64_t from) {
#pragma GCC unroll 4
    for (int p = 0; p < parts; ++p) {
      typename V::type right[columns];
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c) right[c] = V::load(b[c] + from + p * V::lanes);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const typename V::type left = V::load(a[r] + from + p * V::lanes);
#pragma GCC unroll 8
        for (int c = 0; c < columns; ++c) {
          const typename V::type difference = left - right[c];
          sums[(r * columns + c) * parts + p] += difference * difference;
        }
      }
    }
  }
};

// Copies what is left of each vector past element `from`, zeros behind it: they add nothing to a sum.
template <int count>
void copy_rest(const float* const* vectors, int64_t from, int64_t width, float (*rest)[kSums],
               const float** places) {
  for (int i = 0; i < count; ++i) {
    for (int64_t d = 0; d < kSums; ++d) rest[i][d] = from + d < width ? vectors[i][from + d] : 0.0f;
    places[i] = rest[i];
  }
}

template <class V, int rows, int columns>
void measure_tile(const float* const* a, const float* const* b, int64_t width, float* distances) {
  const float* left[rows];
  const float* right[columns];
  for (int r = 0; r < rows; ++r) left[r] = a[r];
  for (int c = 0; c < columns; ++c) right[c] = b[c];
  Tile<V, rows, columns> tile;
  int64_t d = 0;
  for (; d + kSums <= width; d += kSums) tile.add(left, right, d);
  if (d < width) {
    float left_rest[rows][kSums];
    float right_rest[columns][kSums];
    copy_rest<rows>(a, d, width, left_rest, left);
    copy_rest<columns>(b, d, width, right_rest, right);
    tile.add(left, right, 0);
  }
#if defined(__AVX512F__)
  if constexpr (rows * columns == 16) {
    totals(tile.sums, distances);
    return;
  }
#endif
#pragma GCC unroll 16
  for (int i = 0; i < rows * columns; ++i) distances[i] = total<V>(tile.sums + i * tile.parts);
}

// One row of tiles. Where there are fewer than `columns` vectors left, the last one fills the tile.
template <class V, int rows, int columns>
void measure_rows(const float* const* a, const float* const* b, int64_t count, int64_t width,
                  float* distances, int64_t stride) {
  for (int64_t first = 0; first < count; first += columns) {
    const float* some[columns];
    for (int64_t c = 0; c < columns; ++c) some[c] = b[first + c < count ? first + c : count - 1];
    float tile[rows * columns];
    measure_tile<V, rows, columns>(a, some, width, tile);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns && first + c < count; ++c) {
        distances[r * stride + first + c] = tile[r * columns + c];
      }
    }
  }
}

template <class V, int tile_rows, int tile_columns, int single_columns>
void measure(const float* const* a, int64_t rows, const float* const* b, int64_t columns, int64_t width,
             float* distances, int64_t stride) {
  int64_t r = 0;
  for (; r + tile_rows <= rows; r += tile_rows) {
    measure_rows<V, tile_rows, tile_columns>(a + r, b, columns, width, distances + r * stride, stride);
  }
  for (; r < rows; ++r) {
    measure_rows<V, 1, single_columns>(a + r, b, columns, width, distances + r * stride, stride);
  }
}

template <class V>
constexpr uint32_t kAllLanes = (uint32_t{1} << V::lanes) - 1;

template <class V>
int64_t lower(float* nearest, const float* distances, int64_t count) {
  typename V::type largest = V::broadcast(-__builtin_inff());
  int64_t i = 0;
  for (; i + V::lanes <= count; i += V::lanes) {
    // Where a distance is NaN the minimum is its second argument.
    const typename V::type lowered = V::minimum(V::load(distances + i), V::load(nearest + i));
    V::store(nearest + i, lowered);
    largest = V::maximum(largest, lowered);
  }
  float lanes[V::lanes];
  V::store(lanes, largest);
  float most = lanes[0];
  for (int lane = 1; lane < V::lanes; ++lane) most = lanes[lane] > most ? lanes[lane] : most;
  for (; i < count; ++i) {
    if (distances[i] < nearest[i]) nearest[i] = distances[i];
    most = nearest[i] > most ? nearest[i] : most;
  }
  int64_t place = 0;
  const typename V::type all = V::broadcast(most);
  while (place + V::lanes <= count && V::greater(all, V::load(nearest + place)) == kAllLanes<V>) {
    place += V::lanes;
  }
  while (nearest[place] < most) ++place;
  return place;
}

}  // namespace

#if defined(__AVX512F__)
// 16 of the 32 registers hold sums: additions take three cycles, so fewer would wait for each other.
const SquaredDistancesKernel squared_distances_kernel{measure<Simd, 4, 4, 8>, lower<Simd>};
#elif defined(__AVX2__)
const SquaredDistancesKernel squared_distances_kernel{measure<Simd, 2, 2, 4>, lower<Simd>};
#else
const SquaredDistancesKernel squared_distances_kernel{measure<Simd, 1, 2, 2>, lower<Simd>};
#endif

}  // namespace pydefect::cpu::PYDEFECT_LEVEL
