// Algorithm 1's choice of patches on the CPU: the walk over the centres. Candidates come from a k-NN search;
// what they leave undecided is measured directly, for many centres at once, or where it pays bounded first.
// All distances are KnnKernel::squared_distance's, so the answer is that of measuring every pair.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "../checks.h"
#include "../ranking_key.h"
#include "dispatch.h"
#include "kernels/squared_distances.h"
#include "outlines.h"

namespace pydefect::cpu {
namespace {

// Distances measured ahead take at most this much memory, unless one centre needs more.
constexpr int64_t kMeasuredBytes = int64_t{16} << 20;
// Patches that a thread measures at a time stay in its L2 cache.
constexpr int64_t kPatchesAtATime = 64;

class Walk {
 public:
  Walk(const Tensor& bank, const Tensor& patches, const Tensor& candidates, int64_t* chosen)
      : kernel_(PYDEFECT_ACTIVE_KERNEL(squared_distances_kernel)),
        bank_(bank.const_data_ptr<float>()),
        patches_(patches.const_data_ptr<float>()),
        candidates_(candidates.const_data_ptr<int64_t>()),
        centres_(bank.size(0)),
        width_(bank.size(1)),
        candidate_count_(candidates.size(1)),
        chosen_(chosen),
        taken_(static_cast<size_t>(patches.size(0)), false) {}

  void run() {
    for (int64_t centre = 0; centre < centres_; ++centre) {
      int64_t patch = nearest_candidate(centre);
      if (patch < 0) {
        if (!measured(centre)) measure_ahead(centre);
        patch = nearest_measured(centre);
      }
      taken_[static_cast<size_t>(patch)] = true;
      chosen_[centre] = patch;
    }
  }

 private:
  // -1 where all are taken.
  int64_t nearest_candidate(int64_t centre) const {
    const int64_t* candidates = candidates_ + centre * candidate_count_;
    for (int64_t i = 0; i < candidate_count_; ++i) {
      if (!taken_[static_cast<size_t>(candidates[i])]) return candidates[i];
    }
    return -1;
  }

  bool measured(int64_t centre) const {
    return std::binary_search(measured_centres_.begin(), measured_centres_.end(), centre);
  }

  // The outlines of the centres and, behind them, of the patches.
  const Outlines& outlines() {
    if (!outlines_) {
      std::vector<const float*> vectors;
      for (int64_t centre = 0; centre < centres_; ++centre) vectors.push_back(bank_ + centre * width_);
      const int64_t patches = static_cast<int64_t>(taken_.size());
      for (int64_t patch = 0; patch < patches; ++patch) vectors.push_back(patches_ + patch * width_);
      outlines_.emplace(kernel_, vectors, width_);
    }
    return *outlines_;
  }

  // Measures the centre and later ones that have no candidate left either against every free patch, by their
  // outlines if those are used.
  void measure_ahead(int64_t centre) {
    free_.clear();
    for (int64_t patch = 0; patch < static_cast<int64_t>(taken_.size()); ++patch) {
      if (!taken_[static_cast<size_t>(patch)]) free_.push_back(patch);
    }
    const int64_t free = static_cast<int64_t>(free_.size());
    const int64_t most = std::max<int64_t>(1, kMeasuredBytes / static_cast<int64_t>(sizeof(float)) / free);
    measured_centres_.assign(1, centre);
    for (int64_t later = centre + 1;
         later < centres_ && static_cast<int64_t>(measured_centres_.size()) < most; ++later) {
      if (nearest_candidate(later) < 0) measured_centres_.push_back(later);
    }

    std::vector<const float*> rows;
    std::vector<const float*> columns;
    const bool bounds = outlines().used();
    const int64_t width = bounds ? outlines().width() : width_;
    for (const int64_t later : measured_centres_) {
      rows.push_back(bounds ? outlines().row(later) : bank_ + later * width_);
    }
    for (const int64_t patch : free_) {
      columns.push_back(bounds ? outlines().row(centres_ + patch) : patches_ + patch * width_);
    }
    distances_.resize(rows.size() * columns.size());
    torch::stable::parallel_for(0, free, kPatchesAtATime, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += kPatchesAtATime) {
        kernel_.measure(rows.data(), static_cast<int64_t>(rows.size()), columns.data() + first,
                        std::min(kPatchesAtATime, end - first), width, distances_.data() + first, free);
      }
    });
  }

