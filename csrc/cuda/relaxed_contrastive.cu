// The relaxed contrastive loss on CUDA. Distances of all pairs are computed tile by tile on tensor cores
// (tile_product.cuh), once for the row means, once for the loss, once for the gradient; nothing of size N x N
// is kept. Forward, only tiles on and above the diagonal are computed and serve both of their patches: each
// writes what it adds to a patch's sum to a place of its own, so that the sums have one order.
//
// Backward, a stripe of the rows' pulls at a time is written to memory (at most kStripeBytes), split into the
// parts that tensor cores multiply, and multiplied with the vectors. The depth of that product, all patches,
// is divided among blocks.
//
// Memory beyond inputs and outputs: of both branches the centred vectors and their parts, backward those of
// the vectors' columns too, N / 128 floats a patch for the sums (784 at N = 100,352), and the stripe.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "../checks.h"
#include "common.cuh"
#include "reductions.cuh"
#include "split.cuh"
#include "tile_product.cuh"

namespace pydefect::cuda {
namespace {

// 512 threads with 32 sums each: those of two products fit into registers.
using PairShape = TileShape<4, 4, 2, 4>;
using PairProduct = TileProduct<PairShape>;
using PairSums = PairProduct::Sums;

constexpr int kBlock = PairShape::rows;  // patches
static_assert(PairShape::columns == kBlock);
static_assert(kBlock == kGroup);  // a row of a tile of pulls has one scale
constexpr int kThreads = 256;
constexpr int64_t kStripeBytes = int64_t{256} << 20;
constexpr int64_t kMostPatches = kGridLimit * kBlock;
constexpr int64_t kSparseColumns = 4 * kWarp;  // a block's of add_sparse_gradient
constexpr int64_t kMostSparseColumns = kGridLimit * kSparseColumns;
constexpr double kLog2E = 1.4426950408889634;
// Below this a squared distance counts as zero, as in the reference: no gradient flows through such a pair.
constexpr float kFloor = 1e-30f;

// Equations (1), (3) and (5): how a pair's distances become its label and its loss.
struct Terms {
  float alpha;
  float decay;  // log2(e) / sigma
  float margin;
  bool squared_similarity;  // exp(-d^2 / sigma) instead of exp(-d / sigma)
  bool pairwise;            // false: the label has no pairwise part
};

// One branch's vectors less a common centre, which changes no distance and spares the products' digits.
struct Branch {
  const float* vectors;  // [count, width]
  SplitRows parts;       // of the vectors
  const float* scales;   // [count], of the parts
  const float* norms;    // [count], squared
};

struct Patches {
  Branch online;
  Branch target;
  const float* inverse_means;  // [count]: 1 / mean distance, equation (4)
  const float* slopes;         // [count]: mean over j of dL/d delta_ij * delta_ij
  int count;
  int width;
};

// NaN stays NaN.
__device__ float at_least(float value, float floor) {
  return value < floor ? floor : value;
}

// --- Means, centred vectors, norms
// --------------------------------------------------------------------------

// Block (x, y) adds up columns 32 x.. of the y-th part of the rows.
__global__ void sum_columns(const float* rows,  // [count, width]
                            int count, int width, int part,
                            double* sums) {  // [parts, width]
  __shared__ double own[kThreads / kWarp][kWarp];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int column = blockIdx.x * kWarp + lane;
  const int end = min((blockIdx.y + 1) * part, count);
  double sum = 0.0;
  for (int row = blockIdx.y * part + warp; row < end; row += kThreads / kWarp) {
    if (column < width) sum += rows[static_cast<int64_t>(row) * width + column];
  }
  own[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= width) return;
  for (int other = 1; other < kThreads / kWarp; ++other) sum += own[other][lane];
  sums[static_cast<int64_t>(blockIdx.y) * width + column] = sum;
}

__global__ void find_means(const double* sums,  // [parts, width]
                           int parts, int count, int width,
                           float* means) {  // [width]
  const int column = blockIdx.x * kThreads + threadIdx.x;
  if (column >= width) return;
  double sum = 0.0;
  for (int part = 0; part < parts; ++part) sum += sums[static_cast<int64_t>(part) * width + column];
  means[column] = static_cast<float>(sum / count);
}

// A warp a row.
__global__ void subtract_means(const float* rows,   // [count, width]
                               const float* means,  // [width]
                               int64_t count, int width,
                               float* centred) {  // [count, width]
  const int lane = threadIdx.x % kWarp;
  for (int64_t row = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp; row < count;
       row += int64_t{gridDim.x} * (kThreads / kWarp)) {
    for (int d = lane; d < width; d += kWarp) centred[row * width + d] = rows[row * width + d] - means[d];
  }
}

// A product of parts as the product of what they stand for. The scales are powers of two, so the order does
// not matter: where two vectors coincide, their norms and their product do too.
__device__ float scaled(float sum, float scale, float other_scale) {
  return sum * scale * other_scale;
}

// Squared norms in the arithmetic of the products, so that coinciding vectors get a distance of exactly 0.
__global__ void __launch_bounds__(PairShape::threads) find_norms(SplitRows parts, const float* scales,
                                                                 float* norms) {  // [count]
  const int64_t first = int64_t{blockIdx.x} * kBlock;
  const SplitRows block = parts.from(first);
  PairSums sums;
  PairProduct::multiply(block, block, dynamic_shared_memory(), sums);
#pragma unroll
  for (int r = 0; r < PairShape::row_tiles; ++r) {
#pragma unroll
    for (int c = 0; c < PairShape::column_tiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = PairShape::row(r, i);
        if (row == PairShape::column(c, i) && row < block.count)
          norms[first + row] = scaled(sums[r][c][i], scales[first + row], scales[first + row]);
      }
    }
  }
}

// --- Pairs
// --------------------------------------------------------------------------------------------------

// A block's tile of pairs: patches first_row.. against first_column...
struct Tile {
  int row_block;
  int column_block;

