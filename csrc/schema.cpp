// The schema of every operator, once. Backends add their kernels with STABLE_TORCH_LIBRARY_IMPL.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pydefect, library) {
  library.def("knn(Tensor queries, Tensor bank, int k) -> (Tensor distances, Tensor indices)");
}
