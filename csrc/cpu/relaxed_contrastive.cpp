// The relaxed contrastive loss on the CPU. Distances of all pairs are computed tile by tile, once for the row
// means, once for the loss and once for the gradient; nothing of size N x N is kept. Distances are symmetric,
// so only tiles on and above the diagonal are computed, and serve both of their patches.
//
// Rows are taken in blocks. For one block I after the other, the blocks J >= I are dealt out to a fixed
// number of lanes; a lane adds to the rows of J directly, since no other lane of this I touches them, and to
// the rows of I in a partial sum of its own. Lanes are threads' work units; who runs which does not change
// any sum's order.
#include "kernels/relaxed_contrastive.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "aligned.h"
#include "dispatch.h"
#include "rounding.h"

namespace pydefect::cpu {
namespace {

// 288 rows on AVX-512: 4 to 8 panels differ by a few percent.
constexpr int64_t kPanelsPerBlock = 6;
constexpr int64_t kLanes = 16;
// An odd number of cache lines more than a block's rows, so that columns of a tile do not share cache sets.
constexpr int64_t kStridePadding = 16;

struct Settings {
  ContrastiveTerms terms;
  bool mean;
};

// Column means, added up in a fixed order.
std::vector<float> column_means(const float* rows, int64_t count, int64_t width) {
  std::vector<float> means(static_cast<size_t>(width));
  torch::stable::parallel_for(0, width, 64, [&](int64_t begin, int64_t end) {
    std::vector<double> sums(static_cast<size_t>(end - begin), 0.0);
    for (int64_t r = 0; r < count; ++r) {
      const float* row = rows + r * width;
      for (int64_t d = begin; d < end; ++d) sums[static_cast<size_t>(d - begin)] += row[d];
    }
    for (int64_t d = begin; d < end; ++d) {
      means[static_cast<size_t>(d)] =
          static_cast<float>(sums[static_cast<size_t>(d - begin)] / static_cast<double>(count));
    }
  });
  return means;
}

// The patches, what is known about each of them, and how they are cut into panels and blocks.
class Patches {
 public:
  Patches(const float* z, const float* target, int64_t count, int64_t width, const Settings& settings)
      : kernel(PYDEFECT_ACTIVE_KERNEL(relaxed_contrastive_kernel)),
        settings(settings),
        z(z),
        target(target),
        count(count),
        width(width),
        block_rows(kPanelsPerBlock * kernel.panel),
        blocks(divide_up(count, block_rows)),
        lanes(std::min(kLanes, blocks)),
        // Distances do not change under a shift; near the origin the products lose fewer digits. Where pairs
        // of one online and one target vector are measured, both need the same shift.
        target_centre(column_means(target, count, width)),
        centre(settings.terms.cross ? target_centre : column_means(z, count, width)),
        norms_(padded()),
        label_norms_(padded()),
        inverse_means_(padded()),
        slopes_(padded()),
        valid_(padded()) {
    std::fill_n(inverse_means_.data(), padded(), 0.0f);
    std::fill_n(slopes_.data(), padded(), 0.0f);
    std::fill_n(valid_.data(), padded(), 0.0f);
    std::fill_n(valid_.data(), count, 1.0f);
    torch::stable::parallel_for(0, padded() / kernel.panel, 1, [&](int64_t begin, int64_t end) {
      AlignedBuffer<float> panel(width * kernel.panel);
      for (int64_t p = begin; p < end; ++p) {
        const int64_t first = p * kernel.panel;
        pack_panel(z, centre, first, panel.data());
        kernel.norms(panel.data(), width, norms_.data() + first);
        if (!settings.terms.pairwise) continue;
        pack_panel(target, target_centre, first, panel.data());
        kernel.norms(panel.data(), width, label_norms_.data() + first);
      }
    });
  }

  int64_t padded() const { return blocks * block_rows; }
  int64_t rows_from(int64_t first, int64_t most) const { return std::clamp<int64_t>(count - first, 0, most); }

  float* inverse_means() { return inverse_means_.data(); }
  float* slopes() { return slopes_.data(); }

