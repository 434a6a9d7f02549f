// What the two reunion modules share on CUDA: sums of a map's positions, weighed by one number each, the
// adjoint of that, a dot product a position, and the end of their parameters' gradients.
#pragma once

#include "common.cuh"
#include "maps.cuh"
#include "reductions.cuh"

namespace pydefect::cuda {

// dots[image, position] = map . vector + offset, a warp a position; each image has its own vector where
// `vector_stride` is not 0.
template <int width>
static __global__ void find_dots(const float* __restrict__ map, const float* __restrict__ vectors,
                                 int64_t vector_stride,
                                 const float* __restrict__ offset,  // one, or null
                                 MapSize size,
                                 float* __restrict__ dots) {  // [images, positions]
  const int lane = threadIdx.x % kWarp;
  const int64_t count = size.images * size.positions;
  for (int64_t p = int64_t{blockIdx.x} * kMapWarps + threadIdx.x / kWarp; p < count;
       p += int64_t{gridDim.x} * kMapWarps) {
    const float* const vector = vectors + p / size.positions * vector_stride;
    float sum = 0.0f;
#pragma unroll 4
    for (int c = lane * width; c < size.channels; c += kWarp * width) {
      const auto here = Channels<width>::load(map + p * size.channels + c);
      const auto there = Channels<width>::load(vector + c);
      Channels<width>::each([&](int i) { sum += here.of[i] * there.of[i]; });
    }
    sum = warp_sum(sum);
    if (lane == 0) dots[p] = sum + (offset == nullptr ? 0.0f : *offset);
  }
}

inline void launch_dots(const Device& device, const char* name, const float* map, const float* vectors,
                        int64_t vector_stride, const float* offset, const MapSize& size, float* dots) {
  with_width(are_wide(size.channels, {map, vectors}), [&](auto width) {
    device.launch(name, find_dots<width>,
                  blocks_for(device, divide_up(size.images * size.positions, kMapWarps)), kMapThreads, 0, map,
                  vectors, vector_stride, offset, size, dots);
  });
}

// The map's positions added up, weighed or, without weights, as they are.
template <int width>
static __global__ void add_weighted(const float* __restrict__ map,
                                    const float* __restrict__ weights,  // [images, positions], or null
                                    MapSize size,
                                    float* __restrict__ parts) {  // [images, parts, channels]
  const Pass<width> pass(size);
  Channels<width> sum{};
  pass.each(size, [&](int64_t p, int64_t at) {
    const auto here = Channels<width>::load(map + at);
    const float weight = weights == nullptr ? 1.0f : weights[blockIdx.z * size.positions + p];
    Channels<width>::each([&](int i) { sum.of[i] += here.of[i] * weight; });
  });
  pass.write_sum(size, sum, parts + pass.part(size) * size.channels);
}

inline void launch_weighted(const Device& device, const char* name, const float* map, const float* weights,
                            const MapSize& size, float* parts) {
  with_width(are_wide(size.channels, {map}), [&](auto width) {
    device.launch(name, add_weighted<width>, pass_grid(size, width), kMapThreads, 0, map, weights, size,
                  parts);
  });
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
  __shared__ float sums[kMapWarps][kWarp];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t element = int64_t{blockIdx.x} * kWarp + lane;
  float sum = 0.0f;
  if (element < elements) {
    for (int64_t row = warp; row < rows; row += kMapWarps) sum += parts[row * elements + element];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || element >= elements) return;
  for (int other = 1; other < kMapWarps; ++other) sum += sums[other][lane];
  d_weight[element] = sum;
}

}  // namespace pydefect::cuda
