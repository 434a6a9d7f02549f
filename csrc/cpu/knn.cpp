// k-NN on the CPU. Candidates come from the expanded form in register tiles over a packed bank; only winners
// are measured directly. csrc/knn_certificate.h says why the answer is that of measuring everything directly,
// so it depends on neither the thread count nor the blocking nor the instruction set.
//
// Vectors on principal components carry most of their length in their first elements. There it is enough to
// score those, with the norm of the rest as one element more: that score is an upper bound, and few rows pass
// it. A few queries try out whether it pays.

#include "knn.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "../knn_certificate.h"
#include "../ranking_key.h"
#include "aligned.h"
#include "dispatch.h"
#include "kernels/knn.h"
#include "rounding.h"

namespace pydefect::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// The packed part of the bank stays this small, whatever the bank's size.
constexpr int64_t kPackedBytes = int64_t{64} << 20;
// Tiles of queries that share one pass over the bank: a panel is read from L2 once for all of them.
constexpr int64_t kTilesPerGroup = 8;
// Groups are made smaller where there would be fewer than this to share among threads.
constexpr int64_t kFewGroups = 16;
// With fewer queries than this, packing the bank costs more than it saves.
constexpr int64_t kFewQueries = 16;
// Sorted insertion is quick for short lists only.
constexpr int64_t kLongestList = 1024;
// Rows of the bank that its centre is the mean of, at most: any centre will do.
constexpr int64_t kCentreRows = 1024;
// KnnScoring's rows and KnnKernel's columns are at most this.
constexpr int64_t kMostColumns = 32;
// Queries that try out a search, spread over all of them.
constexpr int64_t kTrialQueries = 56;
// Vectors of at least this width may be scored by their heads, an eighth of them, which is a multiple of 32.
constexpr int64_t kWide = 256;
// Packing a bank's heads in vain costs little beside the search of so many queries.
constexpr int64_t kManyQueries = 8 * kTrialQueries;

struct Matrix {
  const float* data;
  int64_t rows;
  int64_t width;
  int64_t stride;  // from row to row

  const float* row(int64_t index) const { return data + index * stride; }
};

struct Candidate {
  float score;
  int32_t row;
};

// For each query of a group: the k best scores so far, and every row whose score lies within a margin of the
// k-th best, or did when it came.
class Shortlists {
 public:
  // The lists hold as many rows more than k as pay: measuring `bank_rows / 16` rows takes about a quarter of
  // the time that scoring all of them takes.
  Shortlists(int64_t queries, int64_t k, int64_t bank_rows)
      : k_(k),
        spare_(std::min(std::clamp<int64_t>(bank_rows / 16, 60, 252), bank_rows - k)),
        capacity_(k + spare_),
        thresholds_(queries),
        best_stride_(std::max<int64_t>(k, 4)),
        best_(static_cast<size_t>(queries * best_stride_)),
        items_(queries * (capacity_ + kMostColumns)),
        margins_(static_cast<size_t>(queries)),
        counts_(static_cast<size_t>(queries)),
        sizes_(static_cast<size_t>(queries)) {}

  void start(int64_t query, VectorSize size, double margin) {
    sizes_[static_cast<size_t>(query)] = size;
    margins_[static_cast<size_t>(query)] = static_cast<float>(margin);
    counts_[static_cast<size_t>(query)] = 0;
    thresholds_.data()[query] = -kInfinity;
    std::fill_n(best_.data() + query * best_stride_, best_stride_, -kInfinity);
  }

  // Begins anew with what scores above a threshold that stays.
  void reopen(int64_t query, float threshold) {
    counts_[static_cast<size_t>(query)] = 0;
    margins_[static_cast<size_t>(query)] = kInfinity;
    thresholds_.data()[query] = threshold;
  }

  // Nothing enters any more.
  void close(int64_t query) { thresholds_.data()[query] = kInfinity; }

  // Leaves the query to the exhaustive search.
  void give_up(int64_t query) {
    counts_[static_cast<size_t>(query)] = -1;
    close(query);
  }