  PanelFacts facts(int64_t first) const {
    return {norms_.data() + first, label_norms_.data() + first, inverse_means_.data() + first,
            slopes_.data() + first, valid_.data() + first};
  }

  void pack_panel(const float* rows, const std::vector<float>& shift, int64_t first, float* panel) const {
    kernel.pack(rows + first * width, rows_from(first, kernel.panel), width, shift.data(), panel);
  }

  const RelaxedContrastiveKernel& kernel;
  const Settings settings;
  const float* const z;
  const float* const target;
  const int64_t count;
  const int64_t width;
  const int64_t block_rows;
  const int64_t blocks;
  const int64_t lanes;
  const std::vector<float> target_centre;
  const std::vector<float> centre;

 private:
  AlignedBuffer<float> norms_;
  AlignedBuffer<float> label_norms_;
  AlignedBuffer<float> inverse_means_;
  AlignedBuffer<float> slopes_;
  AlignedBuffer<float> valid_;
};

// One block's vectors as packed panels.
class PackedBlock {
 public:
  PackedBlock(const Patches& patches, bool with_labels)
      : patches_(patches),
        with_labels_(with_labels && patches.settings.terms.pairwise),
        online_(size()),
        label_(with_labels_ ? size() : 0) {}

  void pack(int64_t block) {
    block_ = block;
    for (int64_t p = 0; p < kPanelsPerBlock; ++p) {
      patches_.pack_panel(patches_.z, patches_.centre, first_row(p), online_.data() + p * panel_size());
      if (!with_labels_) continue;
      patches_.pack_panel(patches_.target, patches_.target_centre, first_row(p),
                          label_.data() + p * panel_size());
    }
  }

  int64_t block() const { return block_; }
  bool with_labels() const { return with_labels_; }
  int64_t first_row() const { return block_ * patches_.block_rows; }
  int64_t first_row(int64_t panel) const { return first_row() + panel * patches_.kernel.panel; }
  int64_t rows() const { return patches_.rows_from(first_row(), patches_.block_rows); }
  const float* online(int64_t panel) const { return online_.data() + panel * panel_size(); }
  const float* label(int64_t panel) const { return label_.data() + panel * panel_size(); }

 private:
  int64_t panel_size() const { return patches_.width * patches_.kernel.panel; }
  int64_t size() const { return kPanelsPerBlock * panel_size(); }

  const Patches& patches_;
  int64_t block_ = 0;
  bool with_labels_;
  AlignedBuffer<float> online_;
  AlignedBuffer<float> label_;
};

// Calls use(row panel, column panel, tile) for every tile of a pair of blocks that holds patches.
template <class Use>
void for_each_tile(const Patches& patches, const PackedBlock& a, const PackedBlock& b, Use use) {
  alignas(64) float products[kLargestPanel * kLargestPanel];
  alignas(64) float label_products[kLargestPanel * kLargestPanel];
  alignas(64) float mirrored_products[kLargestPanel * kLargestPanel];
  const RelaxedContrastiveKernel& kernel = patches.kernel;
  for (int64_t j = 0; j < kPanelsPerBlock && b.first_row(j) < patches.count; ++j) {
    for (int64_t i = 0; i < kPanelsPerBlock && a.first_row(i) < patches.count; ++i) {
      const bool diagonal = a.first_row(i) == b.first_row(j);
      const PanelFacts facts = patches.facts(a.first_row(i));
      kernel.products(a.online(i), b.online(j), patches.width, products);
      if (a.with_labels()) {
        if (patches.settings.terms.cross) {
          kernel.products(a.online(i), b.label(j), patches.width, label_products);
          kernel.products(a.label(i), b.online(j), patches.width, mirrored_products);
        } else {
          kernel.products(a.label(i), b.label(j), patches.width, label_products);
        }
      }
      const auto rows = static_cast<int>(patches.rows_from(a.first_row(i), kernel.panel));
      for (int r = 0; diagonal && r < rows; ++r) {
        // A patch's distance from itself is 0, whatever is not finite elsewhere.
        products[r * kernel.panel + r] = facts.norms[r];
        if (!patches.settings.terms.cross) label_products[r * kernel.panel + r] = facts.label_norms[r];
      }
      use(i, j, PairTile{products, label_products, mirrored_products, rows});
    }
  }
}

// Sums over all pairs of a patch, `kinds` of them at a time.
class RowSums {
 public:
  RowSums(const Patches& patches, int64_t kinds)
      : patches_(patches),
        totals_(static_cast<size_t>(kinds * patches.padded()), 0.0),
        partial_(static_cast<size_t>(patches.lanes * kinds * patches.block_rows), 0.0),
        kinds_(kinds) {}

