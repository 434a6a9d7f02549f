// Spatial reunion on CUDA. The upsampled map, the gate and the gated map exist in registers only: of the
// gated map the 3x3 convolution to one channel needs nine dot products a position, which one pass takes; the
// sum that the attention weighs and the residual are two more. The backward pass computes the gate again.
// Beyond its results it keeps one map, the gradient of the upsampled one, which every coarse position gathers
// from in a fixed order, and sums of the weight's gradient, 9 / 64 of a map.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "../checks.h"
#include "bilinear.cuh"
#include "common.cuh"
#include "maps.cuh"
#include "reunion.cuh"

namespace pydefect::cuda {
namespace {

constexpr const char* kName = "spatial_reunion";
constexpr int kTaps = 9;
// Positions that share a load of the taps' weights in the forward pass; 18 sums, one lane each to write.
constexpr int kGroup = 2;
static_assert(kGroup * kTaps <= kWarp);

// How the position weights are normalised, as pydefect/ops/spatial_reunion.py numbers it.
enum Normalisation : int64_t { kNone, kMean, kSoftmax };

struct Grid {
  int height;
  int width;

  __host__ __device__ int64_t positions() const { return int64_t{height} * width; }
};

Grid grid_of(const Tensor& map) {
  return {static_cast<int>(map.size(1)), static_cast<int>(map.size(2))};
}

// Where a position of the fine grid looks at the coarse one.
struct Place {
  Between<float> row;
  Between<float> column;

  __device__ static Place of(int64_t position, Grid fine, Grid coarse) {
    return {between<float>(position / fine.width, coarse.height, fine.height),
            between<float>(position % fine.width, coarse.width, fine.width)};
  }

  __device__ float upsampled(const float* map,  // an image's [coarse positions, channels]
                             Grid coarse, int channels, int channel) const {
    const auto at = [&](int y, int x) { return map[(int64_t{y} * coarse.width + x) * channels + channel]; };
    return row.low_weight *
               (column.low_weight * at(row.low, column.low) + column.high_weight * at(row.low, column.high)) +
           row.high_weight * (column.low_weight * at(row.high, column.low) +
                              column.high_weight * at(row.high, column.high));
  }
};

struct Maps {
  const float* features;  // [images, positions, channels]
  const float* local;     // [images, positions, channels]
  const float* coarse;    // [images, coarse positions, channels]
  const float* weight;    // [9, channels]
  MapSize size;
  Grid fine;
  Grid grid;  // of the coarse map
};

// taps[k] = sum over the channels of weight[k] * local * sigmoid(upsampled + features): what a position is to
// the nine that look at it. A warp kGroup positions.
__global__ void find_taps(Maps maps, float* taps) {  // [images, positions, 9]
  const int lane = threadIdx.x % kWarp;
  const int64_t channels = maps.size.channels;
  const int64_t count = maps.size.images * maps.size.positions;
  constexpr int kWarps = kMapThreads / kWarp;
  for (int64_t first = (int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp) * kGroup; first < count;
       first += int64_t{gridDim.x} * kWarps * kGroup) {
    // The last group repeats its last position and does not write it twice.
    int64_t position[kGroup];
    const float* coarse[kGroup];
    Place place[kGroup];
    float sums[kGroup][kTaps] = {};
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      position[i] = min(first + i, count - 1);
      coarse[i] =
          maps.coarse + position[i] / maps.size.positions * maps.grid.positions() * maps.size.channels;
      place[i] = Place::of(position[i] % maps.size.positions, maps.fine, maps.grid);
    }
    for (int c = lane; c < channels; c += kWarp) {
      float gated[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const int64_t at = position[i] * channels + c;
        const float up = place[i].upsampled(coarse[i], maps.grid, maps.size.channels, c);
        gated[i] = maps.local[at] * sigmoid(up + maps.features[at]);
      }
#pragma unroll
      for (int k = 0; k < kTaps; ++k) {
        const float factor = maps.weight[k * channels + c];
#pragma unroll
        for (int i = 0; i < kGroup; ++i) sums[i][k] += factor * gated[i];
      }
    }
    float mine = 0.0f;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
#pragma unroll
      for (int k = 0; k < kTaps; ++k) {
        const float sum = warp_sum(sums[i][k]);
        if (lane == i * kTaps + k) mine = sum;
      }
    }
    if (lane < kGroup * kTaps && first + lane / kTaps < count) taps[first * kTaps + lane] = mine;
  }
}

