// The greedy choice of points, each the farthest from those chosen before it.
//
// Showing every chosen point to all others at once would read all points from memory for every choice. But
// only the farthest point matters, and a distance to the points chosen so far can only fall: what was
// measured long ago is an upper bound. So the work goes in rounds. A round takes the points with the largest
// bounds, those of at least a threshold; shows them what was chosen since each was last looked at, many by
// many, as a matrix product reads its operands; and then, as long as the farthest of them stands at the
// threshold or above, no other point can be farther, and it is chosen. Most points are never looked at again
// once they are well covered.
//
// Looking comes in two steps where it pays, as it does on principal components: a vector's outline, its first
// elements and the norm of the others, gives a lower bound of a distance for an eighth of the work, and only
// what may be nearer than what is known is measured.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "kernels/squared_distances.h"
#include "outlines.h"
#include "rounding.h"

namespace pydefect::cpu {
namespace {

// Bounds that are looked at to guess a round's threshold.
constexpr int64_t kSample = 4096;
// Points that a round aims at, at least.
constexpr int64_t kFewestPoints = 512;
// Points and chosen points that a thread measures at a time: both stay in its caches.
constexpr int64_t kPointsAtATime = 16;
constexpr int64_t kChosenAtATime = 256;
// Elements of vectors that are worth a thread of their own.
constexpr int64_t kElementsAThread = 1 << 18;

inline std::vector<const float*> row_pointers(const torch::stable::Tensor& matrix) {
  std::vector<const float*> pointers;
  for (int64_t row = 0; row < matrix.size(0); ++row) {
    pointers.push_back(matrix.const_data_ptr<float>() + row * matrix.size(1));
  }
  return pointers;
}

// Distances that are not a number count as infinite; ties go to the lower index.
class FarthestFirst {
 public:
  // Chooses the first m of the list, which have a width of `width`.
  FarthestFirst(std::vector<const float*> points, int64_t width, int64_t m, int64_t* chosen)
      : kernel_(PYDEFECT_ACTIVE_KERNEL(squared_distances_kernel)),
        points_(std::move(points)),
        count_(static_cast<int64_t>(points_.size())),
        width_(width),
        m_(m),
        chosen_(chosen),
        nearest_(static_cast<size_t>(count_), std::numeric_limits<float>::infinity()),
        seen_(static_cast<size_t>(count_), 0),
        outlines_(kernel_, points_, width),
        bounds_enough_(static_cast<size_t>(count_), std::numeric_limits<float>::quiet_NaN()),
        round_size_(std::max<int64_t>(kFewestPoints, count_ / 64)) {
    chosen_rows_.reserve(static_cast<size_t>(m));
  }

  // Writes the indices of the chosen points.
  void run() {
    choose(0);
    while (chosen_count() < m_) {
      const float threshold = begin_round();
      choose_from_round(threshold);
    }
  }

  // After run(): the squared distance of the farthest point from its nearest chosen one.
  float squared_radius() {
    if (m_ == count_) return 0.0f;
    do {
      begin_round();
    } while (round_.empty());
    return nearest_[static_cast<size_t>(farthest_of_round())];
  }

 private:
  int64_t chosen_count() const { return static_cast<int64_t>(chosen_rows_.size()); }
  const float* row(int64_t point) const { return points_[static_cast<size_t>(point)]; }

  void choose(int64_t point) {
    chosen_[chosen_count()] = point;
    chosen_rows_.push_back(row(point));
    if (outlines_.used()) chosen_outlines_.push_back(outlines_.row(point));
    // Below every distance: no threshold takes it in again.
    nearest_[static_cast<size_t>(point)] = -1.0f;
  }

  // Leaves in the round the points that truly reach the threshold that it returns; no other point does.
  float begin_round() {
    const float threshold = choose_threshold();
    gather(threshold);
    catch_up();
    std::erase_if(round_,
                  [&](int64_t point) { return !(nearest_[static_cast<size_t>(point)] >= threshold); });
    if (round_.empty()) round_size_ = std::min(2 * round_size_, count_);
    return threshold;
  }