  double* totals(int64_t kind) { return totals_.data() + kind * patches_.padded(); }
  double* of_block(int64_t kind, int64_t block) { return totals(kind) + block * patches_.block_rows; }
  double* partial(int64_t kind, int64_t lane) {
    return partial_.data() + (lane * kinds_ + kind) * patches_.block_rows;
  }

  // Moves the lanes' sums to the totals of their block.
  void finish(int64_t block) {
    for (int64_t lane = 0; lane < patches_.lanes; ++lane) {
      for (int64_t kind = 0; kind < kinds_; ++kind) {
        for (int64_t r = 0; r < patches_.block_rows; ++r) {
          of_block(kind, block)[r] += partial(kind, lane)[r];
          partial(kind, lane)[r] = 0.0;
        }
      }
    }
  }

 private:
  const Patches& patches_;
  std::vector<double> totals_;
  std::vector<double> partial_;
  int64_t kinds_;
};

// One block's sums over the pairs with one other block, in single precision.
struct BlockSums {
  explicit BlockSums(int64_t rows) : values(static_cast<size_t>(rows)) {}

  void clear() { std::fill(values.begin(), values.end(), 0.0f); }
  void add_to(double* sums) const {
    for (size_t r = 0; r < values.size(); ++r) sums[r] += values[r];
  }
  float* from(int64_t row) { return values.data() + row; }

  std::vector<float> values;
};

// For every block I, packed as `a`: start(a), work(a, first lane, last lane) for parts of its lanes,
// finish(a). Lane l has the blocks I + l, I + l + lanes, ...
template <class Start, class Work, class Finish>
void sweep(const Patches& patches, bool with_labels, Start start, Work work, Finish finish) {
  PackedBlock a(patches, with_labels);
  for (int64_t block = 0; block < patches.blocks; ++block) {
    a.pack(block);
    start(a);
    const int64_t lanes = std::min(patches.lanes, patches.blocks - block);
    torch::stable::parallel_for(0, lanes, 1, [&](int64_t begin, int64_t end) { work(a, begin, end); });
    finish(a);
  }
}

void find_inverse_means(Patches& patches) {
  RowSums sums(patches, 1);
  const int64_t panel = patches.kernel.panel;
  sweep(
      patches, false, [](const PackedBlock&) {},
      [&](const PackedBlock& a, int64_t begin, int64_t end) {
        PackedBlock b(patches, false);
        BlockSums rows(patches.block_rows), columns(patches.block_rows);
        for (int64_t lane = begin; lane < end; ++lane) {
          for (int64_t block = a.block() + lane; block < patches.blocks; block += patches.lanes) {
            b.pack(block);
            rows.clear();
            columns.clear();
            for_each_tile(patches, a, b, [&](int64_t i, int64_t j, const PairTile& tile) {
              patches.kernel.add_distances(tile, patches.facts(a.first_row(i)), patches.facts(b.first_row(j)),
                                           rows.from(i * panel), columns.from(j * panel));
            });
            rows.add_to(sums.partial(0, lane));
            if (block != a.block()) columns.add_to(sums.of_block(0, block));
          }
        }
      },
      [&](const PackedBlock& a) { sums.finish(a.block()); });
  for (int64_t i = 0; i < patches.count; ++i) {
    patches.inverse_means()[i] = static_cast<float>(static_cast<double>(patches.count) / sums.totals(0)[i]);
  }
}

// The k nearest of every patch and the share of neighbours that each of them has in common with it, times
// 1 - alpha: the sparse part of the label, equations (2) and (3).
class SparseLabel {
 public:
  SparseLabel(const int64_t* neighbors, int64_t count, int64_t k, double alpha)
      : neighbors_(neighbors),
        k_(k),
        share_(static_cast<float>((1.0 - alpha) / static_cast<double>(std::max<int64_t>(k, 1)))) {
    for (int64_t e = 0; e < count * k; ++e) {
      check(neighbors[e] >= 0 && neighbors[e] < count,
            "relaxed_contrastive: neighbors must be between 0 and ", count - 1, ", got ", neighbors[e]);
    }
  }