  __device__ int row(int r, int i) const { return row_block * kBlock + PairShape::row(r, i); }
  __device__ int column(int c, int i) const { return column_block * kBlock + PairShape::column(c, i); }
};

// Calls use(r, c, i) for this thread's pairs of patches; of tiles at the end not for what is beyond it.
template <class Use>
__device__ void for_each_pair(const Tile& tile, int count, Use use) {
  const bool whole = max(tile.row_block, tile.column_block) * kBlock + kBlock <= count;
#pragma unroll
  for (int r = 0; r < PairShape::row_tiles; ++r) {
#pragma unroll
    for (int c = 0; c < PairShape::column_tiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (whole || (tile.row(r, i) < count && tile.column(c, i) < count)) use(r, c, i);
      }
    }
  }
}

// What belongs to this thread's rows or columns of a tile.
using RowValues = OfRows<PairShape>;
using ColumnValues = OfColumns<PairShape>;

__device__ RowValues of_rows(const float* values, const Tile& tile, int count) {
  const int first = tile.row_block * kBlock;
  return RowValues(values + first, count - first);
}

__device__ ColumnValues of_columns(const float* values, const Tile& tile, int count) {
  const int first = tile.column_block * kBlock;
  return ColumnValues(values + first, count - first);
}

// sums becomes the squared distances of a's rows and b's columns.
__device__ void find_squared_distances(const Branch& a, const Branch& b, int count, const Tile& tile,
                                       char* shared, PairSums& sums) {
  PairProduct::multiply(a.parts.from(int64_t{tile.row_block} * kBlock),
                        b.parts.from(int64_t{tile.column_block} * kBlock), shared, sums);
  const RowValues row_scales = of_rows(a.scales, tile, count);
  const RowValues row_norms = of_rows(a.norms, tile, count);
  const ColumnValues column_scales = of_columns(b.scales, tile, count);
  const ColumnValues column_norms = of_columns(b.norms, tile, count);
  // A patch's distance from itself is 0, whatever is not finite elsewhere.
  const bool with_diagonal = a.vectors == b.vectors && tile.row_block == tile.column_block;
#pragma unroll
  for (int r = 0; r < PairShape::row_tiles; ++r) {
#pragma unroll
    for (int c = 0; c < PairShape::column_tiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float product = scaled(sums[r][c][i], row_scales(r, i), column_scales(c, i));
        const float squared = at_least(fmaf(-2.0f, product, row_norms(r, i) + column_norms(c, i)), kFloor);
        sums[r][c][i] = with_diagonal && PairShape::row(r, i) == PairShape::column(c, i) ? kFloor : squared;
      }
    }
  }
}

// labels becomes alpha times the pairwise similarity of a's row and b's column.
__device__ void find_labels(const Branch& a, const Branch& b, int count, const Terms& terms, const Tile& tile,
                            char* shared, PairSums& labels) {
  find_squared_distances(a, b, count, tile, shared, labels);
#pragma unroll
  for (int r = 0; r < PairShape::row_tiles; ++r) {
#pragma unroll
    for (int c = 0; c < PairShape::column_tiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float squared = labels[r][c][i];
        const float distance = terms.squared_similarity ? squared : quick_root(squared);
        labels[r][c][i] = terms.alpha * quick_power_of_2(-terms.decay * distance);
      }
    }
  }
}

// The labels w_ij and, where they are others, w_ji.
template <bool cross>
struct Labels {
  PairSums forth;
  PairSums mirrored[1];  // not touched, and so no registers, where they are the same

  __device__ void find(const Patches& patches, const Terms& terms, const Tile& tile, char* shared) {
    const int count = patches.count;
    if (!terms.pairwise) {
      clear<PairShape>(forth);
      if constexpr (cross) clear<PairShape>(mirrored[0]);
      return;
    }
    if constexpr (cross) {
      find_labels(patches.online, patches.target, count, terms, tile, shared, forth);
      find_labels(patches.target, patches.online, count, terms, tile, shared, mirrored[0]);
    } else {
      find_labels(patches.target, patches.target, count, terms, tile, shared, forth);
    }
  }
  __device__ float back(int r, int c, int i) const {
    if constexpr (cross) return mirrored[0][r][c][i];
    return forth[r][c][i];
  }
};

// A thread's sums over its columns and over its rows.
struct PairTotals {
  float rows[PairShape::row_tiles][2] = {};
  float columns[PairShape::column_tiles][2] = {};

