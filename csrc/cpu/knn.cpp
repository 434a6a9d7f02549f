// k-NN on the CPU. Candidates come from the expanded form in register tiles over a packed bank; only winners
// are measured directly. csrc/knn_certificate.h says why the answer is that of measuring everything directly,
// so it depends on neither the thread count nor the blocking nor the instruction set.
#include "kernels/knn.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "../knn_certificate.h"
#include "../ranking_key.h"
#include "aligned.h"
#include "dispatch.h"

namespace pydefect::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// The packed part of the bank stays this small, whatever the bank's size.
constexpr int64_t kPackedBytes = int64_t{64} << 20;
// Tiles of queries that share one pass over the bank: a panel is read from L2 once for all of them.
constexpr int64_t kTilesPerPass = 8;
// With fewer queries than this, packing the bank costs more than it saves.
constexpr int64_t kFewQueries = 16;
// Sorted insertion is quick for short lists only.
constexpr int64_t kLongestList = 1024;

struct Matrix {
  const float* data;
  int64_t rows;
  int64_t width;

  const float* row(int64_t index) const { return data + index * width; }
};

struct Candidate {
  float score;
  int32_t row;
};

// Every query's best rows so far, best score first.
class CandidateLists {
 public:
  CandidateLists(int64_t queries, int64_t capacity)
      : capacity_(capacity),
        items_(static_cast<size_t>(queries * capacity)),
        sizes_(static_cast<size_t>(queries), 0) {}

  const Candidate* begin(int64_t query) const { return items_.data() + query * capacity_; }
  int64_t size(int64_t query) const { return sizes_[static_cast<size_t>(query)]; }
  bool full(int64_t query) const { return size(query) == capacity_; }

  // Only a larger score enters; NaN and -infinity never do.
  float threshold(int64_t query) const {
    return full(query) ? begin(query)[capacity_ - 1].score : -kInfinity;
  }

  void insert(int64_t query, Candidate candidate) {
    if (!(candidate.score > threshold(query))) return;
    int64_t& size = sizes_[static_cast<size_t>(query)];
    if (size < capacity_) ++size;
    Candidate* first = items_.data() + query * capacity_;
    Candidate* last = first + size - 1;
    Candidate* at = std::upper_bound(
        first, last, candidate, [](const Candidate& a, const Candidate& b) { return a.score > b.score; });
    std::move_backward(at, last, last + 1);
    *at = candidate;
  }

 private:
  int64_t capacity_;
  std::vector<Candidate> items_;
  std::vector<int64_t> sizes_;
};

double squared_norm(const float* row, int64_t width) {
  double sum = 0.0;
  for (int64_t d = 0; d < width; ++d) sum += static_cast<double>(row[d]) * row[d];
  return sum;
}

// Infinity where there is a NaN: no query is certified then.
double largest(const std::vector<double>& values) {
  double result = 0.0;
  for (const double value : values) {
    if (std::isnan(value)) return std::numeric_limits<double>::infinity();
    result = std::max(result, value);
  }
  return result;
}

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// A part of the bank as panels of `columns` rows: [panel][1 + width][columns], the first line of a panel
// being the scores' start values -|y|^2 / 2. Columns past the last row start at -infinity and so never win.
class PackedBank {
 public:
  PackedBank(int columns, int64_t width, int64_t most_rows)
      : columns_(columns), width_(width), panels_(divide_up(most_rows, columns) * panel_size()) {}