  int64_t k() const { return k_; }
  int64_t neighbor(int64_t i, int64_t position) const { return neighbors_[i * k_ + position]; }
  float weight(int64_t i, int64_t position) const {
    const int64_t* mine = neighbors_ + i * k_;
    const int64_t* theirs = neighbors_ + mine[position] * k_;
    int64_t common = 0;
    for (int64_t a = 0; a < k_; ++a) common += std::count(theirs, theirs + k_, mine[a]);
    return share_ * static_cast<float>(common);
  }

 private:
  const int64_t* neighbors_;
  int64_t k_;
  float share_;
};

// A patch's distances from its neighbours, as the tiles have them: near duplicates repel each other in the
// dense part with a force that grows with their nearness, and the sparse part has to take back that very
// force.
class NeighborDistances {
 public:
  NeighborDistances(const Patches& patches, const SparseLabel& label)
      : patches_(patches),
        label_(label),
        neighbors_(static_cast<size_t>(label.k())),
        norms_(neighbors_.size()),
        distances_(neighbors_.size()) {}

  const float* of(int64_t i) {
    const float* norms = patches_.facts(0).norms;
    for (size_t position = 0; position < neighbors_.size(); ++position) {
      const int64_t j = label_.neighbor(i, static_cast<int64_t>(position));
      neighbors_[position] = patches_.z + j * patches_.width;
      norms_[position] = norms[j];
    }
    patches_.kernel.distances(patches_.z + i * patches_.width, norms[i], neighbors_.data(), norms_.data(),
                              label_.k(), patches_.centre.data(), patches_.width, distances_.data());
    return distances_.data();
  }

 private:
  const Patches& patches_;
  const SparseLabel& label_;
  std::vector<const float*> neighbors_;
  std::vector<float> norms_;
  std::vector<float> distances_;
};

// What a pair's sparse label adds to the loss and to its derivative.
struct SparseTerm {
  SparseTerm(const Patches& patches, const SparseLabel& label, int64_t i, int64_t position, float distance) {
    const PanelFacts all = patches.facts(0);
    const float weight = label.weight(i, position);
    const float relative = distance * all.inverse_means[i];
    const float repulsion = std::max(patches.settings.terms.margin - relative, 0.0f);
    loss = weight * (relative * relative - repulsion * repulsion);
    derivative = 2.0f * weight * (relative + repulsion);
    slope = derivative * relative;
  }