  // Writes the block's totals: of the rows to row_totals[kBlock], of the columns to column_totals[kBlock]
  // unless that is null. All threads must call.
  __device__ void write(int row_count, float* row_totals, int column_count, float* column_totals,
                        char* shared) {
    float* const by_row = reinterpret_cast<float*>(shared);              // [warp_columns][kBlock]
    float* const by_column = by_row + PairShape::warp_columns * kBlock;  // [warp_rows][kBlock]
    const int warp = threadIdx.x / kWarp;
    const int lane = threadIdx.x % kWarp;
    __syncthreads();  // the product's last readers of `shared` are done
#pragma unroll
    for (int r = 0; r < PairShape::row_tiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = rows[r][half];
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        if (lane % 4 == 0)
          by_row[warp % PairShape::warp_columns * kBlock + PairShape::row(r, 2 * half)] = sum;
      }
    }
#pragma unroll
    for (int c = 0; c < PairShape::column_tiles; ++c) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = columns[c][half];
        sum += __shfl_xor_sync(kAllLanes, sum, 4);
        sum += __shfl_xor_sync(kAllLanes, sum, 8);
        sum += __shfl_xor_sync(kAllLanes, sum, 16);
        if (lane < 4) by_column[warp / PairShape::warp_columns * kBlock + PairShape::column(c, half)] = sum;
      }
    }
    __syncthreads();
    const int index = threadIdx.x;
    if (index < kBlock && index < row_count) {
      float sum = 0.0f;
      for (int w = 0; w < PairShape::warp_columns; ++w) sum += by_row[w * kBlock + index];
      row_totals[index] = sum;
    }
    if (column_totals != nullptr && index < kBlock && index < column_count) {
      float sum = 0.0f;
      for (int w = 0; w < PairShape::warp_rows; ++w) sum += by_column[w * kBlock + index];
      column_totals[index] = sum;
    }
  }
};

// Where tile (a, b) puts what block b adds to the sums of block a: totals[b][a's patches].
__device__ float* place(float* totals, int count, int added_by, int block) {
  return totals + static_cast<int64_t>(added_by) * count + block * kBlock;
}

__device__ void write_both_ways(PairTotals& sums, const Tile& tile, int count, float* totals, char* shared) {
  const bool diagonal = tile.row_block == tile.column_block;
  sums.write(count - tile.row_block * kBlock, place(totals, count, tile.column_block, tile.row_block),
             count - tile.column_block * kBlock,
             diagonal ? nullptr : place(totals, count, tile.row_block, tile.column_block), shared);
}

// Block (x, y) has the tile of blocks y and x of patches; those below the diagonal end at once.
__global__ void __launch_bounds__(PairShape::threads) add_distances(Patches patches,
                                                                    float* totals) {  // [blocks, count]
  if (blockIdx.x < blockIdx.y) return;
  char* const shared = dynamic_shared_memory();
  const Tile tile{static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.x)};
  PairSums squared;
  find_squared_distances(patches.online, patches.online, patches.count, tile, shared, squared);
  PairTotals sums;
  for_each_pair(tile, patches.count, [&](int r, int c, int i) {
    const float distance = quick_root(squared[r][c][i]);
    sums.rows[r][i / 2] += distance;
    sums.columns[c][i % 2] += distance;
  });
  write_both_ways(sums, tile, patches.count, totals, shared);
}

__global__ void find_inverse_means(const float* totals,  // [blocks, count]
                                   int blocks, int count,
                                   float* inverse_means) {  // [count]
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= count) return;
  double sum = 0.0;
  for (int b = 0; b < blocks; ++b) sum += totals[static_cast<int64_t>(b) * count + i];
  inverse_means[i] = static_cast<float>(count / sum);
}

// Loss and slope of a pair seen from one of its patches.
struct PairTerm {
  float loss;
  float slope;

  __device__ PairTerm(float relative, float weight, float margin) {
    const float repulsion = at_least(margin - relative, 0.0f);
    loss = weight * (relative * relative - repulsion * repulsion) + repulsion * repulsion;
    slope = 2.0f * relative * (weight * (relative + repulsion) - repulsion);
  }
};

template <bool cross>
__global__ void __launch_bounds__(PairShape::threads) add_terms(Patches patches, Terms terms,
                                                                float* slope_totals,    // [blocks, count]
                                                                double* tile_losses) {  // [blocks, blocks]
  if (blockIdx.x < blockIdx.y) return;
  char* const shared = dynamic_shared_memory();
  const Tile tile{static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.x)};
  const bool diagonal = tile.row_block == tile.column_block;
  Labels<cross> labels;
  labels.find(patches, terms, tile, shared);
  PairSums squared;
  find_squared_distances(patches.online, patches.online, patches.count, tile, shared, squared);
  const RowValues row_means = of_rows(patches.inverse_means, tile, patches.count);
  const ColumnValues column_means = of_columns(patches.inverse_means, tile, patches.count);
  PairTotals slopes;
  float loss = 0.0f;
  for_each_pair(tile, patches.count, [&](int r, int c, int i) {
    const float distance = quick_root(squared[r][c][i]);
    const PairTerm forth(distance * row_means(r, i), labels.forth[r][c][i], terms.margin);
    slopes.rows[r][i / 2] += forth.slope;
    loss += forth.loss;
    if (diagonal) return;  // the pair's other side is another element of this tile
    const PairTerm back(distance * column_means(c, i), labels.back(r, c, i), terms.margin);
    slopes.columns[c][i % 2] += back.slope;
    loss += back.loss;
  });
  write_both_ways(slopes, tile, patches.count, slope_totals, shared);
  const double sum = block_sum<PairShape::threads>(static_cast<double>(loss));
  if (threadIdx.x == 0) tile_losses[static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x] = sum;
}

// Every row's largest magnitude in the tile: largest[kBlock], in shared memory. All threads must call.
__device__ void find_largest(const PairSums& values, unsigned* shared, unsigned* largest) {
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  __syncthreads();  // the last readers of `shared` are done
#pragma unroll
  for (int r = 0; r < PairShape::row_tiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      unsigned mine = 0;
#pragma unroll
      for (int c = 0; c < PairShape::column_tiles; ++c) {
        mine = max(mine, max(magnitude(values[r][c][2 * half]), magnitude(values[r][c][2 * half + 1])));
      }
      mine = max(mine, __shfl_xor_sync(kAllLanes, mine, 1));
      mine = max(mine, __shfl_xor_sync(kAllLanes, mine, 2));
      if (lane % 4 == 0) shared[warp % PairShape::warp_columns * kBlock + PairShape::row(r, 2 * half)] = mine;
    }
  }
  __syncthreads();
  if (threadIdx.x < kBlock) {
    unsigned most = 0;
    for (int w = 0; w < PairShape::warp_columns; ++w) most = max(most, shared[w * kBlock + threadIdx.x]);
    largest[threadIdx.x] = most;
  }
  __syncthreads();
}

