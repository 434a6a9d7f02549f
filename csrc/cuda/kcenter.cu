// Greedy k-centre on CUDA: m points, each the farthest from those chosen before it, in m launches and without
// the host. A launch finds the last one's farthest point among its blocks' and shows it to all points.
// Distances are measured directly, in the order of the CPU's kernels, so the choice is the CPU's.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../checks.h"
#include "common.cuh"
#include "reductions.cuh"

namespace pydefect::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kHalf = kWarp / 2;  // lanes that measure a distance

// One after the other, as one list.
struct Points {
  const float* first;   // [first_count, width]
  const float* second;  // [second_count, width]
  int64_t first_count;
  int64_t count;
  int width;

  __device__ const float* operator[](int64_t i) const {
    return i < first_count ? first + i * width : second + (i - first_count) * width;
  }
};

// Orders points by distance, equally distant ones the lower index first; never zero.
__device__ unsigned long long farness(float distance, int64_t point) {
  return static_cast<unsigned long long>(__float_as_uint(distance)) << 32 |
         (0xffffffffu - static_cast<unsigned>(point));
}

__device__ int64_t point_of(unsigned long long farness) {
  return 0xffffffffu - static_cast<unsigned>(farness & 0xffffffffu);
}

// Every thread gets the largest of the block's values. All threads must call.
__device__ unsigned long long block_max(unsigned long long value) {
  __shared__ unsigned long long parts[kThreads / kWarp];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = max(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  __syncthreads();  // the last call's readers are done
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (int warp = 0; warp < kThreads / kWarp; ++warp) value = max(value, parts[warp]);
  return value;
}

__device__ unsigned long long largest(const unsigned long long* values, int count) {
  unsigned long long best = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) best = max(best, values[i]);
  return block_max(best);
}

// Step 0 chooses point 0. Half a warp a point.
__global__ void show_chosen(Points points, int step,
                            const unsigned long long* farthest,   // [blocks] of the last step
                            float* nearest,                       // [count]: -1 for the chosen
                            int64_t* chosen,                      // [m]
                            unsigned long long* next_farthest) {  // [blocks]
  const int64_t pick = step == 0 ? 0 : point_of(largest(farthest, gridDim.x));
  const float* const centre = points[pick];
  const int half = threadIdx.x / kHalf;
  constexpr int halves = kThreads / kHalf;
  unsigned long long best = 0;
  // Whole warps stay together: past the end the last point is measured again.
  for (int64_t base = int64_t{blockIdx.x} * halves; base < points.count;
       base += int64_t{gridDim.x} * halves) {
    const int64_t i = base + half;
    const int64_t safe = i < points.count ? i : points.count - 1;
    const float distance = squared_distance(points[safe], centre, points.width);
    if (threadIdx.x % kHalf != 0 || i >= points.count) continue;
    float known = step == 0 ? INFINITY : nearest[i];
    // A distance that is not a number lowers nothing.
    if (distance < known) known = distance;
    if (i == pick) known = -1.0f;
    nearest[i] = known;
    if (known >= 0.0f) best = max(best, farness(known, i));
  }
  best = block_max(best);
  if (threadIdx.x != 0) return;
  next_farthest[blockIdx.x] = best;
  if (blockIdx.x == 0) chosen[step] = pick;
}

// One block: the largest distance left; 0 where every point is chosen.
__global__ void find_radius(const unsigned long long* farthest, int blocks,
                            float* squared_radius) {  // one
  const unsigned long long best = largest(farthest, blocks);
  if (threadIdx.x == 0) *squared_radius = __uint_as_float(static_cast<unsigned>(best >> 32));
}