  float loss;
  float derivative;
  float slope;
};

double scale_of(const Patches& patches) {
  const auto count = static_cast<double>(patches.count);
  return 1.0 / (patches.settings.mean ? count * count : count);
}

// The loss; fills in the patches' slopes.
double find_loss(Patches& patches, const SparseLabel& sparse) {
  RowSums sums(patches, 2);
  const int64_t panel = patches.kernel.panel;
  sweep(
      patches, true, [](const PackedBlock&) {},
      [&](const PackedBlock& a, int64_t begin, int64_t end) {
        PackedBlock b(patches, true);
        BlockSums row_losses(patches.block_rows), row_slopes(patches.block_rows);
        BlockSums column_losses(patches.block_rows), column_slopes(patches.block_rows);
        for (int64_t lane = begin; lane < end; ++lane) {
          for (int64_t block = a.block() + lane; block < patches.blocks; block += patches.lanes) {
            b.pack(block);
            for (BlockSums* each : {&row_losses, &row_slopes, &column_losses, &column_slopes}) each->clear();
            for_each_tile(patches, a, b, [&](int64_t i, int64_t j, const PairTile& tile) {
              patches.kernel.add_terms(tile, patches.facts(a.first_row(i)), patches.facts(b.first_row(j)),
                                       patches.settings.terms, row_losses.from(i * panel),
                                       row_slopes.from(i * panel), column_losses.from(j * panel),
                                       column_slopes.from(j * panel));
            });
            row_losses.add_to(sums.partial(0, lane));
            row_slopes.add_to(sums.partial(1, lane));
            if (block != a.block()) {
              column_losses.add_to(sums.of_block(0, block));
              column_slopes.add_to(sums.of_block(1, block));
            }
          }
        }
      },
      [&](const PackedBlock& a) { sums.finish(a.block()); });

  torch::stable::parallel_for(0, patches.count, 64, [&](int64_t begin, int64_t end) {
    NeighborDistances distances(patches, sparse);
    for (int64_t i = begin; i < end; ++i) {
      const float* from = distances.of(i);
      for (int64_t position = 0; position < sparse.k(); ++position) {
        const SparseTerm term(patches, sparse, i, position, from[position]);
        sums.totals(0)[i] += term.loss;
        sums.totals(1)[i] += term.slope;
      }
    }
  });
  double loss = 0.0;
  for (int64_t i = 0; i < patches.count; ++i) {
    loss += sums.totals(0)[i];
    patches.slopes()[i] = static_cast<float>(sums.totals(1)[i] / static_cast<double>(patches.count));
  }
  return loss * scale_of(patches);
}

// A block's shifted vectors as [width / panel, rows of a block, panel], zero where there are none: what
// subtract_weighted reads.
class VectorPanels {
 public:
  explicit VectorPanels(const Patches& patches)
      : patches_(patches),
        data_(divide_up(patches.width, patches.kernel.panel) * patches.block_rows * patches.kernel.panel) {}

  void fill(const PackedBlock& block) {
    const int64_t panel = patches_.kernel.panel;
    float* to = data_.data();
    for (int64_t first = 0; first < patches_.width; first += panel) {
      const int64_t columns = std::min(panel, patches_.width - first);
      for (int64_t r = 0; r < patches_.block_rows; ++r, to += panel) {
        std::fill_n(to, panel, 0.0f);
        if (r >= block.rows()) continue;
        const float* from = patches_.z + (block.first_row() + r) * patches_.width + first;
        for (int64_t d = 0; d < columns; ++d)
          to[d] = from[d] - patches_.centre[static_cast<size_t>(first + d)];
      }
    }
  }

  const float* data() const { return data_.data(); }

 private:
  const Patches& patches_;
  AlignedBuffer<float> data_;
};

void add_dense_gradient(const Patches& patches, float* gradient) {
  const int64_t panel = patches.kernel.panel;
  const int64_t stride = patches.block_rows + kStridePadding;
  const int64_t block_size = patches.block_rows * patches.width;
  RowSums pull_sums(patches, 1);
  std::vector<float> partial(static_cast<size_t>(patches.lanes * block_size), 0.0f);
  VectorPanels a_vectors(patches);
  sweep(
      patches, true, [&](const PackedBlock& a) { a_vectors.fill(a); },
      [&](const PackedBlock& a, int64_t begin, int64_t end) {
        PackedBlock b(patches, true);
        VectorPanels b_vectors(patches);
        AlignedBuffer<float> pulls(patches.block_rows * stride);
        BlockSums rows(patches.block_rows), columns(patches.block_rows);
        for (int64_t lane = begin; lane < end; ++lane) {
          for (int64_t block = a.block() + lane; block < patches.blocks; block += patches.lanes) {
            b.pack(block);
            b_vectors.fill(b);
            rows.clear();
            columns.clear();
            std::fill_n(pulls.data(), patches.block_rows * stride, 0.0f);
            for_each_tile(patches, a, b, [&](int64_t i, int64_t j, const PairTile& tile) {
              patches.kernel.find_pulls(tile, patches.facts(a.first_row(i)), patches.facts(b.first_row(j)),
                                        patches.settings.terms, pulls.data() + i * panel * stride + j * panel,
                                        stride, rows.from(i * panel), columns.from(j * panel));
            });
            rows.add_to(pull_sums.partial(0, lane));
            patches.kernel.subtract_weighted(pulls.data(), stride, 1, a.rows(), patches.block_rows,
                                             b_vectors.data(), patches.width,
                                             partial.data() + lane * block_size);
            if (block == a.block()) continue;
            columns.add_to(pull_sums.of_block(0, block));
            patches.kernel.subtract_weighted(pulls.data(), 1, stride, b.rows(), patches.block_rows,
                                             a_vectors.data(), patches.width,
                                             gradient + b.first_row() * patches.width);
          }
        }
      },
      [&](const PackedBlock& a) {
        pull_sums.finish(a.block());
        torch::stable::parallel_for(0, a.rows(), 8, [&](int64_t begin, int64_t end) {
          for (int64_t lane = 0; lane < patches.lanes; ++lane) {
            float* from = partial.data() + lane * block_size;
            float* to = gradient + a.first_row() * patches.width;
            for (int64_t e = begin * patches.width; e < end * patches.width; ++e) {
              to[e] += from[e];
              from[e] = 0.0f;
            }
          }
        });
      });
  torch::stable::parallel_for(0, patches.count, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto pull = static_cast<float>(pull_sums.totals(0)[i]);
      for (int64_t d = 0; d < patches.width; ++d) {
        gradient[i * patches.width + d] +=
            pull * (patches.z[i * patches.width + d] - patches.centre[static_cast<size_t>(d)]);
      }
    }
  });
}