// The neighbour of (y, x) that tap k of the convolution looks at, or with sign -1 the one that looks at it;
// below 0 where that is outside.
__device__ int64_t neighbour(int64_t position, int k, int sign, Grid grid) {
  const int64_t y = position / grid.width + sign * (k / 3 - 1);
  const int64_t x = position % grid.width + sign * (k % 3 - 1);
  return y >= 0 && y < grid.height && x >= 0 && x < grid.width ? y * grid.width + x : -1;
}

// attention = (bias + the taps of the nine neighbours) / divisor
__global__ void find_attention(const float* taps,  // [images, positions, 9]
                               const float* bias,  // one
                               MapSize size, Grid fine, float divisor,
                               float* attention) {  // [images, positions]
  const int64_t count = size.images * size.positions;
  for (int64_t i = int64_t{blockIdx.x} * kMapThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kMapThreads) {
    const int64_t image = i / size.positions * size.positions;
    float sum = *bias;
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
      const int64_t from = neighbour(i - image, k, 1, fine);
      if (from >= 0) sum += taps[(image + from) * kTaps + k];
    }
    attention[i] = sum / divisor;
  }
}

// Every thread gets the largest. All threads must call, and none may have called it before: there is no
// barrier in front.
__device__ float block_largest(float value) {
  __shared__ float parts[kMapThreads / kWarp];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (const float part : parts) value = fmaxf(value, part);
  return value;
}

// The softmax over an image's positions, in place. One block an image.
__global__ void find_softmax(MapSize size, float* attention) {  // [images, positions]
  float* const own = attention + blockIdx.x * size.positions;
  float largest = -INFINITY;
  for (int64_t p = threadIdx.x; p < size.positions; p += kMapThreads) largest = fmaxf(largest, own[p]);
  largest = block_largest(largest);
  double sum = 0.0;
  for (int64_t p = threadIdx.x; p < size.positions; p += kMapThreads) {
    own[p] = expf(own[p] - largest);
    sum += own[p];
  }
  sum = block_sum<kMapThreads>(sum);
  for (int64_t p = threadIdx.x; p < size.positions; p += kMapThreads) {
    own[p] = static_cast<float>(own[p] / sum);
  }
}

// One block an image.
__global__ void find_context(const float* parts, MapSize size, float* context) {  // [images, channels]
  add_parts(parts, size, blockIdx.x, 1.0f, context + int64_t{blockIdx.x} * size.channels);
}

__global__ void add_context(const float* map, const float* context, MapSize size, int64_t elements,
                            float* output) {
  for (int64_t i = int64_t{blockIdx.x} * kMapThreads + threadIdx.x; i < elements;
       i += int64_t{gridDim.x} * kMapThreads) {
    output[i] = map[i] + context[i / size.image() * size.channels + i % size.channels];
  }
}

// Back through the normalisation, in place, and an image's share of the bias's gradient. One block an image.
__global__ void find_logit_gradient(const float* attention,  // [images, positions]
                                    MapSize size, int64_t normalisation,
                                    float* gradient,      // [images, positions]
                                    double* bias_sums) {  // [images]
  const float* const weights = attention + blockIdx.x * size.positions;
  float* const own = gradient + blockIdx.x * size.positions;
  double mean = 0.0;
  if (normalisation == kSoftmax) {
    for (int64_t p = threadIdx.x; p < size.positions; p += kMapThreads) {
      mean += static_cast<double>(weights[p]) * own[p];
    }
    mean = block_sum<kMapThreads>(mean);
  }
  double sum = 0.0;
  for (int64_t p = threadIdx.x; p < size.positions; p += kMapThreads) {
    if (normalisation == kMean) own[p] /= static_cast<float>(size.positions);
    if (normalisation == kSoftmax) own[p] = static_cast<float>(weights[p] * (own[p] - mean));
    sum += own[p];
  }
  sum = block_sum<kMapThreads>(sum);
  if (threadIdx.x == 0) bias_sums[blockIdx.x] = sum;
}

