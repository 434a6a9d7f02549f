// Argument checks that every backend of an operator shares. A failed check throws std::runtime_error, which
// PyTorch turns into a RuntimeError; the message names the argument, what was given and what is allowed.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>

namespace pydefect {

using torch::stable::Tensor;

// STD_TORCH_CHECK would put the source file's path on the build machine into the user's message.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline void check_float_matrix(const char* op, const char* name, const Tensor& tensor) {
  check(tensor.dim() == 2, op, ": ", name, " must have 2 dimensions, got ", tensor.dim());
  check(tensor.scalar_type() == torch::headeronly::ScalarType::Float, op, ": ", name,
        " must be float32, got ", torch::headeronly::toString(tensor.scalar_type()),
        "; convert it with .float()");
}

// Lets kernels count rows and columns, a tile past the end included, in 32 bits.
constexpr int64_t kDimensionLimit = int64_t{1} << 30;

inline void check_knn(const Tensor& queries, const Tensor& bank, int64_t k) {
  check_float_matrix("knn", "queries", queries);
  check_float_matrix("knn", "bank", bank);
  check(queries.device() == bank.device(), "knn: queries and bank must be on one device");
  check(queries.size(1) >= 1, "knn: queries must have a width of at least 1, got 0");
  check(queries.size(1) == bank.size(1), "knn: bank must have the width of queries, ", queries.size(1),
        ", got ", bank.size(1));
  check(bank.size(0) >= 1, "knn: bank must have at least 1 row, got 0");
  check(bank.size(0) < kDimensionLimit && bank.size(1) < kDimensionLimit,
        "knn: bank must have fewer than 2^30 rows and columns, got ", bank.size(0), " and ", bank.size(1));
  check(k >= 1 && k <= bank.size(0), "knn: k must be between 1 and the ", bank.size(0), " rows of bank, got ",
        k);
}

}  // namespace pydefect
