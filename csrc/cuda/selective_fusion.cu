// Selective fusion on CUDA: one pass over both maps for the mean, one for the scaling, backward the same.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "../checks.h"
#include "common.cuh"
#include "maps.cuh"

namespace pydefect::cuda {
namespace {

constexpr const char* kName = "selective_fusion";

template <int width>
__global__ void sum_maps(const float* __restrict__ first, const float* __restrict__ second, MapSize size,
                         float* __restrict__ parts) {  // [images, parts, channels]
  const Pass<width> pass(size);
  Channels<width> sum{};
  pass.each(size, [&](int64_t, int64_t at) {
    const auto one = Channels<width>::load(first + at);
    const auto other = Channels<width>::load(second + at);
    Channels<width>::each([&](int i) { sum.of[i] += one.of[i] + other.of[i]; });
  });
  pass.write_sum(size, sum, parts + pass.part(size) * size.channels);
}

struct Layers {
  const float* reduce_weight;  // [reduced, channels]
  const float* reduce_bias;
  const float* first_weight;  // [channels, reduced]
  const float* first_bias;
  const float* second_weight;
  const float* second_bias;
};

// One block an image.
__global__ void find_shares(const float* parts, MapSize size, int reduced, Layers layers,
                            float* pooled,          // [images, channels]
                            float* hidden,          // [images, reduced]
                            float* share,           // [images, channels]
                            float* second_share) {  // [images, channels]
  const int64_t image = blockIdx.x;
  float* const mean = pooled + image * size.channels;
  float* const middle = hidden + image * reduced;
  float* const n1 = share + image * size.channels;
  float* const n2 = second_share + image * size.channels;
  const auto same = [](float value) { return value; };
  add_parts(parts, size, image, 1.0f / static_cast<float>(size.positions), mean);
  __syncthreads();
  dense(layers.reduce_weight, layers.reduce_bias, mean, reduced, size.channels, middle, relu);
  __syncthreads();
  dense(layers.first_weight, layers.first_bias, middle, size.channels, reduced, n1, same);
  dense(layers.second_weight, layers.second_bias, middle, size.channels, reduced, n2, same);
  __syncthreads();
  // The softmax over two is the sigmoid of their difference.
  for (int c = threadIdx.x; c < size.channels; c += kLayerThreads) {
    const float difference = n1[c] - n2[c];
    n1[c] = sigmoid(difference);
    n2[c] = sigmoid(-difference);
  }
}

// y = x * scale + shift, a factor and a summand (or none) for each image's channels; of both maps.
template <int width>
__global__ void scale_maps(const float* __restrict__ first, const float* __restrict__ second,
                           const float* __restrict__ first_scale,   // [images, channels]
                           const float* __restrict__ second_scale,  // [images, channels]
                           const float* __restrict__ shift,         // [images, channels] or null
                           MapSize size, float* __restrict__ scaled_first,
                           float* __restrict__ scaled_second) {
  const Pass<width> pass(size);
  if (!pass.any) return;
  const auto first_factors = Channels<width>::load(first_scale + pass.row(size));
  const auto second_factors = Channels<width>::load(second_scale + pass.row(size));
  Channels<width> added{};
  if (shift != nullptr) added = Channels<width>::load(shift + pass.row(size));
  pass.each(size, [&](int64_t, int64_t at) {
    auto one = Channels<width>::load(first + at);
    auto other = Channels<width>::load(second + at);
    Channels<width>::each([&](int i) {
      one.of[i] = one.of[i] * first_factors.of[i] + added.of[i];
      other.of[i] = other.of[i] * second_factors.of[i] + added.of[i];
    });
    one.store(scaled_first + at);
    other.store(scaled_second + at);
  });
}

template <int width>
__global__ void sum_products(const float* __restrict__ d_first, const float* __restrict__ first,
                             const float* __restrict__ d_second, const float* __restrict__ second,
                             MapSize size,
                             float* __restrict__ first_parts,     // [images, parts, channels]
                             float* __restrict__ second_parts) {  // [images, parts, channels]
  const Pass<width> pass(size);
  Channels<width> first_sum{};
  Channels<width> second_sum{};
  pass.each(size, [&](int64_t, int64_t at) {
    const auto d_one = Channels<width>::load(d_first + at);
    const auto one = Channels<width>::load(first + at);
    const auto d_other = Channels<width>::load(d_second + at);
    const auto other = Channels<width>::load(second + at);
    Channels<width>::each([&](int i) {
      first_sum.of[i] += d_one.of[i] * one.of[i];
      second_sum.of[i] += d_other.of[i] * other.of[i];
    });
  });
  pass.write_sum(size, first_sum, first_parts + pass.part(size) * size.channels);
  pass.write_sum(size, second_sum, second_parts + pass.part(size) * size.channels);
}

void launch_scale(const Device& device, const char* name, const Tensor& first, const Tensor& second,
                  const Tensor& first_scale, const Tensor& second_scale, const float* shift,
                  const MapSize& size, Tensor& scaled_first, Tensor& scaled_second) {
  const bool wide = are_wide(
      size.channels, {first.const_data_ptr<float>(), second.const_data_ptr<float>(),
                      first_scale.const_data_ptr<float>(), second_scale.const_data_ptr<float>(), shift,
                      scaled_first.const_data_ptr<float>(), scaled_second.const_data_ptr<float>()});
  with_width(wide, [&](auto width) {
    device.launch(name, scale_maps<width>, pass_grid(size, width), kMapThreads, 0,
                  first.const_data_ptr<float>(), second.const_data_ptr<float>(),
                  first_scale.const_data_ptr<float>(), second_scale.const_data_ptr<float>(), shift, size,
                  scaled_first.mutable_data_ptr<float>(), scaled_second.mutable_data_ptr<float>());
  });
}

// One block an image.
__global__ void find_mean_gradient(const float* first_parts, const float* second_parts, const float* share,
                                   const float* hidden, MapSize size, int reduced, Layers layers,
                                   float* second_share,     // [images, channels]
                                   float* d_first_logits,   // [images, channels]
                                   float* d_second_logits,  // [images, channels]
                                   float* d_hidden,         // [images, reduced]
                                   float* d_mean) {         // [images, channels]
  const int64_t image = blockIdx.x;
  const int64_t channel = image * size.channels;
  add_parts(first_parts, size, image, 1.0f, d_first_logits + channel);
  add_parts(second_parts, size, image, 1.0f, d_second_logits + channel);
  // Each thread goes on with the channels that it has just added up.
  for (int c = threadIdx.x; c < size.channels; c += kLayerThreads) {
    const float n1 = share[channel + c];
    const float n2 = 1.0f - n1;
    const float gradient = n1 * n2 * (d_first_logits[channel + c] - d_second_logits[channel + c]);
    second_share[channel + c] = n2;
    d_first_logits[channel + c] = gradient;
    d_second_logits[channel + c] = -gradient;
  }
  __syncthreads();
  float* const d_middle = d_hidden + image * reduced;
  const auto heads = [&](int o, int i) {
    const int64_t at = int64_t{o} * reduced + i;
    return layers.first_weight[at] - layers.second_weight[at];
  };
  dense_backward(heads, d_first_logits + channel, size.channels, reduced, d_middle);
  __syncthreads();
  for (int r = threadIdx.x; r < reduced; r += kLayerThreads) {
    if (!(hidden[image * reduced + r] > 0.0f)) d_middle[r] = 0.0f;
  }
  __syncthreads();
  const auto reduce = [&](int o, int i) { return layers.reduce_weight[int64_t{o} * size.channels + i]; };
  dense_backward(reduce, d_middle, reduced, size.channels, d_mean + channel);
  __syncthreads();
  for (int c = threadIdx.x; c < size.channels; c += kLayerThreads) {
    d_mean[channel + c] /= static_cast<float>(size.positions);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> selective_fusion(
    const Tensor& first_given, const Tensor& second_given, const Tensor& reduce_weight_given,
    const Tensor& reduce_bias_given, const Tensor& first_weight_given, const Tensor& first_bias_given,
    const Tensor& second_weight_given, const Tensor& second_bias_given) {
  check_selective_fusion(first_given, second_given, reduce_weight_given, reduce_bias_given,
                         first_weight_given, first_bias_given, second_weight_given, second_bias_given);
  const Device device(first_given);
  const Tensor first = in_order(kName, "first", first_given);
  const Tensor second = in_order(kName, "second", second_given);
  const Tensor reduce_weight = in_order(kName, "reduce_weight", reduce_weight_given);
  const Tensor reduce_bias = in_order(kName, "reduce_bias", reduce_bias_given);
  const Tensor first_weight = in_order(kName, "first_weight", first_weight_given);
  const Tensor first_bias = in_order(kName, "first_bias", first_bias_given);
  const Tensor second_weight = in_order(kName, "second_weight", second_weight_given);
  const Tensor second_bias = in_order(kName, "second_bias", second_bias_given);
  const MapSize size = size_of(first);
  check_map_size(kName, size);
  const int64_t reduced = reduce_weight.size(0);
  Tensor fused_first = torch::stable::empty_like(first);
  Tensor fused_second = torch::stable::empty_like(second);
  Tensor pooled = new_floats(first, {size.images, size.channels});
  Tensor hidden = new_floats(first, {size.images, reduced});
  Tensor share = new_floats(first, {size.images, size.channels});
  if (size.images == 0) return {fused_first, fused_second, pooled, hidden, share};

  const Tensor parts = new_floats(first, {size.images, size.parts(), size.channels});
  const Tensor second_share = new_floats(first, {size.images, size.channels});
  const Layers layers{reduce_weight.const_data_ptr<float>(), reduce_bias.const_data_ptr<float>(),
                      first_weight.const_data_ptr<float>(),  first_bias.const_data_ptr<float>(),
                      second_weight.const_data_ptr<float>(), second_bias.const_data_ptr<float>()};
  with_width(are_wide(size.channels, {first.const_data_ptr<float>(), second.const_data_ptr<float>()}),
             [&](auto width) {
               device.launch("selective_fusion: sum_maps", sum_maps<width>, pass_grid(size, width),
                             kMapThreads, 0, first.const_data_ptr<float>(), second.const_data_ptr<float>(),
                             size, parts.mutable_data_ptr<float>());
             });
  device.launch("selective_fusion: find_shares", find_shares, size.images, kLayerThreads, 0,
                parts.const_data_ptr<float>(), size, reduced, layers, pooled.mutable_data_ptr<float>(),
                hidden.mutable_data_ptr<float>(), share.mutable_data_ptr<float>(),
                second_share.mutable_data_ptr<float>());
  launch_scale(device, "selective_fusion: scale_maps", first, second, share, second_share, nullptr, size,
               fused_first, fused_second);
  return {fused_first, fused_second, pooled, hidden, share};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_fusion_backward(
    const Tensor& d_first_given, const Tensor& d_second_given, const Tensor& first_given,
    const Tensor& second_given, const Tensor& reduce_weight_given, const Tensor& first_weight_given,
    const Tensor& second_weight_given, const Tensor& pooled_given, const Tensor& hidden_given,
    const Tensor& share_given) {
  check_selective_fusion_backward(d_first_given, d_second_given, first_given, second_given,
                                  reduce_weight_given, first_weight_given, second_weight_given, pooled_given,
                                  hidden_given, share_given);
  const Device device(first_given);
  const Tensor d_fused_first = in_order(kName, "d_fused_first", d_first_given);
  const Tensor d_fused_second = in_order(kName, "d_fused_second", d_second_given);
  const Tensor first = in_order(kName, "first", first_given);
  const Tensor second = in_order(kName, "second", second_given);
  const Tensor reduce_weight = in_order(kName, "reduce_weight", reduce_weight_given);
  const Tensor first_weight = in_order(kName, "first_weight", first_weight_given);
  const Tensor second_weight = in_order(kName, "second_weight", second_weight_given);
  const Tensor pooled = in_order(kName, "pooled", pooled_given);
  const Tensor hidden = in_order(kName, "hidden", hidden_given);
  const Tensor share = in_order(kName, "share", share_given);
  const MapSize size = size_of(first);
  check_map_size(kName, size);
  const int64_t reduced = reduce_weight.size(0);
  Tensor d_first = torch::stable::empty_like(first);
  Tensor d_second = torch::stable::empty_like(second);
  Tensor d_reduce_weight = new_floats(first, {reduced, size.channels});
  Tensor d_reduce_bias = new_floats(first, {reduced});
  Tensor d_first_weight = new_floats(first, {size.channels, reduced});
  Tensor d_first_bias = new_floats(first, {size.channels});
  Tensor d_second_weight = new_floats(first, {size.channels, reduced});
  Tensor d_second_bias = new_floats(first, {size.channels});
  const Tensor parts = new_floats(first, {2, size.images, size.parts(), size.channels});
  const Tensor d_first_logits = new_floats(first, {size.images, size.channels});
  const Tensor d_second_logits = new_floats(first, {size.images, size.channels});
  const Tensor d_hidden = new_floats(first, {size.images, reduced});
  const Tensor second_share = new_floats(first, {size.images, size.channels});
  const Tensor d_mean = new_floats(first, {size.images, size.channels});
  if (size.images > 0) {
    float* const first_parts = parts.mutable_data_ptr<float>();
    float* const second_parts = first_parts + parts.numel() / 2;
    const Layers layers{reduce_weight.const_data_ptr<float>(), nullptr,
                        first_weight.const_data_ptr<float>(),  nullptr,
                        second_weight.const_data_ptr<float>(), nullptr};
    const bool wide =
        are_wide(size.channels, {d_fused_first.const_data_ptr<float>(), first.const_data_ptr<float>(),
                                 d_fused_second.const_data_ptr<float>(), second.const_data_ptr<float>()});
    with_width(wide, [&](auto width) {
      device.launch("selective_fusion_backward: sum_products", sum_products<width>, pass_grid(size, width),
                    kMapThreads, 0, d_fused_first.const_data_ptr<float>(), first.const_data_ptr<float>(),
                    d_fused_second.const_data_ptr<float>(), second.const_data_ptr<float>(), size, first_parts,
                    second_parts);
    });
    device.launch("selective_fusion_backward: find_mean_gradient", find_mean_gradient, size.images,
                  kLayerThreads, 0, first_parts, second_parts, share.const_data_ptr<float>(),
                  hidden.const_data_ptr<float>(), size, reduced, layers,
                  second_share.mutable_data_ptr<float>(), d_first_logits.mutable_data_ptr<float>(),
                  d_second_logits.mutable_data_ptr<float>(), d_hidden.mutable_data_ptr<float>(),
                  d_mean.mutable_data_ptr<float>());
    launch_scale(device, "selective_fusion_backward: scale_maps", d_fused_first, d_fused_second, share,
                 second_share, d_mean.const_data_ptr<float>(), size, d_first, d_second);
  }
  launch_layer_gradient(device, d_first_logits, hidden, d_first_weight, d_first_bias);
  launch_layer_gradient(device, d_second_logits, hidden, d_second_weight, d_second_bias);
  launch_layer_gradient(device, d_hidden, pooled, d_reduce_weight, d_reduce_bias);
  return {d_first,        d_second,     d_reduce_weight, d_reduce_bias,
          d_first_weight, d_first_bias, d_second_weight, d_second_bias};
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, PYDEFECT_CUDA_KEY, library) {
  library.impl("selective_fusion", TORCH_BOX(&selective_fusion));
  library.impl("selective_fusion_backward", TORCH_BOX(&selective_fusion_backward));
}

}  // namespace
}  // namespace pydefect::cuda