  void pack(const Matrix& bank, const std::vector<double>& squared_norms, int64_t first, int64_t last) {
    first_row_ = first;
    panel_count_ = divide_up(last - first, columns_);
    torch::stable::parallel_for(0, panel_count_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) pack_panel(bank, squared_norms, panel, last);
    });
  }

  int64_t panel_count() const { return panel_count_; }
  const float* panel(int64_t index) const { return panels_.data() + index * panel_size(); }
  int64_t row_of(int64_t panel) const { return first_row_ + panel * columns_; }

 private:
  int64_t panel_size() const { return (1 + width_) * columns_; }

  void pack_panel(const Matrix& bank, const std::vector<double>& squared_norms, int64_t panel, int64_t last) {
    float* to = panels_.data() + panel * panel_size();
    const int64_t first = row_of(panel);
    const int64_t filled = std::min<int64_t>(columns_, last - first);
    std::fill(to, to + panel_size(), 0.0f);
    std::fill(to + filled, to + columns_, -kInfinity);
    for (int64_t c = 0; c < filled; ++c) {
      const float* row = bank.row(first + c);
      to[c] = static_cast<float>(-0.5 * squared_norms[static_cast<size_t>(first + c)]);
      for (int64_t d = 0; d < width_; ++d) to[(1 + d) * columns_ + c] = row[d];
    }
  }

  int64_t columns_;
  int64_t width_;
  int64_t first_row_ = 0;
  int64_t panel_count_ = 0;
  AlignedBuffer<float> panels_;
};

// Writes rows first.. of the queries as [width][rows of a tile]; missing rows are zero.
void pack_queries(const Matrix& queries, int64_t first, int tile_rows, float* to) {
  const int64_t filled = std::min<int64_t>(tile_rows, queries.rows - first);
  for (int64_t d = 0; d < queries.width; ++d, to += tile_rows) {
    for (int64_t r = 0; r < filled; ++r) to[r] = queries.row(first + r)[d];
    std::fill(to + filled, to + tile_rows, 0.0f);
  }
}

// Shows one panel to one tile of queries.
void search_panel(const KnnKernel& kernel, const float* tile, const float* panel, int64_t width,
                  int64_t first_query, int64_t filled, int64_t first_row, CandidateLists& lists) {
  float thresholds[32];
  float scores[32 * 32];
  uint32_t hits[32];
  for (int64_t r = 0; r < kernel.rows; ++r) {
    thresholds[r] = r < filled ? lists.threshold(first_query + r) : kInfinity;
  }
  if (!kernel.score_tile(tile, panel, width, thresholds, scores, hits)) return;
  for (int64_t r = 0; r < filled; ++r) {
    for (uint32_t bits = hits[r]; bits != 0; bits &= bits - 1) {
      const int column = std::countr_zero(bits);
      lists.insert(first_query + r,
                   {scores[r * kernel.columns + column], static_cast<int32_t>(first_row + column)});
    }
  }
}

// Shows the packed part of the bank to the tiles begin..end of the queries.
void search_tiles(const KnnKernel& kernel, const Matrix& queries, const PackedBank& packed, int64_t begin,
                  int64_t end, CandidateLists& lists) {
  const int64_t tile_size = kernel.rows * queries.width;
  AlignedBuffer<float> tiles(std::min(kTilesPerPass, end - begin) * tile_size);
  for (int64_t first = begin; first < end; first += kTilesPerPass) {
    const int64_t last = std::min(first + kTilesPerPass, end);
    for (int64_t t = first; t < last; ++t) {
      pack_queries(queries, t * kernel.rows, kernel.rows, tiles.data() + (t - first) * tile_size);
    }
    for (int64_t p = 0; p < packed.panel_count(); ++p) {
      for (int64_t t = first; t < last; ++t) {
        const int64_t query = t * kernel.rows;
        search_panel(kernel, tiles.data() + (t - first) * tile_size, packed.panel(p), queries.width, query,
                     std::min<int64_t>(kernel.rows, queries.rows - query), packed.row_of(p), lists);
      }
    }
  }
}

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

void search_exhaustively(const KnnKernel& kernel, const Matrix& queries, const Matrix& bank, int64_t query,
                         std::vector<RankingKey>& keys, const Answer& answer) {
  keys.resize(static_cast<size_t>(bank.rows));
  for (int64_t row = 0; row < bank.rows; ++row) {
    keys[static_cast<size_t>(row)] =
        ranking_key(kernel.squared_distance(queries.row(query), bank.row(row), bank.width), row);
  }
  std::partial_sort(keys.begin(), keys.begin() + answer.k, keys.end());
  answer.write(query, keys.data());
}

