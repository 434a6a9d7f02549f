#include <immintrin.h>

#include "knn_tile.h"

namespace pydefect::cpu {
namespace {

struct Avx2 {
  static constexpr int lanes = 8;
  using type = __m256;

  static type load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, type value) { _mm256_storeu_ps(to, value); }
  static type broadcast(float value) { return _mm256_set1_ps(value); }
  static type multiply_add(type a, type b, type c) { return _mm256_fmadd_ps(a, b, c); }
  static uint32_t greater(type a, type b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
  }
};

}  // namespace

// 12 of the 16 registers hold sums, the others two bank vectors and a query element.
const KnnKernel knn_avx2{6, 16, score_tile<Avx2, 6, 2>, squared_distance<Avx2>};

}  // namespace pydefect::cpu
