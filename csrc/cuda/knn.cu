// k-NN on CUDA, a few kernels on the caller's stream and no synchronisation with the host:
//   1. split_rows, of queries and bank: the parts that tensor cores multiply (split.cuh);
//      prepare_bank: the scores' start values -|y|^2 / 2 and the largest norm of the bank;
//   2. search_tiles: scores of a tile of queries and a tile of the bank on tensor cores (tile_product.cuh),
//      selection fused, so no [N, M] matrix exists; the bank is divided among blocks where the queries alone
//      would not fill the device;
//   3. rank_candidates: merges the divisions' candidates, measures directly those that can be among the k
//      nearest and certifies the answer (csrc/knn_certificate.h), or notes the query for
//   4. search_exhaustively: measures every row for the queries noted, a few of them on many multiprocessors
//      each.
//
// Memory beyond the outputs: the parts, as large as queries and bank, the candidates, and 2 MiB of keys at
// most.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "../checks.h"
#include "../knn_certificate.h"
#include "../ranking_key.h"
#include "common.cuh"
#include "knn.h"
#include "reductions.cuh"
#include "split.cuh"
#include "tile_product.cuh"

namespace pydefect::cuda {
namespace {

using Shape = TileShape<2, 4, 4, 4>;
using Product = TileProduct<Shape>;

constexpr int kTileQueries = Shape::rows;
constexpr int kTileRows = Shape::columns;  // rows of the bank
constexpr int kThreads = Shape::threads;
constexpr int kThreadsPerQuery = kThreads / kTileQueries;  // in the selection
constexpr int kMostSplits = 32;                            // one lane of a warp each when they are merged
constexpr int kScorePitch = kTileRows + 1;                 // spreads a column over the memory banks
constexpr int kAtOnce = 4;                                 // scores that a thread looks at together
constexpr int kQueue = 2 * kAtOnce;  // scores of a thread that wait until its warp inserts them together
// More candidates than k, so that near ties of the k-th seldom need the exhaustive search.
constexpr int kSpare = 3;
static_assert(kThreadsPerQuery == 2, "merge_pair merges two lists");

// One multiprocessor takes 1.4 ms for one query and 2,048 rows of 448 (H200), as long as the search for all
// the others: the first so many queries are shared out among blocks, the bank in so many parts at most.
constexpr int kSharedQueries = 64;
constexpr int kMostParts = 64;
constexpr RankingKey kNoKey = ~RankingKey{0};

// Shared memory holds the products' slices and, after them, the tile's scores and the threads' queues.
constexpr size_t kScoreBytes = sizeof(float) * kTileQueries * kScorePitch;
constexpr size_t kQueueBytes = (sizeof(float) + sizeof(int)) * kQueue * kThreads;
constexpr size_t kSharedBytes = std::max(Product::shared_bytes, kScoreBytes + kQueueBytes);

struct Problem {
  const float* queries;  // [query_count, width]
  const float* bank;     // [bank_rows, width]
  int64_t query_count;
  int bank_rows;
  int width;
  int k;
};

// `length` rows with the largest scores so far, best first, in registers: every index is known at compile
// time. Free places hold a score of -infinity, which nothing that may enter has.
template <int length>
struct CandidateList {
  float scores[length];
  int rows[length];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < length; ++i) {
      scores[i] = -INFINITY;
      rows[i] = -1;
    }
  }

  __device__ float worst() const { return scores[length - 1]; }

  // The caller has seen that score > worst(). A bubble upwards: the newcomer replaces the last.
  __device__ void insert(float score, int row) {
    scores[length - 1] = score;
    rows[length - 1] = row;
#pragma unroll
    for (int i = length - 1; i > 0; --i) {
      if (scores[i] > scores[i - 1]) {
        const float score_above = scores[i - 1];
        const int row_above = rows[i - 1];
        scores[i - 1] = scores[i];
        rows[i - 1] = rows[i];
        scores[i] = score_above;
        rows[i] = row_above;
      }
    }
  }

  __device__ void drop_first() {
#pragma unroll
    for (int i = 0; i + 1 < length; ++i) {
      scores[i] = scores[i + 1];
      rows[i] = rows[i + 1];
    }
    scores[length - 1] = -INFINITY;
    rows[length - 1] = -1;
  }
};

