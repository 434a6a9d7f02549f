// The argument checks of every operator, once: first what several share, then by operation in alphabetical
// order. They read shapes and settings, never a tensor's elements, which may lie on another device. A failed
// check throws std::runtime_error, which PyTorch turns into a RuntimeError; the message names the argument,
// what was given and what is allowed.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <charconv>
#include <cmath>
#include <cstdint>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace pydefect {

using torch::stable::Tensor;

// Numbers look the same in every locale: no separators, and the fewest digits that read back.
template <typename Part>
void append(std::string& text, const Part& part) {
  if constexpr (std::is_arithmetic_v<Part>) {
    char digits[32];  // the longest double has 24
    text.append(digits, std::to_chars(digits, digits + sizeof(digits), part).ptr);
  } else {
    text += std::string_view(part);
  }
}

// STD_TORCH_CHECK would put the source file's path on the build machine into the user's message.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::string message;
  (append(message, parts), ...);
  throw std::runtime_error(message);
}

// The tensor with its elements in order, itself where they are. An expanded tensor can be larger than any
// memory, and of PyTorch's own message only a macro's text comes through the stable ABI.
inline Tensor in_order(const char* op, const std::string& name, const Tensor& tensor,
                       torch::headeronly::MemoryFormat format = torch::headeronly::MemoryFormat::Contiguous) {
  try {
    return torch::stable::contiguous(tensor, format);
  } catch (const std::exception&) {
    check(false, op, ": ", name, " is not contiguous and its copy, ", tensor.numel(),
          " elements, does not fit into memory");
    throw;
  }
}

inline bool is_float(const Tensor& tensor) {
  return tensor.scalar_type() == torch::headeronly::ScalarType::Float;
}

inline void check_float_matrix(const char* op, const char* name, const Tensor& tensor) {
  check(tensor.dim() == 2, op, ": ", name, " must have 2 dimensions, got ", tensor.dim());
  check(tensor.scalar_type() == torch::headeronly::ScalarType::Float, op, ": ", name,
        " must be float32, got ", torch::headeronly::toString(tensor.scalar_type()),
        "; convert it with .float()");
}

// A tensor of another device would be read at an address that is none there.
template <typename... Tensors>
void check_one_device(const char* op, const Tensor& first, const Tensors&... others) {
  check(((others.device() == first.device()) && ...), op, ": all tensors must be on one device");
}

// Lets kernels count rows and columns, a tile past the end included, in 32 bits.
constexpr int64_t kDimensionLimit = int64_t{1} << 30;

// At least one row of at least one element, few enough to count in 32 bits.
inline void check_points(const char* op, const char* name, const Tensor& tensor) {
  check_float_matrix(op, name, tensor);
  check(tensor.size(0) >= 1, op, ": ", name, " must have at least 1 row, got 0");
  check(tensor.size(1) >= 1, op, ": ", name, " must have a width of at least 1, got 0");
  check(tensor.size(0) < kDimensionLimit && tensor.size(1) < kDimensionLimit, op, ": ", name,
        " must have fewer than 2^30 rows and columns, got ", tensor.size(0), " and ", tensor.size(1));
}

// The maps of the reunion and fusion modules are [images, height, width, channels] here: channels_last.
inline void check_map(const char* op, const char* name, const Tensor& tensor) {
  check(tensor.dim() == 4, op, ": ", name, " must have 4 dimensions, got ", tensor.dim());
  check(tensor.scalar_type() == torch::headeronly::ScalarType::Float, op, ": ", name,
        " must be float32, got ", torch::headeronly::toString(tensor.scalar_type()));
  check(tensor.size(1) >= 1 && tensor.size(2) >= 1 && tensor.size(3) >= 1, op, ": ", name,
        " must have a height, a width and channels of at least 1, got ", tensor.size(1), ", ", tensor.size(2),
        " and ", tensor.size(3));
}

inline void check_same_map(const char* op, const char* name, const Tensor& tensor, const char* like_name,
                           const Tensor& like) {
  check_map(op, name, tensor);
  for (int64_t d = 0; d < 4; ++d) {
    check(tensor.size(d) == like.size(d), op, ": ", name, " must have the shape of ", like_name, ", size ",
          like.size(d), " in dimension ", d, ", got ", tensor.size(d));
  }
}

