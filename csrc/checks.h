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

inline void check_relaxed_contrastive(const Tensor& z, const Tensor& z_target, const Tensor& neighbors,
                                      double alpha, double sigma, double margin, int64_t similarity_power) {
  const char* op = "relaxed_contrastive";
  check_float_matrix(op, "z", z);
  check_float_matrix(op, "z_target", z_target);
  check(z.device() == z_target.device() && z.device() == neighbors.device(), op,
        ": z, z_target and neighbors must be on one device");
  check(z.size(0) >= 1 && z.size(1) >= 1, op, ": z must have at least 1 row and 1 column, got ", z.size(0),
        " x ", z.size(1));
  check(z_target.size(0) == z.size(0) && z_target.size(1) == z.size(1), op,
        ": z_target must have the shape of z, ", z.size(0), " x ", z.size(1), ", got ", z_target.size(0),
        " x ", z_target.size(1));
  check(z.size(0) < kDimensionLimit && z.size(1) < kDimensionLimit, op,
        ": z must have fewer than 2^30 rows and columns, got ", z.size(0), " x ", z.size(1));
  check(neighbors.dim() == 2 && neighbors.size(0) == z.size(0), op,
        ": neighbors must be a matrix with the rows of z");
  check(neighbors.scalar_type() == torch::headeronly::ScalarType::Long, op, ": neighbors must be int64, got ",
        torch::headeronly::toString(neighbors.scalar_type()));
  check(alpha >= 0 && alpha <= 1, op, ": alpha must be between 0 and 1, got ", alpha);
  check(sigma > 0, op, ": sigma must be over 0, got ", sigma);
  check(margin >= 0, op, ": margin must be 0 or more, got ", margin);
  check(similarity_power == 1 || similarity_power == 2, op, ": similarity_power must be 1 or 2, got ",
        similarity_power);
}

}  // namespace pydefect
