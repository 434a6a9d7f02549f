// A block's tile of a product of split matrices (split.cuh) on tensor cores, as exact as float32 arithmetic:
// of the four products of parts three are added up (the fourth, low * low, is below 2^-22 of the product).
// The sums are float32.
//
// Slices of both operands are copied into shared memory asynchronously, kStages - 1 of them ahead.
#pragma once

#include "common.cuh"
#include "instructions.cuh"
#include "split.cuh"

namespace pydefect::cuda {

constexpr int kStages = 3;
constexpr int kSliceBytes = kSliceParts * 2;
constexpr int kPiece = 16;  // bytes that a thread copies, or a row of the matrices that tensor cores load
constexpr int kPieces = kSliceBytes / kPiece;
constexpr int kDepth = 16;  // of one product on tensor cores

// Warps side by side, and what each of them has: row_tiles x column_tiles products of 16 x 8.
template <int warp_rows_, int warp_columns_, int row_tiles_, int column_tiles_>
struct TileShape {
  static constexpr int warp_rows = warp_rows_;
  static constexpr int warp_columns = warp_columns_;
  static constexpr int row_tiles = row_tiles_;
  static constexpr int column_tiles = column_tiles_;
  static constexpr int threads = warp_rows * warp_columns * kWarp;
  static constexpr int rows = warp_rows * row_tiles * 16;
  static constexpr int columns = warp_columns * column_tiles * 8;

  static __device__ int warp_row() {
    return static_cast<int>(threadIdx.x) / kWarp / warp_columns * row_tiles * 16;
  }
  static __device__ int warp_column() {
    return static_cast<int>(threadIdx.x) / kWarp % warp_columns * column_tiles * 8;
  }

  // Of this thread's element i of tile (r, c).
  static __device__ int row(int r, int i) {
    return warp_row() + r * 16 + i / 2 * 8 + static_cast<int>(threadIdx.x) % kWarp / 4;
  }
  static __device__ int column(int c, int i) {
    return warp_column() + c * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
  }
};

template <class Shape>
using TileSums = float[Shape::row_tiles][Shape::column_tiles][4];

template <class Shape>
__device__ void clear(TileSums<Shape>& sums) {
#pragma unroll
  for (int r = 0; r < Shape::row_tiles; ++r) {
#pragma unroll
    for (int c = 0; c < Shape::column_tiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[r][c][i] = 0.0f;
    }
  }
}

// What belongs to this thread's rows and columns of a tile, in registers; beyond the last one, 0.
template <class Shape>
struct OfRows {
  float values[Shape::row_tiles][2];

  __device__ OfRows(const float* of_tile, int64_t count, int64_t stride = 1) {
#pragma unroll
    for (int r = 0; r < Shape::row_tiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = Shape::row(r, 2 * half);
        values[r][half] = row < count ? of_tile[row * stride] : 0.0f;
      }
    }
  }
  __device__ float operator()(int r, int i) const { return values[r][i / 2]; }
};

template <class Shape>
struct OfColumns {
  float values[Shape::column_tiles][2];

  __device__ OfColumns(const float* of_tile, int64_t count, int64_t stride = 1) {
#pragma unroll
    for (int c = 0; c < Shape::column_tiles; ++c) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = Shape::column(c, half);
        values[c][half] = column < count ? of_tile[column * stride] : 0.0f;
      }
    }
  }
  __device__ float operator()(int c, int i) const { return values[c][i % 2]; }
};

template <class Shape>
struct TileProduct {
  using Sums = TileSums<Shape>;

  static constexpr int stage_bytes = (Shape::rows + Shape::columns) * kSliceBytes;
  static constexpr size_t shared_bytes = size_t{kStages} * stage_bytes;

  // sums = the products of a's first rows and b's, of the parts as they are, over slices begin..end of them.
  // All threads must call. `shared` is free again when all of them have returned and met at a barrier.
  // After the last slice of every group, and after the very last one, group_end(group) is called.
  template <class GroupEnd>
  static __device__ void multiply(const SplitRows& a, const SplitRows& b, int begin, int end, char* shared,
                                  Sums& sums, GroupEnd group_end) {
    clear<Shape>(sums);
    // Warps that would only multiply what lies beyond the operands leave the tensor cores to the others.
    const bool idle = Shape::warp_row() >= a.count || Shape::warp_column() >= b.count;
    Feed<Shape::rows> a_feed(a, begin);
    Feed<Shape::columns> b_feed(b, begin);
    int left = end - begin;  // to fetch
    int to = 0;              // the stage that they go to
    const auto fetch = [&] {
      if (left-- > 0) {
        a_feed.fetch(shared + to);
        b_feed.fetch(shared + to + Shape::rows * kSliceBytes);
        to = next_stage(to);
      }
      commit_copies();  // an empty group too: the number of groups is that of slices
    };
    __syncthreads();  // the last readers of `shared` are done
#pragma unroll
    for (int ahead = 0; ahead < kStages - 1; ++ahead) fetch();
    int stage = 0;
    for (int slice = begin; slice < end; ++slice) {
      wait_for_copies<kStages - 2>();
      __syncthreads();  // this slice is there, and the last one has no reader any more
      fetch();
      if (!idle) {
#pragma unroll
        for (int step = 0; step < kSlice / kDepth; ++step) {
          // Of the last slice the second half may be beyond the rows' end.
          if (step == 0 || slice * kSlice + step * kDepth < a.width) add_products(shared, stage, step, sums);
        }
      }
      stage = next_stage(stage);
      if ((slice + 1) % kGroupSlices == 0 || slice + 1 == end) group_end(slice / kGroupSlices);
    }
    wait_for_copies<0>();
  }

