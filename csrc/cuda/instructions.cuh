// Instructions that CUDA C++ has no function for: asynchronous copies into shared memory and matrix products
// by tensor cores, both for 8.0 and later.
#pragma once

#include "common.cuh"

#ifdef PYDEFECT_CUDA_EMULATION
#include "emulated_instructions.h"
#else

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

// The nearest number with 10 bits behind the point, ties away from zero, as the tensor cores read it.
__device__ inline unsigned to_tf32(float value) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// sums[16, 8] += a[16, 8] b[8, 8] by one warp. Of lane l with g = l / 4 and t = l % 4:
//   a: rows g, g + 8, g, g + 8 at columns t, t, t + 4, t + 4;  b: rows t, t + 4 of column g;
//   sums: row g at columns 2t and 2t + 1, then row g + 8 at the same.
__device__ inline void multiply_tf32(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace pydefect::cuda

#endif