// Every patch gathers the pulls of its own pairs and then, in the order of their rows, of those in which it
// is the neighbour.
void add_sparse_gradient(const Patches& patches, const SparseLabel& sparse, float* gradient) {
  const int64_t k = sparse.k();
  std::vector<float> pulls(static_cast<size_t>(patches.count * k));
  torch::stable::parallel_for(0, patches.count, 64, [&](int64_t begin, int64_t end) {
    NeighborDistances distances(patches, sparse);
    const float* inverse_means = patches.facts(0).inverse_means;
    for (int64_t i = begin; i < end; ++i) {
      const float* from = distances.of(i);
      for (int64_t position = 0; position < k; ++position) {
        const SparseTerm term(patches, sparse, i, position, from[position]);
        pulls[static_cast<size_t>(i * k + position)] =
            from[position] > std::sqrt(kLeastSquared) ? term.derivative * inverse_means[i] / from[position]
                                                      : 0.0f;
      }
    }
  });
  std::vector<int64_t> starts(static_cast<size_t>(patches.count) + 1, 0);
  for (int64_t e = 0; e < patches.count * k; ++e) ++starts[static_cast<size_t>(sparse.neighbor(0, e)) + 1];
  for (size_t i = 1; i < starts.size(); ++i) starts[i] += starts[i - 1];
  std::vector<int64_t> incoming(static_cast<size_t>(patches.count * k));
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t e = 0; e < patches.count * k; ++e) {
    incoming[static_cast<size_t>(next[static_cast<size_t>(sparse.neighbor(0, e))]++)] = e;
  }
  torch::stable::parallel_for(0, patches.count, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* from = patches.z + i * patches.width;
      float* to = gradient + i * patches.width;
      const auto add = [&](int64_t edge, int64_t other) {
        const float pull = pulls[static_cast<size_t>(edge)];
        const float* vector = patches.z + other * patches.width;
        for (int64_t d = 0; d < patches.width; ++d) to[d] += pull * (from[d] - vector[d]);
      };
      for (int64_t e = i * k; e < (i + 1) * k; ++e) add(e, sparse.neighbor(0, e));
      for (int64_t p = starts[static_cast<size_t>(i)]; p < starts[static_cast<size_t>(i) + 1]; ++p) {
        const int64_t edge = incoming[static_cast<size_t>(p)];
        add(edge, edge / k);
      }
    }
  });
}

Settings settings_of(double alpha, double sigma, double margin, int64_t similarity_power, bool cross,
                     bool mean) {
  return {{static_cast<float>(alpha), static_cast<float>(sigma), static_cast<float>(margin),
           similarity_power == 2, alpha > 0, cross},
          mean};
}