  // The same over whole rows that have one scale each.
  static __device__ void multiply(const SplitRows& a, const SplitRows& b, char* shared, Sums& sums) {
    multiply(a, b, 0, static_cast<int>(a.slices), shared, sums, [](int) {});
  }

  // totals = the products with the scales of the groups, over groups begin..end as far as both have them.
  static __device__ void multiply_groups(const SplitRows& a, const float* a_scales,  // [rows, a_groups]
                                         const SplitRows& b, const float* b_scales,  // [rows, b_groups]
                                         int begin, int end, char* shared, Sums& totals) {
    const int64_t a_groups = divide_up(a.slices, kGroupSlices);
    const int64_t b_groups = divide_up(b.slices, kGroupSlices);
    const auto last = static_cast<int>(min(min(a.slices, b.slices), int64_t{end} * kGroupSlices));
    Sums sums;
    clear<Shape>(totals);
    multiply(a, b, begin * kGroupSlices, last, shared, sums, [&](int group) {
      const OfRows<Shape> of_rows(a_scales + group, a.count, a_groups);
      const OfColumns<Shape> of_columns(b_scales + group, b.count, b_groups);
#pragma unroll
      for (int r = 0; r < Shape::row_tiles; ++r) {
#pragma unroll
        for (int c = 0; c < Shape::column_tiles; ++c) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            totals[r][c][i] = fmaf(sums[r][c][i], of_rows(r, i) * of_columns(c, i), totals[r][c][i]);
            sums[r][c][i] = 0.0f;
          }
        }
      }
    });
  }

 private:
  static __device__ int next_stage(int stage) {
    return stage == (kStages - 1) * stage_bytes ? 0 : stage + stage_bytes;
  }

  // Piece p of row r lies at place p ^ (r % 8) of the row's places in shared memory: equal pieces of eight
  // rows, which tensor cores load together, lie in different banks.
  template <int rows>
  class Feed {
   public:
    __device__ Feed(const SplitRows& from, int first_slice)
        : pitch_(kRowsAtOnce * from.slices * kSliceBytes) {
      const unsigned row = threadIdx.x / kPieces;
      const unsigned piece = threadIdx.x % kPieces;
      source_ = reinterpret_cast<const char*>(from.parts) + row * (from.slices * kSliceBytes) +
                static_cast<int64_t>(first_slice) * kSliceBytes + piece * kPiece;
      to_ = static_cast<int>((row * kPieces + (piece ^ row % 8)) * kPiece);
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if (static_cast<int>(row) + i * kRowsAtOnce < from.count) inside_ |= 1u << i;
      }
    }

    // This thread's part of the next slice. Of rows beyond the last one nothing is read.
    __device__ void fetch(char* stage) {
      const char* row = source_;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        copy_async<kPiece>(stage + to_ + i * kRowsAtOnce * kSliceBytes, row, inside_ >> i & 1u ? kPiece : 0);
        row += pitch_;
      }
      source_ += kSliceBytes;
    }

   private:
    static constexpr int kRowsAtOnce = Shape::threads / kPieces;
    static constexpr int kCopies = rows / kRowsAtOnce;
    static_assert(rows % kRowsAtOnce == 0 && kRowsAtOnce % 8 == 0 && kCopies <= 32);

    const char* source_;
    int64_t pitch_;
    int to_;
    unsigned inside_ = 0;
  };

  static __device__ void add_products(const char* shared, int stage, int step, Sums& sums) {
    static_assert(Shape::column_tiles % 2 == 0);
    // Rows of eight pieces each, the high parts' and then the low parts': bit 2 of a piece tells which, bit 1
    // the step, and bit 0 which half of it a lane loads. Eight lanes load the same piece of eight rows.
    const unsigned lane = threadIdx.x % kWarp;
    const auto place = [&](unsigned row, unsigned half) {
      return static_cast<int>(row * kSliceBytes + (half ^ lane % 8) * kPiece);
    };
    const auto piece = [&](int place, int part) {
      return stage + (place ^ (part * kPieces / 2 + 2 * step) * kPiece);
    };
    const int a = place(Shape::warp_row() + lane % 16, lane / 16);
    const int b = place(Shape::rows + Shape::warp_column() + lane / 16 * 8 + lane % 8, lane / 8 % 2);
    unsigned b_high[Shape::column_tiles / 2][4];
    unsigned b_low[Shape::column_tiles / 2][4];
#pragma unroll
    for (int c = 0; c < Shape::column_tiles / 2; ++c) {
      load_matrices(b_high[c], shared, piece(b, 0) + c * 16 * kSliceBytes);
      load_matrices(b_low[c], shared, piece(b, 1) + c * 16 * kSliceBytes);
    }
#pragma unroll
    for (int r = 0; r < Shape::row_tiles; ++r) {
      unsigned a_high[4];
      unsigned a_low[4];
      load_matrices(a_high, shared, piece(a, 0) + r * 16 * kSliceBytes);
      load_matrices(a_low, shared, piece(a, 1) + r * 16 * kSliceBytes);
      // The small parts first, and always other sums between two products of the same one.
#pragma unroll
      for (int c = 0; c < Shape::column_tiles; ++c) {
        multiply_half(sums[r][c], a_low, b_high[c / 2][c % 2 * 2], b_high[c / 2][c % 2 * 2 + 1]);
      }
#pragma unroll
      for (int c = 0; c < Shape::column_tiles; ++c) {
        multiply_half(sums[r][c], a_high, b_low[c / 2][c % 2 * 2], b_low[c / 2][c % 2 * 2 + 1]);
      }
#pragma unroll
      for (int c = 0; c < Shape::column_tiles; ++c) {
        multiply_half(sums[r][c], a_high, b_high[c / 2][c % 2 * 2], b_high[c / 2][c % 2 * 2 + 1]);
      }
    }
  }
};

}  // namespace pydefect::cuda