inline void check_parameter(const char* op, const char* name, const Tensor& tensor, int64_t rows,
                            int64_t columns) {
  check(tensor.scalar_type() == torch::headeronly::ScalarType::Float, op, ": ", name,
        " must be float32, got ", torch::headeronly::toString(tensor.scalar_type()));
  check(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, op, ": ", name,
        " must have the shape [", rows, ", ", columns, "]");
}

inline void check_parameter(const char* op, const char* name, const Tensor& tensor, int64_t length) {
  check(tensor.scalar_type() == torch::headeronly::ScalarType::Float, op, ": ", name,
        " must be float32, got ", torch::headeronly::toString(tensor.scalar_type()));
  check(tensor.dim() == 1 && tensor.size(0) == length, op, ": ", name, " must have the shape [", length, "]");
}

// The rows of the reducing layer of a channel attention.
inline int64_t reduced_width(const char* op, const Tensor& reduce_weight) {
  check(reduce_weight.dim() == 2, op, ": reduce_weight must have 2 dimensions, got ", reduce_weight.dim());
  return reduce_weight.size(0);
}

inline void check_assign_unique(const Tensor& bank, const Tensor& patches, const Tensor& candidates) {
  check_float_matrix("assign_unique", "bank", bank);
  check_points("assign_unique", "patches", patches);
  check(bank.device() == patches.device() && bank.device() == candidates.device(),
        "assign_unique: bank, patches and candidates must be on one device");
  check(bank.size(1) == patches.size(1), "assign_unique: bank must have the width of patches, ",
        patches.size(1), ", got ", bank.size(1));
  check(bank.size(0) <= patches.size(0), "assign_unique: bank must have at most one row for each of the ",
        patches.size(0), " patches, got ", bank.size(0));
  check(candidates.scalar_type() == torch::headeronly::ScalarType::Long && candidates.dim() == 2 &&
            candidates.size(0) == bank.size(0),
        "assign_unique: candidates must be int64 with one row for each row of bank");
}

inline void check_channel_reunion(const Tensor& features, const Tensor& direction, const Tensor& offset,
                                  const Tensor& reduce_weight, const Tensor& reduce_bias,
                                  const Tensor& expand_weight, const Tensor& expand_bias) {
  const char* const op = "channel_reunion";
  check_map(op, "features", features);
  const int64_t channels = features.size(3);
  const int64_t reduced = reduced_width(op, reduce_weight);
  check_parameter(op, "direction", direction, channels);
  check_parameter(op, "offset", offset, 1);
  check_parameter(op, "reduce_weight", reduce_weight, reduced, channels);
  check_parameter(op, "reduce_bias", reduce_bias, reduced);
  check_parameter(op, "expand_weight", expand_weight, channels, reduced);
  check_parameter(op, "expand_bias", expand_bias, channels);
  check_one_device(op, features, direction, offset, reduce_weight, reduce_bias, expand_weight, expand_bias);
}

inline void check_channel_reunion_backward(const Tensor& d_output, const Tensor& features,
                                           const Tensor& direction, const Tensor& reduce_weight,
                                           const Tensor& expand_weight, const Tensor& weights,
                                           const Tensor& pooled, const Tensor& hidden, const Tensor& gate) {
  const char* const op = "channel_reunion_backward";
  check_map(op, "features", features);
  check_same_map(op, "d_output", d_output, "features", features);
  const int64_t images = features.size(0);
  const int64_t channels = features.size(3);
  const int64_t reduced = reduced_width(op, reduce_weight);
  check_parameter(op, "direction", direction, channels);
  check_parameter(op, "reduce_weight", reduce_weight, reduced, channels);
  check_parameter(op, "expand_weight", expand_weight, channels, reduced);
  check_parameter(op, "weights", weights, images, features.size(1) * features.size(2));
  check_parameter(op, "pooled", pooled, images, channels);
  check_parameter(op, "hidden", hidden, images, reduced);
  check_parameter(op, "gate", gate, images, channels);
  check_one_device(op, features, d_output, direction, reduce_weight, expand_weight, weights, pooled, hidden,
                   gate);
}

