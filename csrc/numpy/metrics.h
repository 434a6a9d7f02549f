// Scores of normal and defective things, and the metrics of how well they tell them apart: exact, whatever
// the ties, in hardly more memory than the scores take.
//
// A score is kept as a 32-bit key of the same order. What is added at once becomes a run: keys grouped by
// their upper 16 bits, the bin. A histogram over bins says what lies above each; so bins, or windows of
// several, can be evaluated apart from each other, and nothing is ever sorted as a whole. All metrics need of
// the normal scores is how many lie between two neighbouring defective ones and how many equal them: bins
// without a defective score are only counted.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "components.h"

namespace pydefect {

struct SaturatedRegion {
  View mask;
  int64_t saturation;  // pixels that must be found for the region to count as found, 1 to its area
};

struct ScoredImage {
  View scores;  // float32
  View mask;    // of the same size, or empty
  // Of the same size too; where there are any, the mask is their union.
  std::vector<SaturatedRegion> regions;
};

struct MetricsSummary {
  double auroc;
  double average_precision;
  double f1;
  float f1_threshold;        // a score greater than it counts as defective
  std::vector<double> pro;   // mean overlap of components, integrated up to each limit and divided by it
  std::vector<double> spro;  // the same of saturated regions
};

// What is called defective at thresholds that fall: scores greater than the threshold.
struct OperatingPoints {
  std::vector<float> thresholds;
  std::vector<int64_t> true_positives, false_positives;
  std::vector<double> pro, spro;  // mean overlap of components and of saturated regions; 0 without any
};

class ScoreSet {
 public:
  // Each of these leaves the set as it was where it throws: std::domain_error for a score that is not finite.
  void add_labelled(const float* scores, const uint8_t* labels, int64_t count, int threads);
  void add_images(const std::vector<ScoredImage>& images, int threads);

  // Adds all that the other one holds, without copying scores.
  void merge(const ScoreSet& other);

  int64_t normal() const { return normal_count_; }
  int64_t defective() const { return defective_count_; }
  int64_t components() const { return static_cast<int64_t>(component_shares_.size()); }
  int64_t regions() const { return static_cast<int64_t>(region_shares_.size()); }

  // Both classes must be there, and components (regions) for limits of pro (spro). Limits are false-positive
  // rates, above 0 and at most 1.
  MetricsSummary summary(const std::vector<double>& pro_limits, const std::vector<double>& spro_limits,
                         int threads) const;

  // The curve's corners, from calling nothing defective to calling all. Those are left out that lie, in every
  // rate and in precision, less than `step` from one that is kept; 0 keeps all.
  OperatingPoints operating_points(double step, int threads) const;

  // How many defective (first) and normal scores are greater than the threshold, which is no NaN.
  std::array<int64_t, 2> count_above(float threshold) const;

 private:
  struct Run {
    // Never changed once they are part of a set: sets that were merged share them.
    std::shared_ptr<uint32_t[]> keys;
    std::shared_ptr<uint16_t[]> regions;  // null: all keys belong to first_region
    int64_t size = 0;
    int64_t first_region = 0;
    uint32_t least = 0, largest = 0;
  };
  struct Window;
  struct Workspace;
  struct Added;

  static constexpr int kBins = 1 << 16;
  using Histogram = std::vector<int64_t>;

  void commit(Added&& added);
  std::vector<Window> windows() const;
  template <class Visit>
  void walk(const Window& window, Workspace& space, const Visit& visit) const;
  template <class Visit>
  void walk_sorted(const Window& window, Workspace& space, const Visit& visit) const;
  template <class Visit>
  void walk_counted(const Window& window, Workspace& space, const Visit& visit) const;

  mutable std::mutex guard_;
  std::vector<Run> normal_, defective_, saturated_;
  Histogram normal_bins_ = Histogram(kBins), defective_bins_ = Histogram(kBins);
  std::vector<double> component_shares_, region_shares_;  // what one pixel adds to its region's overlap
  int64_t normal_count_ = 0, defective_count_ = 0;
  uint32_t least_ = ~uint32_t{0}, largest_ = 0;
};

}  // namespace pydefect