// Back through the gate, a thread a channel of a part's positions. With d_g = sum of d_taps[k] * weight[k]
// and h = d_g * local * s * (1 - s), s the sigmoid: d_features = d_output + attention * d_context + h,
// d_local = d_g * s, d_up = h, and the weight's gradient is the sum of d_taps[k] * local * s.
__global__ void __launch_bounds__(kChannelThreads)
    find_gate_gradient(Maps maps,
                       const float* d_output,   // [images, positions, channels]
                       const float* d_context,  // [images, channels]
                       const float* attention,  // [images, positions]
                       const float* gradient,   // [images, positions]
                       float* d_features, float* d_local,
                       float* d_up,            // all three [images, positions, channels]
                       float* weight_parts) {  // [images, parts, 9, channels]
  // What all channels of a position share.
  __shared__ Place places[kPartPositions];
  __shared__ float d_taps[kPartPositions][kTaps];
  const MapSize size = maps.size;
  const Part part(size);
  const int64_t image = int64_t{blockIdx.z} * size.positions;
  const int length = static_cast<int>(part.end - part.begin);
  for (int i = threadIdx.x; i < length; i += kChannelThreads) {
    places[i] = Place::of(part.begin + i, maps.fine, maps.grid);
  }
  for (int i = threadIdx.x; i < length * kTaps; i += kChannelThreads) {
    const int64_t from = neighbour(part.begin + i / kTaps, i % kTaps, -1, maps.fine);
    d_taps[i / kTaps][i % kTaps] = from >= 0 ? gradient[image + from] : 0.0f;
  }
  __syncthreads();
  if (part.channel >= size.channels) return;

  const float* const coarse = maps.coarse + blockIdx.z * maps.grid.positions() * size.channels;
  const float context = d_context[int64_t{blockIdx.z} * size.channels + part.channel];
  float factors[kTaps];
  float sums[kTaps] = {};
#pragma unroll
  for (int k = 0; k < kTaps; ++k) {
    factors[k] = maps.weight[static_cast<int64_t>(k) * size.channels + part.channel];
  }
  for (int i = 0; i < length; ++i) {
    const int64_t position = image + part.begin + i;
    const int64_t at = position * size.channels + part.channel;
    const float up = places[i].upsampled(coarse, maps.grid, size.channels, part.channel);
    const float open = sigmoid(up + maps.features[at]);
    const float gated = maps.local[at] * open;
    float d_gated = 0.0f;
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
      d_gated += d_taps[i][k] * factors[k];
      sums[k] += d_taps[i][k] * gated;
    }
    const float d_sum = d_gated * gated * (1.0f - open);
    d_local[at] = d_gated * open;
    d_up[at] = d_sum;
    d_features[at] = d_output[at] + attention[position] * context + d_sum;
  }
  float* const own = weight_parts + (blockIdx.z * size.parts() + blockIdx.x) * kTaps * size.channels;
#pragma unroll
  for (int k = 0; k < kTaps; ++k) own[static_cast<int64_t>(k) * size.channels + part.channel] = sums[k];
}