// A row block of the stripe against a block of patches: how strongly each pair pulls its two patches
// together. Written split, a tile's row being a group; what is beyond the last patch is zero.
template <bool cross>
__global__ void __launch_bounds__(PairShape::threads)
    find_pulls(Patches patches, Terms terms, int first_block, int stripe_count,
               uint16_t* pulls,     // [stripe_count, slices, 2, kSlice]
               float* pull_scales,  // [stripe_count, blocks]
               float* totals) {     // [blocks, stripe_count]
  char* const shared = dynamic_shared_memory();
  const Tile tile{first_block + static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.x)};
  const int row_in_stripe = blockIdx.y * kBlock;
  Labels<cross> labels;
  labels.find(patches, terms, tile, shared);
  PairSums squared;
  find_squared_distances(patches.online, patches.online, patches.count, tile, shared, squared);
  const RowValues row_means = of_rows(patches.inverse_means, tile, patches.count);
  const RowValues row_slopes = of_rows(patches.slopes, tile, patches.count);
  const ColumnValues column_means = of_columns(patches.inverse_means, tile, patches.count);
  const ColumnValues column_slopes = of_columns(patches.slopes, tile, patches.count);
  // dL/dd_ij = (dL/d delta_ij - slope_i) / mean_i: through delta itself and through the row's mean.
  const auto derivative = [&](float distance, float weight, float inverse_mean, float slope) {
    const float relative = distance * inverse_mean;
    const float repulsion = at_least(terms.margin - relative, 0.0f);
    return inverse_mean * (2.0f * (weight * (relative + repulsion) - repulsion) - slope);
  };
  const bool whole = max(tile.row_block, tile.column_block) * kBlock + kBlock <= patches.count;
  PairTotals sums;
  PairSums& found = labels.forth;
#pragma unroll
  for (int r = 0; r < PairShape::row_tiles; ++r) {
#pragma unroll
    for (int c = 0; c < PairShape::column_tiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool inside = whole || (tile.row(r, i) < patches.count && tile.column(c, i) < patches.count);
        const float inverse = quick_inverse_root(squared[r][c][i]);
        const float distance = squared[r][c][i] * inverse;
        const float both =
            derivative(distance, labels.forth[r][c][i], row_means(r, i), row_slopes(r, i)) +
            derivative(distance, labels.back(r, c, i), column_means(c, i), column_slopes(c, i));
        // The negated form lets NaN through.
        const float pull = inside && !(squared[r][c][i] <= kFloor) ? both * inverse : 0.0f;
        found[r][c][i] = pull;
        sums.rows[r][i / 2] += pull;
      }
    }
  }
  auto* const own = reinterpret_cast<unsigned*>(shared);
  unsigned* const largest = own + PairShape::warp_columns * kBlock;
  find_largest(found, own, largest);
  const int64_t slices = int64_t{gridDim.x} * kGroupSlices;
#pragma unroll
  for (int r = 0; r < PairShape::row_tiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = PairShape::row(r, 2 * half);
      if (row_in_stripe + row >= stripe_count) continue;
      const float factor = scaling_of(largest[row]).factor;
      uint16_t* const to =
          pulls + ((row_in_stripe + row) * slices + int64_t{blockIdx.x} * kGroupSlices) * kSliceParts;
#pragma unroll
      for (int c = 0; c < PairShape::column_tiles; ++c) {
        const int column = PairShape::column(c, 0);
        const Parts left = split(found[r][c][2 * half] * factor);
        const Parts right = split(found[r][c][2 * half + 1] * factor);
        auto* const pair = reinterpret_cast<unsigned*>(to + column / kSlice * kSliceParts + column % kSlice);
        pair[0] = left.high | static_cast<unsigned>(right.high) << 16;
        pair[kSlice / 2] = left.low | static_cast<unsigned>(right.low) << 16;
      }
    }
  }
  if (threadIdx.x < kBlock && row_in_stripe + static_cast<int>(threadIdx.x) < stripe_count) {
    pull_scales[(row_in_stripe + static_cast<int64_t>(threadIdx.x)) * gridDim.x + blockIdx.x] =
        scaling_of(largest[threadIdx.x]).scale;
  }
  sums.write(stripe_count - row_in_stripe,
             totals + static_cast<int64_t>(blockIdx.x) * stripe_count + row_in_stripe, 0, nullptr, shared);
}