// A thread a row. Non-negative doubles order as their bits do, and the bits of a NaN are larger still, so the
// largest norm is NaN where any is.
__global__ void prepare_bank(const double* squared_norms,  // [bank_rows]
                             int bank_rows,
                             float* start_values,                         // [bank_rows]
                             unsigned long long* largest_squared_norm) {  // one, zero before
  const int row = blockIdx.x * kThreads + threadIdx.x;
  if (row >= bank_rows) return;
  start_values[row] = static_cast<float>(-0.5 * squared_norms[row]);
  atomicMax(largest_squared_norm, static_cast<unsigned long long>(__double_as_longlong(squared_norms[row])));
}

// Leaves the best of two neighbouring lanes' lists, in order, in `scores` and `rows`; the even lane writes
// them.
template <int length>
__device__ void merge_pair(CandidateList<length>& list, bool writes, float* scores, int* rows) {
  for (int i = 0; i < length; ++i) {
    const float other_score = __shfl_xor_sync(kAllLanes, list.scores[0], 1);
    const int other_row = __shfl_xor_sync(kAllLanes, list.rows[0], 1);
    const bool even = threadIdx.x % 2 == 0;
    // Both lanes must agree on whose entry goes, so a tie is the even lane's.
    const bool mine = list.scores[0] > other_score || (list.scores[0] == other_score && even);
    if (writes && even) {
      scores[i] = mine ? list.scores[0] : other_score;
      rows[i] = mine ? list.rows[0] : other_row;
    }
    if (mine) list.drop_first();
  }
}

// Both operands as tensor cores multiply them, and what turns a product into a score.
struct Operands {
  SplitRows queries;
  SplitRows bank;
  const float* query_scales;  // [query_count]
  const float* bank_scales;   // [bank_rows]
  const float* start_values;  // [bank_rows]
};

// A thread's scores that may enter its list. Lanes of a warp find such scores at different times, and an
// insertion holds all of them up: so they wait until one lane's queue may overflow.
struct Queue {
  float* scores;  // [kQueue, kThreads]
  int* rows;      // [kQueue, kThreads]
  int waiting = 0;

  __device__ explicit Queue(char* memory)
      : scores(reinterpret_cast<float*>(memory)), rows(reinterpret_cast<int*>(scores + kQueue * kThreads)) {}

  __device__ void add(float score, int row) {
    scores[waiting * kThreads + threadIdx.x] = score;
    rows[waiting * kThreads + threadIdx.x] = row;
    ++waiting;
  }

  template <int length>
  __device__ void insert_into(CandidateList<length>& list) {
#pragma unroll
    for (int i = 0; i < kQueue; ++i) {
      if (i >= waiting) continue;
      const float score = scores[i * kThreads + threadIdx.x];
      if (score > list.worst()) list.insert(score, rows[i * kThreads + threadIdx.x]);
    }
    waiting = 0;
  }
};

