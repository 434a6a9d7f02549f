#include <immintrin.h>

#include "knn_tile.h"

namespace pydefect::cpu {
namespace {

struct Avx512 {
  static constexpr int lanes = 16;
  using type = __m512;

  static type load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, type value) { _mm512_storeu_ps(to, value); }
  static type broadcast(float value) { return _mm512_set1_ps(value); }
  static type multiply_add(type a, type b, type c) { return _mm512_fmadd_ps(a, b, c); }
  static uint32_t greater(type a, type b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
};

}  // namespace

// 28 of the 32 registers hold sums, the others two bank vectors and a query element.
const KnnKernel knn_avx512{14, 32, score_tile<Avx512, 14, 2>, squared_distance<Avx512>};

}  // namespace pydefect::cpu