// Of a convolution's weights: 6 x 6 numbers for each pair of channels, in blocks of 16 channels of the input
// and panels of 32 of the output.
constexpr int64_t kTileNumberCount = 36;
constexpr int64_t kTileDepth = 16;
constexpr int64_t kTileColumns = 32;

inline void check_convolution_tiles(const Tensor& weight) {
  const char* op = "convolution_tiles";
  check(weight.dim() == 4, op, ": weight must have 4 dimensions, got ", weight.dim());
  check(is_float(weight), op, ": weight must be float32, got ",
        torch::headeronly::toString(weight.scalar_type()));
  check(weight.size(2) == weight.size(3) && (weight.size(2) == 3 || weight.size(2) == 4), op,
        ": weight must have kernels of 3 x 3 or 4 x 4, got ", weight.size(2), " x ", weight.size(3));
  check(weight.size(0) >= 1 && weight.size(1) >= 1, op, ": weight must have at least 1 channel, got ",
        weight.size(0), " and ", weight.size(1));
}

// By how much the output's sides differ from the maps'.
inline int64_t check_convolution_sides(const char* op, const Tensor& maps, int64_t kernel, int64_t padding) {
  check_map(op, "maps", maps);
  check(kernel == 3 || kernel == 4, op, ": kernel must be 3 or 4, got ", kernel);
  check(padding >= 0 && padding < kernel, op, ": padding must be between 0 and ", kernel - 1, ", got ",
        padding);
  const int64_t grown = 2 * padding - kernel + 1;
  for (int64_t d = 1; d < 3; ++d) {
    check(maps.size(d) < kDimensionLimit, op, ": maps must have fewer than 2^30 rows and columns, got ",
          maps.size(1), " and ", maps.size(2));
    check(maps.size(d) + grown >= 1, op, ": maps must have a height and a width of at least ", 1 - grown,
          ", got ", maps.size(1), " and ", maps.size(2));
  }
  return grown;
}

inline void check_convolution(const Tensor& maps, const Tensor& tiles, const Tensor& bias,
                              const std::optional<Tensor>& residual, int64_t kernel, int64_t padding) {
  const char* op = "convolution";
  const int64_t grown = check_convolution_sides(op, maps, kernel, padding);
  check(bias.dim() == 1 && bias.size(0) >= 1, op, ": bias must have 1 dimension and at least 1 value");
  check_parameter(op, "bias", bias, bias.size(0));
  const int64_t panels = (bias.size(0) + kTileColumns - 1) / kTileColumns;
  const int64_t depth = (maps.size(3) + kTileDepth - 1) / kTileDepth * kTileDepth;
  check(tiles.dim() == 4 && is_float(tiles) && tiles.size(0) == panels && tiles.size(1) == kTileNumberCount &&
            tiles.size(2) == depth && tiles.size(3) == kTileColumns,
        op, ": tiles must be float32 and have the shape [", panels, ", ", kTileNumberCount, ", ", depth, ", ",
        kTileColumns, "], which convolution_tiles gives them");
  check_one_device(op, maps, tiles, bias);
  if (residual) {
    check_map(op, "residual", *residual);
    check(residual->size(0) == maps.size(0) && residual->size(1) == maps.size(1) + grown &&
              residual->size(2) == maps.size(2) + grown && residual->size(3) == bias.size(0),
          op, ": residual must have the shape of the output, [", maps.size(0), ", ", maps.size(1) + grown,
          ", ", maps.size(2) + grown, ", ", bias.size(0), "]");
    check_one_device(op, maps, *residual);
  }
}

inline void check_convolution_weight_gradient(const Tensor& gradient, const Tensor& maps, int64_t kernel,
                                              int64_t padding) {
  const char* op = "convolution_weight_gradient";
  const int64_t grown = check_convolution_sides(op, maps, kernel, padding);
  check_map(op, "gradient", gradient);
  check(gradient.size(0) == maps.size(0) && gradient.size(1) == maps.size(1) + grown &&
            gradient.size(2) == maps.size(2) + grown,
        op, ": gradient must have the shape of the output, [", maps.size(0), ", ", maps.size(1) + grown, ", ",
        maps.size(2) + grown, ", O]");
  check_one_device(op, gradient, maps);
}