  VectorSize size(int64_t query) const { return sizes_[static_cast<size_t>(query)]; }

  // Only larger scores enter; NaN and -infinity never do. Never falls.
  const float* thresholds() const { return thresholds_.data(); }

  // Offers the bank's row first_row + c, which scored scores[c], for each bit c.
  void insert(int64_t query, const float* scores, uint32_t bits, int64_t first_row) {
    switch (k_) {
      case 1:
        return insert_few<1>(query, scores, bits, first_row);
      case 2:
        return insert_few<2>(query, scores, bits, first_row);
      case 3:
        return insert_few<3>(query, scores, bits, first_row);
      case 4:
        return insert_few<4>(query, scores, bits, first_row);
      default:
        return insert_many(query, scores, bits, first_row);
    }
  }

  // Drops the rows that the k-th best has left behind; false where there were too many to keep.
  bool keep_good(int64_t query) {
    int64_t& count = counts_[static_cast<size_t>(query)];
    if (count < 0) return false;
    Candidate* const first = list(query);
    const float threshold = thresholds_.data()[query];
    count = std::remove_if(first, first + count, [=](Candidate c) { return !(c.score > threshold); }) - first;
    return true;
  }

  const Candidate* begin(int64_t query) const { return items_.data() + query * (capacity_ + kMostColumns); }
  int64_t count(int64_t query) const { return counts_[static_cast<size_t>(query)]; }

 private:
  using Quad = float __attribute__((vector_size(16)));

  Candidate* list(int64_t query) { return items_.data() + query * (capacity_ + kMostColumns); }

  // Without a branch on the scores, which would be hard to predict.
  template <int k>
  void insert_few(int64_t query, const float* scores, uint32_t bits, int64_t first_row) {
    int64_t& count = counts_[static_cast<size_t>(query)];
    const float margin = margins_[static_cast<size_t>(query)];
    Quad best;
    std::memcpy(&best, best_.data() + query * best_stride_, sizeof(best));
    float threshold = thresholds_.data()[query];
    if (bits == 0xffffffffu) {
      threshold = std::max(threshold, lower_bound_of_best(scores)[k - 1] - margin);
      bits = 0;
      for (int c = 0; c < 32; ++c) bits |= static_cast<uint32_t>(scores[c] > threshold) << c;
    }
    Candidate* const first = list(query);
    Candidate* next = first + count;
    for (; bits != 0; bits &= bits - 1) {
      const int column = std::countr_zero(bits);
      *next = {scores[column], static_cast<int32_t>(first_row + column)};
      next += scores[column] > threshold;
      best = with(best, scores[column]);
      threshold = std::max(threshold, best[k - 1] - margin);
    }
    std::memcpy(best_.data() + query * best_stride_, &best, sizeof(best));
    thresholds_.data()[query] = threshold;
    count = next - first;
    if (count > capacity_) make_room(query);
  }

  // The four best of `best`, which descends, and `score`.
  static Quad with(Quad best, float score) {
    using Places = int32_t __attribute__((vector_size(16)));
    const Quad better = __builtin_shuffle(best, Quad{kInfinity}, Places{4, 0, 1, 2});
    const Quad scores = {score, score, score, score};
    const Quad from_above = better < scores ? better : scores;
    return best > from_above ? best : from_above;
  }

  // The best of four groups of 32 scores: each is at most the score of its rank.
  static Quad lower_bound_of_best(const float* scores) {
    Quad groups = {-kInfinity, -kInfinity, -kInfinity, -kInfinity};
    Quad best = groups;
    for (int c = 0; c < 32; c += 4) {
      Quad some;
      std::memcpy(&some, scores + c, sizeof(some));
      groups = groups > some ? groups : some;
    }
    for (int g = 0; g < 4; ++g) best = with(best, groups[g]);
    return best;
  }