// Block (x, y) shows the y-th part of the bank to the x-th tile of queries. The lists come out best first,
// free places as -infinity. A list that is full has a last score that no row left out by it exceeds.
template <int length>
__global__ void __launch_bounds__(kThreads, length <= 8 ? 2 : 1)
    search_tiles(Operands operands, int rows_per_split,
                 float* candidate_scores,  // [query_count, splits, length]
                 int* candidate_rows) {    // [query_count, splits, length]
  char* const shared = dynamic_shared_memory();
  float* const scores = reinterpret_cast<float*>(shared);
  const int64_t first_query = static_cast<int64_t>(blockIdx.x) * kTileQueries;
  const int first_row = blockIdx.y * rows_per_split;
  const int last_row = static_cast<int>(min(int64_t{first_row} + rows_per_split, operands.bank.count));
  const int list_query = threadIdx.x / kThreadsPerQuery;
  const int list_part = threadIdx.x % kThreadsPerQuery;
  const SplitRows queries = operands.queries.from(first_query);

  CandidateList<length> list;
  list.clear();
  for (int tile_row = first_row; tile_row < last_row; tile_row += kTileRows) {
    SplitRows bank = operands.bank.from(tile_row);
    bank.count = last_row - tile_row;
    typename Product::Sums sums;
    Product::multiply(queries, bank, shared, sums);
    __syncthreads();  // the last readers of the slices are done
    const OfRows<Shape> query_scales(operands.query_scales + first_query, queries.count);
    const OfColumns<Shape> bank_scales(operands.bank_scales + tile_row, bank.count);
    const OfColumns<Shape> start_values(operands.start_values + tile_row, bank.count);
#pragma unroll
    for (int r = 0; r < Shape::row_tiles; ++r) {
#pragma unroll
      for (int c = 0; c < Shape::column_tiles; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float product = sums[r][c][i] * bank_scales(c, i);
          scores[Shape::row(r, i) * kScorePitch + Shape::column(c, i)] =
              fmaf(product, query_scales(r, i), start_values(c, i));
        }
      }
    }
    __syncthreads();
    Queue queue(shared + kScoreBytes);
    const auto columns = static_cast<int>(min(bank.count, int64_t{kTileRows}));
    const float* const own = scores + list_query * kScorePitch;
    for (int first = list_part; first < kTileRows; first += kAtOnce * kThreadsPerQuery) {
      float together[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) together[i] = own[first + i * kThreadsPerQuery];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int c = first + i * kThreadsPerQuery;
        if (together[i] > list.worst() && c < columns) queue.add(together[i], tile_row + c);
      }
      if (__any_sync(kAllLanes, queue.waiting > kQueue - kAtOnce)) queue.insert_into(list);
    }
    queue.insert_into(list);
  }
  const int64_t query = first_query + list_query;
  const int64_t to = (query * gridDim.y + blockIdx.y) * length;
  merge_pair(list, query < operands.queries.count, candidate_scores + to, candidate_rows + to);
}

// The certificate's bound is for float32 sums of `width` products. Those of split numbers lack three parts of
// at most 2^-22 of a product each (and 2^-39 of |x||y| for every number, which the margin below covers), and
// are sums of at most 3 / 8 as many groups of eight, each of which a tensor core may cut off by 2^-22 of what
// it has: together at most (1.5 width + 12) 2^-24 |x||y| more. The scales are powers of two and round nothing
// but what is smaller than the smallest normal number.
__device__ int64_t certified_width(int width) {
  return 4 * (int64_t{width} + 16);
}

struct ScoredRow {
  float score;
  int row;
};

// The lanes' largest score, ties to the lower row; every lane gets it.
__device__ ScoredRow warp_best(ScoredRow mine) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const float score = __shfl_xor_sync(kAllLanes, mine.score, offset);
    const int row = __shfl_xor_sync(kAllLanes, mine.row, offset);
    if (score > mine.score || (score == mine.score && row < mine.row)) mine = {score, row};
  }
  return mine;
}