inline void check_hypersphere(const Tensor& features, const Tensor& bank, int64_t k, double r,
                              int64_t distance_power) {
  check_float_matrix("hypersphere", "features", features);
  check_float_matrix("hypersphere", "bank", bank);
  check(features.device() == bank.device(), "hypersphere: features and bank must be on one device");
  check(features.size(1) >= 1, "hypersphere: features must have a width of at least 1, got 0");
  check(features.size(1) == bank.size(1), "hypersphere: bank must have the width of features, ",
        features.size(1), ", got ", bank.size(1));
  check(bank.size(0) >= 1, "hypersphere: bank must have at least 1 row, got 0");
  check(bank.size(0) < kDimensionLimit && bank.size(1) < kDimensionLimit,
        "hypersphere: bank must have fewer than 2^30 rows and columns, got ", bank.size(0), " and ",
        bank.size(1));
  check(k >= 1 && k <= bank.size(0), "hypersphere: k must be between 1 and the ", bank.size(0),
        " rows of bank, got ", k);
  check(r >= 0.0 && std::isfinite(r), "hypersphere: r must be a finite number of at least 0, got ", r);
  check(distance_power == 1 || distance_power == 2, "hypersphere: distance_power must be 1 or 2, got ",
        distance_power);
}

// `distances` and `indices` are those that `hypersphere` returned. Whether the indices are rows of the bank
// is for the backend to see: this reads no tensor's elements.
inline void check_hypersphere_backward(const Tensor& grad, const Tensor& features, const Tensor& bank,
                                       const Tensor& distances, const Tensor& indices,
                                       int64_t distance_power) {
  check_float_matrix("hypersphere_backward", "distances", distances);
  check_hypersphere(features, bank, distances.size(1), 0.0, distance_power);
  check(grad.dim() == 0 && grad.scalar_type() == torch::headeronly::ScalarType::Float,
        "hypersphere_backward: grad must be a float32 scalar");
  check(indices.dim() == 2 && indices.scalar_type() == torch::headeronly::ScalarType::Long,
        "hypersphere_backward: indices must be an int64 matrix");
  check(distances.size(0) == features.size(0) && indices.size(0) == features.size(0) &&
            indices.size(1) == distances.size(1),
        "hypersphere_backward: distances and indices must have one row for each of features");
  check_one_device("hypersphere_backward", features, grad, distances, indices);
}

inline void check_kcenter_greedy(const Tensor& features, int64_t m) {
  check_points("kcenter_greedy", "features", features);
  check(m >= 1 && m <= features.size(0), "kcenter_greedy: m must be between 1 and the ", features.size(0),
        " rows of features, got ", m);
}

inline void check_kcenter_reduce(const Tensor& centres, const Tensor& added, int64_t m,
                                 const std::optional<Tensor>& distances) {
  check_points("kcenter_reduce", "centres", centres);
  check_float_matrix("kcenter_reduce", "added", added);
  check(centres.device() == added.device(), "kcenter_reduce: centres and added must be on one device");
  check(added.size(1) == centres.size(1), "kcenter_reduce: added must have the width of centres, ",
        centres.size(1), ", got ", added.size(1));
  const int64_t points = centres.size(0) + added.size(0);
  check(points < kDimensionLimit, "kcenter_reduce: centres and added must have fewer than 2^30 rows, got ",
        points);
  check(m >= 1 && m <= points, "kcenter_reduce: m must be between 1 and the ", points,
        " rows of centres and added, got ", m);
  if (!distances) return;
  check_float_matrix("kcenter_reduce", "distances", *distances);
  check(centres.device() == distances->device(),
        "kcenter_reduce: centres and distances must be on one device");
  check(distances->size(0) == centres.size(0) && distances->size(1) == centres.size(0),
        "kcenter_reduce: distances must be ", centres.size(0), " x ", centres.size(0), ", got ",
        distances->size(0), " x ", distances->size(1));
}

inline void check_knn(const Tensor& queries, const Tensor& bank, int64_t k, const std::string& precision) {
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
  check(precision == "float32" || precision == "bf16", "knn: precision must be 'float32' or 'bf16', got '",
        precision, "'");
}

inline std::string level_name(size_t index) {
  return "levels[" + std::to_string(index) + "]";
}