  void insert_many(int64_t query, const float* scores, uint32_t bits, int64_t first_row) {
    int64_t& count = counts_[static_cast<size_t>(query)];
    float& threshold = thresholds_.data()[query];
    float* const best = best_.data() + query * best_stride_;
    float* const last = best + k_ - 1;
    for (; bits != 0; bits &= bits - 1) {
      const int column = std::countr_zero(bits);
      const float score = scores[column];
      if (!(score > threshold)) continue;
      list(query)[count++] = {score, static_cast<int32_t>(first_row + column)};
      if (!(score > *last)) continue;
      float* const at = std::upper_bound(best, last, score, std::greater<>());
      std::move_backward(at, last, last + 1);
      *at = score;
      threshold = std::max(threshold, *last - margins_[static_cast<size_t>(query)]);
    }
    if (count > capacity_) make_room(query);
  }

  void make_room(int64_t query) {
    keep_good(query);
    // Making room again and again would cost more than it brings.
    if (4 * (count(query) - k_) <= 3 * spare_) return;
    give_up(query);
  }

  int64_t k_;
  int64_t spare_;
  int64_t capacity_;
  AlignedBuffer<float> thresholds_;
  int64_t best_stride_;
  std::vector<float> best_;
  AlignedBuffer<Candidate> items_;
  std::vector<float> margins_;
  std::vector<int64_t> counts_;  // -1: too many
  std::vector<VectorSize> sizes_;
};

struct Answer {
  float* distances;
  int64_t* indices;
  int64_t k;

  void write(int64_t query, const RankingKey* keys) const {
    for (int64_t i = 0; i < k; ++i) {
      distances[query * k + i] = key_distance(keys[i]);
      indices[query * k + i] = key_row(keys[i]);
    }
  }
};

// What measuring a query's rows needs; one for each thread.
struct Workspace {
  std::vector<int32_t> rows;
  std::vector<float> distances;
  std::vector<RankingKey> keys;

  void measure(const KnnKernel& kernel, const float* query, const Matrix& bank, int64_t best) {
    const size_t count = rows.size();
    distances.resize(count);
    keys.resize(count);
    kernel.squared_distances(query, bank.data, bank.width, rows.data(), static_cast<int64_t>(count),
                             distances.data());
    for (size_t i = 0; i < count; ++i) keys[i] = ranking_key(distances[i], rows[i]);
    std::partial_sort(keys.begin(), keys.begin() + best, keys.end());
  }
};

void search_exhaustively(const KnnKernel& kernel, const Matrix& queries, const Matrix& bank, int64_t query,
                         Workspace& workspace, const Answer& answer) {
  workspace.rows.resize(static_cast<size_t>(bank.rows));
  std::iota(workspace.rows.begin(), workspace.rows.end(), 0);
  workspace.measure(kernel, queries.row(query), bank, answer.k);
  answer.write(query, workspace.keys.data());
}

// About the mean of the bank's rows.
std::vector<float> centre_of(const Matrix& bank) {
  const int64_t step = divide_up(bank.rows, kCentreRows);
  std::vector<float> centre(static_cast<size_t>(bank.width), 0.0f);
  for (int64_t row = 0; row < bank.rows; row += step) {
    const float* from = bank.row(row);
    for (int64_t d = 0; d < bank.width; ++d) centre[static_cast<size_t>(d)] += from[d];
  }
  const float rows = static_cast<float>(divide_up(bank.rows, step));
  for (float& value : centre) value /= rows;
  return centre;
}

// A number as a packed word holds it.
float as_float32(double value) {
  return static_cast<float>(value);
}

