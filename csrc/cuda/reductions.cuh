// Sums over a warp and over a block, in an order that does not depend on who arrives first.
#pragma once

#include "common.cuh"

namespace pydefect::cuda {

// Every lane gets the sum. All lanes must call.
template <class T>
__device__ T warp_sum(T value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// Every thread gets the sum. All threads must call; `threads` is a multiple of the warp.
template <int threads, class T>
__device__ T block_sum(T value) {
  __shared__ T parts[threads / kWarp];
  value = warp_sum(value);
  __syncthreads();  // the last call's readers are done
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  T sum = parts[0];
  for (int warp = 1; warp < threads / kWarp; ++warp) sum += parts[warp];
  return sum;
}

// Half a warp's squared distance of two vectors, in exactly the order of the CPU's kernels; every lane of the
// half gets the sum. All lanes of the warp must call.
__device__ inline float squared_distance(const float* __restrict__ a, const float* __restrict__ b,
                                         int width) {
  float sum = 0.0f;
#pragma unroll 4  // the loads of several steps at once
  for (int d = static_cast<int>(threadIdx.x) % 16; d < width; d += 16) {
    const float difference = __fsub_rn(a[d], b[d]);
    sum = __fadd_rn(sum, __fmul_rn(difference, difference));
  }
  for (int offset = 8; offset > 0; offset /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, offset));
  return sum;
}

}  // namespace pydefect::cuda