// Block (x, y, z): columns x and rows y of pulls @ vectors over the z-th part of the patches.
__global__ void __launch_bounds__(PairShape::threads)
    weigh_vectors(SplitRows pulls,           // [rows, patches]
                  const float* pull_scales,  // [rows, groups]
                  SplitRows columns,         // of the vectors, [width, patches]
                  const float* column_scales,
                  int part,       // groups
                  float* sums) {  // [parts, rows, width]
  const int64_t first_row = int64_t{blockIdx.y} * kBlock;
  const int64_t first_column = int64_t{blockIdx.x} * kBlock;
  const int64_t groups = pulls.slices / kGroupSlices;
  const int begin = blockIdx.z * part;
  const SplitRows a = pulls.from(first_row);
  const SplitRows b = columns.from(first_column);
  PairSums products;
  PairProduct::multiply_groups(a, pull_scales + first_row * groups, b, column_scales + first_column * groups,
                               begin, begin + part, dynamic_shared_memory(), products);
#pragma unroll
  for (int r = 0; r < PairShape::row_tiles; ++r) {
#pragma unroll
    for (int c = 0; c < PairShape::column_tiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = PairShape::row(r, i);
        const int column = PairShape::column(c, i);
        if (row >= a.count || column >= b.count) continue;
        sums[(blockIdx.z * pulls.count + first_row + row) * columns.count + first_column + column] =
            products[r][c][i];
      }
    }
  }
}

// gradient_i = scale * (sum_j pull_ij z_i - sum_j pull_ij z_j), one block a row of the stripe.
__global__ void subtract_weighted(const float* totals,   // [blocks, rows]
                                  const float* sums,     // [parts, rows, width]
                                  const float* vectors,  // [rows, width]
                                  const float* grad,     // one
                                  float scale, int blocks, int parts, int rows, int width,
                                  float* gradient) {  // [rows, width]
  const int row = blockIdx.x;
  double own = 0.0;
  for (int b = threadIdx.x; b < blocks; b += kThreads) own += totals[static_cast<int64_t>(b) * rows + row];
  const auto pull = static_cast<float>(block_sum<kThreads>(own));
  for (int d = threadIdx.x; d < width; d += kThreads) {
    float sum = 0.0f;
    for (int part = 0; part < parts; ++part)
      sum += sums[(static_cast<int64_t>(part) * rows + row) * width + d];
    gradient[static_cast<int64_t>(row) * width + d] =
        *grad * scale * (pull * vectors[static_cast<int64_t>(row) * width + d] - sum);
  }
}

// --- The label's sparse part, equation (2)
// --------------------------------------------------------------------

struct SparseLabel {
  const int64_t* neighbors;  // [count, k]
  int k;
  float share;  // (1 - alpha) / k
};

// What the pair of a patch and its neighbour adds; one warp, every lane gets it.
struct SparseTerm {
  float distance;
  float loss;
  float derivative;
  float slope;

  __device__ SparseTerm(const Patches& patches, const Terms& terms, const SparseLabel& label, int i,
                        int position) {
    const int lane = threadIdx.x % kWarp;
    const int64_t j = label.neighbors[static_cast<int64_t>(i) * label.k + position];
    // Nobody has checked the indices, and the host cannot without waiting: a foreign one poisons the loss.
    const bool foreign = j < 0 || j >= patches.count;
    const int64_t safe = foreign ? i : j;
    int common = 0;
    for (int a = lane; a < label.k; a += kWarp) {
      const int64_t mine = label.neighbors[static_cast<int64_t>(i) * label.k + a];
      for (int b = 0; b < label.k; ++b) common += label.neighbors[safe * label.k + b] == mine;
    }
    const float weight = foreign ? NAN : label.share * static_cast<float>(warp_sum(common));
    const float* x = patches.online.vectors + static_cast<int64_t>(i) * patches.width;
    const float* y = patches.online.vectors + safe * patches.width;
    // The same floor as in the dense part.
    distance = at_least(sqrtf(squared_distance(x, y, patches.width)), 1e-15f);
    const float relative = distance * patches.inverse_means[i];
    const float repulsion = at_least(terms.margin - relative, 0.0f);
    loss = weight * (relative * relative - repulsion * repulsion);
    derivative = 2.0f * weight * (relative + repulsion);
    slope = derivative * relative;
  }
};

// One warp a patch.
__global__ void finish_slopes(Patches patches, Terms terms, SparseLabel label,
                              const float* slope_totals,  // [blocks, count]
                              int blocks,
                              float* slopes,            // [count]
                              double* sparse_losses) {  // [count]
  const int lane = threadIdx.x % kWarp;
  const int i = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (i >= patches.count) return;  // the whole warp leaves
  double slope = 0.0;
  for (int b = lane; b < blocks; b += kWarp)
    slope += slope_totals[static_cast<int64_t>(b) * patches.count + i];
  slope = warp_sum(slope);
  double loss = 0.0;
  for (int position = 0; position < label.k; ++position) {
    const SparseTerm term(patches, terms, label, i, position);
    slope += term.slope;
    loss += term.loss;
  }
  if (lane > 0) return;
  slopes[i] = static_cast<float>(slope / patches.count);
  sparse_losses[i] = loss;
}

// One block.
__global__ void finish_loss(const double* tile_losses,    // [blocks, blocks], those above the diagonal
                            const double* sparse_losses,  // [count]
                            int blocks, int count, double scale,
                            float* loss) {  // one
  double sum = 0.0;
  for (int64_t tile = threadIdx.x; tile < int64_t{blocks} * blocks; tile += kThreads) {
    if (tile % blocks >= tile / blocks) sum += tile_losses[tile];
  }
  for (int i = threadIdx.x; i < count; i += kThreads) sum += sparse_losses[i];
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) *loss = static_cast<float>(sum * scale);
}

// One warp a patch.
__global__ void find_sparse_pulls(Patches patches, Terms terms, SparseLabel label,
                                  float* pulls) {  // [count, k]
  const int i = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (i >= patches.count) return;  // the whole warp leaves
  for (int position = 0; position < label.k; ++position) {
    const SparseTerm term(patches, terms, label, i, position);
    if (threadIdx.x % kWarp > 0) continue;
    pulls[static_cast<int64_t>(i) * label.k + position] =
        term.distance <= 1e-15f ? 0.0f : term.derivative * patches.inverse_means[i] / term.distance;
  }
}