// The adjoint of the upsampling: a coarse position gathers from those that it is in.
__global__ void find_coarse_gradient(const float* d_up,  // [images, positions, channels]
                                     MapSize size, Grid fine, Grid coarse, int64_t elements,
                                     float* d_coarse) {  // [images, coarse positions, channels]
  for (int64_t i = int64_t{blockIdx.x} * kMapThreads + threadIdx.x; i < elements;
       i += int64_t{gridDim.x} * kMapThreads) {
    const int64_t c = i % size.channels;
    const int64_t position = i / size.channels % coarse.positions();
    const float* const own = d_up + i / size.channels / coarse.positions() * size.image();
    const int coarse_y = static_cast<int>(position / coarse.width);
    const int coarse_x = static_cast<int>(position % coarse.width);
    const Reach rows = reach(coarse_y, coarse.height, fine.height);
    const Reach columns = reach(coarse_x, coarse.width, fine.width);
    float sum = 0.0f;
    for (int y = rows.first; y < rows.end; ++y) {
      const float row_weight = weight_of<float>(coarse_y, y, coarse.height, fine.height);
      if (row_weight == 0.0f) continue;
      for (int x = columns.first; x < columns.end; ++x) {
        const float weight = row_weight * weight_of<float>(coarse_x, x, coarse.width, fine.width);
        if (weight == 0.0f) continue;
        sum += weight * own[(int64_t{y} * fine.width + x) * size.channels + c];
      }
    }
    d_coarse[i] = sum;
  }
}

// The sum of a map's positions, each image's own: [images, channels].
template <bool weighed>
Tensor summed(const Device& device, const char* name, const Tensor& map, const float* weights,
              const MapSize& size) {
  const Tensor parts = new_floats(map, {size.images, size.parts(), size.channels});
  Tensor sums = new_floats(map, {size.images, size.channels});
  device.launch(name, add_weighted<weighed>, part_grid(size), kChannelThreads, 0, map.const_data_ptr<float>(),
                weights, size, parts.mutable_data_ptr<float>());
  device.launch("spatial_reunion: find_context", find_context, size.images, kMapThreads, 0,
                parts.const_data_ptr<float>(), size, sums.mutable_data_ptr<float>());
  return sums;
}

