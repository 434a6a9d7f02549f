// What the operations on channels_last maps share on CUDA: sums over an image's positions, in parts whose
// order is fixed, and the small fully connected layers of a channel attention, which one block computes for
// an image.
#pragma once

#include "common.cuh"
#include "reductions.cuh"

namespace pydefect::cuda {

constexpr int kMapThreads = 256;
constexpr int kChannelThreads = 128;
constexpr int kPartPositions = 64;  // positions that a block adds up

// The sizes of maps [images, positions, channels].
struct MapSize {
  int64_t images;
  int64_t positions;
  int channels;

  __host__ __device__ int64_t image() const { return positions * channels; }
  __host__ __device__ int64_t parts() const { return (positions + kPartPositions - 1) / kPartPositions; }
  int64_t elements() const { return images * image(); }
};

inline MapSize size_of(const Tensor& map) {
  return {map.size(0), map.size(1) * map.size(2), static_cast<int>(map.size(3))};
}

// A grid's second and third dimension end at 65535.
inline void check_map_size(const char* op, const MapSize& size) {
  check(size.images <= 65535 && size.channels <= 65535 * kChannelThreads, op,
        ": on CUDA maps must have at most 65535 images and ", 65535 * kChannelThreads, " channels, got ",
        size.images, " and ", size.channels);
}

// For kernels that add up positions: x the part, y the channels, z the image.
inline dim3 part_grid(const MapSize& size) {
  return dim3(static_cast<unsigned>(size.parts()),
              static_cast<unsigned>(divide_up(size.channels, kChannelThreads)),
              static_cast<unsigned>(size.images));
}

// Where a thread of such a grid begins, and its share.
struct Part {
  int64_t begin;
  int64_t end;
  int channel;

  __device__ explicit Part(const MapSize& size)
      : begin(int64_t{blockIdx.x} * kPartPositions),
        end(min(begin + kPartPositions, size.positions)),
        channel(blockIdx.y * kChannelThreads + threadIdx.x) {}

  __device__ int64_t place(const MapSize& size) const {
    return (blockIdx.z * size.parts() + blockIdx.x) * size.channels + channel;
  }
};

// Adds up the parts of this block's image; all threads call, and meet at a barrier before they read.
__device__ inline void add_parts(const float* parts,  // [images, parts, channels]
                                 const MapSize& size, int64_t image, float scale,
                                 float* sums) {  // [channels]
  for (int c = threadIdx.x; c < size.channels; c += kMapThreads) {
    float sum = 0.0f;
    for (int64_t part = 0; part < size.parts(); ++part) {
      sum += parts[(image * size.parts() + part) * size.channels + c];
    }
    sums[c] = sum * scale;
  }
}

// out = weight @ in + bias, a warp an output.
template <class Finish>
__device__ void dense(const float* weight,  // [outputs, inputs]
                      const float* bias,    // [outputs]
                      const float* in,      // [inputs]
                      int outputs, int inputs, float* out, Finish finish) {
  const int lane = threadIdx.x % kWarp;
  for (int o = threadIdx.x / kWarp; o < outputs; o += kMapThreads / kWarp) {
    float sum = 0.0f;
    for (int i = lane; i < inputs; i += kWarp) sum += weight[static_cast<int64_t>(o) * inputs + i] * in[i];
    sum = warp_sum(sum);
    if (lane == 0) out[o] = finish(sum + bias[o]);
  }
}

// d_in = weight^T @ d_out, a thread an input.
__device__ inline void dense_backward(const float* weight,  // [outputs, inputs]
                                      const float* d_out,   // [outputs]
                                      int outputs, int inputs,
                                      float* d_in) {  // [inputs]
  for (int i = threadIdx.x; i < inputs; i += kMapThreads) {
    float sum = 0.0f;
    for (int o = 0; o < outputs; ++o) sum += weight[static_cast<int64_t>(o) * inputs + i] * d_out[o];
    d_in[i] = sum;
  }
}

// NaN stays NaN.
__device__ inline float relu(float value) {
  return value < 0.0f ? 0.0f : value;
}

__device__ inline float sigmoid(float value) {
  return 1.0f / (1.0f + expf(-value));
}

// The gradients of a layer's weight and bias, summed over the images in order: a thread an element.
static __global__ void add_layer_gradient(const float* d_out,  // [images, outputs]
                                          const float* in,     // [images, inputs]
                                          int64_t images, int outputs, int inputs,
                                          float* d_weight,  // [outputs, inputs]
                                          float* d_bias) {  // [outputs]
  const int64_t count = int64_t{outputs} * inputs;
  for (int64_t e = int64_t{blockIdx.x} * kMapThreads + threadIdx.x; e < count + outputs;
       e += int64_t{gridDim.x} * kMapThreads) {
    const int64_t o = e < count ? e / inputs : e - count;
    float sum = 0.0f;
    for (int64_t image = 0; image < images; ++image) {
      sum += d_out[image * outputs + o] * (e < count ? in[image * inputs + e % inputs] : 1.0f);
    }
    if (e < count) {
      d_weight[e] = sum;
    } else {
      d_bias[o] = sum;
    }
  }
}

inline void launch_layer_gradient(const Device& device, const Tensor& d_out, const Tensor& in,
                                  Tensor& d_weight, Tensor& d_bias) {
  const int64_t count = d_weight.numel() + d_bias.numel();
  if (count == 0) return;
  device.launch("add_layer_gradient", add_layer_gradient, blocks_for(device, divide_up(count, kMapThreads)),
                kMapThreads, 0, d_out.const_data_ptr<float>(), in.const_data_ptr<float>(), d_out.size(0),
                d_out.size(1), in.size(1), d_weight.mutable_data_ptr<float>(),
                d_bias.mutable_data_ptr<float>());
}

}  // namespace pydefect::cuda
