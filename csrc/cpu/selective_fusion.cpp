// Selective fusion on the CPU: two maps, weighed against each other channel by channel. Each direction reads
// the maps twice, one image after the other, so that the second reading finds them in the cache; the maps'
// sum never exists.
#include "kernels/selective_fusion.h"

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

constexpr const char* kName = "selective_fusion";

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> selective_fusion(
    const Tensor& first_given, const Tensor& second_given, const Tensor& reduce_weight_given,
    const Tensor& reduce_bias_given, const Tensor& first_weight_given, const Tensor& first_bias_given,
    const Tensor& second_weight_given, const Tensor& second_bias_given) {
  check_selective_fusion(first_given, second_given, reduce_weight_given, reduce_bias_given,
                         first_weight_given, first_bias_given, second_weight_given, second_bias_given);
  const MapSize size(first_given);
  const int64_t channels = size.channels;
  const int64_t reduced = reduce_weight_given.size(0);
  const Tensor first = in_order(kName, "first", first_given);
  const Tensor second = in_order(kName, "second", second_given);
  const Tensor reduce_weight = in_order(kName, "reduce_weight", reduce_weight_given);
  const Tensor reduce_bias = in_order(kName, "reduce_bias", reduce_bias_given);
  const Tensor first_weight = in_order(kName, "first_weight", first_weight_given);
  const Tensor first_bias = in_order(kName, "first_bias", first_bias_given);
  const Tensor second_weight = in_order(kName, "second_weight", second_weight_given);
  const Tensor second_bias = in_order(kName, "second_bias", second_bias_given);
  Tensor fused_first = new_map(first);
  Tensor fused_second = new_map(second);
  Tensor pooled = torch::stable::new_zeros(first, {size.images, channels});
  Tensor hidden = torch::stable::new_empty(first, {size.images, reduced});
  Tensor share = torch::stable::new_empty(first, {size.images, channels});

  const SelectiveFusionKernel& kernel = PYDEFECT_ACTIVE_KERNEL(selective_fusion_kernel);
  const auto scale_shift = past_caches(size, 2) ? kernel.scale_shift_streamed : kernel.scale_shift;
  const Blocks blocks = position_blocks(size);
  BlockSums sums(blocks.count(), channels);
  const std::vector<float> zeros(static_cast<size_t>(channels), 0.0f);
  std::vector<float> second_logits(static_cast<size_t>(channels));
  std::vector<float> second_share(static_cast<size_t>(channels));
  for (int64_t image = 0; image < size.images; ++image) {
    const float* a = first.const_data_ptr<float>() + image * size.image();
    const float* b = second.const_data_ptr<float>() + image * size.image();
    blocks.for_each([&](int64_t block, int64_t begin, int64_t end) {
      kernel.add_sums(a + begin * channels, b + begin * channels, end - begin, channels, sums.start(block));
    });
    float* mean = pooled.mutable_data_ptr<float>() + image * channels;
    sums.add_to(mean);
    for (int64_t c = 0; c < channels; ++c) mean[c] /= static_cast<float>(size.positions());
    float* middle = hidden.mutable_data_ptr<float>() + image * reduced;
    dense(reduce_weight.const_data_ptr<float>(), reduce_bias.const_data_ptr<float>(), mean, reduced, channels,
          middle);
    relu(middle, reduced);
    // The softmax over two is the sigmoid of their difference.
    float* first_share = share.mutable_data_ptr<float>() + image * channels;
    dense(first_weight.const_data_ptr<float>(), first_bias.const_data_ptr<float>(), middle, channels, reduced,
          first_share);
    dense(second_weight.const_data_ptr<float>(), second_bias.const_data_ptr<float>(), middle, channels,
          reduced, second_logits.data());
    for (int64_t c = 0; c < channels; ++c) {
      const size_t i = static_cast<size_t>(c);
      const float difference = first_share[c] - second_logits[i];
      first_share[c] = 1.0f / (1.0f + std::exp(-difference));
      second_share[i] = 1.0f / (1.0f + std::exp(difference));
    }
    float* y1 = fused_first.mutable_data_ptr<float>() + image * size.image();
    float* y2 = fused_second.mutable_data_ptr<float>() + image * size.image();
    blocks.for_each([&](int64_t, int64_t begin, int64_t end) {
      const int64_t at = begin * channels;
      scale_shift(a + at, first_share, zeros.data(), end - begin, channels, y1 + at);
      scale_shift(b + at, second_share.data(), zeros.data(), end - begin, channels, y2 + at);
    });
  }
  return {fused_first, fused_second, pooled, hidden, share};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_fusion_backward(
    const Tensor& d_fused_first_given, const Tensor& d_fused_second_given, const Tensor& first_given,
    const Tensor& second_given, const Tensor& reduce_weight_given, const Tensor& first_weight_given,
    const Tensor& second_weight_given, const Tensor& pooled_given, const Tensor& hidden_given,
    const Tensor& share_given) {
  check_selective_fusion_backward(d_fused_first_given, d_fused_second_given, first_given, second_given,
                                  reduce_weight_given, first_weight_given, second_weight_given, pooled_given,
                                  hidden_given, share_given);
  const MapSize size(first_given);
  const int64_t channels = size.channels;
  const int64_t reduced = reduce_weight_given.size(0);
  const Tensor d_fused_first = in_order(kName, "d_fused_first", d_fused_first_given);
  const Tensor d_fused_second = in_order(kName, "d_fused_second", d_fused_second_given);
  const Tensor first = in_order(kName, "first", first_given);
  const Tensor second = in_order(kName, "second", second_given);
  const Tensor reduce_weight = in_order(kName, "reduce_weight", reduce_weight_given);
  const Tensor first_weight = in_order(kName, "first_weight", first_weight_given);
  const Tensor second_weight = in_order(kName, "second_weight", second_weight_given);
  const Tensor pooled = in_order(kName, "pooled", pooled_given);
  const Tensor hidden = in_order(kName, "hidden", hidden_given);
  const Tensor share = in_order(kName, "share", share_given);
  Tensor d_first = new_map(first);
  Tensor d_second = new_map(second);
  Tensor d_reduce_weight = torch::stable::new_zeros(first, {reduced, channels});
  Tensor d_reduce_bias = torch::stable::new_zeros(first, {reduced});
  Tensor d_first_weight = torch::stable::new_zeros(first, {channels, reduced});
  Tensor d_first_bias = torch::stable::new_zeros(first, {channels});
  Tensor d_second_weight = torch::stable::new_zeros(first, {channels, reduced});
  Tensor d_second_bias = torch::stable::new_zeros(first, {channels});

  const SelectiveFusionKernel& kernel = PYDEFECT_ACTIVE_KERNEL(selective_fusion_kernel);
  const auto scale_shift = past_caches(size, 2) ? kernel.scale_shift_streamed : kernel.scale_shift;
  const Blocks blocks = position_blocks(size);
  BlockSums sums(blocks.count(), 2 * channels);
  for (int64_t image = 0; image < size.images; ++image) {
    const float* d1 = d_fused_first.const_data_ptr<float>() + image * size.image();
    const float* d2 = d_fused_second.const_data_ptr<float>() + image * size.image();
    const float* a = first.const_data_ptr<float>() + image * size.image();
    const float* b = second.const_data_ptr<float>() + image * size.image();
    blocks.for_each([&](int64_t block, int64_t begin, int64_t end) {
      const int64_t at = begin * channels;
      float* d_shares = sums.start(block);
      kernel.add_products(d1 + at, a + at, end - begin, channels, d_shares);
      kernel.add_products(d2 + at, b + at, end - begin, channels, d_shares + channels);
    });
    std::vector<float> d_shares(static_cast<size_t>(2 * channels), 0.0f);
    sums.add_to(d_shares.data());

    const float* n1 = share.const_data_ptr<float>() + image * channels;
    std::vector<float> n2(static_cast<size_t>(channels));
    std::vector<float> d_first_logits(static_cast<size_t>(channels));
    std::vector<float> d_second_logits(static_cast<size_t>(channels));
    for (int64_t c = 0; c < channels; ++c) {
      const size_t i = static_cast<size_t>(c);
      n2[i] = 1.0f - n1[c];
      d_first_logits[i] = n1[c] * n2[i] * (d_shares[i] - d_shares[i + static_cast<size_t>(channels)]);
      d_second_logits[i] = -d_first_logits[i];
    }
    const float* middle = hidden.const_data_ptr<float>() + image * reduced;
    std::vector<float> d_middle(static_cast<size_t>(reduced), 0.0f);
    dense_backward(d_first_logits.data(), first_weight.const_data_ptr<float>(), middle, channels, reduced,
                   d_first_weight.mutable_data_ptr<float>(), d_first_bias.mutable_data_ptr<float>(),
                   d_middle.data());
    dense_backward(d_second_logits.data(), second_weight.const_data_ptr<float>(), middle, channels, reduced,
                   d_second_weight.mutable_data_ptr<float>(), d_second_bias.mutable_data_ptr<float>(),
                   d_middle.data());
    relu_backward(middle, reduced, d_middle.data());
    std::vector<float> d_mean(static_cast<size_t>(channels), 0.0f);
    dense_backward(d_middle.data(), reduce_weight.const_data_ptr<float>(),
                   pooled.const_data_ptr<float>() + image * channels, reduced, channels,
                   d_reduce_weight.mutable_data_ptr<float>(), d_reduce_bias.mutable_data_ptr<float>(),
                   d_mean.data());
    for (float& value : d_mean) value /= static_cast<float>(size.positions());

    float* da = d_first.mutable_data_ptr<float>() + image * size.image();
    float* db = d_second.mutable_data_ptr<float>() + image * size.image();
    blocks.for_each([&](int64_t, int64_t begin, int64_t end) {
      const int64_t at = begin * channels;
      scale_shift(d1 + at, n1, d_mean.data(), end - begin, channels, da + at);
      scale_shift(d2 + at, n2.data(), d_mean.data(), end - begin, channels, db + at);
    });
  }
  return {d_first,        d_second,     d_reduce_weight, d_reduce_bias,
          d_first_weight, d_first_bias, d_second_weight, d_second_bias};
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, CPU, library) {
  library.impl("selective_fusion", TORCH_BOX(&selective_fusion));
  library.impl("selective_fusion_backward", TORCH_BOX(&selective_fusion_backward));
}

}  // namespace
}  // namespace pydefect::cpu