// One warp a query. Each lane walks down the list of one split.
template <int length>
__global__ void rank_candidates(Problem problem, int splits, const float* candidate_scores,
                                const int* candidate_rows,
                                const double* squared_norms,  // [query_count]
                                const unsigned long long* largest_squared_norm,
                                float* distances,             // [query_count, k]
                                int64_t* indices,             // [query_count, k]
                                int64_t* uncertain_queries,   // [query_count]
                                unsigned* uncertain_count) {  // one, zero before
  __shared__ int winner_rows[kThreads / kWarp][length];
  __shared__ RankingKey winner_keys[kThreads / kWarp][length];
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int64_t query = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + warp;
  if (query >= problem.query_count) return;  // the whole warp leaves, and no barrier of the block follows

  const int64_t from = (query * splits + lane) * length;
  int next = 0;
  const auto head = [&] {
    const bool any = lane < splits && next < length;
    return any ? ScoredRow{candidate_scores[from + next], candidate_rows[from + next]}
               : ScoredRow{-INFINITY, -1};
  };
  const float* const vector = problem.queries + query * problem.width;
  const double query_norm = sqrt(squared_norms[query]);
  const double bank_norm = sqrt(__longlong_as_double(static_cast<long long>(*largest_squared_norm)));
  const int64_t width = certified_width(problem.width);
  // Rows whose scores lie further below the k-th best one's than this need not be measured.
  const double margin = score_margin({query_norm}, {bank_norm}, width);
  double least = -INFINITY;

  ScoredRow mine = head();
  int winners = 0;
  while (winners < length) {
    const ScoredRow best = warp_best(mine);
    // Where the margin is not a number nothing is below it.
    if (best.score == -INFINITY || (winners >= problem.k && best.score < least)) break;
    if (lane == 0) winner_rows[warp][winners] = best.row;
    ++winners;
    if (winners == problem.k) least = best.score - margin;
    if (mine.row == best.row) {  // a row is in one split's list only
      ++next;
      mine = head();
    }
  }
  // No row left out has a larger score than this: what waits in a list bounds the rest of that list and all
  // that it left out; of a list that is used up its last score does.
  float worst = mine.score;
  if (lane < splits && next == length) worst = candidate_scores[from + length - 1];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    worst = fmaxf(worst, __shfl_xor_sync(kAllLanes, worst, offset));
  }
  __syncwarp();

  for (int first = 0; first < winners; first += 2) {
    // The second half of the warp measures the last winner too where their number is odd.
    const int winner = min(first + lane / 16, winners - 1);
    const int row = winner_rows[warp][winner];
    const float distance =
        squared_distance(vector, problem.bank + static_cast<int64_t>(row) * problem.width, problem.width);
    if (lane % 16 == 0 && first + lane / 16 == winner) winner_keys[warp][winner] = ranking_key(distance, row);
  }
  __syncwarp();

  // Keys differ, so each has a rank of its own and the ranks below k are all taken once.
  RankingKey kth = 0;
  for (int i = lane; i < winners; i += kWarp) {
    const RankingKey key = winner_keys[warp][i];
    int rank = 0;
    for (int j = 0; j < winners; ++j) rank += winner_keys[warp][j] < key;
    if (rank >= problem.k) continue;
    distances[query * problem.k + rank] = key_distance(key);
    indices[query * problem.k + rank] = key_row(key);
    if (rank == problem.k - 1) kth = key;
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const RankingKey other = __shfl_xor_sync(kAllLanes, kth, offset);
    kth = other > kth ? other : kth;
  }
  if (lane == 0) {
    const bool certain = winners >= problem.k && (winners == problem.bank_rows ||
                                                  no_closer_row_outside({query_norm}, {bank_norm}, worst,
                                                                        key_distance(kth), width, false));
    if (!certain) uncertain_queries[atomicAdd(uncertain_count, 1u)] = query;
  }
}

// What search_exhaustively works on. The list is read on the device: the host never waits.
struct Uncertain {
  const int64_t* queries;  // [query_count], of which `count` are there
  const unsigned* count;
  int parts;                 // of the bank
  int64_t part_rows;         // of each part but the last
  RankingKey* part_keys;     // [kSharedQueries, parts, k]
  unsigned* parts_finished;  // [kSharedQueries], zero before
};

// The best keys so far and the next kThreads, one of each thread, are ranked together: a key's rank is its
// place in the next best list. All threads must call.
__device__ void keep_best(RankingKey* keys,  // [kMostNeighbours + kThreads], shared: the best, the new ones
                          int k) {
  __syncthreads();
  const RankingKey key_new = keys[kMostNeighbours + threadIdx.x];
  // The first threads rank an old one too.
  const RankingKey key_old = threadIdx.x < k ? keys[threadIdx.x] : kNoKey;
  int rank_new = 0;
  int rank_old = 0;
  for (int j = 0; j < kMostNeighbours + kThreads; ++j) {
    rank_new += keys[j] < key_new;
    rank_old += keys[j] < key_old;
  }
  __syncthreads();
  // Places that no key takes hold kNoKey already: there are never fewer keys than before.
  if (key_new != kNoKey && rank_new < k) keys[rank_new] = key_new;
  if (key_old != kNoKey && rank_old < k) keys[rank_old] = key_old;
  __syncthreads();
}