inline void check_levels(const char* op, const std::vector<Tensor>& levels) {
  using torch::headeronly::ScalarType;
  check(!levels.empty(), op, ": levels must hold at least 1 tensor, got none");
  for (size_t i = 0; i < levels.size(); ++i) {
    const Tensor& level = levels[i];
    const ScalarType type = level.scalar_type();
    check(level.dim() == 4, op, ": ", level_name(i), " must have 4 dimensions, got ", level.dim());
    check(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op, ": ",
          level_name(i), " must be float32, bfloat16 or float16, got ", torch::headeronly::toString(type));
    check(level.size(0) == levels[0].size(0), op, ": ", level_name(i),
          " must have the batch size of levels[0], ", levels[0].size(0), ", got ", level.size(0));
    for (int64_t dimension = 1; dimension < 4; ++dimension) {
      check(level.size(dimension) >= 1 && level.size(dimension) < kDimensionLimit, op, ": ", level_name(i),
            " must have between 1 and 2^30 channels, rows and columns, got ", level.size(1), ", ",
            level.size(2), " and ", level.size(3));
    }
    check(level.device() == levels[0].device(), op, ": all tensors must be on one device");
  }
}

inline int64_t projection_inputs(const std::vector<Tensor>& levels) {
  int64_t inputs = 2;
  for (const Tensor& level : levels) inputs += level.size(1);
  return inputs;
}

inline void check_project_levels(const std::vector<Tensor>& levels, const Tensor& weight,
                                 const std::optional<Tensor>& bias) {
  check_levels("project_levels", levels);
  check_float_matrix("project_levels", "weight", weight);
  check(weight.device() == levels[0].device(), "project_levels: all tensors must be on one device");
  check(weight.size(0) >= 1, "project_levels: weight must have at least 1 row, got 0");
  check(weight.size(1) == projection_inputs(levels),
        "project_levels: weight must have a column for each of the levels' channels and 2 for the "
        "coordinates, ",
        projection_inputs(levels), ", got ", weight.size(1));
  if (!bias) return;
  check(bias->dim() == 1 && bias->size(0) == weight.size(0), "project_levels: bias must have the shape [",
        weight.size(0), "]");
  check(bias->scalar_type() == torch::headeronly::ScalarType::Float,
        "project_levels: bias must be float32, got ", torch::headeronly::toString(bias->scalar_type()));
  check(bias->device() == weight.device(), "project_levels: all tensors must be on one device");
}

// The gradient of what project_levels returns: [B, pixels, D].
inline void check_output_gradient(const char* op, const Tensor& gradient) {
  check(gradient.dim() == 3, op, ": gradient must have 3 dimensions, got ", gradient.dim());
  check(gradient.scalar_type() == torch::headeronly::ScalarType::Float, op,
        ": gradient must be float32, got ", torch::headeronly::toString(gradient.scalar_type()));
  check(gradient.size(2) >= 1 && gradient.size(2) < kDimensionLimit, op,
        ": gradient must have a width between 1 and 2^30, got ", gradient.size(2));
}

inline void check_project_levels_weight_gradient(const Tensor& gradient, const std::vector<Tensor>& levels) {
  const char* const op = "project_levels_weight_gradient";
  check_levels(op, levels);
  check_output_gradient(op, gradient);
  check(gradient.device() == levels[0].device(), op, ": all tensors must be on one device");
  const int64_t pixels = levels[0].size(2) * levels[0].size(3);
  check(gradient.size(0) == levels[0].size(0) && gradient.size(1) == pixels, op,
        ": gradient must have the batch size and the pixels of levels[0], ", levels[0].size(0), " and ",
        pixels, ", got ", gradient.size(0), " and ", gradient.size(1));
}

