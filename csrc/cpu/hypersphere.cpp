// The hypersphere loss on the CPU: the search's own distances are the loss, so the forward pass reads no
// centre twice, and the backward pass makes a row's gradient in one go, without [N, k, D] temporaries.
#include "kernels/hypersphere.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "dispatch.h"
#include "knn.h"
#include "rounding.h"

namespace pydefect::cpu {
namespace {

// Losses are added up in blocks of this many, whatever the number of threads.
constexpr int64_t kBlock = 4096;
// Where a row lies this near to its centre (squared), the root's gradient is cut off.
constexpr float kCoincident = 1e-30f;

struct Hinge {
  float squared_radius;
  bool squared;  // distances enter squared

  // Not below zero; NaN stays.
  float loss(float squared_distance) const {
    const float distance = squared ? squared_distance : std::sqrt(std::max(squared_distance, kCoincident));
    const float excess = distance - squared_radius;
    return excess <= 0.0f ? 0.0f : excess;
  }

  // d loss / d row = weight (row - centre).
  float weight(float squared_distance) const {
    if (loss(squared_distance) == 0.0f) return 0.0f;
    if (squared) return 2.0f;
    return squared_distance < kCoincident ? 0.0f : 1.0f / std::sqrt(squared_distance);
  }
};

std::tuple<Tensor, Tensor, Tensor> hypersphere(const Tensor& features_given, const Tensor& bank_given,
                                               int64_t k, double r, int64_t distance_power) {
  check_hypersphere(features_given, bank_given, k, r, distance_power);
  const Tensor features = in_order("hypersphere", "features", features_given);
  const Tensor bank = in_order("hypersphere", "bank", bank_given);
  // The neighbours are the same in both precisions.
  auto [distances, indices] = knn(features, bank, k, "bf16");
  const Hinge hinge{static_cast<float>(r * r), distance_power == 2};
  const int64_t count = features.size(0) * k;
  const int64_t blocks = divide_up(count, kBlock);
  const float* squared = distances.const_data_ptr<float>();
  std::vector<double> sums(static_cast<size_t>(blocks));
  torch::stable::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      double sum = 0.0;
      for (int64_t i = block * kBlock; i < std::min(count, (block + 1) * kBlock); ++i) {
        sum += hinge.loss(squared[i]);
      }
      sums[static_cast<size_t>(block)] = sum;
    }
  });
  double sum = 0.0;
  for (const double part : sums) sum += part;
  Tensor loss = torch::stable::new_empty(features, {});
  // The mean of nothing is NaN, as in PyTorch.
  *loss.mutable_data_ptr<float>() = static_cast<float>(sum / static_cast<double>(count));
  return {loss, distances, indices};
}

Tensor hypersphere_backward(const Tensor& grad, const Tensor& features_given, const Tensor& bank_given,
                            const Tensor& distances_given, const Tensor& indices_given, double r,
                            int64_t distance_power) {
  check_hypersphere_backward(grad, features_given, bank_given, distances_given, indices_given,
                             distance_power);
  const Tensor features = in_order("hypersphere_backward", "features", features_given);
  const Tensor bank = in_order("hypersphere_backward", "bank", bank_given);
  const Tensor distances = in_order("hypersphere_backward", "distances", distances_given);
  const Tensor indices = in_order("hypersphere_backward", "indices", indices_given);
  const int64_t width = features.size(1);
  const int64_t k = distances.size(1);
  // No row outside of the bank is ever read, whoever calls the operator.
  const int64_t* rows = indices.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < indices.numel(); ++i) {
    check(rows[i] >= 0 && rows[i] < bank.size(0), "hypersphere_backward: indices must be rows of bank, got ",
          rows[i]);
  }
  Tensor gradient = torch::stable::new_empty(features, {features.size(0), width});
  const Hinge hinge{static_cast<float>(r * r), distance_power == 2};
  const HypersphereKernel& kernel = PYDEFECT_ACTIVE_KERNEL(hypersphere_kernel);
  const float scale =
      *grad.const_data_ptr<float>() / static_cast<float>(std::max<int64_t>(features.size(0) * k, 1));
  const float* from = features.const_data_ptr<float>();
  const float* centres = bank.const_data_ptr<float>();
  const float* squared = distances.const_data_ptr<float>();
  float* to = gradient.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, features.size(0), 64, [&](int64_t begin, int64_t end) {
    std::vector<float> weights(static_cast<size_t>(k));
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t j = 0; j < k; ++j) {
        weights[static_cast<size_t>(j)] = scale * hinge.weight(squared[row * k + j]);
      }
      kernel.pull(from + row * width, centres, width, rows + row * k, weights.data(), k, to + row * width);
    }
  });
  return gradient;
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, CPU, library) {
  library.impl("hypersphere", TORCH_BOX(&hypersphere));
  library.impl("hypersphere_backward", TORCH_BOX(&hypersphere_backward));
}

}  // namespace
}  // namespace pydefect::cpu