// starts[i] = the first of the sorted ends that is at least i; one more than there are patches.
__global__ void find_starts(const int64_t* sorted_ends, int64_t edges, int count,
                            int64_t* starts) {  // [count + 1]
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i > count) return;
  int64_t begin = 0;
  int64_t end = edges;
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    if (sorted_ends[middle] < i) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  starts[i] = begin;
}

// Block (x, y): patch x and 128 elements of it, y. The pulls of its own pairs and of those in which it is the
// neighbour, which can be hundreds: each warp adds up every eighth of them, in the order of their rows.
__global__ void __launch_bounds__(kThreads)
    add_sparse_gradient(Patches patches, SparseLabel label,
                        const float* __restrict__ pulls,           // [count, k]
                        const int64_t* __restrict__ starts,        // [count + 1]
                        const int64_t* __restrict__ sorted_edges,  // [count * k]: by neighbour
                        const float* __restrict__ grad,            // one
                        float scale,
                        float* __restrict__ gradient) {  // [count, width]
  constexpr int kWarps = kThreads / kWarp;
  constexpr int kAtOnce = 4;  // elements of a lane
  __shared__ float sums[kWarps][kAtOnce * kWarp];
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int64_t i = blockIdx.x;
  const int first = blockIdx.y * kAtOnce * kWarp + lane;
  const int64_t begin = starts[i];
  const int64_t others = starts[i + 1] - begin;
  const float* const from = patches.online.vectors + i * patches.width;
  float own[kAtOnce];
  float mine[kAtOnce] = {};
#pragma unroll
  for (int a = 0; a < kAtOnce; ++a) {
    const int d = first + a * kWarp;
    own[a] = d < patches.width ? from[d] : 0.0f;
  }
  for (int64_t at = warp; at < label.k + others; at += kWarps) {
    const bool outgoing = at < label.k;
    const int64_t edge = outgoing ? i * label.k + at : sorted_edges[begin + at - label.k];
    const int64_t other = outgoing ? label.neighbors[edge] : edge / label.k;
    const float pull = pulls[edge];
    if (pull == 0.0f) continue;
    const bool foreign = other < 0 || other >= patches.count;
    const float* const to = patches.online.vectors + (foreign ? i : other) * patches.width;
#pragma unroll
    for (int a = 0; a < kAtOnce; ++a) {
      const int d = first + a * kWarp;
      if (d < patches.width) mine[a] += pull * (own[a] - (foreign ? NAN : to[d]));
    }
  }
#pragma unroll
  for (int a = 0; a < kAtOnce; ++a) sums[warp][a * kWarp + lane] = mine[a];
  __syncthreads();
  const int d = blockIdx.y * kAtOnce * kWarp + static_cast<int>(threadIdx.x);
  if (threadIdx.x >= kAtOnce * kWarp || d >= patches.width) return;
  float sum = sums[0][threadIdx.x];
  for (int other = 1; other < kWarps; ++other) sum += sums[other][threadIdx.x];
  gradient[i * patches.width + d] += *grad * scale * sum;
}

// --- On the host
// ------------------------------------------------------------------------------------------------

struct CentredBranch {
  Tensor vectors;
  SplitTensor split;
  Tensor norms;

  Branch view() const {
    return {vectors.const_data_ptr<float>(), split.rows(), split.scales.const_data_ptr<float>(),
            norms.const_data_ptr<float>()};
  }
};

Tensor column_means(const Device& device, const Tensor& rows) {
  const int count = static_cast<int>(rows.size(0));
  const int width = static_cast<int>(rows.size(1));
  const int part = static_cast<int>(std::max<int64_t>(kThreads, divide_up(count, 64)));
  const int parts = static_cast<int>(divide_up(count, part));
  const Tensor sums = new_of(rows, {parts, width}, torch::headeronly::ScalarType::Double);
  Tensor means = new_floats(rows, {width});
  device.launch("relaxed_contrastive: sum_columns", sum_columns, dim3(divide_up(width, kWarp), parts),
                kThreads, 0, rows.const_data_ptr<float>(), count, width, part,
                sums.mutable_data_ptr<double>());
  device.launch("relaxed_contrastive: find_means", find_means, divide_up(width, kThreads), kThreads, 0,
                sums.const_data_ptr<double>(), parts, count, width, means.mutable_data_ptr<float>());
  return means;
}

CentredBranch centred(const Device& device, const Tensor& rows, const Tensor& means) {
  const int64_t count = rows.size(0);
  const int width = static_cast<int>(rows.size(1));
  Tensor vectors = new_floats(rows, {count, width});
  device.launch("relaxed_contrastive: subtract_means", subtract_means,
                blocks_for(device, divide_up(count, kThreads / kWarp)), kThreads, 0,
                rows.const_data_ptr<float>(), means.const_data_ptr<float>(), count, width,
                vectors.mutable_data_ptr<float>());
  const CentredBranch branch{vectors, split_by_row(device, vectors), new_floats(rows, {count})};
  device.launch("relaxed_contrastive: find_norms", find_norms, divide_up(count, kBlock), PairShape::threads,
                PairProduct::shared_bytes, branch.split.rows(), branch.split.scales.const_data_ptr<float>(),
                branch.norms.mutable_data_ptr<float>());
  return branch;
}