inline void check_project_levels_level_gradient(const Tensor& gradient, const Tensor& weight, int64_t height,
                                                int64_t width, int64_t level_height, int64_t level_width) {
  const char* const op = "project_levels_level_gradient";
  check_output_gradient(op, gradient);
  check_float_matrix(op, "weight", weight);
  check(gradient.device() == weight.device(), op, ": all tensors must be on one device");
  check(weight.size(0) == gradient.size(2) && weight.size(1) >= 1, op,
        ": weight must have the gradient's width of rows, ", gradient.size(2),
        ", and at least 1 column, got ", weight.size(0), " and ", weight.size(1));
  for (const int64_t size : {height, width, level_height, level_width}) {
    check(size >= 1 && size < kDimensionLimit, op, ": grid sizes must be between 1 and 2^30, got ", size);
  }
  check(gradient.size(1) == height * width, op, ": gradient must have height * width pixels, ",
        height * width, ", got ", gradient.size(1));
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

// What the backward pass takes beside the forward one's arguments.
inline void check_relaxed_contrastive_backward(const Tensor& grad, const Tensor& z,
                                               const Tensor& inverse_means, const Tensor& slopes) {
  for (const Tensor& saved : {inverse_means, slopes}) {
    check(saved.dim() == 1 && saved.size(0) == z.size(0) &&
              saved.scalar_type() == torch::headeronly::ScalarType::Float,
          "relaxed_contrastive_backward: inverse_means and slopes must be those that relaxed_contrastive "
          "returned");
  }
  check(grad.numel() == 1 && grad.scalar_type() == torch::headeronly::ScalarType::Float,
        "relaxed_contrastive_backward: grad must be one float32");
  check_one_device("relaxed_contrastive_backward", z, grad, inverse_means, slopes);
}

// The side of maps behind the pooling of 2 x 2 cells, `padding` of them added before and after.
constexpr int64_t halved(int64_t side, int64_t padding) {
  return (side + 2 * padding) / 2;
}

// Maps are [images, height, width, channels] here, as for the modules above, of float32 or bfloat16.
inline void check_relu_avg_pool(const Tensor& maps, int64_t padding) {
  const char* op = "relu_avg_pool";
  check(maps.dim() == 4, op, ": maps must have 4 dimensions, got ", maps.dim());
  check(is_float(maps) || maps.scalar_type() == torch::headeronly::ScalarType::BFloat16, op,
        ": maps must be float32 or bfloat16, got ", torch::headeronly::toString(maps.scalar_type()));
  check(padding == 0 || padding == 1, op, ": padding must be 0 or 1, got ", padding);
  check(maps.size(3) >= 1, op, ": maps must have at least 1 channel, got 0");
  const int64_t smallest = 2 - 2 * padding < 1 ? 1 : 2 - 2 * padding;
  check(maps.size(1) >= smallest && maps.size(2) >= smallest, op,
        ": maps must have a height and a width of at least ", smallest, ", got ", maps.size(1), " and ",
        maps.size(2));
}

inline void check_relu_avg_pool_backward(const Tensor& d_output, const Tensor& maps, int64_t padding) {
  const char* op = "relu_avg_pool_backward";
  check_relu_avg_pool(maps, padding);
  check(d_output.dim() == 4 && d_output.size(0) == maps.size(0) &&
            d_output.size(1) == halved(maps.size(1), padding) &&
            d_output.size(2) == halved(maps.size(2), padding) && d_output.size(3) == maps.size(3),
        op, ": d_output must have the shape of the output");
  check(d_output.scalar_type() == maps.scalar_type() && d_output.device() == maps.device(), op,
        ": d_output must have the type and the device of maps");
}

// A Gaussian of this many pixels flattens any image; its width still fits every integer.
constexpr double kSigmaLimit = 1 << 20;

inline void check_score_maps(const Tensor& distances, int64_t height, int64_t width, double sigma) {
  check(distances.dim() == 4, "score_maps: distances must have 4 dimensions, got ", distances.dim());
  check(distances.scalar_type() == torch::headeronly::ScalarType::Float,
        "score_maps: distances must be float32, got ", torch::headeronly::toString(distances.scalar_type()));
  for (int64_t dimension = 1; dimension < 4; ++dimension) {
    check(distances.size(dimension) >= 1 && distances.size(dimension) < kDimensionLimit,
          "score_maps: distances must have between 1 and 2^30 rows, columns and neighbours, got ",
          distances.size(1), ", ", distances.size(2), " and ", distances.size(3));
  }
  check(height >= 1 && height < kDimensionLimit && width >= 1 && width < kDimensionLimit,
        "score_maps: size must be between 1 and 2^30 pixels each way, got ", height, " and ", width);
  check(sigma >= 0.0 && sigma < kSigmaLimit, "score_maps: sigma must be between 0 and 2^20 pixels, got ",
        sigma);
}

inline void check_selective_fusion(const Tensor& first, const Tensor& second, const Tensor& reduce_weight,
                                   const Tensor& reduce_bias, const Tensor& first_weight,
                                   const Tensor& first_bias, const Tensor& second_weight,
                                   const Tensor& second_bias) {
  const char* const op = "selective_fusion";
  check_map(op, "first", first);
  check_same_map(op, "second", second, "first", first);
  const int64_t channels = first.size(3);
  const int64_t reduced = reduced_width(op, reduce_weight);
  check_parameter(op, "reduce_weight", reduce_weight, reduced, channels);
  check_parameter(op, "reduce_bias", reduce_bias, reduced);
  check_parameter(op, "first_weight", first_weight, channels, reduced);
  check_parameter(op, "first_bias", first_bias, channels);
  check_parameter(op, "second_weight", second_weight, channels, reduced);
  check_parameter(op, "second_bias", second_bias, channels);
  check_one_device(op, first, second, reduce_weight, reduce_bias, first_weight, first_bias, second_weight,
                   second_bias);
}

inline void check_selective_fusion_backward(const Tensor& d_fused_first, const Tensor& d_fused_second,
                                            const Tensor& first, const Tensor& second,
                                            const Tensor& reduce_weight, const Tensor& first_weight,
                                            const Tensor& second_weight, const Tensor& pooled,
                                            const Tensor& hidden, const Tensor& share) {
  const char* const op = "selective_fusion_backward";
  check_map(op, "first", first);
  check_same_map(op, "second", second, "first", first);
  check_same_map(op, "d_fused_first", d_fused_first, "first", first);
  check_same_map(op, "d_fused_second", d_fused_second, "first", first);
  const int64_t images = first.size(0);
  const int64_t channels = first.size(3);
  const int64_t reduced = reduced_width(op, reduce_weight);
  check_parameter(op, "reduce_weight", reduce_weight, reduced, channels);
  check_parameter(op, "first_weight", first_weight, channels, reduced);
  check_parameter(op, "second_weight", second_weight, channels, reduced);
  check_parameter(op, "pooled", pooled, images, channels);
  check_parameter(op, "hidden", hidden, images, reduced);
  check_parameter(op, "share", share, images, channels);
  check_one_device(op, first, second, d_fused_first, d_fused_second, reduce_weight, first_weight,
                   second_weight, pooled, hidden, share);
}

inline void check_spatial_reunion_maps(const char* op, const Tensor& features, const Tensor& local,
                                       const Tensor& coarse, const Tensor& weight, int64_t normalisation) {
  check_map(op, "features", features);
  check_same_map(op, "local", local, "features", features);
  check_map(op, "coarse", coarse);
  check(coarse.size(0) == features.size(0) && coarse.size(3) == features.size(3), op,
        ": coarse must have the images and channels of features, ", features.size(0), " and ",
        features.size(3), ", got ", coarse.size(0), " and ", coarse.size(3));
  check_parameter(op, "weight", weight, 9, features.size(3));
  check(normalisation >= 0 && normalisation <= 2, op,
        ": normalisation must be 0 (none), 1 (mean) or 2 (softmax), got ", normalisation);
}

inline void check_spatial_reunion(const Tensor& features, const Tensor& local, const Tensor& coarse,
                                  const Tensor& weight, const Tensor& bias, int64_t normalisation) {
  check_spatial_reunion_maps("spatial_reunion", features, local, coarse, weight, normalisation);
  check_parameter("spatial_reunion", "bias", bias, 1);
  check_one_device("spatial_reunion", features, local, coarse, weight, bias);
}

inline void check_spatial_reunion_backward(const Tensor& d_output, const Tensor& features,
                                           const Tensor& local, const Tensor& coarse, const Tensor& weight,
                                           const Tensor& attention, int64_t normalisation) {
  const char* const op = "spatial_reunion_backward";
  check_spatial_reunion_maps(op, features, local, coarse, weight, normalisation);
  check_same_map(op, "d_output", d_output, "features", features);
  check_parameter(op, "attention", attention, features.size(0), features.size(1) * features.size(2));
  check_one_device(op, features, d_output, local, coarse, weight, attention);
}

}  // namespace pydefect