// Measures the query's candidates directly. False where a row that is no candidate might belong in the
// answer.
bool rank_candidates(const KnnKernel& kernel, const Matrix& queries, const Matrix& bank, double bank_norm,
                     const CandidateLists& lists, int64_t query, std::vector<RankingKey>& keys,
                     const Answer& answer) {
  const int64_t size = lists.size(query);
  if (size < std::min(answer.k + kSpareCandidates, bank.rows)) return false;
  keys.resize(static_cast<size_t>(size));
  for (int64_t i = 0; i < size; ++i) {
    const int32_t row = lists.begin(query)[i].row;
    keys[static_cast<size_t>(i)] =
        ranking_key(kernel.squared_distance(queries.row(query), bank.row(row), bank.width), row);
  }
  std::sort(keys.begin(), keys.end());
  const double query_norm = std::sqrt(squared_norm(queries.row(query), queries.width));
  const double kth = key_distance(keys[static_cast<size_t>(answer.k - 1)]);
  if (size < bank.rows &&
      !no_closer_row_outside(query_norm, bank_norm, lists.threshold(query), kth, bank.width)) {
    return false;
  }
  answer.write(query, keys.data());
  return true;
}

void search_by_candidates(const KnnKernel& kernel, const Matrix& queries, const Matrix& bank,
                          const Answer& answer) {
  std::vector<double> squared_norms(static_cast<size_t>(bank.rows));
  torch::stable::parallel_for(0, bank.rows, 256, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      squared_norms[static_cast<size_t>(row)] = squared_norm(bank.row(row), bank.width);
    }
  });
  const double bank_norm = std::sqrt(largest(squared_norms));

  CandidateLists lists(queries.rows, std::min(answer.k + kSpareCandidates, bank.rows));
  const int64_t most_rows = std::clamp<int64_t>(
      kPackedBytes / static_cast<int64_t>(sizeof(float)) / (bank.width + 1) / kernel.columns * kernel.columns,
      kernel.columns, divide_up(bank.rows, kernel.columns) * kernel.columns);
  PackedBank packed(kernel.columns, bank.width, most_rows);
  for (int64_t first = 0; first < bank.rows; first += most_rows) {
    packed.pack(bank, squared_norms, first, std::min(first + most_rows, bank.rows));
    torch::stable::parallel_for(0, divide_up(queries.rows, kernel.rows), 1, [&](int64_t begin, int64_t end) {
      search_tiles(kernel, queries, packed, begin, end, lists);
    });
  }
  torch::stable::parallel_for(0, queries.rows, 16, [&](int64_t begin, int64_t end) {
    std::vector<RankingKey> keys;
    for (int64_t query = begin; query < end; ++query) {
      if (!rank_candidates(kernel, queries, bank, bank_norm, lists, query, keys, answer)) {
        search_exhaustively(kernel, queries, bank, query, keys, answer);
      }
    }
  });
}

std::tuple<Tensor, Tensor> knn(const Tensor& queries_given, const Tensor& bank_given, int64_t k) {
  check_knn(queries_given, bank_given, k);
  const Tensor queries = in_order("knn", "queries", queries_given);
  const Tensor bank = in_order("knn", "bank", bank_given);
  const Matrix q{queries.const_data_ptr<float>(), queries.size(0), queries.size(1)};
  const Matrix b{bank.const_data_ptr<float>(), bank.size(0), bank.size(1)};
  Tensor distances = torch::stable::new_empty(queries, {q.rows, k});
  Tensor indices = torch::stable::new_empty(queries, {q.rows, k}, torch::headeronly::ScalarType::Long);
  if (q.rows == 0) return {distances, indices};

  const Answer answer{distances.mutable_data_ptr<float>(), indices.mutable_data_ptr<int64_t>(), k};
  const KnnKernel& kernel = PYDEFECT_ACTIVE_KERNEL(knn_kernel);
  if (q.rows < kFewQueries || k > kLongestList) {
    torch::stable::parallel_for(0, q.rows, 1, [&](int64_t begin, int64_t end) {
      std::vector<RankingKey> keys;
      for (int64_t query = begin; query < end; ++query) {
        search_exhaustively(kernel, q, b, query, keys, answer);
      }
    });
  } else {
    search_by_candidates(kernel, q, b, answer);
  }
  return {distances, indices};
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, CPU, library) {
  library.impl("knn", TORCH_BOX(&knn));
}

}  // namespace
}  // namespace pydefect::cpu
