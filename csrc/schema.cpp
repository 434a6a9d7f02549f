// The schema of every operator, once, in alphabetical order. Backends add their kernels with
// STABLE_TORCH_LIBRARY_IMPL.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pydefect, library) {
  library.def("assign_unique(Tensor bank, Tensor patches, Tensor candidates) -> Tensor");
  library.def(
      "channel_reunion(Tensor features, Tensor direction, Tensor offset, "
      "Tensor reduce_weight, Tensor reduce_bias, Tensor expand_weight, Tensor expand_bias) "
      "-> (Tensor output, Tensor weights, Tensor pooled, Tensor hidden, Tensor gate)");
  library.def(
      "channel_reunion_backward(Tensor d_output, Tensor features, Tensor direction, "
      "Tensor reduce_weight, Tensor expand_weight, "
      "Tensor weights, Tensor pooled, Tensor hidden, Tensor gate) "
      "-> (Tensor d_features, Tensor d_direction, Tensor d_offset, "
      "Tensor d_reduce_weight, Tensor d_reduce_bias, Tensor d_expand_weight, Tensor d_expand_bias)");
  library.def(
      "convolution(Tensor maps, Tensor tiles, Tensor bias, Tensor? residual, int kernel, int padding, "
      "bool relu) -> Tensor");
  library.def("convolution_tiles(Tensor weight) -> Tensor");
  library.def("convolution_weight_gradient(Tensor gradient, Tensor maps, int kernel, int padding) -> Tensor");
  library.def(
      "hypersphere(Tensor features, Tensor bank, int k, float r, int distance_power) "
      "-> (Tensor loss, Tensor distances, Tensor indices)");
  library.def(
      "hypersphere_backward(Tensor grad, Tensor features, Tensor bank, Tensor distances, Tensor indices, "
      "float r, int distance_power) -> Tensor");
  library.def("kcenter_greedy(Tensor features, int m) -> Tensor");
  library.def(
      "kcenter_reduce(Tensor centres, Tensor added, int m, Tensor? distances) "
      "-> (Tensor chosen, Tensor squared_radius, Tensor chosen_distances)");
  library.def(
      "knn(Tensor queries, Tensor bank, int k, *, str precision=\"float32\") "
      "-> (Tensor distances, Tensor indices)");
  library.def("project_levels(Tensor[] levels, Tensor weight, Tensor? bias, bool pool) -> Tensor");
  library.def(
      "project_levels_level_gradient(Tensor gradient, Tensor weight, SymInt height, SymInt width, "
      "SymInt level_height, SymInt level_width) -> Tensor");
  library.def(
      "project_levels_weight_gradient(Tensor gradient, Tensor[] levels, bool pool) "
      "-> (Tensor weight, Tensor bias)");
  library.def(
      "relaxed_contrastive(Tensor z, Tensor z_target, Tensor neighbors, "
      "float alpha, float sigma, float margin, int similarity_power, bool cross, bool mean) "
      "-> (Tensor loss, Tensor inverse_means, Tensor slopes)");
  library.def(
      "relaxed_contrastive_backward(Tensor grad, Tensor z, Tensor z_target, Tensor neighbors, "
      "Tensor inverse_means, Tensor slopes, "
      "float alpha, float sigma, float margin, int similarity_power, bool cross, bool mean) -> Tensor");
  library.def("relu_avg_pool(Tensor maps, int padding) -> Tensor");
  library.def("relu_avg_pool_backward(Tensor d_output, Tensor maps, int padding) -> Tensor");
  library.def(
      "score_maps(Tensor distances, SymInt height, SymInt width, float sigma, bool certainty) "
      "-> (Tensor scores, Tensor maps)");
  library.def(
      "selective_fusion(Tensor first, Tensor second, Tensor reduce_weight, Tensor reduce_bias, "
      "Tensor first_weight, Tensor first_bias, Tensor second_weight, Tensor second_bias) "
      "-> (Tensor fused_first, Tensor fused_second, Tensor pooled, Tensor hidden, Tensor share)");
  library.def(
      "selective_fusion_backward(Tensor d_fused_first, Tensor d_fused_second, Tensor first, Tensor second, "
      "Tensor reduce_weight, Tensor first_weight, Tensor second_weight, "
      "Tensor pooled, Tensor hidden, Tensor share) "
      "-> (Tensor d_first, Tensor d_second, Tensor d_reduce_weight, Tensor d_reduce_bias, "
      "Tensor d_first_weight, Tensor d_first_bias, Tensor d_second_weight, Tensor d_second_bias)");
  library.def(
      "spatial_reunion(Tensor features, Tensor local, Tensor coarse, Tensor weight, Tensor bias, "
      "int normalisation) -> (Tensor output, Tensor attention)");
  library.def(
      "spatial_reunion_backward(Tensor d_output, Tensor features, Tensor local, Tensor coarse, "
      "Tensor weight, Tensor attention, int normalisation) "
      "-> (Tensor d_features, Tensor d_local, Tensor d_coarse, Tensor d_weight, Tensor d_bias)");
}
