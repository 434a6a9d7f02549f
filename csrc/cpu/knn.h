// The search that operators built on nearest neighbours call.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>

namespace pydefect::cpu {

// The operator `knn` on the CPU: squared distances and rows of the bank.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> knn(const torch::stable::Tensor& queries,
                                                             const torch::stable::Tensor& bank, int64_t k,
                                                             const std::string& precision);

}  // namespace pydefect::cpu