void check_cuda_sizes(const Tensor& z, const Tensor& neighbors) {
  check(z.size(0) <= kMostPatches, "relaxed_contrastive: on CUDA z must have at most ", kMostPatches,
        " rows, got ", z.size(0));
  check(neighbors.size(1) == 0 || z.size(1) <= kMostSparseColumns,
        "relaxed_contrastive: on CUDA z must have at most ", kMostSparseColumns,
        " columns where there are neighbors, got ", z.size(1));
}

// What both passes begin with.
struct Problem {
  Problem(const Device& device, const Tensor& z_given, const Tensor& target_given,
          const Tensor& neighbors_given, double alpha, double sigma, double margin, int64_t similarity_power,
          bool cross, bool mean)
      : z(in_order("relaxed_contrastive", "z", z_given)),
        target(in_order("relaxed_contrastive", "z_target", target_given)),
        neighbors(in_order("relaxed_contrastive", "neighbors", neighbors_given)),
        terms{static_cast<float>(alpha), static_cast<float>(kLog2E / sigma), static_cast<float>(margin),
              similarity_power == 2, alpha > 0},
        cross(cross),
        // Where pairs of one online and one target vector are measured, both need the same shift.
        centre(column_means(device, cross ? target : z)),
        online(centred(device, z, centre)) {
    if (terms.pairwise) label_branch = centred(device, target, cross ? centre : column_means(device, target));
    const auto n = static_cast<double>(count());
    scale = 1.0 / (mean ? n * n : n);
    const int64_t k = neighbors.size(1);
    sparse = {neighbors.const_data_ptr<int64_t>(), static_cast<int>(k),
              static_cast<float>((1.0 - alpha) / static_cast<double>(std::max<int64_t>(k, 1)))};
  }

  int count() const { return static_cast<int>(z.size(0)); }
  int blocks() const { return static_cast<int>(divide_up(z.size(0), kBlock)); }
  Patches patches(const Tensor& inverse_means, const Tensor& slopes) const {
    return {online.view(),
            label_branch ? label_branch->view() : online.view(),
            inverse_means.const_data_ptr<float>(),
            slopes.const_data_ptr<float>(),
            count(),
            static_cast<int>(z.size(1))};
  }

  Tensor z;
  Tensor target;
  Tensor neighbors;
  Terms terms;
  bool cross;
  Tensor centre;
  CentredBranch online;
  std::optional<CentredBranch> label_branch;
  SparseLabel sparse;
  double scale;
};

std::tuple<Tensor, Tensor, Tensor> relaxed_contrastive(const Tensor& z, const Tensor& target,
                                                       const Tensor& neighbors, double alpha, double sigma,
                                                       double margin, int64_t similarity_power, bool cross,
                                                       bool mean) {
  check_relaxed_contrastive(z, target, neighbors, alpha, sigma, margin, similarity_power);
  check_cuda_sizes(z, neighbors);
  const Device device(z);
  const Problem problem(device, z, target, neighbors, alpha, sigma, margin, similarity_power, cross, mean);
  const int count = problem.count();
  const int blocks = problem.blocks();
  Tensor loss = new_floats(z, {});
  Tensor inverse_means = new_floats(z, {count});
  Tensor slopes = new_floats(z, {count});
  const Tensor totals = new_floats(z, {blocks, count});
  const Tensor tile_losses = new_of(z, {blocks, blocks}, torch::headeronly::ScalarType::Double);
  const Tensor sparse_losses = new_of(z, {count}, torch::headeronly::ScalarType::Double);
  const Patches patches = problem.patches(inverse_means, slopes);

  device.launch("relaxed_contrastive: add_distances", add_distances, dim3(blocks, blocks), PairShape::threads,
                PairProduct::shared_bytes, patches, totals.mutable_data_ptr<float>());
  device.launch("relaxed_contrastive: find_inverse_means", find_inverse_means, divide_up(count, kThreads),
                kThreads, 0, totals.const_data_ptr<float>(), blocks, count,
                inverse_means.mutable_data_ptr<float>());
  device.launch("relaxed_contrastive: add_terms", cross ? add_terms<true> : add_terms<false>,
                dim3(blocks, blocks), PairShape::threads, PairProduct::shared_bytes, patches, problem.terms,
                totals.mutable_data_ptr<float>(), tile_losses.mutable_data_ptr<double>());
  device.launch("relaxed_contrastive: finish_slopes", finish_slopes, divide_up(count, kThreads / kWarp),
                kThreads, 0, patches, problem.terms, problem.sparse, totals.const_data_ptr<float>(), blocks,
                slopes.mutable_data_ptr<float>(), sparse_losses.mutable_data_ptr<double>());
  device.launch("relaxed_contrastive: finish_loss", finish_loss, 1, kThreads, 0,
                tile_losses.const_data_ptr<double>(), sparse_losses.const_data_ptr<double>(), blocks, count,
                problem.scale, loss.mutable_data_ptr<float>());
  return {loss, inverse_means, slopes};
}

// The neighbours in ascending order and the edges that they are from.
std::tuple<Tensor, Tensor> sorted(const Tensor& neighbors) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(torch::stable::flatten(neighbors)), from(std::optional<bool>(true)),
                                    from(int64_t{0}), from(false)};
  check(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION) == 0,
        "relaxed_contrastive_backward: the neighbours could not be sorted");
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