// Distances of all chosen points; half a warp a pair.
__global__ void measure_chosen(Points points, const int64_t* chosen, int64_t m,
                               float* distances) {  // [m, m]
  constexpr int halves = kThreads / kHalf;
  for (int64_t base = int64_t{blockIdx.x} * halves; base < m * m; base += int64_t{gridDim.x} * halves) {
    const int64_t pair = base + threadIdx.x / kHalf;
    const int64_t safe = pair < m * m ? pair : m * m - 1;
    const float distance = squared_distance(points[chosen[safe / m]], points[chosen[safe % m]], points.width);
    if (threadIdx.x % kHalf == 0 && pair < m * m) distances[pair] = distance;
  }
}

class Search {
 public:
  Search(const Device& device, const Tensor& like, const Points& points)
      : device_(device),
        points_(points),
        blocks_(blocks_for(device, divide_up(points.count, kThreads / kHalf))),
        nearest_(new_floats(like, {points.count})),
        farthest_(new_of(like, {2, blocks_}, torch::headeronly::ScalarType::Long)) {}

  void choose(int64_t m, int64_t* chosen) {
    for (; step_ < m; ++step_) {
      device_.launch("kcenter: show_chosen", show_chosen, blocks_, kThreads, 0, points_, step_,
                     farthest(step_ + 1), nearest_.mutable_data_ptr<float>(), chosen, farthest(step_));
    }
  }

  void find_radius(float* squared_radius) {
    device_.launch("kcenter: find_radius", &cuda::find_radius, 1, kThreads, 0, farthest(step_ - 1),
                   static_cast<int>(blocks_), squared_radius);
  }

 private:
  unsigned long long* farthest(int step) {
    return reinterpret_cast<unsigned long long*>(farthest_.mutable_data_ptr<int64_t>()) + step % 2 * blocks_;
  }

  const Device& device_;
  Points points_;
  unsigned blocks_;
  Tensor nearest_;
  Tensor farthest_;  // of this step and of the last one
  int step_ = 0;
};

Points points_of(const Tensor& features) {
  const float* data = features.const_data_ptr<float>();
  return {data, data, features.size(0), features.size(0), static_cast<int>(features.size(1))};
}

Tensor kcenter_greedy(const Tensor& features_given, int64_t m) {
  check_kcenter_greedy(features_given, m);
  const Device device(features_given);
  const Tensor features = in_order("kcenter_greedy", "features", features_given);
  Tensor chosen = new_of(features, {m}, torch::headeronly::ScalarType::Long);
  Search(device, features, points_of(features)).choose(m, chosen.mutable_data_ptr<int64_t>());
  return chosen;
}

// Known distances among the centres would save less than they cost to look up: they are not read.
std::tuple<Tensor, Tensor, Tensor> kcenter_reduce(const Tensor& centres_given, const Tensor& added_given,
                                                  int64_t m, const std::optional<Tensor>& distances_given) {
  check_kcenter_reduce(centres_given, added_given, m, distances_given);
  const Device device(centres_given);
  const Tensor centres = in_order("kcenter_reduce", "centres", centres_given);
  const Tensor added = in_order("kcenter_reduce", "added", added_given);
  Points points = points_of(centres);
  points.second = added.const_data_ptr<float>();
  points.count += added.size(0);
  Tensor chosen = new_of(centres, {m}, torch::headeronly::ScalarType::Long);
  Tensor squared_radius = new_floats(centres, {});
  Tensor distances = new_floats(centres, {m, m});
  int64_t* const picks = chosen.mutable_data_ptr<int64_t>();
  Search search(device, centres, points);
  search.choose(m, picks);
  search.find_radius(squared_radius.mutable_data_ptr<float>());
  device.launch("kcenter_reduce: measure_chosen", measure_chosen,
                blocks_for(device, divide_up(m * m, kThreads / kHalf)), kThreads, 0, points, picks, m,
                distances.mutable_data_ptr<float>());
  return {chosen, squared_radius, distances};
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, PYDEFECT_CUDA_KEY, library) {
  library.impl("kcenter_greedy", TORCH_BOX(&kcenter_greedy));
  library.impl("kcenter_reduce", TORCH_BOX(&kcenter_reduce));
}

}  // namespace
}  // namespace pydefect::cuda
