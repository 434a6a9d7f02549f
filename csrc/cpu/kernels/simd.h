// `Simd`: float32 vectors of the level that the including file is compiled for. Everything sits in an unnamed
// namespace, and files in this folder use no PyTorch header and no standard library template: code that the
// linker may merge with another unit's copy must not hold instructions that the machine lacks.
//
// Vectors are GCC's, so + - * / work on them as they stand.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
// GCC 12 takes its own intrinsics' "undefined" operands for mistakes (its bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace pydefect::cpu::PYDEFECT_LEVEL {
namespace {

// What the levels share: `greater` gives one bit a lane, `where_greater` the value in those lanes and 0 in
// the others; where a or b is NaN, `maximum` and `minimum` return b.

#if defined(__AVX512F__)

struct SimdBase {
  static constexpr int lanes = 16;
  using type = __m512;

  static type load(const float* from) { return _mm512_loadu_ps(from); }
  // The first `count` values, zero past them.
  static type load_some(const float* from, int64_t count) {
    const uint32_t mask = count >= lanes ? 0xffffu : (1u << count) - 1u;
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
  }
  static void store(float* to, type value) { _mm512_storeu_ps(to, value); }
  // Past the caches; `to` is aligned to a whole vector, and finish_streams() comes before anyone reads.
  static void stream(float* to, type value) { _mm512_stream_ps(to, value); }
  static void finish_streams() { _mm_sfence(); }
  static type broadcast(float value) { return _mm512_set1_ps(value); }
  static type multiply_add(type a, type b, type c) { return _mm512_fmadd_ps(a, b, c); }
  static type maximum(type a, type b) { return _mm512_max_ps(a, b); }
  static type minimum(type a, type b) { return _mm512_min_ps(a, b); }
  static type square_root(type a) { return _mm512_sqrt_ps(a); }
  static uint32_t greater(type a, type b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static type where_greater(type a, type b, type value) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), value);
  }

  // Rows become columns.
  static void transpose(type (&rows)[lanes]) {
    type quarters[4][4];  // [q][j]: in its 128-bit lane l, column 4 l + j of the rows 4 q to 4 q + 3
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const type* row = rows + 4 * q;
      const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(row[0], row[1]));
      const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(row[0], row[1]));
      const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(row[2], row[3]));
      const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(row[2], row[3]));
      quarters[q][0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
      quarters[q][1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
      quarters[q][2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
      quarters[q][3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const type even_top = _mm512_shuffle_f32x4(quarters[0][j], quarters[1][j], 0x88);
      const type odd_top = _mm512_shuffle_f32x4(quarters[0][j], quarters[1][j], 0xdd);
      const type even_bottom = _mm512_shuffle_f32x4(quarters[2][j], quarters[3][j], 0x88);
      const type odd_bottom = _mm512_shuffle_f32x4(quarters[2][j], quarters[3][j], 0xdd);
      rows[j] = _mm512_shuffle_f32x4(even_top, even_bottom, 0x88);
      rows[4 + j] = _mm512_shuffle_f32x4(odd_top, odd_bottom, 0x88);
      rows[8 + j] = _mm512_shuffle_f32x4(even_top, even_bottom, 0xdd);
      rows[12 + j] = _mm512_shuffle_f32x4(odd_top, odd_bottom, 0xdd);
    }
  }
};

#elif defined(__AVX2__)

struct SimdBase {
  static constexpr int lanes = 8;
  using type = __m256;

  static type load(const float* from) { return _mm256_loadu_ps(from); }
  // The first `count` values, zero past them.
  static type load_some(const float* from, int64_t count) {
    if (count >= lanes) return load(from);
    const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(from, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), places));
  }
  static void store(float* to, type value) { _mm256_storeu_ps(to, value); }
  static void stream(float* to, type value) { _mm256_stream_ps(to, value); }
  static void finish_streams() { _mm_sfence(); }
  static type broadcast(float value) { return _mm256_set1_ps(value); }
  static type multiply_add(type a, type b, type c) { return _mm256_fmadd_ps(a, b, c); }
  static type maximum(type a, type b) { return _mm256_max_ps(a, b); }
  static type minimum(type a, type b) { return _mm256_min_ps(a, b); }
  static type square_root(type a) { return _mm256_sqrt_ps(a); }
  static uint32_t greater(type a, type b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
  }
  static type where_greater(type a, type b, type value) {
    return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ), value);
  }

  // Rows become columns.
  static void transpose(type (&rows)[lanes]) {
    type halves[2][4];  // [h][j]: in its 128-bit lane l, column 4 l + j of the rows 4 h to 4 h + 3
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const type* row = rows + 4 * h;
      const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(row[0], row[1]));
      const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(row[0], row[1]));
      const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(row[2], row[3]));
      const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(row[2], row[3]));
      halves[h][0] = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23));
      halves[h][1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
      halves[h][2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23));
      halves[h][3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      rows[j] = _mm256_permute2f128_ps(halves[0][j], halves[1][j], 0x20);
      rows[4 + j] = _mm256_permute2f128_ps(halves[0][j], halves[1][j], 0x31);
    }
  }
};

