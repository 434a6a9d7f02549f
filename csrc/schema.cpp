// The schema of every operator, once. Backends add their kernels with STABLE_TORCH_LIBRARY_IMPL.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pydefect, library) {
  library.def("knn(Tensor queries, Tensor bank, int k) -> (Tensor distances, Tensor indices)");
  library.def(
      "relaxed_contrastive(Tensor z, Tensor z_target, Tensor neighbors, float alpha, float sigma, float "
      "margin, "
      "int similarity_power, bool cross, bool mean) -> (Tensor loss, Tensor inverse_means, Tensor slopes)");
  library.def(
      "relaxed_contrastive_backward(Tensor grad, Tensor z, Tensor z_target, Tensor neighbors, Tensor "
      "inverse_means, "
      "Tensor slopes, float alpha, float sigma, float margin, int similarity_power, bool cross, bool mean) "
      "-> "
      "Tensor");
}
