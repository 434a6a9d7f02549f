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

PlaneSize grid_of(const Tensor& map) {
  return {static_cast<int>(map.size(1)), static_cast<int>(map.size(2))};
}

// Where a position of the fine grid looks at the coarse one.
struct Place {
  Between<float> row;
  Between<float> column;

  __device__ static Place of(int64_t position, PlaneSize fine, PlaneSize coarse) {
    return {between<float>(position / fine.width, coarse.height, fine.height),
            between<float>(position % fine.width, coarse.width, fine.width)};
  }

  template <int width>
  __device__ Channels<width> upsampled(
      const float* __restrict__ map,  // an image's [coarse positions, channels]
      PlaneSize coarse, int channels, int channel) const {
    const auto at = [&](int y, int x) {
      return Channels<width>::load(map + (int64_t{y} * coarse.width + x) * channels + channel);
    };
    const auto low_low = at(row.low, column.low);
    const auto low_high = at(row.low, column.high);
    const auto high_low = at(row.high, column.low);
    const auto high_high = at(row.high, column.high);
    Channels<width> found;
    Channels<width>::each([&](int i) {
      found.of[i] =
          row.low_weight * (column.low_weight * low_low.of[i] + column.high_weight * low_high.of[i]) +
          row.high_weight * (column.low_weight * high_low.of[i] + column.high_weight * high_high.of[i]);
    });
    return found;
  }
};

struct Maps {
  const float* features;  // [images, positions, channels]
  const float* local;     // [images, positions, channels]
  const float* coarse;    // [images, coarse positions, channels]
  const float* weight;    // [9, channels]
  MapSize size;
  PlaneSize fine;
  PlaneSize grid;  // of the coarse map

  bool are_wide() const { return cuda::are_wide(size.channels, {features, local, coarse, weight}); }
};