// A block takes a part of the bank for one of the first kSharedQueries of the list, or the whole bank for one
// of those after them, of which there are enough to fill the device. The last block that is done with a
// shared query ranks what all of them have found.
__global__ void __launch_bounds__(kThreads) search_exhaustively(Problem problem, Uncertain uncertain,
                                                                float* distances,    // [query_count, k]
                                                                int64_t* indices) {  // [query_count, k]
  __shared__ RankingKey keys[kMostNeighbours + kThreads];
  __shared__ bool is_last;
  const int lane = threadIdx.x % kWarp;
  const int k = problem.k;
  const int64_t count = *uncertain.count;
  const int64_t shared_count = min(count, int64_t{kSharedQueries});
  const int64_t shared_items = shared_count * uncertain.parts;
  for (int64_t item = blockIdx.x; item < shared_items + count - shared_count; item += gridDim.x) {
    const bool is_shared = item < shared_items;
    const int64_t place = is_shared ? item / uncertain.parts : item - shared_items + shared_count;
    const int64_t part = is_shared ? item % uncertain.parts : 0;
    const int64_t first_row = part * uncertain.part_rows;
    const int64_t rows = is_shared ? uncertain.part_rows : problem.bank_rows;
    const int64_t last_row = min(first_row + rows, int64_t{problem.bank_rows});
    const int64_t query = uncertain.queries[place];
    const float* const vector = problem.queries + query * problem.width;
    if (threadIdx.x < kMostNeighbours) keys[threadIdx.x] = kNoKey;
    for (int64_t first = first_row; first < last_row; first += kThreads) {
      for (int r = threadIdx.x / 16; r < kThreads; r += kThreads / 16) {
        // A row past the end is measured as the last one, so that whole warps take part, and then dropped.
        const int64_t row = min(first + r, last_row - 1);
        const float distance = squared_distance(vector, problem.bank + row * problem.width, problem.width);
        if (lane % 16 == 0) {
          keys[kMostNeighbours + r] = first + r < last_row ? ranking_key(distance, row) : kNoKey;
        }
      }
      keep_best(keys, k);
    }
    if (is_shared) {
      RankingKey* const found = uncertain.part_keys + place * uncertain.parts * k;
      if (threadIdx.x < k) found[part * k + threadIdx.x] = keys[threadIdx.x];
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) {
        is_last =
            atomicAdd(uncertain.parts_finished + place, 1u) + 1 == static_cast<unsigned>(uncertain.parts);
      }
      __syncthreads();
      if (!is_last) continue;
      __threadfence();
      // volatile: not from this multiprocessor's own cache, which does not know what others have written.
      const volatile RankingKey* const all = found;
      if (threadIdx.x < kMostNeighbours) keys[threadIdx.x] = kNoKey;
      for (int first = 0; first < uncertain.parts * k; first += kThreads) {
        const int i = first + static_cast<int>(threadIdx.x);
        keys[kMostNeighbours + threadIdx.x] = i < uncertain.parts * k ? all[i] : kNoKey;
        keep_best(keys, k);
      }
    }
    if (threadIdx.x < k) {
      distances[query * k + threadIdx.x] = key_distance(keys[threadIdx.x]);
      indices[query * k + threadIdx.x] = key_row(keys[threadIdx.x]);
    }
    __syncthreads();  // before the next query clears the list
  }
}

// The bank is divided, in whole tiles, so that the blocks fill the device once: a second round of few blocks
// would take as long as the first.
int rows_per_split(const Problem& problem, const Device& device) {
  const int64_t query_tiles = divide_up(problem.query_count, kTileQueries);
  const int64_t bank_tiles = divide_up(problem.bank_rows, kTileRows);
  const int64_t wanted = std::max<int64_t>(1, 2 * device.multiprocessors() / query_tiles);
  const int64_t splits = std::min({wanted, bank_tiles, static_cast<int64_t>(kMostSplits)});
  return static_cast<int>(divide_up(bank_tiles, splits)) * kTileRows;
}

