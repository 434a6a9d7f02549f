// What the two reunion modules share on CUDA: sums of a map's positions, weighed by one number each, the
// adjoint of that, a dot product a position, and the end of their parameters' gradients.
#pragma once

#include "common.cuh"
#include "maps.cuh"
#include "reductions.cuh"

namespace pydefect::cuda {

// dots[image, position] = map . vector + offset, a warp a position; each image has its own vector where
// `vector_stride` is not 0.
static __global__ void find_dots(const float* map, const float* vectors, int64_t vector_stride,
                                 const float* offset,  // one, or null
                                 MapSize size,
                                 float* dots) {  // [images, positions]
  const int lane = threadIdx.x % kWarp;
  const int64_t count = size.images * size.positions;
  for (int64_t p = int64_t{blockIdx.x} * (kMapThreads / kWarp) + threadIdx.x / kWarp; p < count;
       p += int64_t{gridDim.x} * (kMapThreads / kWarp)) {
    const float* vector = vectors + p / size.positions * vector_stride;
    float sum = 0.0f;
    for (int c = lane; c < size.channels; c += kWarp) sum += map[p * size.channels + c] * vector[c];
    sum = warp_sum(sum);
    if (lane == 0) dots[p] = sum + (offset == nullptr ? 0.0f : *offset);
  }
}

// The map's positions added up, weighed or as they are.
template <bool weighed>
static __global__ void add_weighted(const float* map,
                                    const float* weights,  // [images, positions], or null
                                    MapSize size,
                                    float* parts) {  // [images, parts, channels]
  const Part part(size);
  if (part.channel >= size.channels) return;
  float sum = 0.0f;
  for (int64_t p = part.begin; p < part.end; ++p) {
    const int64_t position = blockIdx.z * size.positions + p;
    const float value = map[position * size.channels + part.channel];
    sum += weighed ? value * weights[position] : value;
  }
  parts[part.place(size)] = sum;
}

// The gradients of a weight and a bias out of sums, in a fixed order. A block has 32 elements of the weight
// and a warp every eighth row of their sums; the last block has the bias.
template <class Real>
static __global__ void finish_parameters(const float* parts,  // [rows, elements]
                                         int64_t rows, int64_t elements,
                                         const Real* bias_parts,  // [count]
                                         int64_t count,
                                         float* d_weight,  // [elements]
                                         float* d_bias) {  // one
  if (blockIdx.x + 1 == gridDim.x) {
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < count; i += kMapThreads) sum += bias_parts[i];
    sum = block_sum<kMapThreads>(sum);
    if (threadIdx.x == 0) *d_bias = static_cast<float>(sum);
    return;
  }
  constexpr int kWarps = kMapThreads / kWarp;
  __shared__ float sums[kWarps][kWarp];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t element = int64_t{blockIdx.x} * kWarp + lane;
  float sum = 0.0f;
  if (element < elements) {
    for (int64_t row = warp; row < rows; row += kWarps) sum += parts[row * elements + element];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || element >= elements) return;
  for (int other = 1; other < kWarps; ++other) sum += sums[other][lane];
  d_weight[element] = sum;
}

// Blocks for a warp a position.
inline unsigned warps_for(const Device& device, const MapSize& size) {
  return blocks_for(device, divide_up(size.images * size.positions, kMapThreads / kWarp));
}

}  // namespace pydefect::cuda
