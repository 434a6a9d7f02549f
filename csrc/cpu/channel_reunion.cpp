// Channel reunion on the CPU: the position weights and the sum that they weigh come out of one pass over the
// map, the gating is the second. The backward pass reads the map and the incoming gradient twice and writes
// once. Images go one after the other, so that the second reading finds them in the cache.
#include "kernels/channel_reunion.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "dense.h"
#include "dispatch.h"
#include "maps.h"

namespace pydefect::cpu {
namespace {

constexpr const char* kName = "channel_reunion";

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> channel_reunion(
    const Tensor& features_given, const Tensor& direction_given, const Tensor& offset_given,
    const Tensor& reduce_weight_given, const Tensor& reduce_bias_given, const Tensor& expand_weight_given,
    const Tensor& expand_bias_given) {
  check_channel_reunion(features_given, direction_given, offset_given, reduce_weight_given, reduce_bias_given,
                        expand_weight_given, expand_bias_given);
  const MapSize size(features_given);
  const int64_t channels = size.channels;
  const int64_t reduced = reduce_weight_given.size(0);
  const Tensor features = in_order(kName, "features", features_given);
  const Tensor direction = in_order(kName, "direction", direction_given);
  const Tensor reduce_weight = in_order(kName, "reduce_weight", reduce_weight_given);
  const Tensor reduce_bias = in_order(kName, "reduce_bias", reduce_bias_given);
  const Tensor expand_weight = in_order(kName, "expand_weight", expand_weight_given);
  const Tensor expand_bias = in_order(kName, "expand_bias", expand_bias_given);
  Tensor output = new_map(features);
  Tensor weights = torch::stable::new_empty(features, {size.images, size.positions()});
  Tensor pooled = torch::stable::new_zeros(features, {size.images, channels});
  Tensor hidden = torch::stable::new_empty(features, {size.images, reduced});
  Tensor gate = torch::stable::new_empty(features, {size.images, channels});

  const ChannelReunionKernel& kernel = PYDEFECT_ACTIVE_KERNEL(channel_reunion_kernel);
  const float offset = *offset_given.const_data_ptr<float>();
  const Blocks blocks = position_blocks(size);
  BlockSums sums(blocks.count(), channels);
  for (int64_t image = 0; image < size.images; ++image) {
    const float* map = features.const_data_ptr<float>() + image * size.image();
    float* position_weights = weights.mutable_data_ptr<float>() + image * size.positions();
    blocks.for_each([&](int64_t block, int64_t begin, int64_t end) {
      kernel.pool(map + begin * channels, direction.const_data_ptr<float>(), offset, end - begin, channels,
                  position_weights + begin, sums.start(block));
    });
    float* context = pooled.mutable_data_ptr<float>() + image * channels;
    sums.add_to(context);
    float* middle = hidden.mutable_data_ptr<float>() + image * reduced;
    dense(reduce_weight.const_data_ptr<float>(), reduce_bias.const_data_ptr<float>(), context, reduced,
          channels, middle);
    relu(middle, reduced);
    float* scale = gate.mutable_data_ptr<float>() + image * channels;
    dense(expand_weight.const_data_ptr<float>(), expand_bias.const_data_ptr<float>(), middle, channels,
          reduced, scale);
    for (int64_t c = 0; c < channels; ++c) scale[c] = 1.0f / (1.0f + std::exp(-scale[c]));
    float* out = output.mutable_data_ptr<float>() + image * size.image();
    blocks.for_each([&](int64_t, int64_t begin, int64_t end) {
      kernel.scale(map + begin * channels, scale, end - begin, channels, out + begin * channels);
    });
  }
  return {output, weights, pooled, hidden, gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> channel_reunion_backward(
    const Tensor& d_output_given, const Tensor& features_given, const Tensor& direction_given,
    const Tensor& reduce_weight_given, const Tensor& expand_weight_given, const Tensor& weights_given,
    const Tensor& pooled_given, const Tensor& hidden_given, const Tensor& gate_given) {
  check_channel_reunion_backward(d_output_given, features_given, direction_given, reduce_weight_given,
                                 expand_weight_given, weights_given, pooled_given, hidden_given, gate_given);
  const MapSize size(features_given);
  const int64_t channels = size.channels;
  const int64_t reduced = reduce_weight_given.size(0);
  const Tensor d_output = in_order(kName, "d_output", d_output_given);
  const Tensor features = in_order(kName, "features", features_given);
  const Tensor direction = in_order(kName, "direction", direction_given);
  const Tensor reduce_weight = in_order(kName, "reduce_weight", reduce_weight_given);
  const Tensor expand_weight = in_order(kName, "expand_weight", expand_weight_given);
  const Tensor weights = in_order(kName, "weights", weights_given);
  const Tensor pooled = in_order(kName, "pooled", pooled_given);
  const Tensor hidden = in_order(kName, "hidden", hidden_given);
  const Tensor gate = in_order(kName, "gate", gate_given);
  Tensor d_features = new_map(features);
  Tensor d_direction = torch::stable::new_zeros(features, {channels});
  Tensor d_offset = torch::stable::new_zeros(features, {1});
  Tensor d_reduce_weight = torch::stable::new_zeros(features, {reduced, channels});
  Tensor d_reduce_bias = torch::stable::new_zeros(features, {reduced});
  Tensor d_expand_weight = torch::stable::new_zeros(features, {channels, reduced});
  Tensor d_expand_bias = torch::stable::new_zeros(features, {channels});

  const ChannelReunionKernel& kernel = PYDEFECT_ACTIVE_KERNEL(channel_reunion_kernel);
  const Blocks blocks = position_blocks(size);
  BlockSums gate_sums(blocks.count(), channels);
  BlockSums direction_sums(blocks.count(), channels);
  BlockSums offset_sums(blocks.count(), 1);
  for (int64_t image = 0; image < size.images; ++image) {
    const float* d_out = d_output.const_data_ptr<float>() + image * size.image();
    const float* map = features.const_data_ptr<float>() + image * size.image();
    blocks.for_each([&](int64_t block, int64_t begin, int64_t end) {
      kernel.add_products(d_out + begin * channels, map + begin * channels, end - begin, channels,
                          gate_sums.start(block));
    });
    // The gradient of the gate, then of what its sigmoid is taken of.
    std::vector<float> d_gate(static_cast<size_t>(channels), 0.0f);
    gate_sums.add_to(d_gate.data());
    const float* scale = gate.const_data_ptr<float>() + image * channels;
    for (int64_t c = 0; c < channels; ++c) d_gate[static_cast<size_t>(c)] *= scale[c] * (1.0f - scale[c]);

    const float* middle = hidden.const_data_ptr<float>() + image * reduced;
    std::vector<float> d_middle(static_cast<size_t>(reduced), 0.0f);
    dense_backward(d_gate.data(), expand_weight.const_data_ptr<float>(), middle, channels, reduced,
                   d_expand_weight.mutable_data_ptr<float>(), d_expand_bias.mutable_data_ptr<float>(),
                   d_middle.data());
    relu_backward(middle, reduced, d_middle.data());
    std::vector<float> d_pooled(static_cast<size_t>(channels), 0.0f);
    dense_backward(d_middle.data(), reduce_weight.const_data_ptr<float>(),
                   pooled.const_data_ptr<float>() + image * channels, reduced, channels,
                   d_reduce_weight.mutable_data_ptr<float>(), d_reduce_bias.mutable_data_ptr<float>(),
                   d_pooled.data());

    const float* position_weights = weights.const_data_ptr<float>() + image * size.positions();
    float* d_map = d_features.mutable_data_ptr<float>() + image * size.image();
    blocks.for_each([&](int64_t block, int64_t begin, int64_t end) {
      const int64_t at = begin * channels;
      kernel.backward(d_out + at, map + at, scale, direction.const_data_ptr<float>(), d_pooled.data(),
                      position_weights + begin, end - begin, channels, d_map + at,
                      direction_sums.start(block), offset_sums.start(block));
    });
    direction_sums.add_to(d_direction.mutable_data_ptr<float>());
    offset_sums.add_to(d_offset.mutable_data_ptr<float>());
  }
  return {d_features, d_direction, d_offset, d_reduce_weight, d_reduce_bias, d_expand_weight, d_expand_bias};
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, CPU, library) {
  library.impl("channel_reunion", TORCH_BOX(&channel_reunion));
  library.impl("channel_reunion_backward", TORCH_BOX(&channel_reunion_backward));
}

}  // namespace
}  // namespace pydefect::cpu