template <int length>
void search(const Problem& problem, const Tensor& queries, const Tensor& bank, const Device& device,
            float* distances, int64_t* indices) {
  using torch::headeronly::ScalarType;
  const int rows_each = rows_per_split(problem, device);
  const int splits = static_cast<int>(divide_up(problem.bank_rows, rows_each));
  const Tensor start_values = new_floats(bank, {problem.bank_rows});
  const Tensor scores = new_floats(bank, {problem.query_count, splits, length});
  const Tensor rows = new_of(bank, {problem.query_count, splits, length}, ScalarType::Int);
  const Tensor uncertain = new_of(bank, {problem.query_count}, ScalarType::Long);
  // The largest squared norm, the number of uncertain queries, and of each that is shared out the parts that
  // are finished; all start at zero.
  const Tensor totals = torch::stable::new_zeros(bank, {2 + kSharedQueries}, ScalarType::Long);
  auto* largest_squared_norm = reinterpret_cast<unsigned long long*>(totals.mutable_data_ptr<int64_t>());
  auto* uncertain_count = reinterpret_cast<unsigned*>(largest_squared_norm + 1);
  auto* parts_finished = reinterpret_cast<unsigned*>(largest_squared_norm + 2);
  const int64_t part_rows = round_up(divide_up(problem.bank_rows, kMostParts), kThreads);
  const int parts = static_cast<int>(divide_up(problem.bank_rows, part_rows));
  const int64_t shared_queries = std::min<int64_t>(problem.query_count, kSharedQueries);
  const Tensor part_keys = new_of(bank, {shared_queries, parts, problem.k}, ScalarType::Long);

  constexpr int warps = kThreads / kWarp;
  const Tensor query_norms = new_of(queries, {problem.query_count}, ScalarType::Double);
  const Tensor bank_norms = new_of(bank, {problem.bank_rows}, ScalarType::Double);
  const SplitTensor split_queries = split_by_row(device, queries, &query_norms);
  const SplitTensor split_bank = split_by_row(device, bank, &bank_norms);
  device.launch("knn: prepare_bank", prepare_bank, divide_up(problem.bank_rows, kThreads), kThreads, 0,
                bank_norms.const_data_ptr<double>(), problem.bank_rows,
                start_values.mutable_data_ptr<float>(), largest_squared_norm);
  const Operands operands{split_queries.rows(), split_bank.rows(),
                          split_queries.scales.const_data_ptr<float>(),
                          split_bank.scales.const_data_ptr<float>(), start_values.const_data_ptr<float>()};
  const dim3 grid(divide_up(problem.query_count, kTileQueries), splits);
  device.launch("knn: search_tiles", search_tiles<length>, grid, kThreads, kSharedBytes, operands, rows_each,
                scores.mutable_data_ptr<float>(), rows.mutable_data_ptr<int32_t>());
  device.launch("knn: rank_candidates", rank_candidates<length>, divide_up(problem.query_count, warps),
                kThreads, 0, problem, splits, scores.const_data_ptr<float>(), rows.const_data_ptr<int32_t>(),
                query_norms.const_data_ptr<double>(), largest_squared_norm, distances, indices,
                uncertain.mutable_data_ptr<int64_t>(), uncertain_count);
  const Uncertain noted{uncertain.const_data_ptr<int64_t>(),
                        uncertain_count,
                        parts,
                        part_rows,
                        reinterpret_cast<RankingKey*>(part_keys.mutable_data_ptr<int64_t>()),
                        parts_finished};
  const int64_t blocks = std::min<int64_t>(problem.query_count * parts, 8 * device.multiprocessors());
  device.launch("knn: search_exhaustively", search_exhaustively, blocks, kThreads, 0, problem, noted,
                distances, indices);
}

}  // namespace

std::tuple<Tensor, Tensor> knn(const Tensor& queries_given, const Tensor& bank_given, int64_t k,
                               const std::string& precision) {
  // The answer is the same for both precisions: "bf16" searches in float32 here.
  check_knn(queries_given, bank_given, k, precision);
  check(k <= kMostNeighbours, "knn: on CUDA k must be at most ", kMostNeighbours, ", got ", k);
  const Device device(queries_given);
  const Tensor queries = in_order("knn", "queries", queries_given);
  const Tensor bank = in_order("knn", "bank", bank_given);
  const int64_t query_count = queries.size(0);
  Tensor distances = new_floats(queries, {query_count, k});
  Tensor indices = new_of(queries, {query_count, k}, torch::headeronly::ScalarType::Long);
  if (query_count == 0) return {distances, indices};

  const Problem problem{queries.const_data_ptr<float>(), bank.const_data_ptr<float>(),   query_count,
                        static_cast<int>(bank.size(0)),  static_cast<int>(bank.size(1)), static_cast<int>(k)};
  const int64_t length = k + kSpare;
  const auto run = length <= 8    ? search<8>
                   : length <= 16 ? search<16>
                   : length <= 32 ? search<32>
                                  : search<68>;
  run(problem, queries, bank, device, distances.mutable_data_ptr<float>(),
      indices.mutable_data_ptr<int64_t>());
  return {distances, indices};
}

namespace {

STABLE_TORCH_LIBRARY_IMPL(pydefect, PYDEFECT_CUDA_KEY, library) {
  library.impl("knn", TORCH_BOX(&knn));
}

}  // namespace
}  // namespace pydefect::cuda