  // About round_size_ bounds reach it, and the largest one does.
  float choose_threshold() {
    const int64_t stride = std::max<int64_t>(1, count_ / kSample);
    sample_.clear();
    for (int64_t point = 0; point < count_; point += stride) {
      sample_.push_back(nearest_[static_cast<size_t>(point)]);
    }
    const auto place =
        sample_.begin() + std::min<int64_t>(round_size_ / stride, static_cast<int64_t>(sample_.size()) - 1);
    std::nth_element(sample_.begin(), place, sample_.end(), std::greater<>());
    // All of the sample may be chosen points; any that is left has at least 0.
    return std::max(*place, 0.0f);
  }

  void gather(float threshold) {
    round_.clear();
    for (int64_t point = 0; point < count_; ++point) {
      if (nearest_[static_cast<size_t>(point)] >= threshold) round_.push_back(point);
    }
  }

  // Shows every point of the round what was chosen since it was last shown anything.
  void catch_up() {
    const int64_t now = chosen_count();
    // Points that have seen equally much stand together, so that few are shown anything twice.
    by_seen_ = round_;
    std::sort(by_seen_.begin(), by_seen_.end(), [this](int64_t a, int64_t b) {
      const int32_t seen_a = seen_[static_cast<size_t>(a)];
      const int32_t seen_b = seen_[static_cast<size_t>(b)];
      return seen_a != seen_b ? seen_a < seen_b : a < b;
    });
    const int64_t groups = divide_up(static_cast<int64_t>(by_seen_.size()), kPointsAtATime);
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> distances(static_cast<size_t>(kPointsAtATime * kChosenAtATime));
      for (int64_t group = begin; group < end; ++group) {
        const int64_t first = group * kPointsAtATime;
        const int64_t points = std::min(kPointsAtATime, static_cast<int64_t>(by_seen_.size()) - first);
        show(by_seen_.data() + first, points, now, distances.data());
      }
    });
  }

