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

__global__ void add_products(const float* a, const float* b, MapSize size,
                             float* parts) {  // [images, parts, channels]
  const Part part(size);
  if (part.channel >= size.channels) return;
  float sum = 0.0f;
  for (int64_t p = part.begin; p < part.end; ++p) {
    const int64_t at = (blockIdx.z * size.positions + p) * size.channels + part.channel;
    sum += a[at] * b[at];
  }
  parts[part.place(size)] = sum;
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

__global__ void apply_gate(const float* map, const float* gate, MapSize size, int64_t elements,
                           float* output) {
  for (int64_t i = int64_t{blockIdx.x} * kMapThreads + threadIdx.x; i < elements;
       i += int64_t{gridDim.x} * kMapThreads) {
    output[i] = map[i] * gate[i / size.image() * size.channels + i % size.channels];
  }
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
  for (int c = threadIdx.x; c < size.channels; c += kMapThreads) {
    d_logits[channel + c] *= gate[channel + c] * (1.0f - gate[channel + c]);
  }
  __syncthreads();
  float* const d_middle = d_hidden + image * reduced;
  dense_backward(layers.expand_weight, d_logits + channel, size.channels, reduced, d_middle);
  for (int r = threadIdx.x; r < reduced; r += kMapThreads) {
    if (!(hidden[image * reduced + r] > 0.0f)) d_middle[r] = 0.0f;
  }
  __syncthreads();
  dense_backward(layers.reduce_weight, d_middle, reduced, size.channels, d_pooled + channel);
}

__global__ void find_map_gradient(const float* d_output, const float* gate, const float* weights,
                                  const float* d_pooled, const float* d_weights, const float* direction,
                                  MapSize size, int64_t elements, float* d_map) {
  for (int64_t i = int64_t{blockIdx.x} * kMapThreads + threadIdx.x; i < elements;
       i += int64_t{gridDim.x} * kMapThreads) {
    const int64_t c = i % size.channels;
    const int64_t position = i / size.channels;
    const int64_t channel = position / size.positions * size.channels + c;
    d_map[i] = d_output[i] * gate[channel] + weights[position] * d_pooled[channel] +
               d_weights[position] * direction[c];
  }
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
  device.launch("channel_reunion: find_dots", find_dots, warps_for(device, size), kMapThreads, 0, map,
                direction.const_data_ptr<float>(), 0, offset.const_data_ptr<float>(), size,
                weights.mutable_data_ptr<float>());
  device.launch("channel_reunion: add_weighted", add_weighted<true>, part_grid(size), kChannelThreads, 0, map,
                weights.const_data_ptr<float>(), size, parts.mutable_data_ptr<float>());
  device.launch("channel_reunion: find_gate", find_gate, size.images, kMapThreads, 0,
                parts.const_data_ptr<float>(), size, reduced, layers, pooled.mutable_data_ptr<float>(),
                hidden.mutable_data_ptr<float>(), gate.mutable_data_ptr<float>());
  device.launch("channel_reunion: apply_gate", apply_gate,
                blocks_for(device, divide_up(size.elements(), kMapThreads)), kMapThreads, 0, map,
                gate.const_data_ptr<float>(), size, size.elements(), output.mutable_data_ptr<float>());
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
    device.launch("channel_reunion_backward: add_products", add_products, part_grid(size), kChannelThreads, 0,
                  d_output.const_data_ptr<float>(), map, size, parts.mutable_data_ptr<float>());
    device.launch("channel_reunion_backward: find_pooled_gradient", find_pooled_gradient, size.images,
                  kMapThreads, 0, parts.const_data_ptr<float>(), gate.const_data_ptr<float>(),
                  hidden.const_data_ptr<float>(), size, reduced, layers, d_logits.mutable_data_ptr<float>(),
                  d_hidden.mutable_data_ptr<float>(), d_pooled.mutable_data_ptr<float>());
    device.launch("channel_reunion_backward: find_dots", find_dots, warps_for(device, size), kMapThreads, 0,
                  map, d_pooled.const_data_ptr<float>(), size.channels, nullptr, size,
                  d_weights.mutable_data_ptr<float>());
    device.launch("channel_reunion_backward: find_map_gradient", find_map_gradient,
                  blocks_for(device, divide_up(size.elements(), kMapThreads)), kMapThreads, 0,
                  d_output.const_data_ptr<float>(), gate.const_data_ptr<float>(),
                  weights.const_data_ptr<float>(), d_pooled.const_data_ptr<float>(),
                  d_weights.const_data_ptr<float>(), direction.const_data_ptr<float>(), size, size.elements(),
                  d_features.mutable_data_ptr<float>());
    device.launch("channel_reunion_backward: add_weighted", add_weighted<true>, part_grid(size),
                  kChannelThreads, 0, map, d_weights.const_data_ptr<float>(), size,
                  parts.mutable_data_ptr<float>());
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
