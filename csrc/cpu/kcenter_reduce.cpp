// One step of the streaming k-centre on the CPU: centres whose distances are known and new points are reduced
// to m points, each the farthest from those chosen before it. Every distance is
// KnnKernel::squared_distance's, so nothing depends on threads or instruction sets.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
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

// Every row's distances to every column, [rows, columns].
void measure_all(const SquaredDistancesKernel& kernel, const std::vector<const float*>& rows,
                 const std::vector<const float*>& columns, int64_t width, float* table) {
  const int64_t stride = static_cast<int64_t>(columns.size());
  torch::stable::parallel_for(0, static_cast<int64_t>(rows.size()), kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t column = 0; column < stride; column += kBlock) {
      kernel.measure(rows.data() + begin, end - begin, columns.data() + column,
                     std::min(kBlock, stride - column), width, table + begin * stride + column, stride);
    }
  });
}

// The rows' distances to each other, [rows, rows]: one half is measured, the other is its mirror image.
void measure_among(const SquaredDistancesKernel& kernel, const std::vector<const float*>& rows, int64_t width,
                   float* table) {
  const int64_t count = static_cast<int64_t>(rows.size());
  const int64_t blocks = divide_up(count, kBlock);
  const auto measure_block = [&](int64_t block) {
    const int64_t first = block * kBlock;
    const int64_t some = std::min(kBlock, count - first);
    for (int64_t column = first; column < count; column += kBlock) {
      const int64_t columns = std::min(kBlock, count - column);
      kernel.measure(rows.data() + first, some, rows.data() + column, columns, width,
                     table + first * count + column, count);
      if (column == first) continue;
      for (int64_t i = first; i < first + some; ++i) {
        for (int64_t j = column; j < column + columns; ++j) table[j * count + i] = table[i * count + j];
      }
    }
  };
  // The first lines of blocks are the longest: each goes with one of the last.
  torch::stable::parallel_for(0, divide_up(blocks, 2), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      measure_block(block);
      if (blocks - 1 - block != block) measure_block(blocks - 1 - block);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> kcenter_reduce(const Tensor& centres_given, const Tensor& added_given,
                                                  int64_t m, const std::optional<Tensor>& distances_given) {
  check_kcenter_reduce(centres_given, added_given, m, distances_given);
  const SquaredDistancesKernel& kernel = PYDEFECT_ACTIVE_KERNEL(squared_distances_kernel);
  const Tensor centres = in_order("kcenter_reduce", "centres", centres_given);
  const Tensor added = in_order("kcenter_reduce", "added", added_given);
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
    measure_among(kernel, rows, width, distances.mutable_data_ptr<float>());
    return {chosen, squared_radius, distances};
  }

  Tensor known = distances_given ? in_order("kcenter_reduce", "distances", *distances_given)
                                 : torch::stable::new_empty(centres, {old, old});
  if (!distances_given) {
    measure_among(kernel, row_pointers(centres), width, known.mutable_data_ptr<float>());
  }
  const float* const among_old = known.const_data_ptr<float>();
  // [all points, new points]
  const int64_t fresh = added.size(0);
  std::vector<float> to_new;
  // Blocks of few sizes are used again; of ever new sizes they would leave the heap full of holes.
  to_new.reserve(std::bit_ceil(static_cast<size_t>(count * fresh)));
  to_new.resize(static_cast<size_t>(count * fresh));
  measure_all(kernel, points, new_points, width, to_new.data());

  std::vector<float> nearest(static_cast<size_t>(count), std::numeric_limits<float>::infinity());
  std::vector<float> line(static_cast<size_t>(old));
  int64_t point = 0;
  for (int64_t step = 0; step < m; ++step) {
    picks[step] = point;
    const float* to_old = among_old + point * old;
    if (point >= old) {
      for (int64_t i = 0; i < old; ++i) line[static_cast<size_t>(i)] = to_new[i * fresh + point - old];
      to_old = line.data();
    }
    // Below every distance: never lowered and never the farthest while another is left.
    nearest[static_cast<size_t>(point)] = -1.0f;
    const float* const to_fresh = to_new.data() + point * fresh;
    point = kernel.lower(nearest.data(), to_old, old);
    if (fresh == 0) continue;
    const int64_t other = old + kernel.lower(nearest.data() + old, to_fresh, fresh);
    if (nearest[static_cast<size_t>(other)] > nearest[static_cast<size_t>(point)]) point = other;
  }
  *squared_radius.mutable_data_ptr<float>() = std::max(0.0f, nearest[static_cast<size_t>(point)]);

  float* const table = distances.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, m, kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = picks[i];
      for (int64_t j = 0; j < m; ++j) {
        const int64_t to = picks[j];
        table[i * m + j] = to >= old     ? to_new[from * fresh + to - old]
                           : from >= old ? to_new[to * fresh + from - old]
                                         : among_old[from * old + to];
      }
    }
  });
  return {chosen, squared_radius, distances};
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, CPU, library) {
  library.impl("kcenter_reduce", TORCH_BOX(&kcenter_reduce));
}

}  // namespace
}  // namespace pydefect::cpu
