// What the operations on channels_last maps share on CUDA: passes over an image's positions, sums over them
// in parts whose order is fixed, and the small fully connected layers of a channel attention, which one block
// computes for an image.
//
// In a pass a warp has a stretch of neighbouring channels and some positions of a part; a lane has four (or
// two) channels where their number and the maps' places allow 16-byte accesses, and one elsewhere.
#pragma once

#include "common.cuh"
#include "reductions.cuh"

namespace pydefect::cuda {

constexpr int kMapThreads = 256;
constexpr int kMapWarps = kMapThreads / kWarp;
constexpr int kPartPositions = 64;  // that a block adds up
constexpr int kLayerThreads = 512;  // of a block that computes the layers of an image

// The sizes of maps [images, positions, channels].
struct MapSize {
  int64_t images;
  int64_t positions;
  int channels;

  __host__ __device__ int64_t image() const { return positions * channels; }
  __host__ __device__ int64_t parts() const { return divide_up(positions, kPartPositions); }
};

inline MapSize size_of(const Tensor& map) {
  return {map.size(0), map.size(1) * map.size(2), static_cast<int>(map.size(3))};
}

inline void check_map_size(const char* op, const MapSize& size) {
  check(size.images <= kGridLimit && size.channels <= kGridLimit * kWarp, op,
        ": on CUDA maps must have at most ", kGridLimit, " images and ", kGridLimit * kWarp,
        " channels, got ", size.images, " and ", size.channels);
}

// Neighbouring channels of a position.
template <int width>
struct Channels {
  float of[width];

  __device__ static Channels load(const float* from) {
    if constexpr (width == 4) {
      const float4 four = *reinterpret_cast<const float4*>(from);
      return {four.x, four.y, four.z, four.w};
    } else if constexpr (width == 2) {
      const float2 two = *reinterpret_cast<const float2*>(from);
      return {two.x, two.y};
    } else {
      return {*from};
    }
  }
  __device__ void store(float* to) const {
    if constexpr (width == 4) {
      *reinterpret_cast<float4*>(to) = make_float4(of[0], of[1], of[2], of[3]);
    } else if constexpr (width == 2) {
      *reinterpret_cast<float2*>(to) = make_float2(of[0], of[1]);
    } else {
      *to = of[0];
    }
  }
  // Calls use(i) for each of them.
  template <class Use>
  __device__ static void each(Use use) {
#pragma unroll
    for (int i = 0; i < width; ++i) use(i);
  }
};

// Whether lanes can have four channels: every pointer is that of rows of `channels` numbers, or null.
inline bool are_wide(int channels, std::initializer_list<const float*> pointers) {
  bool wide = channels % 4 == 0;
  for (const float* pointer : pointers) wide = wide && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  return wide;
}

// Launches kernel(std::integral_constant<int, width>) with four channels a lane or one.
template <class Launch>
void with_width(bool wide, Launch launch) {
  if (wide) {
    launch(std::integral_constant<int, 4>{});
  } else {
    launch(std::integral_constant<int, 1>{});
  }
}

// For passes: x the part, y the stretch of channels, z the image.
inline dim3 pass_grid(const MapSize& size, int width) {
  return dim3(static_cast<unsigned>(size.parts()),
              static_cast<unsigned>(divide_up(size.channels, kWarp * width)),
              static_cast<unsigned>(size.images));
}

// A thread's place in such a grid.
template <int width>
struct Pass {
  int64_t begin;  // of the part's positions
  int64_t end;
  int channel;     // the first of this lane's
  bool any;        // whether it has some
  int64_t origin;  // of the image's maps

  __device__ explicit Pass(const MapSize& size)
      : begin(int64_t{blockIdx.x} * kPartPositions),
        end(min(begin + kPartPositions, size.positions)),
        channel(static_cast<int>(blockIdx.y * kWarp + threadIdx.x % kWarp) * width),
        any(channel < size.channels),
        origin(blockIdx.z * size.image()) {}

  // Calls use(position in the image, offset in the maps) for this warp's positions.
  template <class Use>
  __device__ void each(const MapSize& size, Use use) const {
    if (!any) return;
    for (int64_t p = begin + threadIdx.x / kWarp; p < end; p += kMapWarps) {
      use(p, origin + p * size.channels + channel);
    }
  }

