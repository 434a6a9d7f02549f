// Channel reunion on CUDA: a position's weight and the sum that it weighs come out of one pass over the map,
// the gating is the second. Backward, what the gate passes on is one pass, and the rest needs a position's
// dot product with it: the second reads map and gradient again and writes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "../checks.h"
#include "common.cuh"
#include "maps.cuh"
#include "reunion.cuh"

namespace pydefect::cuda {
namespace {

constexpr const char* kName = "channel_reunion";

template <int width>
__global__ void add_products(const float* __restrict__ a, const float* __restrict__ b, MapSize size,
                             float* __restrict__ parts) {  // [images, parts, channels]
  const Pass<width> pass(size);
  Channels<width> sum{};
  pass.each(size, [&](int64_t, int64_t at) {
    const auto one = Channels<width>::load(a + at);
    const auto other = Channels<width>::load(b + at);
    Channels<width>::each([&](int i) { sum.of[i] += one.of[i] * other.of[i]; });
  });
  pass.write_sum(size, sum, parts + pass.part(size) * size.channels);
}

struct Layers {
  const float* reduce_weight;  // [reduced, channels]
  const float* reduce_bias;
  const float* expand_weight;  // [channels, reduced]
  const float* expand_bias;
};

// One block an image.
__global__ void find_gate(const float* parts, MapSize size, int reduced, Layers layers,
                          float* pooled,  // [images, channels]
                          float* hidden,  // [images, reduced]
                          float* gate) {  // [images, channels]
  const int64_t image = blockIdx.x;
  float* const sum = pooled + image * size.channels;
  float* const middle = hidden + image * reduced;
  add_parts(parts, size, image, 1.0f, sum);
  __syncthreads();
  dense(layers.reduce_weight, layers.reduce_bias, sum, reduced, size.channels, middle, relu);
  __syncthreads();
  dense(layers.expand_weight, layers.expand_bias, middle, size.channels, reduced,
        gate + image * size.channels, sigmoid);
}

template <int width>
__global__ void apply_gate(const float* __restrict__ map, const float* __restrict__ gate, MapSize size,
                           float* __restrict__ output) {
  const Pass<width> pass(size);
  if (!pass.any) return;
  const auto factors = Channels<width>::load(gate + pass.row(size));
  pass.each(size, [&](int64_t, int64_t at) {
    auto here = Channels<width>::load(map + at);
    Channels<width>::each([&](int i) { here.of[i] *= factors.of[i]; });
    here.store(output + at);
  });
}

// One block an image.
__global__ void find_pooled_gradient(const float* parts, const float* gate, const float* hidden, MapSize size,
                                     int reduced, Layers layers,
                                     float* d_logits,    // [images, channels]
                                     float* d_hidden,    // [images, reduced]
                                     float* d_pooled) {  // [images, channels]
  const int64_t image = blockIdx.x;
  const int64_t channel = image * size.channels;
  add_parts(parts, size, image, 1.0f, d_logits + channel);
  // Each thread goes on with the channels that it has just added up.
  for (int c = threadIdx.x; c < size.channels; c += kLayerThreads) {
    d_logits[channel + c] *= gate[channel + c] * (1.0f - gate[channel + c]);
  }
  __syncthreads();
  float* const d_middle = d_hidden + image * reduced;
  const auto expand = [&](int o, int i) { return layers.expand_weight[int64_t{o} * reduced + i]; };
  dense_backward(expand, d_logits + channel, size.channels, reduced, d_middle);
  __syncthreads();
  for (int r = threadIdx.x; r < reduced; r += kLayerThreads) {
    if (!(hidden[image * reduced + r] > 0.0f)) d_middle[r] = 0.0f;
  }
  __syncthreads();
  const auto reduce = [&](int o, int i) { return layers.reduce_weight[int64_t{o} * size.channels + i]; };
  dense_backward(reduce, d_middle, reduced, size.channels, d_pooled + channel);
}

template <int width>
__global__ void find_map_gradient(const float* __restrict__ d_output, const float* __restrict__ gate,
                                  const float* __restrict__ weights, const float* __restrict__ d_pooled,
                                  const float* __restrict__ d_weights, const float* __restrict__ direction,
                                  MapSize size, float* __restrict__ d_map) {
  const Pass<width> pass(size);
  if (!pass.any) return;
  const auto open = Channels<width>::load(gate + pass.row(size));
  const auto d_sum = Channels<width>::load(d_pooled + pass.row(size));
  const auto along = Channels<width>::load(direction + pass.channel);
  pass.each(size, [&](int64_t p, int64_t at) {
    auto here = Channels<width>::load(d_output + at);
    const float weight = weights[blockIdx.z * size.positions + p];
    const float d_weight = d_weights[blockIdx.z * size.positions + p];
    Channels<width>::each(
        [&](int i) { here.of[i] = here.of[i] * open.of[i] + weight * d_sum.of[i] + d_weight * along.of[i]; });
    here.store(d_map + at);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> channel_reunion(
    const Tensor& features_given, const Tensor& direction_given, const Tensor& offset,
    const Tensor& reduce_weight_given, const Tensor& reduce_bias_given, const Tensor& expand_weight_given,
    const Tensor& expand_bias_given) {
  check_channel_reunion(features_given, direction_given, offset, reduce_weight_given, reduce_bias_given,
                        expand_weight_given, expand_bias_given);
  const Device device(features_given);
  const Tensor features = in_order(kName, "features", features_given);
  const Tensor direction = in_order(kName, "direction", direction_given);
  const Tensor reduce_weight = in_order(kName, "reduce_weight", reduce_weight_given);
  const Tensor reduce_bias = in_order(kName, "reduce_bias", reduce_bias_given);
  const Tensor expand_weight = in_order(kName, "expand_weight", expand_weight_given);
  const Tensor expand_bias = in_order(kName, "expand_bias", expand_bias_given);
  const MapSize size = size_of(features);
  check_map_size(kName, size);
  const int64_t reduced = reduce_weight.size(0);
  Tensor output = torch::stable::empty_like(features);
  Tensor weights = new_floats(features, {size.images, size.positions});
  Tensor pooled = new_floats(features, {size.images, size.channels});
  Tensor hidden = new_floats(features, {size.images, reduced});
  Tensor gate = new_floats(features, {size.images, size.channels});
  if (size.images == 0) return {output, weights, pooled, hidden, gate};

  const Tensor parts = new_floats(features, {size.images, size.parts(), size.channels});
  const Layers layers{reduce_weight.const_data_ptr<float>(), reduce_bias.const_data_ptr<float>(),
                      expand_weight.const_data_ptr<float>(), expand_bias.const_data_ptr<float>()};
  const float* const map = features.const_data_ptr<float>();
  launch_dots(device, "channel_reunion: find_dots", map, direction.const_data_ptr<float>(), 0,
              offset.const_data_ptr<float>(), size, weights.mutable_data_ptr<float>());
  launch_weighted(device, "channel_reunion: add_weighted", map, weights.const_data_ptr<float>(), size,
                  parts.mutable_data_ptr<float>());
  device.launch("channel_reunion: find_gate", find_gate, size.images, kLayerThreads, 0,
                parts.const_data_ptr<float>(), size, reduced, layers, pooled.mutable_data_ptr<float>(),
                hidden.mutable_data_ptr<float>(), gate.mutable_data_ptr<float>());
  with_width(are_wide(size.channels, {map, gate.const_data_ptr<float>(), output.const_data_ptr<float>()}),
             [&](auto width) {
               device.launch("channel_reunion: apply_gate", apply_gate<width>, pass_grid(size, width),
                             kMapThreads, 0, map, gate.const_data_ptr<float>(), size,
                             output.mutable_data_ptr<float>());
             });
  return {output, weights, pooled, hidden, gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> channel_reunion_backward(
    const Tensor& d_output_given, const Tensor& features_given, const Tensor& direction_given,
    const Tensor& reduce_weight_given, const Tensor& expand_weight_given, const Tensor& weights_given,
    const Tensor& pooled_given, const Tensor& hidden_given, const Tensor& gate_given) {
  check_channel_reunion_backward(d_output_given, features_given, direction_given, reduce_weight_given,
                                 expand_weight_given, weights_given, pooled_given, hidden_given, gate_given);
  const Device device(features_given);
  const Tensor d_output = in_order(kName, "d_output", d_output_given);
  const Tensor features = in_order(kName, "features", features_given);
  const Tensor direction = in_order(kName, "direction", direction_given);
  const Tensor reduce_weight = in_order(kName, "reduce_weight", reduce_weight_given);
  const Tensor expand_weight = in_order(kName, "expand_weight", expand_weight_given);
  const Tensor weights = in_order(kName, "weights", weights_given);
  const Tensor pooled = in_order(kName, "pooled", pooled_given);
  const Tensor hidden = in_order(kName, "hidden", hidden_given);
  const Tensor gate = in_order(kName, "gate", gate_given);
  const MapSize size = size_of(features);
  check_map_size(kName, size);
  const int64_t reduced = reduce_weight.size(0);
  Tensor d_features = torch::stable::empty_like(features);
  Tensor d_direction = new_floats(features, {size.channels});
  Tensor d_offset = new_floats(features, {1});
  Tensor d_reduce_weight = new_floats(features, {reduced, size.channels});
  Tensor d_reduce_bias = new_floats(features, {reduced});
  Tensor d_expand_weight = new_floats(features, {size.channels, reduced});
  Tensor d_expand_bias = new_floats(features, {size.channels});
  const Tensor parts = new_floats(features, {size.images, size.parts(), size.channels});
  const Tensor d_logits = new_floats(features, {size.images, size.channels});
  const Tensor d_hidden = new_floats(features, {size.images, reduced});
  const Tensor d_pooled = new_floats(features, {size.images, size.channels});
  const Tensor d_weights = new_floats(features, {size.images, size.positions});
  const float* const map = features.const_data_ptr<float>();
  if (size.images > 0) {
    const Layers layers{reduce_weight.const_data_ptr<float>(), nullptr, expand_weight.const_data_ptr<float>(),
                        nullptr};
    const float* const gradient = d_output.const_data_ptr<float>();
    with_width(are_wide(size.channels, {gradient, map}), [&](auto width) {
      device.launch("channel_reunion_backward: add_products", add_products<width>, pass_grid(size, width),
                    kMapThreads, 0, gradient, map, size, parts.mutable_data_ptr<float>());
    });
    device.launch("channel_reunion_backward: find_pooled_gradient", find_pooled_gradient, size.images,
                  kLayerThreads, 0, parts.const_data_ptr<float>(), gate.const_data_ptr<float>(),
                  hidden.const_data_ptr<float>(), size, reduced, layers, d_logits.mutable_data_ptr<float>(),
                  d_hidden.mutable_data_ptr<float>(), d_pooled.mutable_data_ptr<float>());
    launch_dots(device, "channel_reunion_backward: find_dots", map, d_pooled.const_data_ptr<float>(),
                size.channels, nullptr, size, d_weights.mutable_data_ptr<float>());
    const bool wide =
        are_wide(size.channels, {gradient, gate.const_data_ptr<float>(), d_pooled.const_data_ptr<float>(),
                                 direction.const_data_ptr<float>(), d_features.const_data_ptr<float>()});
    with_width(wide, [&](auto width) {
      device.launch("channel_reunion_backward: find_map_gradient", find_map_gradient<width>,
                    pass_grid(size, width), kMapThreads, 0, gradient, gate.const_data_ptr<float>(),
                    weights.const_data_ptr<float>(), d_pooled.const_data_ptr<float>(),
                    d_weights.const_data_ptr<float>(), direction.const_data_ptr<float>(), size,
                    d_features.mutable_data_ptr<float>());
    });
    launch_weighted(device, "channel_reunion_backward: add_weighted", map, d_weights.const_data_ptr<float>(),
                    size, parts.mutable_data_ptr<float>());
  }
  device.launch("channel_reunion_backward: finish_parameters", finish_parameters<float>,
                divide_up(size.channels, kWarp) + 1, kMapThreads, 0, parts.const_data_ptr<float>(),
                size.images * size.parts(), size.channels, d_weights.const_data_ptr<float>(),
                size.images * size.positions, d_direction.mutable_data_ptr<float>(),
                d_offset.mutable_data_ptr<float>());
  launch_layer_gradient(device, d_logits, hidden, d_expand_weight, d_expand_bias);
  launch_layer_gradient(device, d_hidden, pooled, d_reduce_weight, d_reduce_bias);
  return {d_features, d_direction, d_offset, d_reduce_weight, d_reduce_bias, d_expand_weight, d_expand_bias};
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, PYDEFECT_CUDA_KEY, library) {
  library.impl("channel_reunion", TORCH_BOX(&channel_reunion));
  library.impl("channel_reunion_backward", TORCH_BOX(&channel_reunion_backward));
}

}  // namespace
}  // namespace pydefect::cuda
