// Greedy k-centre on the CPU: m points, each the farthest from those chosen before it, without a table of
// distances. Every distance is KnnKernel::squared_distance's, so the choice is that of measuring every pair.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../checks.h"
#include "farthest_first.h"

namespace pydefect::cpu {
namespace {

Tensor kcenter_greedy(const Tensor& features_given, int64_t m) {
  check_kcenter_greedy(features_given, m);
  const Tensor features = in_order("kcenter_greedy", "features", features_given);
  Tensor chosen = torch::stable::new_empty(features, {m}, torch::headeronly::ScalarType::Long);
  FarthestFirst(row_pointers(features), features.size(1), m, chosen.mutable_data_ptr<int64_t>()).run();
  return chosen;
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, CPU, library) {
  library.impl("kcenter_greedy", TORCH_BOX(&kcenter_greedy));
}

}  // namespace
}  // namespace pydefect::cpu
