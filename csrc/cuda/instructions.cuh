// Instructions that CUDA C++ has no function for: asynchronous copies into shared memory and matrix products
// by tensor cores, both for 8.0 and later.
#pragma once

#include "common.cuh"

#ifdef PYDEFECT_CUDA_EMULATION
#include "emulated_instructions.h"
#else

#include <cuda_fp16.h>

namespace pydefect::cuda {

// Copies the first `valid` of `bytes` (4 or 16, both addresses aligned to it) and fills the rest with zeros.
template <int bytes>
__device__ inline void copy_async(void* shared, const void* global, int valid) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (bytes == 16) {
    // Around the first-level cache: what is read twice is read by other multiprocessors.
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid)
                 : "memory");
  } else {
    static_assert(bytes == 4);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(valid)
                 : "memory");
  }
}

// Ends a group of this thread's copies.
__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `pending` of this thread's groups are under way.
template <int pending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// The nearest float16, ties to even, and what it stands for.
__device__ inline uint16_t half_bits(float value) {
  return __half_as_ushort(__float2half_rn(value));
}

__device__ inline float half_value(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}

// Four matrices of 8 x 8 float16 from shared memory, by one warp: lane l names the start of row l % 8 of
// matrix l / 8, 16 bytes, aligned to as many. It receives elements 2 (l % 4) and the next of row l / 4 of
// each.
__device__ inline void load_matrices(unsigned (&to)[4], const char* shared, int offset) {
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(shared)) + offset;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from));
}

// sums[16, 8] += a[16, 16] b[16, 8] by one warp, two float16 a register. Of lane l with g = l / 4 and t = l %
// 4:
//   a: rows g, g + 8, g, g + 8 at columns 2t.., 2t.., 2t + 8.., 2t + 8..;  b0, b1: rows 2t.., 2t + 8.. of
//   column g;  sums: row g at columns 2t and 2t + 1, then row g + 8 at the same.
__device__ inline void multiply_half(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Functions of one instruction, within 2^-22 of the result, without the exact ones' branches. Denormal
// numbers count as zero.
__device__ inline float quick_root(float value) {
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(value));
  return root;
}

__device__ inline float quick_inverse_root(float value) {
  float root;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(value));
  return root;
}

__device__ inline float quick_power_of_2(float value) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
  return power;
}

}  // namespace pydefect::cuda

#endif
