#include "machine_limits.h"

#include <cstdint>

#include "simd.h"
#include "tiles.h"

namespace pydefect::cpu::PYDEFECT_LEVEL {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSums = 24;  // of 32 registers
#else
constexpr int kSums = 12;  // of 16
#endif

// Every sum waits for itself only: enough of them hide the latency of a multiply-add on all its units.
float float32_peak(int64_t rounds) {
  // Different starts, or the compiler would compute one sum instead of all.
  Simd::type sums[kSums];
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) sums[i] = Simd::broadcast(static_cast<float>(i));
  // The sums tend to 1: neither denormal numbers nor infinities, which some processors are slow on.
  const Simd::type factor = Simd::broadcast(0.75f), addend = Simd::broadcast(0.25f);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) sums[i] = Simd::multiply_add(sums[i], factor, addend);
  }
#pragma GCC unroll 32
  for (int i = 1; i < kSums; ++i) sums[0] += sums[i];
  return Simd::sum(sums[0]);
}

#if defined(__AVX512BF16__)

float bf16_peak(int64_t rounds) {
  __m512 sums[kSums];
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) sums[i] = _mm512_set1_ps(static_cast<float>(i));
  // The products are 2^-40: the sums stay what they are.
  const __m512 tiny = _mm512_set1_ps(0x1p-20f);
  const __m512bh factor = _mm512_cvtne2ps_pbh(tiny, tiny);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], factor, factor);
  }
#pragma GCC unroll 32
  for (int i = 1; i < kSums; ++i) sums[0] = _mm512_add_ps(sums[0], sums[i]);
  return Simd::sum(sums[0]);
}

#endif

#if defined(__AMX_BF16__)

constexpr int64_t kTileOperations = 2 * 16 * 16 * 32;

float amx_peak(int64_t rounds) {
  configure_tiles();
  // Zeros: the sums stay what they are.
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t round = 0; round < rounds; ++round) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 5);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 5);
  }
  alignas(64) float sums[16 * 16];
  _tile_stored(0, sums, 64);
  release_tiles();
  return sums[0];
}

#endif

}  // namespace

const MachineLimitsKernel machine_limits_kernel{
    float32_peak,
    2 * kSums * Simd::lanes,
#if defined(__AVX512BF16__)
    bf16_peak,
    // Two products a lane.
    4 * kSums * Simd::lanes,
#else
    nullptr,      0,
#endif
#if defined(__AMX_BF16__)
    amx_peak,
    4 * kTileOperations,
#else
    nullptr,      0,
#endif
};

}  // namespace pydefect::cpu::PYDEFECT_LEVEL