#else  // any processor: GCC's generic vectors, which are SSE2 on x86-64 and NEON on 64-bit Arm

struct SimdBase {
  static constexpr int lanes = 4;
  using type = float __attribute__((vector_size(16)));

  static type load(const float* from) {
    type value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  }
  // The first `count` values, zero past them.
  static type load_some(const float* from, int64_t count) {
    type value = {};
    for (int64_t i = 0; i < lanes && i < count; ++i) value[i] = from[i];
    return value;
  }
  static void store(float* to, type value) { std::memcpy(to, &value, sizeof(value)); }
  static void stream(float* to, type value) { store(to, value); }
  static void finish_streams() {}
  static type broadcast(float value) { return type{value, value, value, value}; }
  static type multiply_add(type a, type b, type c) { return a * b + c; }
  static type maximum(type a, type b) { return a > b ? a : b; }
  static type minimum(type a, type b) { return a < b ? a : b; }
  static type square_root(type a) {
    return type{std::sqrt(a[0]), std::sqrt(a[1]), std::sqrt(a[2]), std::sqrt(a[3])};
  }
  static uint32_t greater(type a, type b) {
    const auto larger = a > b;
    return (larger[0] & 1u) | (larger[1] & 2u) | (larger[2] & 4u) | (larger[3] & 8u);
  }
  static type where_greater(type a, type b, type value) { return a > b ? value : type{}; }

  // Rows become columns.
  static void transpose(type (&rows)[lanes]) {
    const type copies[lanes] = {rows[0], rows[1], rows[2], rows[3]};
    for (int c = 0; c < lanes; ++c) rows[c] = type{copies[0][c], copies[1][c], copies[2][c], copies[3][c]};
  }
};

#endif

struct Simd : SimdBase {
  using integers = int32_t __attribute__((vector_size(sizeof(type))));

  using halves = uint16_t __attribute__((vector_size(sizeof(type) / 2)));

  static type zero() { return broadcast(0.0f); }

  // Half-precision values as they lie in memory, bit patterns in uint16_t; the conversions are exact.
  static type load_bfloat16(const uint16_t* from) { return reinterpret_cast<type>(load_halves(from) << 16); }
  static type load_float16(const uint16_t* from) {
    const integers bits = load_halves(from);
    const integers magnitude = (bits & 0x7fff) << 13;
    // float16's exponent is biased by 15, float32's by 127; the product also makes subnormal values normal.
    const type value = reinterpret_cast<type>(magnitude) * broadcast(0x1p112f);
    const integers infinite = (magnitude >= (0x7c00 << 13)) & 0x7f800000;
    return reinterpret_cast<type>(reinterpret_cast<integers>(value) | infinite | ((bits & 0x8000) << 16));
  }

  // The sum of all lanes, halves added to halves.
  static float sum(type value) {
    float all[lanes];
    store(all, value);
    for (int half = lanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) all[i] += all[i + half];
    }
    return all[0];
  }

  // e^x to 2 ulp for -87 <= x <= 88; smaller x give about 1e-38, larger ones about 2e38, NaN gives NaN.
  // Range reduction and polynomial are those of Cephes' expf (Moshier).
  static type exponential(type x) {
    x = minimum(broadcast(88.0f), maximum(broadcast(-87.0f), x));
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
    const type shifter = broadcast(12582912.0f);
    const type shifted = multiply_add(x, broadcast(1.44269504088896341f), shifter);
    const type n = shifted - shifter;
    x = multiply_add(n, broadcast(-0.693359375f), x);
    x = multiply_add(n, broadcast(2.12194440e-4f), x);
    type p = broadcast(1.9875691500e-4f);
    p = multiply_add(p, x, broadcast(1.3981999507e-3f));
    p = multiply_add(p, x, broadcast(8.3334519073e-3f));
    p = multiply_add(p, x, broadcast(4.1665795894e-2f));
    p = multiply_add(p, x, broadcast(1.6666665459e-1f));
    p = multiply_add(p, x, broadcast(5.0000001201e-1f));
    p = multiply_add(p, x * x, x + broadcast(1.0f));
    const integers exponent = (reinterpret_cast<integers>(shifted) + 127) << 23;
    return p * reinterpret_cast<type>(exponent);
  }

 private:
  static integers load_halves(const uint16_t* from) {
    halves value;
    std::memcpy(&value, from, sizeof(value));
    return __builtin_convertvector(value, integers);
  }
};

}  // namespace
}  // namespace pydefect::cpu::PYDEFECT_LEVEL
