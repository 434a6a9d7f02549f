// Lower bounds of squared distances for an eighth of the work. A vector's outline is its first elements and
// the norm of the others; by the triangle inequality two outlines are no farther apart than their vectors.
// Where the first elements carry most of the length, as on principal components, the bound is close.
//
// The norms are rounded to float32, each by at most 2^-24 of the largest one, R, so that measured outlines
// may lie 2^-23 R farther apart than true ones (2^-22 covers the norms' own sums in double precision).
// Measuring W elements directly is right within a factor of 1 +- g(W + 8), csrc/knn_certificate.h, of either
// sign. So if the outlines' measured distance is at least
//     (sqrt(d / (1 - g)) + 2^-22 R)^2 (1 + g)
// then the vectors' measured distance is at least d: `enough` returns that, with what underflow may take.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../knn_certificate.h"
#include "aligned.h"
#include "kernels/squared_distances.h"
#include "rounding.h"

namespace pydefect::cpu {
namespace {

class Outlines {
 public:
  // Of vectors of `width`; of none where vectors are narrow or few, or the bounds of a sample of distances
  // are poor.
  Outlines(const SquaredDistancesKernel& kernel, const std::vector<const float*>& vectors, int64_t width)
      : full_width_(width), width_(round_up(width / 8, 16)) {
    const int64_t count = static_cast<int64_t>(vectors.size());
    if (width < kWide || count < kMany) return;
    std::vector<const float*> sample;
    for (int64_t i = 0; i < kSampled; ++i) {
      sample.push_back(vectors[static_cast<size_t>(i * (count / kSampled))]);
    }
    draw(sample);
    if (!close(kernel, sample)) return;
    draw(vectors);
    used_ = true;
  }

  bool used() const { return used_; }
  int64_t width() const { return width_; }
  const float* row(int64_t index) const { return outlines_.data() + index * width_; }

  // What the distance of two outlines must be for that of their vectors to be at least `distance`; NaN, which
  // nothing reaches, where that cannot be said.
  float enough(float distance) const {
    const double growth = rounding_growth(full_width_);
    const double root = std::sqrt(static_cast<double>(distance) / (1.0 - growth)) + 0x1p-22 * largest_rest_;
    const double bound =
        root * root * (1.0 + growth) * (1.0 + 0x1p-23) + 4.0 * static_cast<double>(full_width_) * FLT_MIN;
    return bound < static_cast<double>(FLT_MAX) / 4.0 ? static_cast<float>(bound)
                                                      : std::numeric_limits<float>::quiet_NaN();
  }

 private:
  static constexpr int64_t kWide = 256;
  static constexpr int64_t kMany = 512;
  static constexpr int64_t kSampled = 32;

  void draw(const std::vector<const float*>& vectors) {
    const int64_t count = static_cast<int64_t>(vectors.size());
    outlines_ = AlignedBuffer<float>(count * width_);
    torch::stable::parallel_for(0, count, 256, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float* const vector = vectors[static_cast<size_t>(i)];
        float* const outline = outlines_.data() + i * width_;
        std::copy(vector, vector + width_ - 1, outline);
        outline[width_ - 1] = static_cast<float>(std::sqrt(squared_rest(vector)));
      }
    });
    largest_rest_ = 0.0;
    for (int64_t i = 0; i < count; ++i) {
      const double rest = row(i)[width_ - 1];
      // Where there is a NaN no bound is enough.
      if (!(rest <= largest_rest_)) largest_rest_ = rest;
      if (std::isnan(rest)) return;
    }
  }

  double squared_rest(const float* vector) const {
    double sums[8] = {};
    int64_t d = width_ - 1;
    for (; d + 8 <= full_width_; d += 8) {
      for (int64_t i = 0; i < 8; ++i) {
        const double value = vector[d + i];
        sums[i] += value * value;
      }
    }
    double total = 0.0;
    for (; d < full_width_; ++d) total += static_cast<double>(vector[d]) * vector[d];
    for (const double sum : sums) total += sum;
    return total;
  }

  // Whether the sample's outlines lie at least half as far apart, squared, as its vectors.
  bool close(const SquaredDistancesKernel& kernel, const std::vector<const float*>& sample) const {
    std::vector<const float*> outlines;
    for (int64_t i = 0; i < kSampled; ++i) outlines.push_back(row(i));
    float bounds[kSampled * kSampled];
    float distances[kSampled * kSampled];
    kernel.measure(outlines.data(), kSampled, outlines.data(), kSampled, width_, bounds, kSampled);
    kernel.measure(sample.data(), kSampled, sample.data(), kSampled, full_width_, distances, kSampled);
    double of_outlines = 0.0;
    double of_vectors = 0.0;
    for (int64_t i = 0; i < kSampled * kSampled; ++i) {
      of_outlines += bounds[i];
      of_vectors += distances[i];
    }
    return of_outlines >= 0.5 * of_vectors;
  }

  int64_t full_width_;
  int64_t width_;
  bool used_ = false;
  double largest_rest_ = 0.0;
  AlignedBuffer<float> outlines_;  // [vectors, width_]
};

}  // namespace
}  // namespace pydefect::cpu
