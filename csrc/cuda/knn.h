// The k-NN search for other operations on CUDA.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <tuple>

namespace pydefect::cuda {

// The most neighbours that the kernels can list.
constexpr int kMostNeighbours = 64;

std::tuple<torch::stable::Tensor, torch::stable::Tensor> knn(const torch::stable::Tensor& queries,  // [N, D]
                                                             const torch::stable::Tensor& bank,     // [M, D]
                                                             int64_t k, const std::string& precision);

}  // namespace pydefect::cuda