std::tuple<Tensor, Tensor> spatial_reunion(const Tensor& features_given, const Tensor& local_given,
                                           const Tensor& coarse_given, const Tensor& weight_given,
                                           const Tensor& bias, int64_t normalisation) {
  check_spatial_reunion(features_given, local_given, coarse_given, weight_given, bias, normalisation);
  const Device device(features_given);
  const Tensor features = in_order(kName, "features", features_given);
  const Tensor local = in_order(kName, "local", local_given);
  const Tensor coarse = in_order(kName, "coarse", coarse_given);
  const Tensor weight = in_order(kName, "weight", weight_given);
  const MapSize size = size_of(features);
  check_map_size(kName, size);
  Tensor output = torch::stable::empty_like(features);
  Tensor attention = new_floats(features, {size.images, size.positions});
  if (size.images == 0) return {output, attention};

  const Maps maps{features.const_data_ptr<float>(),
                  local.const_data_ptr<float>(),
                  coarse.const_data_ptr<float>(),
                  weight.const_data_ptr<float>(),
                  size,
                  grid_of(features),
                  grid_of(coarse)};
  const int64_t count = size.images * size.positions;
  const Tensor taps = new_floats(features, {count, kTaps});
  float* const weights = attention.mutable_data_ptr<float>();
  device.launch("spatial_reunion: find_taps", find_taps,
                blocks_for(device, divide_up(count, kGroup * kMapThreads / kWarp)), kMapThreads, 0, maps,
                taps.mutable_data_ptr<float>());
  device.launch("spatial_reunion: find_attention", find_attention,
                blocks_for(device, divide_up(count, kMapThreads)), kMapThreads, 0,
                taps.const_data_ptr<float>(), bias.const_data_ptr<float>(), size, maps.fine,
                normalisation == kMean ? size.positions : 1, weights);
  if (normalisation == kSoftmax) {
    device.launch("spatial_reunion: find_softmax", find_softmax, size.images, kMapThreads, 0, size, weights);
  }
  const Tensor context = summed<true>(device, "spatial_reunion: add_weighted", features, weights, size);
  device.launch("spatial_reunion: add_context", add_context,
                blocks_for(device, divide_up(size.elements(), kMapThreads)), kMapThreads, 0, maps.features,
                context.const_data_ptr<float>(), size, size.elements(), output.mutable_data_ptr<float>());
  return {output, attention};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> spatial_reunion_backward(
    const Tensor& d_output_given, const Tensor& features_given, const Tensor& local_given,
    const Tensor& coarse_given, const Tensor& weight_given, const Tensor& attention_given,
    int64_t normalisation) {
  check_spatial_reunion_backward(d_output_given, features_given, local_given, coarse_given, weight_given,
                                 attention_given, normalisation);
  const Device device(features_given);
  const Tensor d_output = in_order(kName, "d_output", d_output_given);
  const Tensor features = in_order(kName, "features", features_given);
  const Tensor local = in_order(kName, "local", local_given);
  const Tensor coarse = in_order(kName, "coarse", coarse_given);
  const Tensor weight = in_order(kName, "weight", weight_given);
  const Tensor attention = in_order(kName, "attention", attention_given);
  const MapSize size = size_of(features);
  check_map_size(kName, size);
  Tensor d_features = torch::stable::empty_like(features);
  Tensor d_local = torch::stable::empty_like(features);
  Tensor d_coarse = torch::stable::empty_like(coarse);
  Tensor d_weight = new_floats(features, {kTaps, size.channels});
  Tensor d_bias = new_floats(features, {1});
  const Tensor bias_sums = new_of(features, {size.images}, torch::headeronly::ScalarType::Double);
  const Tensor weight_parts = new_floats(features, {size.images * size.parts(), kTaps, size.channels});
  if (size.images > 0) {
    const Maps maps{features.const_data_ptr<float>(),
                    local.const_data_ptr<float>(),
                    coarse.const_data_ptr<float>(),
                    weight.const_data_ptr<float>(),
                    size,
                    grid_of(features),
                    grid_of(coarse)};
    const Tensor gradient = new_floats(features, {size.images, size.positions});
    const Tensor d_up = torch::stable::empty_like(features);
    const Tensor d_context =
        summed<false>(device, "spatial_reunion_backward: add_weighted", d_output, nullptr, size);
    device.launch("spatial_reunion_backward: find_dots", find_dots, warps_for(device, size), kMapThreads, 0,
                  maps.features, d_context.const_data_ptr<float>(), size.channels, nullptr, size,
                  gradient.mutable_data_ptr<float>());
    device.launch("spatial_reunion_backward: find_logit_gradient", find_logit_gradient, size.images,
                  kMapThreads, 0, attention.const_data_ptr<float>(), size, normalisation,
                  gradient.mutable_data_ptr<float>(), bias_sums.mutable_data_ptr<double>());
    device.launch("spatial_reunion_backward: find_gate_gradient", find_gate_gradient, part_grid(size),
                  kChannelThreads, 0, maps, d_output.const_data_ptr<float>(),
                  d_context.const_data_ptr<float>(), attention.const_data_ptr<float>(),
                  gradient.const_data_ptr<float>(), d_features.mutable_data_ptr<float>(),
                  d_local.mutable_data_ptr<float>(), d_up.mutable_data_ptr<float>(),
                  weight_parts.mutable_data_ptr<float>());
    device.launch("spatial_reunion_backward: find_coarse_gradient", find_coarse_gradient,
                  blocks_for(device, divide_up(d_coarse.numel(), kMapThreads)), kMapThreads, 0,
                  d_up.const_data_ptr<float>(), size, maps.fine, maps.grid, d_coarse.numel(),
                  d_coarse.mutable_data_ptr<float>());
  }
  const int64_t elements = d_weight.numel();
  device.launch("spatial_reunion_backward: finish_parameters", finish_parameters<double>,
                divide_up(elements, kWarp) + 1, kMapThreads, 0, weight_parts.const_data_ptr<float>(),
                size.images * size.parts(), elements, bias_sums.const_data_ptr<double>(), size.images,
                d_weight.mutable_data_ptr<float>(), d_bias.mutable_data_ptr<float>());
  return {d_features, d_local, d_coarse, d_weight, d_bias};
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, PYDEFECT_CUDA_KEY, library) {
  library.impl("spatial_reunion", TORCH_BOX(&spatial_reunion));
  library.impl("spatial_reunion_backward", TORCH_BOX(&spatial_reunion_backward));
}

}  // namespace
}  // namespace pydefect::cuda