  // This image's row of [images, channels], from this lane's channels on.
  __device__ int64_t row(const MapSize& size) const { return int64_t{blockIdx.z} * size.channels + channel; }

  // Of [images, parts].
  __device__ int64_t part(const MapSize& size) const { return blockIdx.z * size.parts() + blockIdx.x; }

  // Adds up the block's warps' sums, in order. All threads must call.
  __device__ void write_sum(const MapSize& size, const Channels<width>& sum, float* to) const {  // [channels]
    __shared__ float sums[kMapWarps][kWarp * width];
    const int warp = threadIdx.x / kWarp;
    const int lane = threadIdx.x % kWarp;
    __syncthreads();  // the last call's readers are done
    Channels<width>::each([&](int i) { sums[warp][lane * width + i] = sum.of[i]; });
    __syncthreads();
    for (int i = threadIdx.x; i < kWarp * width; i += kMapThreads) {
      const int own = static_cast<int>(blockIdx.y) * kWarp * width + i;
      if (own >= size.channels) continue;
      float total = sums[0][i];
      for (int other = 1; other < kMapWarps; ++other) total += sums[other][i];
      to[own] = total;
    }
  }
};

// Adds up the parts of an image, a thread a channel; all threads call, and meet at a barrier before they read
// others' sums.
__device__ inline void add_parts(const float* __restrict__ parts,  // [images, parts, channels]
                                 const MapSize& size, int64_t image, float scale,
                                 float* __restrict__ sums) {  // [channels]
  const float* const own = parts + image * size.parts() * size.channels;
  for (int c = threadIdx.x; c < size.channels; c += kLayerThreads) {
    float sum = 0.0f;
#pragma unroll 8  // as many loads at once
    for (int64_t part = 0; part < size.parts(); ++part) sum += own[part * size.channels + c];
    sums[c] = sum * scale;
  }
}

// out = weight @ in + bias: a warp an output, or where that would leave lanes idle a thread.
template <class Finish>
__device__ void dense(const float* __restrict__ weight,  // [outputs, inputs]
                      const float* __restrict__ bias,    // [outputs]
                      const float* in,                   // [inputs]
                      int outputs, int inputs, float* out, Finish finish) {
  if (inputs <= kWarp) {
    for (int o = threadIdx.x; o < outputs; o += kLayerThreads) {
      float sum = 0.0f;
#pragma unroll 8
      for (int i = 0; i < inputs; ++i) sum += weight[static_cast<int64_t>(o) * inputs + i] * in[i];
      out[o] = finish(sum + bias[o]);
    }
    return;
  }
  const int lane = threadIdx.x % kWarp;
  for (int o = threadIdx.x / kWarp; o < outputs; o += kLayerThreads / kWarp) {
    float sum = 0.0f;
#pragma unroll 4
    for (int i = lane; i < inputs; i += kWarp) sum += weight[static_cast<int64_t>(o) * inputs + i] * in[i];
    sum = warp_sum(sum);
    if (lane == 0) out[o] = finish(sum + bias[o]);
  }
}

// d_in = weight^T @ d_out, weight(o, i) being [outputs, inputs]. Where there are more threads than inputs,
// several share the outputs of one. All threads must call.
template <class Weight>
__device__ void dense_backward(Weight weight, const float* d_out,  // [outputs]
                               int outputs, int inputs,
                               float* d_in) {  // [inputs]
  __shared__ float sums[kLayerThreads];
  const int shares = inputs < kLayerThreads ? kLayerThreads / inputs : 1;
  for (int first = 0; first < inputs; first += kLayerThreads) {
    const int here = min(inputs - first, kLayerThreads);
    const int share = threadIdx.x / here;
    const int i = first + threadIdx.x % here;
    float sum = 0.0f;
    if (share < shares) {
#pragma unroll 4
      for (int o = share; o < outputs; o += shares) sum += weight(o, i) * d_out[o];
    }
    __syncthreads();  // the last round's readers are done
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x < here) {
      for (int other = 1; other < shares; ++other) sum += sums[other * here + threadIdx.x];
      d_in[i] = sum;
    }
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
