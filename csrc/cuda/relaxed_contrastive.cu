// The relaxed contrastive loss on CUDA. Distances of all pairs are computed tile by tile on tensor cores
// (tile_product.cuh), once for the row means, once for the loss, once for the gradient; nothing of size N x N
// is kept. Forward, only tiles on and above the diagonal are computed and serve both of their patches: each
// writes what it adds to a patch's sum to a place of its own, so that the sums have one order.
//
// Backward, a stripe of the rows' pulls at a time is written to memory (at most kStripeBytes) and multiplied
// with the vectors. The depth of that product, all patches, is split over blocks.
//
// Memory beyond inputs and outputs: the centred vectors of both branches, N / 128 floats a patch for the sums
// (784 at N = 100,352), and the stripe.
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
#include "tile_product.cuh"

namespace pydefect::cuda {
namespace {

// 512 threads with 32 sums each: those of two products fit into registers.
using PairShape = TileShape<4, 4, 2, 4>;
using PairProduct = TileProduct<PairShape, Layout::kAlongDepth, Layout::kAlongDepth>;
using PullShape = TileShape<2, 4, 4, 4>;
using PullProduct = TileProduct<PullShape, Layout::kAlongDepth, Layout::kAcrossDepth>;
using PairSums = PairProduct::Sums;

constexpr int kBlock = PairShape::rows;  // patches
static_assert(PairShape::columns == kBlock);
constexpr int kThreads = 256;
constexpr int64_t kStripeBytes = int64_t{256} << 20;
// A grid's second dimension ends here.
constexpr int64_t kMostPatches = int64_t{65535} * kBlock;
// Below this a squared distance counts as zero, as in the reference: no gradient flows through such a pair.
constexpr float kFloor = 1e-30f;

// Equations (1), (3) and (5): how a pair's distances become its label and its loss.
struct Terms {
  float alpha;
  float sigma;
  float margin;
  bool squared_similarity;  // exp(-d^2 / sigma) instead of exp(-d / sigma)
  bool pairwise;            // false: the label has no pairwise part
};

// One branch's vectors less a common centre, which changes no distance and spares the products' digits.
struct Branch {
  const float* vectors;  // [count, stride], zero beyond the width
  const float* norms;    // [count], squared
  int64_t stride;

