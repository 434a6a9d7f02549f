// The hypersphere loss on CUDA: the search's own distances are the loss, so the forward pass reads no centre
// twice, and the backward pass makes a row's gradient in one go, without [N, k, D] temporaries.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>

#include "../checks.h"
#include "common.cuh"
#include "knn.h"
#include "reductions.cuh"

namespace pydefect::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostParts = 1024;
// Where a row lies this near to its centre (squared), the root's gradient is cut off.
constexpr float kCoincident = 1e-30f;

struct Hinge {
  float squared_radius;
  bool squared;  // distances enter squared

  // Not below zero; NaN stays.
  __device__ float loss(float squared_distance) const {
    const float nearest = squared_distance < kCoincident ? kCoincident : squared_distance;
    const float excess = (squared ? squared_distance : sqrtf(nearest)) - squared_radius;
    return excess <= 0.0f ? 0.0f : excess;
  }

  // d loss / d row = weight (row - centre).
  __device__ float weight(float squared_distance) const {
    if (loss(squared_distance) == 0.0f) return 0.0f;
    if (squared) return 2.0f;
    return squared_distance < kCoincident ? 0.0f : 1.0f / sqrtf(squared_distance);
  }
};

// Each block adds up a part of the distances.
__global__ void sum_losses(const float* distances, int64_t count, int64_t part, Hinge hinge,
                           double* sums) {  // [parts]
  const int64_t end = min((blockIdx.x + 1) * part, count);
  double sum = 0.0;
  for (int64_t i = blockIdx.x * part + threadIdx.x; i < end; i += kThreads) sum += hinge.loss(distances[i]);
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// One block. The mean of nothing is NaN, as in PyTorch.
__global__ void finish_loss(const double* sums,  // [parts]
                            int parts, double count,
                            float* loss) {  // one
  double sum = 0.0;
  for (int part = threadIdx.x; part < parts; part += kThreads) sum += sums[part];
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) *loss = static_cast<float>(sum / count);
}

// One warp a row: gradient = sum_j scale weight_j (row - centre_j).
__global__ void pull_rows(const float* grad,       // one
                          const float* features,   // [count, width]
                          const float* bank,       // [bank_rows, width]
                          const float* distances,  // [count, k]
                          const int64_t* indices,  // [count, k]
                          int64_t count, int64_t bank_rows, int width, int k, Hinge hinge, float share,
                          float* gradient) {  // [count, width]
  const float scale = *grad * share;
  const int64_t warps = int64_t{gridDim.x} * (kThreads / kWarp);
  for (int64_t row = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp; row < count;
       row += warps) {
    for (int d = threadIdx.x % kWarp; d < width; d += kWarp) {
      const float own = features[row * width + d];
      float sum = 0.0f;
      for (int j = 0; j < k; ++j) {
        const float weight = scale * hinge.weight(distances[row * k + j]);
        const int64_t centre = indices[row * k + j];
        // No row outside of the bank is ever read, whoever calls the operator; the host cannot look without
        // waiting.
        const float other = centre >= 0 && centre < bank_rows ? bank[centre * width + d] : NAN;
        sum += weight * (own - other);
      }
      gradient[row * width + d] = sum;
    }
  }
}

Hinge hinge_of(double r, int64_t distance_power) {
  return {static_cast<float>(r * r), distance_power == 2};
}

std::tuple<Tensor, Tensor, Tensor> hypersphere(const Tensor& features, const Tensor& bank, int64_t k,
                                               double r, int64_t distance_power) {
  check_hypersphere(features, bank, k, r, distance_power);
  const Device device(features);
  auto [distances, indices] = knn(features, bank, k, "float32");
  Tensor loss = new_floats(features, {});
  const int64_t count = features.size(0) * k;
  const int64_t part = std::max<int64_t>(divide_up(count, kMostParts), kThreads);
  const int parts = static_cast<int>(divide_up(count, part));
  const Tensor sums = new_of(features, {parts}, torch::headeronly::ScalarType::Double);
  if (parts > 0) {
    device.launch("hypersphere: sum_losses", sum_losses, parts, kThreads, 0,
                  distances.const_data_ptr<float>(), count, part, hinge_of(r, distance_power),
                  sums.mutable_data_ptr<double>());
  }
  device.launch("hypersphere: finish_loss", finish_loss, 1, kThreads, 0, sums.const_data_ptr<double>(), parts,
                static_cast<double>(count), loss.mutable_data_ptr<float>());
  return {loss, distances, indices};
}

Tensor hypersphere_backward(const Tensor& grad, const Tensor& features_given, const Tensor& bank_given,
                            const Tensor& distances_given, const Tensor& indices_given, double r,
                            int64_t distance_power) {
  check_hypersphere_backward(grad, features_given, bank_given, distances_given, indices_given,
                             distance_power);
  const Device device(features_given);
  const Tensor features = in_order("hypersphere_backward", "features", features_given);
  const Tensor bank = in_order("hypersphere_backward", "bank", bank_given);
  const Tensor distances = in_order("hypersphere_backward", "distances", distances_given);
  const Tensor indices = in_order("hypersphere_backward", "indices", indices_given);
  const int64_t count = features.size(0);
  const int64_t k = distances.size(1);
  Tensor gradient = new_floats(features, {count, features.size(1)});
  if (count == 0) return gradient;
  device.launch("hypersphere_backward: pull_rows", pull_rows,
                blocks_for(device, divide_up(count, kThreads / kWarp)), kThreads, 0,
                grad.const_data_ptr<float>(), features.const_data_ptr<float>(), bank.const_data_ptr<float>(),
                distances.const_data_ptr<float>(), indices.const_data_ptr<int64_t>(), count, bank.size(0),
                static_cast<int>(features.size(1)), static_cast<int>(k), hinge_of(r, distance_power),
                1.0f / static_cast<float>(count * k), gradient.mutable_data_ptr<float>());
  return gradient;
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, PYDEFECT_CUDA_KEY, library) {
  library.impl("hypersphere", TORCH_BOX(&hypersphere));
  library.impl("hypersphere_backward", TORCH_BOX(&hypersphere_backward));
}

}  // namespace
}  // namespace pydefect::cuda