// taps[k] = sum over the channels of weight[k] * local * sigmoid(upsampled + features): what a position is to
// the nine that look at it. A warp kGroup positions.
template <int width>
__global__ void find_taps(Maps maps, float* __restrict__ taps) {  // [images, positions, 9]
  const int lane = threadIdx.x % kWarp;
  const int64_t channels = maps.size.channels;
  const int64_t count = maps.size.images * maps.size.positions;
  for (int64_t first = (int64_t{blockIdx.x} * kMapWarps + threadIdx.x / kWarp) * kGroup; first < count;
       first += int64_t{gridDim.x} * kMapWarps * kGroup) {
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
    for (int c = lane * width; c < channels; c += kWarp * width) {
      Channels<width> gated[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const int64_t at = position[i] * channels + c;
        const auto up = place[i].upsampled<width>(coarse[i], maps.grid, maps.size.channels, c);
        const auto local = Channels<width>::load(maps.local + at);
        const auto features = Channels<width>::load(maps.features + at);
        Channels<width>::each(
            [&](int j) { gated[i].of[j] = local.of[j] * sigmoid(up.of[j] + features.of[j]); });
      }
#pragma unroll
      for (int k = 0; k < kTaps; ++k) {
        const auto factor = Channels<width>::load(maps.weight + k * channels + c);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          Channels<width>::each([&](int j) { sums[i][k] += factor.of[j] * gated[i].of[j]; });
        }
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
__device__ int64_t neighbour(int64_t position, int k, int sign, PlaneSize grid) {
  const int64_t y = position / grid.width + sign * (k / 3 - 1);
  const int64_t x = position % grid.width + sign * (k % 3 - 1);
  return y >= 0 && y < grid.height && x >= 0 && x < grid.width ? y * grid.width + x : -1;
}

// attention = (bias + the taps of the nine neighbours) / divisor
__global__ void find_attention(const float* taps,  // [images, positions, 9]
                               const float* bias,  // one
                               MapSize size, PlaneSize fine, float divisor,
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

template <int width>
__global__ void add_context(const float* __restrict__ map, const float* __restrict__ context, MapSize size,
                            float* __restrict__ output) {
  const Pass<width> pass(size);
  if (!pass.any) return;
  const auto added = Channels<width>::load(context + pass.row(size));
  pass.each(size, [&](int64_t, int64_t at) {
    auto here = Channels<width>::load(map + at);
    Channels<width>::each([&](int i) { here.of[i] += added.of[i]; });
    here.store(output + at);
  });
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

// Back through the gate. With d_g = sum of d_taps[k] * weight[k] and h = d_g * local * s * (1 - s), s the
// sigmoid: d_features = d_output + attention * d_context + h, d_local = d_g * s, d_up = h, and the weight's
// gradient is the sum of d_taps[k] * local * s.
template <int width>
__global__ void __launch_bounds__(kMapThreads)
    find_gate_gradient(Maps maps,
                       const float* __restrict__ d_output,   // [images, positions, channels]
                       const float* __restrict__ d_context,  // [images, channels]
                       const float* __restrict__ attention,  // [images, positions]
                       const float* __restrict__ gradient,   // [images, positions]
                       float* __restrict__ d_features, float* __restrict__ d_local,
                       float* __restrict__ d_up,            // all three [images, positions, channels]
                       float* __restrict__ weight_parts) {  // [images, parts, 9, channels]
  // What all channels of a position share.
  __shared__ Place places[kPartPositions];
  __shared__ float d_taps[kPartPositions][kTaps];
  const MapSize size = maps.size;
  const Pass<width> pass(size);
  const int64_t image = int64_t{blockIdx.z} * size.positions;
  const int length = static_cast<int>(pass.end - pass.begin);
  for (int i = threadIdx.x; i < length; i += kMapThreads) {
    places[i] = Place::of(pass.begin + i, maps.fine, maps.grid);
  }
  for (int i = threadIdx.x; i < length * kTaps; i += kMapThreads) {
    const int64_t from = neighbour(pass.begin + i / kTaps, i % kTaps, -1, maps.fine);
    d_taps[i / kTaps][i % kTaps] = from >= 0 ? gradient[image + from] : 0.0f;
  }
  __syncthreads();

  const float* const coarse = maps.coarse + blockIdx.z * maps.grid.positions() * size.channels;
  Channels<width> context{};
  Channels<width> factors[kTaps] = {};
  Channels<width> sums[kTaps] = {};
  if (pass.any) {
    context = Channels<width>::load(d_context + pass.row(size));
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
      factors[k] =
          Channels<width>::load(maps.weight + static_cast<int64_t>(k) * size.channels + pass.channel);
    }
  }
  pass.each(size, [&](int64_t p, int64_t at) {
    const auto place = static_cast<int>(p - pass.begin);
    const auto features = Channels<width>::load(maps.features + at);
    const auto local = Channels<width>::load(maps.local + at);
    auto d_sum = Channels<width>::load(d_output + at);
    const auto up = places[place].template upsampled<width>(coarse, maps.grid, size.channels, pass.channel);
    const float weight = attention[image + p];
    Channels<width> d_gate;
    Channels<width> d_gated;
    Channels<width>::each([&](int i) {
      const float open = sigmoid(up.of[i] + features.of[i]);
      const float gated = local.of[i] * open;
      float through = 0.0f;
#pragma unroll
      for (int k = 0; k < kTaps; ++k) {
        through += d_taps[place][k] * factors[k].of[i];
        sums[k].of[i] += d_taps[place][k] * gated;
      }
      d_gated.of[i] = through * open;
      d_gate.of[i] = through * gated * (1.0f - open);
      d_sum.of[i] += weight * context.of[i] + d_gate.of[i];
    });
    d_gated.store(d_local + at);
    d_gate.store(d_up + at);
    d_sum.store(d_features + at);
  });
#pragma unroll
  for (int k = 0; k < kTaps; ++k) {
    pass.write_sum(size, sums[k], weight_parts + (pass.part(size) * kTaps + k) * size.channels);
  }
}

// The sum of a map's positions, each image's own: [images, channels]. Without weights as they are.
Tensor summed(const Device& device, const char* name, const Tensor& map, const float* weights,
              const MapSize& size) {
  const Tensor parts = new_floats(map, {size.images, size.parts(), size.channels});
  Tensor sums = new_floats(map, {size.images, size.channels});
  launch_weighted(device, name, map.const_data_ptr<float>(), weights, size, parts.mutable_data_ptr<float>());
  device.launch("spatial_reunion: find_context", find_context, size.images, kLayerThreads, 0,
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
  with_width(maps.are_wide(), [&](auto width) {
    device.launch("spatial_reunion: find_taps", find_taps<width>,
                  blocks_for(device, divide_up(count, kGroup * kMapWarps)), kMapThreads, 0, maps,
                  taps.mutable_data_ptr<float>());
  });
  device.launch("spatial_reunion: find_attention", find_attention,
                blocks_for(device, divide_up(count, kMapThreads)), kMapThreads, 0,
                taps.const_data_ptr<float>(), bias.const_data_ptr<float>(), size, maps.fine,
                normalisation == kMean ? size.positions : 1, weights);
  if (normalisation == kSoftmax) {
    device.launch("spatial_reunion: find_softmax", find_softmax, size.images, kMapThreads, 0, size, weights);
  }
  const Tensor context = summed(device, "spatial_reunion: add_weighted", features, weights, size);
  const bool wide = are_wide(
      size.channels, {maps.features, context.const_data_ptr<float>(), output.const_data_ptr<float>()});
  with_width(wide, [&](auto width) {
    device.launch("spatial_reunion: add_context", add_context<width>, pass_grid(size, width), kMapThreads, 0,
                  maps.features, context.const_data_ptr<float>(), size, output.mutable_data_ptr<float>());
  });
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
        summed(device, "spatial_reunion_backward: add_weighted", d_output, nullptr, size);
    launch_dots(device, "spatial_reunion_backward: find_dots", maps.features,
                d_context.const_data_ptr<float>(), size.channels, nullptr, size,
                gradient.mutable_data_ptr<float>());
    device.launch("spatial_reunion_backward: find_logit_gradient", find_logit_gradient, size.images,
                  kMapThreads, 0, attention.const_data_ptr<float>(), size, normalisation,
                  gradient.mutable_data_ptr<float>(), bias_sums.mutable_data_ptr<double>());
    const bool wide =
        maps.are_wide() &&
        are_wide(size.channels, {d_output.const_data_ptr<float>(), d_context.const_data_ptr<float>(),
                                 d_features.const_data_ptr<float>(), d_local.const_data_ptr<float>(),
                                 d_up.const_data_ptr<float>()});
    const auto find_gradient = wide ? find_gate_gradient<2> : find_gate_gradient<1>;
    device.launch("spatial_reunion_backward: find_gate_gradient", find_gradient,
                  pass_grid(size, wide ? 2 : 1), kMapThreads, 0, maps, d_output.const_data_ptr<float>(),
                  d_context.const_data_ptr<float>(), attention.const_data_ptr<float>(),
                  gradient.const_data_ptr<float>(), d_features.mutable_data_ptr<float>(),
                  d_local.mutable_data_ptr<float>(), d_up.mutable_data_ptr<float>(),
                  weight_parts.mutable_data_ptr<float>());
    launch_adjoint(device, "spatial_reunion_backward: gather_upsampled", d_up.const_data_ptr<float>(),
                   size.images, size.channels, maps.fine, maps.grid, d_coarse.mutable_data_ptr<float>());
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