  void show(const int64_t* points, int64_t count, int64_t now, float* distances) {
    const float* rows[kPointsAtATime];
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = outlines_.used() ? outlines_.row(points[i]) : row(points[i]);
    }
    const float* const* chosen = outlines_.used() ? chosen_outlines_.data() : chosen_rows_.data();
    const int64_t width = outlines_.used() ? outlines_.width() : width_;
    std::vector<const float*> near;
    for (int64_t first = seen_[static_cast<size_t>(points[0])]; first < now; first += kChosenAtATime) {
      const int64_t some = std::min(kChosenAtATime, now - first);
      kernel_.measure(rows, count, chosen + first, some, width, distances, kChosenAtATime);
      for (int64_t i = 0; i < count; ++i) {
        float* const of_point = distances + i * kChosenAtATime;
        if (outlines_.used()) {
          measure_near(points[i], chosen_rows_.data() + first, of_point, some, near);
        } else {
          for (int64_t c = 0; c < some; ++c) lower(points[i], of_point[c]);
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) seen_[static_cast<size_t>(points[i])] = static_cast<int32_t>(now);
  }

  // Measures the point's distance from the chosen rows whose bounds leave open whether they are nearer than
  // what the point knows.
  void measure_near(int64_t point, const float* const* chosen, float* bounds, int64_t count,
                    std::vector<const float*>& near) {
    const float* const own = row(point);
    float distance;
    if (nearest_[static_cast<size_t>(point)] == std::numeric_limits<float>::infinity()) {
      // Nothing is known: the one with the lowest bound says most.
      const int64_t first = std::min_element(bounds, bounds + count) - bounds;
      kernel_.measure(&own, 1, chosen + first, 1, width_, &distance, 1);
      lower(point, distance);
    }
    near.clear();
    const float enough = bounds_enough_[static_cast<size_t>(point)];
    for (int64_t c = 0; c < count; ++c) {
      if (!(bounds[c] >= enough)) near.push_back(chosen[c]);
    }
    if (near.empty()) return;
    const int64_t left = static_cast<int64_t>(near.size());
    kernel_.measure(&own, 1, near.data(), left, width_, bounds, left);
    for (int64_t c = 0; c < left; ++c) lower(point, bounds[c]);
  }

  void lower(int64_t point, float distance) {
    float& nearest = nearest_[static_cast<size_t>(point)];
    if (!(distance < nearest)) return;
    nearest = distance;
    if (outlines_.used()) bounds_enough_[static_cast<size_t>(point)] = outlines_.enough(distance);
  }

  // Chooses the farthest of the round as long as no point outside can be farther.
  void choose_from_round(float threshold) {
    const int64_t width = outlines_.used() ? outlines_.width() : width_;
    const int64_t grain = std::max<int64_t>(1, kElementsAThread / width);
    rows_.clear();
    for (const int64_t point : round_) {
      rows_.push_back(outlines_.used() ? outlines_.row(point) : row(point));
    }
    while (!round_.empty() && chosen_count() < m_) {
      const int64_t farthest = farthest_of_round();
      // Where even the farthest lies on a chosen point all do, and nothing can lower their distances.
      const bool all_zero = nearest_[static_cast<size_t>(farthest)] == 0.0f;
      choose(farthest);
      const int64_t count = static_cast<int64_t>(round_.size());
      if (!all_zero) {
        distances_.resize(round_.size());
        const float* const* newest = outlines_.used() ? &chosen_outlines_.back() : &chosen_rows_.back();
        torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
          kernel_.measure(newest, 1, rows_.data() + begin, end - begin, width, distances_.data() + begin,
                          count);
          show_newest(begin, end);
        });
      }
      size_t kept = 0;
      for (size_t i = 0; i < round_.size(); ++i) {
        const int64_t point = round_[i];
        seen_[static_cast<size_t>(point)] = static_cast<int32_t>(chosen_count());
        if (!(nearest_[static_cast<size_t>(point)] >= threshold)) continue;
        round_[kept] = point;
        rows_[kept] = rows_[i];
        ++kept;
      }
      round_.resize(kept);
      rows_.resize(kept);
    }
  }

  // Lowers what the round's points begin..end know by the newest choice, whose distances from them, or bounds
  // of those, stand in distances_.
  void show_newest(int64_t begin, int64_t end) {
    const float* near[kPointsAtATime];
    int64_t points[kPointsAtATime];
    float distances[kPointsAtATime];
    int64_t count = 0;
    const auto measure = [&] {
      kernel_.measure(&chosen_rows_.back(), 1, near, count, width_, distances, count);
      for (int64_t i = 0; i < count; ++i) lower(points[i], distances[i]);
      count = 0;
    };
    for (int64_t i = begin; i < end; ++i) {
      const int64_t point = round_[static_cast<size_t>(i)];
      const float found = distances_[static_cast<size_t>(i)];
      if (!outlines_.used()) {
        lower(point, found);
      } else if (!(found >= bounds_enough_[static_cast<size_t>(point)])) {
        near[count] = row(point);
        points[count++] = point;
        if (count == kPointsAtATime) measure();
      }
    }
    if (count > 0) measure();
  }

  // The first one of equals: the round's points ascend.
  int64_t farthest_of_round() const {
    return *std::max_element(round_.begin(), round_.end(), [this](int64_t a, int64_t b) {
      return nearest_[static_cast<size_t>(a)] < nearest_[static_cast<size_t>(b)];
    });
  }

  const SquaredDistancesKernel& kernel_;
  std::vector<const float*> points_;  // [count_] of [width_]
  int64_t count_;
  int64_t width_;
  int64_t m_;
  int64_t* chosen_;                        // [m_]
  std::vector<const float*> chosen_rows_;  // so far
  std::vector<float> nearest_;  // [count_]: distance to the nearest of the first seen_ chosen points
  std::vector<int32_t> seen_;   // [count_]
  Outlines outlines_;
  std::vector<const float*> chosen_outlines_;  // as chosen_rows_
  // [count_]: no row whose bound reaches this is nearer than nearest_.
  std::vector<float> bounds_enough_;
  int64_t round_size_;
  std::vector<int64_t> round_;  // points, ascending
  std::vector<const float*> rows_;
  std::vector<int64_t> by_seen_;
  std::vector<float> sample_;
  std::vector<float> distances_;
};

}  // namespace
}  // namespace pydefect::cpu