// To nearest, ties to even; a value that is not a number stays none.
float as_bf16(double value) {
  const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(value));
  if (std::isnan(value)) return static_cast<float>(value);
  return std::bit_cast<float>((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
}

// The search by candidates, in float32 or in bf16, by whole vectors or by their heads.
class Search {
 public:
  // Scores the first `head` elements and the norm of the others.
  Search(const KnnKernel& kernel, const KnnScoring& scoring, const Matrix& bank, int64_t k, int64_t head)
      : kernel_(kernel),
        scoring_(scoring),
        bank_(bank),
        k_(k),
        head_(head),
        head_words_(divide_up(head, scoring.elements)),
        words_(round_up(head_words_ + (whole() ? 0 : 1), scoring.block)),
        panel_size_((1 + words_) * kernel.columns),
        centre_(centre_of(bank)),
        squared_norms_(static_cast<size_t>(bank.rows)),
        rests_(static_cast<size_t>(bank.rows)),
        part_rows_(std::clamp<int64_t>(
            kPackedBytes / static_cast<int64_t>(sizeof(float)) / panel_size_ * kernel.columns, kernel.columns,
            divide_up(bank.rows, kernel.columns) * kernel.columns)),
        panels_(part_rows_ / kernel.columns * panel_size_) {
    measure_bank();
    pack(0);
  }

  // Whether few enough candidates of queries like these are left to be measured.
  bool pays(const Matrix& queries) const {
    if (!whole() && !one_part()) return false;
    const int64_t step = divide_up(queries.rows, kTrialQueries);
    const Matrix some{queries.data, queries.rows / step, queries.width, step * queries.stride};
    Shortlists lists = lists_for(divide_up(some.rows, scoring_.rows));
    std::vector<float> rests(static_cast<size_t>(some.rows));
    start(some, 0, some.rows, lists, rests);
    const AlignedBuffer<float> packed = packed_queries(some, 0, some.rows, rests);
    show_panels(packed, some.rows, lists);
    int64_t measured = 0;
    const auto count = [&] {
      for (int64_t query = 0; query < some.rows; ++query) {
        measured += lists.keep_good(query) ? lists.count(query) : bank_.rows;
      }
    };
    count();
    if (!whole()) {
      Workspace workspace;
      for (int64_t query = 0; query < some.rows; ++query) widen(some, query, lists, query, workspace);
      show_panels(packed, some.rows, lists);
      count();
    }
    // Scoring whole vectors in float32 takes as long as measuring a third of the bank, in bf16 half as long,
    // by tiles less. Of what whole vectors in bf16 or heads save half must be left.
    const int64_t saved = !whole() && scoring_.elements == 1 ? bank_.rows / 3 : bank_.rows / 6;
    return measured <= some.rows * (k_ + saved / 2);
  }

  void run(const Matrix& queries, const Answer& answer) {
    const int64_t tiles = divide_up(queries.rows, scoring_.rows);
    const int64_t group_tiles = std::clamp<int64_t>(tiles / kFewGroups, 1, kTilesPerGroup);
    const int64_t group_queries = group_tiles * scoring_.rows;
    const int64_t groups = divide_up(tiles, group_tiles);
    // Where the bank comes in parts, the lists of all queries wait for the last one.
    std::vector<Shortlists> waiting;
    if (!one_part()) waiting.reserve(static_cast<size_t>(groups));
    for (int64_t group = 0; !one_part() && group < groups; ++group) waiting.push_back(lists_for(group_tiles));
    for (int64_t first_row = 0; first_row < bank_.rows; first_row += part_rows_) {
      if (first_row != packed_row_) pack(first_row);
      const bool last_part = first_row + part_rows_ >= bank_.rows;
      torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
        std::optional<Shortlists> own;
        if (one_part()) own.emplace(lists_for(group_tiles));
        Workspace workspace;
        std::vector<float> rests(static_cast<size_t>(group_queries));
        for (int64_t group = begin; group < end; ++group) {
          Shortlists& lists = one_part() ? *own : waiting[static_cast<size_t>(group)];
          const int64_t first = group * group_queries;
          const int64_t last = std::min(first + group_queries, queries.rows);
          if (first_row == 0) start(queries, first, last, lists, rests);
          const AlignedBuffer<float> packed = packed_queries(queries, first, last, rests);
          show_panels(packed, last - first, lists);
          if (!whole()) {
            for (int64_t query = first; query < last; ++query) {
              widen(queries, query, lists, query - first, workspace);
            }
            show_panels(packed, last - first, lists);
          }
          for (int64_t query = first; last_part && query < last; ++query) {
            if (!rank(queries, query, lists, query - first, workspace, answer)) {
              search_exhaustively(kernel_, queries, bank_, query, workspace, answer);
            }
          }
        }
      });
    }
  }

 private:
  // Of a vector less the centre.
  struct Measured {
    double squared_norm;
    double squared_rounding;
    float rest;  // norm of what is behind the head, rounded as it is packed
  };

  bool whole() const { return head_ == bank_.width; }
  bool one_part() const { return part_rows_ >= bank_.rows; }
  Shortlists lists_for(int64_t tiles) const { return {tiles * scoring_.rows, k_, bank_.rows}; }

  Measured measure(const float* row) const {
    const PackedSize head = scoring_.measure(row, head_, centre_.data());
    if (whole()) return {head.squared_norm, head.squared_rounding, 0.0f};
    const double squared =
        kernel_.float32.measure(row + head_, bank_.width - head_, centre_.data() + head_).squared_norm;
    const double norm = std::sqrt(squared);
    const float rest = scoring_.elements == 1 ? as_float32(norm) : as_bf16(norm);
    const double rounding = norm - static_cast<double>(rest);
    return {head.squared_norm + squared, head.squared_rounding + rounding * rounding, rest};
  }

  VectorSize size_of(double squared_norm, double squared_rounding) const {
    if (scoring_.elements == 1 && whole()) return {std::sqrt(squared_norm)};
    // The roundings' sum was made in float32 and may have underflowed.
    const double rounding = squared_rounding * (1.0 + rounding_growth(bank_.width)) +
                            static_cast<double>(bank_.width) * std::numeric_limits<float>::min();
    return {std::sqrt(squared_norm), std::sqrt(rounding)};
  }

  void measure_bank() {
    std::vector<double> roundings(static_cast<size_t>(bank_.rows));
    torch::stable::parallel_for(0, bank_.rows, 256, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const Measured measured = measure(bank_.row(row));
        squared_norms_[static_cast<size_t>(row)] = measured.squared_norm;
        roundings[static_cast<size_t>(row)] = measured.squared_rounding;
        rests_[static_cast<size_t>(row)] = measured.rest;
      }
    });
    bank_size_ = size_of(largest(squared_norms_), largest(roundings));
  }

  // Infinity where there is a NaN: no query is certified then.
  static double largest(const std::vector<double>& values) {
    double result = 0.0;
    for (const double value : values) {
      if (std::isnan(value)) return std::numeric_limits<double>::infinity();
      result = std::max(result, value);
    }
    return result;
  }

  // Packs the part of the bank that begins at `first_row` as panels [1 + words][columns], the first line of a
  // panel being the scores' start values -|y|^2 / 2. Columns past the last row start at -infinity: they never
  // win.
  void pack(int64_t first_row) {
    packed_row_ = first_row;
    packed_panels_ = divide_up(std::min(part_rows_, bank_.rows - first_row), kernel_.columns);
    torch::stable::parallel_for(0, packed_panels_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        float* to = panels_.data() + panel * panel_size_;
        const int64_t first = first_row + panel * kernel_.columns;
        const int64_t filled = std::min<int64_t>(kernel_.columns, bank_.rows - first);
        for (int64_t c = 0; c < kernel_.columns; ++c) {
          to[c] = c < filled ? static_cast<float>(-0.5 * squared_norms_[static_cast<size_t>(first + c)])
                             : -kInfinity;
        }
        to += kernel_.columns;
        scoring_.pack_bank(bank_.row(first), bank_.stride, filled, head_, centre_.data(), to);
        const auto word = [&](int64_t w, int64_t c) -> float& { return to[w * kernel_.columns + c]; };
        finish_packing(rests_.data() + first, filled, kernel_.columns, word);
      }
    });
  }

  // Writes the words behind the head's of `vectors` packed ones: the norm of the rest, and zeros.
  template <class Word>
  void finish_packing(const float* rests, int64_t filled, int64_t vectors, const Word& word) const {
    for (int64_t w = head_words_; w < words_; ++w) {
      const bool of_rests = w == head_words_ && !whole();
      // Beside a bf16 number in the upper half of the word stands a zero in the lower one.
      for (int64_t v = 0; v < vectors; ++v) word(w, v) = of_rests && v < filled ? rests[v] : 0.0f;
    }
  }

  // Empty lists for the queries first..last.
  void start(const Matrix& queries, int64_t first, int64_t last, Shortlists& lists,
             std::vector<float>& rests) const {
    for (int64_t query = first; query < last; ++query) {
      const Measured measured = measure(queries.row(query));
      const VectorSize size = size_of(measured.squared_norm, measured.squared_rounding);
      lists.start(query - first, size, score_margin(size, bank_size_, bank_.width));
      rests[static_cast<size_t>(query - first)] = measured.rest;
    }
    for (int64_t slot = last - first; slot % scoring_.rows != 0; ++slot) lists.close(slot);
  }

  AlignedBuffer<float> packed_queries(const Matrix& queries, int64_t first, int64_t last,
                                      const std::vector<float>& rests) const {
    const int64_t tile_size = scoring_.rows * words_;
    const int64_t tiles = divide_up(last - first, scoring_.rows);
    AlignedBuffer<float> packed(tiles * tile_size + 16);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t query = first + t * scoring_.rows;
      const int64_t filled = std::min<int64_t>(scoring_.rows, last - query);
      float* const to = packed.data() + t * tile_size;
      scoring_.pack_queries(queries.row(query), queries.stride, filled, head_, centre_.data(), to);
      const auto word = [&](int64_t w, int64_t r) -> float& { return to[scoring_.query_word(w, r)]; };
      finish_packing(rests.data() + t * scoring_.rows, filled, scoring_.rows, word);
    }
    return packed;
  }

  // Shows the packed part of the bank to packed queries.
  void show_panels(const AlignedBuffer<float>& packed, int64_t queries, Shortlists& lists) const {
    const int64_t tile_size = scoring_.rows * words_;
    const int64_t tiles = divide_up(queries, scoring_.rows);
    alignas(64) float scores[kMostColumns * kMostColumns];
    uint32_t hits[kMostColumns];
    if (scoring_.begin != nullptr) scoring_.begin();
    for (int64_t p = 0; p < packed_panels_; ++p) {
      const float* panel = panels_.data() + p * panel_size_;
      const int64_t first_row = packed_row_ + p * kernel_.columns;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t slot = t * scoring_.rows;
        uint32_t hit_rows = scoring_.score_tile(packed.data() + t * tile_size, panel, words_,
                                                lists.thresholds() + slot, scores, hits);
        for (; hit_rows != 0; hit_rows &= hit_rows - 1) {
          const int r = std::countr_zero(hit_rows);
          lists.insert(slot + r, scores + r * kernel_.columns, hits[r], first_row);
        }
      }
    }
    if (scoring_.end != nullptr) scoring_.end();
  }

  // The best by their heads are measured. What can be nearer than the k-th of them scores above a threshold:
  // the lists begin anew with that.
  void widen(const Matrix& queries, int64_t query, Shortlists& lists, int64_t slot,
             Workspace& workspace) const {
    if (!lists.keep_good(slot) || lists.count(slot) < k_) return lists.give_up(slot);
    measure_candidates(queries, query, lists, slot, workspace);
    const double kth = key_distance(workspace.keys[static_cast<size_t>(k_ - 1)]);
    const VectorSize size = lists.size(slot);
    const double threshold =
        0.5 * (size.norm * size.norm - kth) - score_margin(size, bank_size_, bank_.width);
    lists.reopen(slot, static_cast<float>(threshold));
  }

  void measure_candidates(const Matrix& queries, int64_t query, const Shortlists& lists, int64_t slot,
                          Workspace& workspace) const {
    const int64_t count = lists.count(slot);
    workspace.rows.resize(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) workspace.rows[static_cast<size_t>(i)] = lists.begin(slot)[i].row;
    workspace.measure(kernel_, queries.row(query), bank_, k_);
  }

  // Measures the query's candidates directly. False where a row that is no candidate might belong in the
  // answer.
  bool rank(const Matrix& queries, int64_t query, Shortlists& lists, int64_t slot, Workspace& workspace,
            const Answer& answer) const {
    if (!lists.keep_good(slot)) return false;
    const int64_t count = lists.count(slot);
    if (count < k_) return false;
    measure_candidates(queries, query, lists, slot, workspace);
    const double kth = key_distance(workspace.keys[static_cast<size_t>(k_ - 1)]);
    if (count < bank_.rows && !no_closer_row_outside(lists.size(slot), bank_size_, lists.thresholds()[slot],
                                                     kth, bank_.width, true)) {
      return false;
    }
    answer.write(query, workspace.keys.data());
    return true;
  }

  const KnnKernel& kernel_;
  const KnnScoring& scoring_;
  const Matrix& bank_;
  int64_t k_;
  int64_t head_;  // elements that are scored one by one
  int64_t head_words_;
  int64_t words_;  // of a packed row
  int64_t panel_size_;
  std::vector<float> centre_;
  std::vector<double> squared_norms_;  // of the bank's rows less the centre
  std::vector<float> rests_;           // norms of what is behind their heads
  VectorSize bank_size_{};
  int64_t part_rows_;  // of the bank that are packed at a time
  AlignedBuffer<float> panels_;
  int64_t packed_row_ = 0;
  int64_t packed_panels_ = 0;
};