void write_dense_gradient(const Device& device, const Problem& problem, const Patches& patches,
                          const Tensor& grad, Tensor& gradient) {
  const int count = problem.count();
  const int blocks = problem.blocks();
  const int64_t width = problem.z.size(1);
  const int64_t depth = int64_t{blocks} * kBlock;
  const int64_t block_bytes = kBlock * depth * static_cast<int64_t>(sizeof(float));
  const int stripe_blocks = static_cast<int>(std::clamp<int64_t>(kStripeBytes / block_bytes, 1, blocks));
  const int stripe_rows = std::min(stripe_blocks * kBlock, count);
  const int64_t tiles = divide_up(stripe_rows, kBlock) * divide_up(width, kBlock);
  // About two blocks wait for every multiprocessor; a part is worth a thousand patches at least.
  const int64_t splits = std::clamp<int64_t>(divide_up(2 * device.multiprocessors(), tiles), 1,
                                             std::max<int64_t>(1, blocks / 8));
  const int part = static_cast<int>(divide_up(blocks, splits));
  const int parts = static_cast<int>(divide_up(blocks, part));
  const MatrixColumns vectors{problem.online.vectors.const_data_ptr<float>(), width};
  const SplitTensor columns = split_by_group(device, problem.z, vectors, width, count);
  const Tensor pulls = new_parts(problem.z, stripe_rows, depth);
  const Tensor pull_scales = new_floats(problem.z, {stripe_rows, blocks});
  const Tensor totals = new_floats(problem.z, {blocks, stripe_rows});
  const Tensor sums = new_floats(problem.z, {parts, stripe_rows, width});
  auto* const pull_parts = static_cast<uint16_t*>(pulls.mutable_data_ptr());
  for (int first = 0; first < blocks; first += stripe_blocks) {
    const int rows = std::min(stripe_rows, count - first * kBlock);
    const auto row_tiles = static_cast<unsigned>(divide_up(rows, kBlock));
    device.launch("relaxed_contrastive_backward: find_pulls",
                  problem.cross ? find_pulls<true> : find_pulls<false>, dim3(blocks, row_tiles),
                  PairShape::threads, PairProduct::shared_bytes, patches, problem.terms, first, rows,
                  pull_parts, pull_scales.mutable_data_ptr<float>(), totals.mutable_data_ptr<float>());
    device.launch("relaxed_contrastive_backward: weigh_vectors", weigh_vectors,
                  dim3(divide_up(width, kBlock), row_tiles, parts), PairShape::threads,
                  PairProduct::shared_bytes, SplitRows{pull_parts, rows, depth / kSlice, depth},
                  pull_scales.const_data_ptr<float>(), columns.rows(), columns.scales.const_data_ptr<float>(),
                  part, sums.mutable_data_ptr<float>());
    const int64_t at = int64_t{first} * kBlock * width;
    device.launch("relaxed_contrastive_backward: subtract_weighted", subtract_weighted, rows, kThreads, 0,
                  totals.const_data_ptr<float>(), sums.const_data_ptr<float>(), patches.online.vectors + at,
                  grad.const_data_ptr<float>(), static_cast<float>(problem.scale), blocks, parts, rows,
                  static_cast<int>(width), gradient.mutable_data_ptr<float>() + at);
  }
}

Tensor relaxed_contrastive_backward(const Tensor& grad, const Tensor& z, const Tensor& target,
                                    const Tensor& neighbors, const Tensor& inverse_means_given,
                                    const Tensor& slopes_given, double alpha, double sigma, double margin,
                                    int64_t similarity_power, bool cross, bool mean) {
  check_relaxed_contrastive(z, target, neighbors, alpha, sigma, margin, similarity_power);
  check_relaxed_contrastive_backward(grad, z, inverse_means_given, slopes_given);
  check_cuda_sizes(z, neighbors);
  const Device device(z);
  const Problem problem(device, z, target, neighbors, alpha, sigma, margin, similarity_power, cross, mean);
  const Tensor inverse_means = in_order("relaxed_contrastive_backward", "inverse_means", inverse_means_given);
  const Tensor slopes = in_order("relaxed_contrastive_backward", "slopes", slopes_given);
  const Patches patches = problem.patches(inverse_means, slopes);
  Tensor gradient = new_floats(z, {z.size(0), z.size(1)});
  write_dense_gradient(device, problem, patches, grad, gradient);
  if (problem.sparse.k == 0) return gradient;

  const Tensor pulls = new_floats(z, {z.size(0), problem.sparse.k});
  const auto [ends, edges] = sorted(problem.neighbors);
  device.launch("relaxed_contrastive_backward: find_sparse_pulls", find_sparse_pulls,
                divide_up(problem.count(), kThreads / kWarp), kThreads, 0, patches, problem.terms,
                problem.sparse, pulls.mutable_data_ptr<float>());
  const Tensor starts = new_of(z, {z.size(0) + 1}, torch::headeronly::ScalarType::Long);
  device.launch("relaxed_contrastive_backward: find_starts", find_starts, divide_up(starts.numel(), kThreads),
                kThreads, 0, ends.const_data_ptr<int64_t>(), ends.numel(), problem.count(),
                starts.mutable_data_ptr<int64_t>());
  device.launch("relaxed_contrastive_backward: add_sparse_gradient", add_sparse_gradient,
                dim3(problem.count(), divide_up(z.size(1), kSparseColumns)), kThreads, 0, patches,
                problem.sparse, pulls.const_data_ptr<float>(), starts.const_data_ptr<int64_t>(),
                edges.const_data_ptr<int64_t>(), grad.const_data_ptr<float>(),
                static_cast<float>(problem.scale), gradient.mutable_data_ptr<float>());
  return gradient;
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, PYDEFECT_CUDA_KEY, library) {
  library.impl("relaxed_contrastive", TORCH_BOX(&relaxed_contrastive));
  library.impl("relaxed_contrastive_backward", TORCH_BOX(&relaxed_contrastive_backward));
}

}  // namespace
}  // namespace pydefect::cuda