std::tuple<Tensor, Tensor, Tensor> relaxed_contrastive(const Tensor& z_given, const Tensor& target_given,
                                                       const Tensor& neighbors_given, double alpha,
                                                       double sigma, double margin, int64_t similarity_power,
                                                       bool cross, bool mean) {
  check_relaxed_contrastive(z_given, target_given, neighbors_given, alpha, sigma, margin, similarity_power);
  const Tensor z = in_order("relaxed_contrastive", "z", z_given);
  const Tensor target = in_order("relaxed_contrastive", "z_target", target_given);
  const Tensor neighbors = in_order("relaxed_contrastive", "neighbors", neighbors_given);
  const SparseLabel sparse(neighbors.const_data_ptr<int64_t>(), z.size(0), neighbors.size(1), alpha);
  Patches patches(z.const_data_ptr<float>(), target.const_data_ptr<float>(), z.size(0), z.size(1),
                  settings_of(alpha, sigma, margin, similarity_power, cross, mean));
  Tensor loss = torch::stable::new_empty(z, {});
  Tensor inverse_means = torch::stable::new_empty(z, {z.size(0)});
  Tensor slopes = torch::stable::new_empty(z, {z.size(0)});
  find_inverse_means(patches);
  *loss.mutable_data_ptr<float>() = static_cast<float>(find_loss(patches, sparse));
  std::copy_n(patches.inverse_means(), patches.count, inverse_means.mutable_data_ptr<float>());
  std::copy_n(patches.slopes(), patches.count, slopes.mutable_data_ptr<float>());
  return {loss, inverse_means, slopes};
}

Tensor relaxed_contrastive_backward(const Tensor& grad_given, const Tensor& z_given,
                                    const Tensor& target_given, const Tensor& neighbors_given,
                                    const Tensor& inverse_means_given, const Tensor& slopes_given,
                                    double alpha, double sigma, double margin, int64_t similarity_power,
                                    bool cross, bool mean) {
  check_relaxed_contrastive(z_given, target_given, neighbors_given, alpha, sigma, margin, similarity_power);
  check_relaxed_contrastive_backward(grad_given, z_given, inverse_means_given, slopes_given);
  const Tensor z = in_order("relaxed_contrastive_backward", "z", z_given);
  const Tensor target = in_order("relaxed_contrastive_backward", "z_target", target_given);
  const Tensor neighbors = in_order("relaxed_contrastive_backward", "neighbors", neighbors_given);
  const Tensor inverse_means = in_order("relaxed_contrastive_backward", "inverse_means", inverse_means_given);
  const Tensor slopes = in_order("relaxed_contrastive_backward", "slopes", slopes_given);
  const SparseLabel sparse(neighbors.const_data_ptr<int64_t>(), z.size(0), neighbors.size(1), alpha);
  Patches patches(z.const_data_ptr<float>(), target.const_data_ptr<float>(), z.size(0), z.size(1),
                  settings_of(alpha, sigma, margin, similarity_power, cross, mean));
  std::copy_n(inverse_means.const_data_ptr<float>(), patches.count, patches.inverse_means());
  std::copy_n(slopes.const_data_ptr<float>(), patches.count, patches.slopes());

  Tensor result = torch::stable::new_empty(z, {z.size(0), z.size(1)});
  float* gradient = result.mutable_data_ptr<float>();
  std::fill_n(gradient, patches.count * patches.width, 0.0f);
  add_dense_gradient(patches, gradient);
  if (sparse.k() > 0) add_sparse_gradient(patches, sparse, gradient);
  const auto scale = static_cast<float>(scale_of(patches) * *grad_given.const_data_ptr<float>());
  torch::stable::parallel_for(0, patches.count, 64, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin * patches.width; e < end * patches.width; ++e) gradient[e] *= scale;
  });
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, CPU, library) {
  library.impl("relaxed_contrastive", TORCH_BOX(&relaxed_contrastive));
  library.impl("relaxed_contrastive_backward", TORCH_BOX(&relaxed_contrastive_backward));
}

}  // namespace
}  // namespace pydefect::cpu