  __device__ Vectors block(int block, int count) const {
    const int first = block * kBlock;
    return {vectors + first * stride, stride, count - first, true};
  }
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

__device__ float squared_distance_of(float norm, float other_norm, float product) {
  return at_least(fmaf(-2.0f, product, norm + other_norm), kFloor);
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

__global__ void subtract_means(const float* rows,   // [count, width]
                               const float* means,  // [width]
                               int64_t count, int width, int stride,
                               float* centred) {  // [count, stride]
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count * stride;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t row = i / stride;
    const int d = static_cast<int>(i % stride);
    centred[i] = d < width ? rows[row * width + d] - means[d] : 0.0f;
  }
}

// Squared norms in the arithmetic of the products, so that coinciding vectors get a distance of exactly 0.
__global__ void __launch_bounds__(PairShape::threads) find_norms(Branch branch, int count, int width,
                                                                 float* norms) {  // [count]
  float* const shared = reinterpret_cast<float*>(dynamic_shared_memory());
  const Vectors block = branch.block(blockIdx.x, count);
  PairSums sums;
  PairProduct::multiply(block, block, 0, width, shared, sums);
#pragma unroll
  for (int r = 0; r < PairShape::row_tiles; ++r) {
#pragma unroll
    for (int c = 0; c < PairShape::column_tiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = PairShape::row(r, i);
        if (row == PairShape::column(c, i) && row < block.count)
          norms[blockIdx.x * kBlock + row] = sums[r][c][i];
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

// Calls use(r, c, i, row, column) for this thread's pairs of patches.
template <class Use>
__device__ void for_each_pair(const Tile& tile, int count, Use use) {
#pragma unroll
  for (int r = 0; r < PairShape::row_tiles; ++r) {
#pragma unroll
    for (int c = 0; c < PairShape::column_tiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = tile.row(r, i);
        const int column = tile.column(c, i);
        if (row < count && column < count) use(r, c, i, row, column);
      }
    }
  }
}

// sums becomes the squared distances of the online vectors.
__device__ void find_squared_distances(const Patches& patches, const Tile& tile, float* shared,
                                       PairSums& sums) {
  PairProduct::multiply(patches.online.block(tile.row_block, patches.count),
                        patches.online.block(tile.column_block, patches.count), 0, patches.width, shared,
                        sums);
  for_each_pair(tile, patches.count, [&](int r, int c, int i, int row, int column) {
    // A patch's distance from itself is 0, whatever is not finite elsewhere.
    sums[r][c][i] = row == column ? kFloor
                                  : squared_distance_of(patches.online.norms[row],
                                                        patches.online.norms[column], sums[r][c][i]);
  });
}

// labels becomes alpha times the pairwise similarity of a's row and b's column.
__device__ void find_labels(const Branch& a, const Branch& b, const Patches& patches, const Terms& terms,
                            const Tile& tile, float* shared, PairSums& labels) {
  PairProduct::multiply(a.block(tile.row_block, patches.count), b.block(tile.column_block, patches.count), 0,
                        patches.width, shared, labels);
  const bool one_branch = a.vectors == b.vectors;
  for_each_pair(tile, patches.count, [&](int r, int c, int i, int row, int column) {
    const float squared = one_branch && row == column
                              ? kFloor
                              : squared_distance_of(a.norms[row], b.norms[column], labels[r][c][i]);
    const float distance = terms.squared_similarity ? squared : sqrtf(squared);
    labels[r][c][i] = terms.alpha * expf(distance * (-1.0f / terms.sigma));
  });
}

__device__ void clear(PairSums& values) {
#pragma unroll
  for (int r = 0; r < PairShape::row_tiles; ++r) {
#pragma unroll
    for (int c = 0; c < PairShape::column_tiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) values[r][c][i] = 0.0f;
    }
  }
}

// The labels w_ij and, where they are others, w_ji.
template <bool cross>
struct Labels {
  PairSums forth;
  PairSums mirrored[1];  // not touched, and so no registers, where they are the same

  __device__ void find(const Patches& patches, const Terms& terms, const Tile& tile, float* shared) {
    if (!terms.pairwise) {
      clear(forth);
      if constexpr (cross) clear(mirrored[0]);
      return;
    }
    if constexpr (cross) {
      find_labels(patches.online, patches.target, patches, terms, tile, shared, forth);
      find_labels(patches.target, patches.online, patches, terms, tile, shared, mirrored[0]);
    } else {
      find_labels(patches.target, patches.target, patches, terms, tile, shared, forth);
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
                        float* shared) {
    float* const by_row = shared;                                        // [warp_columns][kBlock]
    float* const by_column = shared + PairShape::warp_columns * kBlock;  // [warp_rows][kBlock]
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

__device__ void write_both_ways(PairTotals& sums, const Tile& tile, int count, float* totals, float* shared) {
  const bool diagonal = tile.row_block == tile.column_block;
  sums.write(count - tile.row_block * kBlock, place(totals, count, tile.column_block, tile.row_block),
             count - tile.column_block * kBlock,
             diagonal ? nullptr : place(totals, count, tile.row_block, tile.column_block), shared);
}

// Block (x, y) has the tile of blocks y and x of patches; those below the diagonal end at once.
__global__ void __launch_bounds__(PairShape::threads) add_distances(Patches patches,
                                                                    float* totals) {  // [blocks, count]
  if (blockIdx.x < blockIdx.y) return;
  float* const shared = reinterpret_cast<float*>(dynamic_shared_memory());
  const Tile tile{static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.x)};
  PairSums squared;
  find_squared_distances(patches, tile, shared, squared);
  PairTotals sums;
  for_each_pair(tile, patches.count, [&](int r, int c, int i, int, int) {
    const float distance = sqrtf(squared[r][c][i]);
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
  float* const shared = reinterpret_cast<float*>(dynamic_shared_memory());
  const Tile tile{static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.x)};
  const bool diagonal = tile.row_block == tile.column_block;
  Labels<cross> labels;
  labels.find(patches, terms, tile, shared);
  PairSums squared;
  find_squared_distances(patches, tile, shared, squared);
  PairTotals slopes;
  float loss = 0.0f;
  for_each_pair(tile, patches.count, [&](int r, int c, int i, int row, int column) {
    const float distance = sqrtf(squared[r][c][i]);
    const PairTerm forth(distance * patches.inverse_means[row], labels.forth[r][c][i], terms.margin);
    slopes.rows[r][i / 2] += forth.slope;
    loss += forth.loss;
    if (diagonal) return;  // the pair's other side is another element of this tile
    const PairTerm back(distance * patches.inverse_means[column], labels.back(r, c, i), terms.margin);
    slopes.columns[c][i % 2] += back.slope;
    loss += back.loss;
  });
  write_both_ways(slopes, tile, patches.count, slope_totals, shared);
  const double sum = block_sum<PairShape::threads>(static_cast<double>(loss));
  if (threadIdx.x == 0) tile_losses[static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x] = sum;
}

// A row block of the stripe against a block of patches: how strongly each pair pulls its two patches
// together.
template <bool cross>
__global__ void __launch_bounds__(PairShape::threads)
    find_pulls(Patches patches, Terms terms, int first_block, int stripe_count, int64_t stride,
               float* pulls,     // [stripe_count, stride]
               float* totals) {  // [blocks, stripe_count]
  float* const shared = reinterpret_cast<float*>(dynamic_shared_memory());
  const Tile tile{first_block + static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.x)};
  const int first_row = first_block * kBlock;
  Labels<cross> labels;
  labels.find(patches, terms, tile, shared);
  PairSums squared;
  find_squared_distances(patches, tile, shared, squared);
  // dL/dd_ij = (dL/d delta_ij - slope_i) / mean_i: through delta itself and through the row's mean.
  const auto derivative = [&](float distance, float weight, int patch) {
    const float inverse_mean = patches.inverse_means[patch];
    const float relative = distance * inverse_mean;
    const float repulsion = at_least(terms.margin - relative, 0.0f);
    return inverse_mean * (2.0f * (weight * (relative + repulsion) - repulsion) - patches.slopes[patch]);
  };
  PairTotals sums;
  for_each_pair(tile, patches.count, [&](int r, int c, int i, int row, int column) {
    const float distance = sqrtf(squared[r][c][i]);
    const float both =
        derivative(distance, labels.forth[r][c][i], row) + derivative(distance, labels.back(r, c, i), column);
    // The negated form lets NaN through.
    const float pull = !(squared[r][c][i] <= kFloor) ? both / distance : 0.0f;
    pulls[(row - first_row) * stride + column] = pull;
    sums.rows[r][i / 2] += pull;
  });
  const int row_in_stripe = blockIdx.y * kBlock;
  sums.write(stripe_count - row_in_stripe,
             totals + static_cast<int64_t>(blockIdx.x) * stripe_count + row_in_stripe, 0, nullptr, shared);
}

// Block (x, y, z): columns x and rows y of pulls @ vectors over the z-th part of the patches.
__global__ void __launch_bounds__(PullShape::threads)
    weigh_vectors(const float* pulls,  // [rows, pull_stride]
                  int rows, int64_t pull_stride,
                  const float* vectors,  // [count, stride]
                  int count, int stride, int part,
                  float* sums) {  // [parts, rows, stride]
  float* const shared = reinterpret_cast<float*>(dynamic_shared_memory());
  const int first_row = blockIdx.y * PullShape::rows;
  const int first_column = blockIdx.x * PullShape::columns;
  const Vectors a{pulls + first_row * pull_stride, pull_stride, rows - first_row, true};
  const Vectors b{vectors + first_column, stride, stride - first_column, true};
  const int begin = blockIdx.z * part;
  PullProduct::Sums products;
  PullProduct::multiply(a, b, begin, min(begin + part, count), shared, products);
#pragma unroll
  for (int r = 0; r < PullShape::row_tiles; ++r) {
#pragma unroll
    for (int c = 0; c < PullShape::column_tiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const int row = first_row + PullShape::row(r, i);
        const int column = first_column + PullShape::column(c, i);
        if (row >= rows || column >= stride) continue;
        float* const to = sums + (static_cast<int64_t>(blockIdx.z) * rows + row) * stride + column;
        *reinterpret_cast<float2*>(to) = make_float2(products[r][c][i], products[r][c][i + 1]);
      }
    }
  }
}

// gradient_i = scale * (sum_j pull_ij z_i - sum_j pull_ij z_j), one block a row of the stripe.
__global__ void subtract_weighted(const float* totals,   // [blocks, rows]
                                  const float* sums,     // [parts, rows, stride]
                                  const float* vectors,  // [rows, stride]
                                  const float* grad,     // one
                                  float scale, int blocks, int parts, int rows, int stride, int width,
                                  float* gradient) {  // [rows, width]
  const int row = blockIdx.x;
  double own = 0.0;
  for (int b = threadIdx.x; b < blocks; b += kThreads) own += totals[static_cast<int64_t>(b) * rows + row];
  const auto pull = static_cast<float>(block_sum<kThreads>(own));
  for (int d = threadIdx.x; d < width; d += kThreads) {
    float sum = 0.0f;
    for (int part = 0; part < parts; ++part)
      sum += sums[(static_cast<int64_t>(part) * rows + row) * stride + d];
    gradient[static_cast<int64_t>(row) * width + d] =
        *grad * scale * (pull * vectors[static_cast<int64_t>(row) * stride + d] - sum);
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
    const float* x = patches.online.vectors + i * patches.online.stride;
    const float* y = patches.online.vectors + safe * patches.online.stride;
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

__device__ int64_t first_at_least(const int64_t* sorted, int64_t length, int64_t value) {
  int64_t begin = 0;
  while (begin < length) {
    const int64_t middle = (begin + length) / 2;
    if (sorted[middle] < value) {
      begin = middle + 1;
    } else {
      length = middle;
    }
  }
  return begin;
}

// One block a patch: the pulls of its own pairs and then, in the order of their rows, of those in which it is
// the neighbour.
__global__ void add_sparse_gradient(Patches patches, SparseLabel label,
                                    const float* pulls,           // [count, k]
                                    const int64_t* sorted_ends,   // [count * k]: neighbours, ascending
                                    const int64_t* sorted_edges,  // [count * k]: whose they are
                                    const float* grad,            // one
                                    float scale,
                                    float* gradient) {  // [count, width]
  const int64_t i = blockIdx.x;
  const int64_t edges = static_cast<int64_t>(patches.count) * label.k;
  const int64_t begin = first_at_least(sorted_ends, edges, i);
  const int64_t end = first_at_least(sorted_ends, edges, i + 1);
  const float* from = patches.online.vectors + i * patches.online.stride;
  for (int d = threadIdx.x; d < patches.width; d += kThreads) {
    float sum = 0.0f;
    const auto add = [&](int64_t edge, int64_t other) {
      const float pull = pulls[edge];
      if (pull == 0.0f) return;
      const bool foreign = other < 0 || other >= patches.count;
      sum += pull * (from[d] - (foreign ? NAN : patches.online.vectors[other * patches.online.stride + d]));
    };
    for (int64_t edge = i * label.k; edge < (i + 1) * label.k; ++edge) add(edge, label.neighbors[edge]);
    for (int64_t at = begin; at < end; ++at) add(sorted_edges[at], sorted_edges[at] / label.k);
    gradient[i * patches.width + d] += *grad * scale * sum;
  }
}

// --- On the host
// ------------------------------------------------------------------------------------------------

struct CentredBranch {
  Tensor vectors;
  Tensor norms;

  Branch view() const {
    return {vectors.const_data_ptr<float>(), norms.const_data_ptr<float>(), vectors.size(1)};
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
  const int stride = static_cast<int>(round_up(width, 4));
  const CentredBranch branch{new_floats(rows, {count, stride}), new_floats(rows, {count})};
  device.launch("relaxed_contrastive: subtract_means", subtract_means,
                blocks_for(device, divide_up(count * stride, kThreads)), kThreads, 0,
                rows.const_data_ptr<float>(), means.const_data_ptr<float>(), count, width, stride,
                branch.vectors.mutable_data_ptr<float>());
  device.launch("relaxed_contrastive: find_norms", find_norms, divide_up(count, kBlock), PairShape::threads,
                PairProduct::shared_bytes, branch.view(), static_cast<int>(count), width,
                branch.norms.mutable_data_ptr<float>());
  return branch;
}

// What both passes begin with.
struct Problem {
  Problem(const Device& device, const Tensor& z_given, const Tensor& target_given,
          const Tensor& neighbors_given, double alpha, double sigma, double margin, int64_t similarity_power,
          bool cross, bool mean)
      : z(in_order("relaxed_contrastive", "z", z_given)),
        target(in_order("relaxed_contrastive", "z_target", target_given)),
        neighbors(in_order("relaxed_contrastive", "neighbors", neighbors_given)),
        terms{static_cast<float>(alpha), static_cast<float>(sigma), static_cast<float>(margin),
              similarity_power == 2, alpha > 0},
        cross(cross),
        // Where pairs of one online and one target vector are measured, both need the same shift.
        centre(column_means(device, cross ? target : z)),
        online(centred(device, z, centre)) {
    check(z.size(0) <= kMostPatches, "relaxed_contrastive: on CUDA z must have at most ", kMostPatches,
          " rows, got ", z.size(0));
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
  const int width = static_cast<int>(problem.z.size(1));
  const int stride = static_cast<int>(problem.online.vectors.size(1));
  const int64_t pull_stride = round_up(count, 4);
  const int64_t block_bytes = int64_t{kBlock} * pull_stride * static_cast<int64_t>(sizeof(float));
  const int stripe_blocks = static_cast<int>(std::clamp<int64_t>(kStripeBytes / block_bytes, 1, blocks));
  const int stripe_rows = std::min(stripe_blocks * kBlock, count);
  const int row_tiles = static_cast<int>(divide_up(stripe_rows, PullShape::rows));
  const int column_tiles = static_cast<int>(divide_up(stride, PullShape::columns));
  // About two blocks wait for every multiprocessor; a part is worth a thousand patches at least.
  const int64_t wanted = divide_up(2 * device.multiprocessors(), row_tiles * column_tiles);
  const int64_t splits = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, count / 1024));
  const int part = static_cast<int>(round_up(divide_up(count, splits), kSlice));
  const int parts = static_cast<int>(divide_up(count, part));
  const Tensor pulls = new_floats(problem.z, {stripe_rows, pull_stride});
  const Tensor totals = new_floats(problem.z, {blocks, stripe_rows});
  const Tensor sums = new_floats(problem.z, {parts, stripe_rows, stride});
  for (int first = 0; first < blocks; first += stripe_blocks) {
    const int rows = std::min(stripe_rows, count - first * kBlock);
    device.launch("relaxed_contrastive_backward: find_pulls",
                  problem.cross ? find_pulls<true> : find_pulls<false>, dim3(blocks, divide_up(rows, kBlock)),
                  PairShape::threads, PairProduct::shared_bytes, patches, problem.terms, first, rows,
                  pull_stride, pulls.mutable_data_ptr<float>(), totals.mutable_data_ptr<float>());
    device.launch("relaxed_contrastive_backward: weigh_vectors", weigh_vectors,
                  dim3(column_tiles, divide_up(rows, PullShape::rows), parts), PullShape::threads,
                  PullProduct::shared_bytes, pulls.const_data_ptr<float>(), rows, pull_stride,
                  patches.online.vectors, count, stride, part, sums.mutable_data_ptr<float>());
    const int64_t at = int64_t{first} * kBlock;
    device.launch("relaxed_contrastive_backward: subtract_weighted", subtract_weighted, rows, kThreads, 0,
                  totals.const_data_ptr<float>(), sums.const_data_ptr<float>(),
                  patches.online.vectors + at * stride, grad.const_data_ptr<float>(),
                  static_cast<float>(problem.scale), blocks, parts, rows, stride, width,
                  gradient.mutable_data_ptr<float>() + at * width);
  }
}

Tensor relaxed_contrastive_backward(const Tensor& grad, const Tensor& z, const Tensor& target,
                                    const Tensor& neighbors, const Tensor& inverse_means_given,
                                    const Tensor& slopes_given, double alpha, double sigma, double margin,
                                    int64_t similarity_power, bool cross, bool mean) {
  check_relaxed_contrastive(z, target, neighbors, alpha, sigma, margin, similarity_power);
  check_relaxed_contrastive_backward(grad, z, inverse_means_given, slopes_given);
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
  device.launch("relaxed_contrastive_backward: add_sparse_gradient", add_sparse_gradient, problem.count(),
                kThreads, 0, patches, problem.sparse, pulls.const_data_ptr<float>(),
                ends.const_data_ptr<int64_t>(), edges.const_data_ptr<int64_t>(), grad.const_data_ptr<float>(),
                static_cast<float>(problem.scale), gradient.mutable_data_ptr<float>());
  return gradient;
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, PYDEFECT_CUDA_KEY, library) {
  library.impl("relaxed_contrastive", TORCH_BOX(&relaxed_contrastive));
  library.impl("relaxed_contrastive_backward", TORCH_BOX(&relaxed_contrastive_backward));
}

}  // namespace
}  // namespace pydefect::cuda