  int64_t nearest_measured(int64_t centre) {
    const auto place = std::lower_bound(measured_centres_.begin(), measured_centres_.end(), centre);
    const size_t free = free_.size();
    const float* distances =
        distances_.data() + static_cast<size_t>(place - measured_centres_.begin()) * free;
    if (outlines().used()) return nearest_by_bounds(centre, distances);
    RankingKey best = std::numeric_limits<RankingKey>::max();
    for (size_t i = 0; i < free; ++i) {
      const int64_t patch = free_[i];
      if (!taken_[static_cast<size_t>(patch)]) best = std::min(best, ranking_key(distances[i], patch));
    }
    return key_row(best);
  }

  // The patch with the lowest bound is measured, and then all that may be as near.
  int64_t nearest_by_bounds(int64_t centre, const float* bounds) {
    const float* const own = bank_ + centre * width_;
    left_.clear();
    for (size_t i = 0; i < free_.size(); ++i) {
      if (!taken_[static_cast<size_t>(free_[i])]) left_.push_back(static_cast<int64_t>(i));
    }
    const int64_t lowest = *std::min_element(left_.begin(), left_.end(),
                                             [&](int64_t a, int64_t b) { return bounds[a] < bounds[b]; });
    const float* near = patches_ + free_[static_cast<size_t>(lowest)] * width_;
    float distance;
    kernel_.measure(&own, 1, &near, 1, width_, &distance, 1);
    // One that is as far and has a lower index would be taken.
    const float enough = outlines().enough(std::nextafter(distance, std::numeric_limits<float>::infinity()));
    near_.clear();
    near_rows_.clear();
    for (const int64_t i : left_) {
      if (bounds[i] >= enough) continue;
      near_.push_back(free_[static_cast<size_t>(i)]);
      near_rows_.push_back(patches_ + near_.back() * width_);
    }
    const int64_t count = static_cast<int64_t>(near_.size());
    near_distances_.resize(near_.size());
    kernel_.measure(&own, 1, near_rows_.data(), count, width_, near_distances_.data(), count);
    RankingKey best = ranking_key(distance, free_[static_cast<size_t>(lowest)]);
    for (size_t i = 0; i < near_.size(); ++i) {
      best = std::min(best, ranking_key(near_distances_[i], near_[i]));
    }
    return key_row(best);
  }

  const SquaredDistancesKernel& kernel_;
  const float* bank_;          // [centres_, width_]
  const float* patches_;       // [patches, width_]
  const int64_t* candidates_;  // [centres_, candidate_count_]
  int64_t centres_;
  int64_t width_;
  int64_t candidate_count_;
  int64_t* chosen_;  // [centres_]
  std::vector<bool> taken_;
  // What measure_ahead measured last.
  std::vector<int64_t> measured_centres_;  // ascending
  std::vector<int64_t> free_;              // patches, ascending; some may have been taken since
  std::vector<float> distances_;           // [measured centres, free patches], or bounds
  std::optional<Outlines> outlines_;
  std::vector<int64_t> left_;  // places in free_
  std::vector<int64_t> near_;  // patches
  std::vector<const float*> near_rows_;
  std::vector<float> near_distances_;
};

Tensor assign_unique(const Tensor& bank_given, const Tensor& patches_given, const Tensor& candidates_given) {
  check_assign_unique(bank_given, patches_given, candidates_given);
  const Tensor bank = in_order("assign_unique", "bank", bank_given);
  const Tensor patches = in_order("assign_unique", "patches", patches_given);
  const Tensor candidates = in_order("assign_unique", "candidates", candidates_given);
  const int64_t* given = candidates.const_data_ptr<int64_t>();
  const int64_t count = candidates.size(0) * candidates.size(1);
  for (int64_t i = 0; i < count; ++i) {
    check(given[i] >= 0 && given[i] < patches.size(0), "assign_unique: candidates must be rows of the ",
          patches.size(0), " patches, got ", given[i]);
  }
  Tensor chosen = torch::stable::new_empty(candidates, {bank.size(0)});
  Walk(bank, patches, candidates, chosen.mutable_data_ptr<int64_t>()).run();
  return chosen;
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, CPU, library) {
  library.impl("assign_unique", TORCH_BOX(&assign_unique));
}

}  // namespace
}  // namespace pydefect::cpu
