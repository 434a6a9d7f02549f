// One step of the streaming k-centre on the CPU: centres whose distances are known and new points are reduced
// to m points, each the farthest from those chosen before it. Every distance is
// KnnKernel::squared_distance's, so nothing depends on threads or instruction sets.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "dispatch.h"
#include "farthest_first.h"
#include "kernels/squared_distances.h"

namespace pydefect::cpu {
namespace {

// Rows and columns of the centres' table that a thread measures at a time.
constexpr int64_t kBlock = 64;

void measure_all(const SquaredDistancesKernel& kernel, const std::vector<const float*>& points, int64_t width,
                 float* table) {
  const int64_t count = static_cast<int64_t>(points.size());
  torch::stable::parallel_for(0, count, kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t column = 0; column < count; column += kBlock) {
      kernel.measure(points.data() + begin, end - begin, points.data() + column,
                     std::min(kBlock, count - column), width, table + begin * count + column, count);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> kcenter_reduce(const Tensor& centres_given, const Tensor& added_given,
                                                  int64_t m, const std::optional<Tensor>& distances_given) {
  check_kcenter_reduce(centres_given, added_given, m, distances_given);
  const SquaredDistancesKernel& kernel = PYDEFECT_ACTIVE_KERNEL(squared_distances_kernel);
  const Tensor centres = torch::stable::contiguous(centres_given);
  const Tensor added = torch::stable::contiguous(added_given);
  const int64_t width = centres.size(1);
  const int64_t old = centres.size(0);
  const int64_t count = old + added.size(0);
  std::vector<const float*> points = row_pointers(centres);
  const std::vector<const float*> new_points = row_pointers(added);
  points.insert(points.end(), new_points.begin(), new_points.end());

  Tensor chosen = torch::stable::new_empty(centres, {m}, torch::headeronly::ScalarType::Long);
  Tensor squared_radius = torch::stable::new_empty(centres, {});
  Tensor distances = torch::stable::new_empty(centres, {m, m});
  int64_t* const picks = chosen.mutable_data_ptr<int64_t>();

  if (added.size(0) > old) {
    // Known distances would save less than looking at few points saves.
    FarthestFirst search(points, width, m, picks);
    search.run();
    *squared_radius.mutable_data_ptr<float>() = search.squared_radius();
    std::vector<const float*> rows;
    for (int64_t i = 0; i < m; ++i) rows.push_back(points[static_cast<size_t>(picks[i])]);
    measure_all(kernel, rows, width, distances.mutable_data_ptr<float>());
    return {chosen, squared_radius, distances};
  }

  Tensor known = distances_given ? torch::stable::contiguous(*distances_given)
                                 : torch::stable::new_empty(centres, {old, old});
  if (!distances_given) measure_all(kernel, row_pointers(centres), width, known.mutable_data_ptr<float>());

  // One line a chosen point: its distances to all points.
  const Tensor lines = torch::stable::new_empty(centres, {m, count});
  float* const line = lines.mutable_data_ptr<float>();
  std::vector<float> nearest(static_cast<size_t>(count), std::numeric_limits<float>::infinity());
  const int64_t grain = std::max<int64_t>(1, kElementsAThread / width);
  int64_t point = 0;
  for (int64_t step = 0; step < m; ++step) {
    picks[step] = point;
    float* const to = line + step * count;
    int64_t first = 0;
    if (point < old) {
      const float* from = known.const_data_ptr<float>() + point * old;
      std::copy(from, from + old, to);
      first = old;
    }
    torch::stable::parallel_for(first, count, grain, [&](int64_t begin, int64_t end) {
      kernel.measure(points.data() + point, 1, points.data() + begin, end - begin, width, to + begin, count);
    });
    // Below every distance: never lowered and never the farthest while another is left.
    nearest[static_cast<size_t>(point)] = -1.0f;
    point = kernel.lower(nearest.data(), to, count);
  }
  *squared_radius.mutable_data_ptr<float>() = std::max(0.0f, nearest[static_cast<size_t>(point)]);

  float* const table = distances.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, m, kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < m; ++j) table[i * m + j] = line[i * count + picks[j]];
    }
  });
  return {chosen, squared_radius, distances};
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, CPU, library) {
  library.impl("kcenter_reduce", TORCH_BOX(&kcenter_reduce));
}

}  // namespace
}  // namespace pydefect::cpu