void search_by_candidates(const KnnKernel& kernel, const Matrix& queries, const Matrix& bank, bool bf16,
                          const Answer& answer) {
  const bool tiles = active_level() == Level::amx;
  if (bf16 && tiles) {
    // Scoring whole vectors is faster here than measuring what their heads leave.
    Search search(kernel, kernel.amx, bank, answer.k, bank.width);
    if (search.pays(queries)) return search.run(queries, answer);
  }
  // Beside tiles, the other bf16 instructions are no faster than float32's.
  const bool narrow = bf16 && !tiles && kernel.bf16.elements != 0;
  if (bank.width >= kWide && queries.rows >= kManyQueries) {
    const int64_t head = round_up(bank.width / 8, 32);
    Search search(kernel, narrow ? kernel.bf16 : kernel.float32, bank, answer.k, head);
    if (search.pays(queries)) return search.run(queries, answer);
  }
  if (narrow) {
    Search search(kernel, kernel.bf16, bank, answer.k, bank.width);
    if (search.pays(queries)) return search.run(queries, answer);
  }
  Search(kernel, kernel.float32, bank, answer.k, bank.width).run(queries, answer);
}

}  // namespace

std::tuple<Tensor, Tensor> knn(const Tensor& queries_given, const Tensor& bank_given, int64_t k,
                               const std::string& precision) {
  check_knn(queries_given, bank_given, k, precision);
  const Tensor queries = in_order("knn", "queries", queries_given);
  const Tensor bank = in_order("knn", "bank", bank_given);
  const int64_t width = queries.size(1);
  const Matrix q{queries.const_data_ptr<float>(), queries.size(0), width, width};
  const Matrix b{bank.const_data_ptr<float>(), bank.size(0), width, width};
  Tensor distances = torch::stable::new_empty(queries, {q.rows, k});
  Tensor indices = torch::stable::new_empty(queries, {q.rows, k}, torch::headeronly::ScalarType::Long);
  if (q.rows == 0) return {distances, indices};

  const Answer answer{distances.mutable_data_ptr<float>(), indices.mutable_data_ptr<int64_t>(), k};
  const KnnKernel& kernel = PYDEFECT_ACTIVE_KERNEL(knn_kernel);
  if (q.rows < kFewQueries || k > kLongestList) {
    torch::stable::parallel_for(0, q.rows, 1, [&](int64_t begin, int64_t end) {
      Workspace workspace;
      for (int64_t query = begin; query < end; ++query) {
        search_exhaustively(kernel, q, b, query, workspace, answer);
      }
    });
  } else {
    search_by_candidates(kernel, q, b, precision == "bf16", answer);
  }
  return {distances, indices};
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, CPU, library) {
  library.impl("knn", TORCH_BOX(&knn));
}

}  // namespace pydefect::cpu
