// A block's tile of a product of float32 matrices on tensor cores, as exact as float32 arithmetic: each
// number is split into two tf32 parts, x = high + low with |x - high - low| <= 2^-22 |x|, and three of the
// four partial products are added up (3xTF32; the fourth, low * low, is below 2^-22 of the product). The sums
// are float32.
//
// Operands are copied into shared memory in slices of the depth, asynchronously, kStages - 1 slices ahead.
#pragma once

#include "common.cuh"
#include "instructions.cuh"

namespace pydefect::cuda {

constexpr int kStages = 3;
constexpr int kSlice = 16;  // elements of the depth in a stage

// How a matrix of vectors lies in memory.
enum class Layout {
  kAlongDepth,   // element d of vector v at v * stride + d
  kAcrossDepth,  // element d of vector v at d * stride + v
};

// Some vectors of a matrix. Beyond `count` vectors and the end of the depth there are zeros.
struct Vectors {
  const float* data;
  int64_t stride;
  int count;
  bool aligned;  // to 16 bytes, the stride too

  static __host__ __device__ bool is_aligned(const float* data, int64_t stride) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 4 == 0;
  }
};

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

  // Of this thread's element i of tile (r, c).
  static __device__ int row(int r, int i) {
    const int warp = threadIdx.x / kWarp;
    return (warp / warp_columns * row_tiles + r) * 16 + i / 2 * 8 + static_cast<int>(threadIdx.x) % kWarp / 4;
  }
  static __device__ int column(int c, int i) {
    const int warp = threadIdx.x / kWarp;
    return (warp % warp_columns * column_tiles + c) * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
  }
};

// One operand's slice in shared memory. The pitches send the 32 reads of a warp (8 vectors, 4 elements of the
// depth) to 32 banks and keep 16-byte alignment.
template <Layout layout, int vectors>
struct Slice {
  static constexpr int pitch = layout == Layout::kAlongDepth ? kSlice + 4 : vectors + 8;
  static constexpr int size = (layout == Layout::kAlongDepth ? vectors : kSlice) * pitch;

  static __device__ int at(int vector, int d) {
    return layout == Layout::kAlongDepth ? vector * pitch + d : d * pitch + vector;
  }

  template <int threads>
  static __device__ void copy(const Vectors& from, int depth, int depth_end, float* to) {
    if (from.aligned) {
      copy_pieces<threads, 4>(from, depth, depth_end, to);
    } else {
      copy_pieces<threads, 1>(from, depth, depth_end, to);
    }
  }

 private:
  template <int threads, int piece>
  static __device__ void copy_pieces(const Vectors& from, int depth, int depth_end, float* to) {
    constexpr int bytes = piece * 4;
    for (int i = threadIdx.x; i < vectors * kSlice / piece; i += threads) {
      if constexpr (layout == Layout::kAlongDepth) {
        const int vector = i / (kSlice / piece);
        const int d = i % (kSlice / piece) * piece;
        const int valid = vector < from.count ? max(0, min(depth_end - depth - d, piece)) : 0;
        const float* source =
            valid > 0 ? from.data + static_cast<int64_t>(vector) * from.stride + depth + d : from.data;
        copy_async<bytes>(to + vector * pitch + d, source, valid * 4);
      } else {
        const int d = i / (vectors / piece);
        const int vector = i % (vectors / piece) * piece;
        const int valid = depth + d < depth_end ? max(0, min(from.count - vector, piece)) : 0;
        const float* source =
            valid > 0 ? from.data + static_cast<int64_t>(depth + d) * from.stride + vector : from.data;
        copy_async<bytes>(to + d * pitch + vector, source, valid * 4);
      }
    }
  }
};

template <class Shape, Layout a_layout, Layout b_layout>
struct TileProduct {
  using A = Slice<a_layout, Shape::rows>;
  using B = Slice<b_layout, Shape::columns>;
  using Sums = float[Shape::row_tiles][Shape::column_tiles][4];

  static constexpr int stage_size = A::size + B::size;
  static constexpr size_t shared_bytes = sizeof(float) * kStages * stage_size;

  // sums = the products of a's vectors and b's over depth_begin..depth_end. All threads must call. `shared`
  // is free again when all of them have returned and met at a barrier.
  static __device__ void multiply(const Vectors& a, const Vectors& b, int depth_begin, int depth_end,
                                  float* shared, Sums& sums) {
#pragma unroll
    for (int r = 0; r < Shape::row_tiles; ++r) {
#pragma unroll
      for (int c = 0; c < Shape::column_tiles; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[r][c][i] = 0.0f;
      }
    }
    const int steps = (depth_end - depth_begin + kSlice - 1) / kSlice;
    const auto fetch = [&](int step) {
      if (step < steps) {
        float* stage = shared + step % kStages * stage_size;
        const int depth = depth_begin + step * kSlice;
        A::template copy<Shape::threads>(a, depth, depth_end, stage);
        B::template copy<Shape::threads>(b, depth, depth_end, stage + A::size);
      }
      commit_copies();  // an empty group too: the number of groups is that of steps
    };
    __syncthreads();  // the last readers of `shared` are done
    for (int step = 0; step < kStages - 1; ++step) fetch(step);
    for (int step = 0; step < steps; ++step) {
      wait_for_copies<kStages - 2>();
      __syncthreads();  // this step's slice is there, and the last step's has no reader any more
      fetch(step + kStages - 1);
      const float* stage = shared + step % kStages * stage_size;
#pragma unroll
      for (int d = 0; d < kSlice; d += 8) add_products(stage, stage + A::size, d, sums);
    }
    wait_for_copies<0>();
  }

 private:
  static __device__ void split(float value, unsigned& high, unsigned& low) {
    high = to_tf32(value);
    low = to_tf32(value - __uint_as_float(high));
  }

  static __device__ void add_products(const float* a_slice, const float* b_slice, int d, Sums& sums) {
    const int warp = threadIdx.x / kWarp;
    const int g = static_cast<int>(threadIdx.x) % kWarp / 4;
    const int t = static_cast<int>(threadIdx.x) % 4;
    const int first_row = warp / Shape::warp_columns * Shape::row_tiles * 16;
    const int first_column = warp % Shape::warp_columns * Shape::column_tiles * 8;
    unsigned b_high[Shape::column_tiles][2];
    unsigned b_low[Shape::column_tiles][2];
#pragma unroll
    for (int c = 0; c < Shape::column_tiles; ++c) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        split(b_slice[B::at(first_column + c * 8 + g, d + t + 4 * i)], b_high[c][i], b_low[c][i]);
      }
    }
#pragma unroll
    for (int r = 0; r < Shape::row_tiles; ++r) {
      unsigned a_high[4];
      unsigned a_low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        split(a_slice[A::at(first_row + r * 16 + g + i % 2 * 8, d + t + i / 2 * 4)], a_high[i], a_low[i]);
      }
      // The small parts first, and always two others between two sums of the same element.
#pragma unroll
      for (int c = 0; c < Shape::column_tiles; ++c) multiply_tf32(sums[r][c], a_low, b_high[c]);
#pragma unroll
      for (int c = 0; c < Shape::column_tiles; ++c) multiply_tf32(sums[r][c], a_high, b_low[c]);
#pragma unroll
      for (int c = 0; c < Shape::column_tiles; ++c) multiply_tf32(sums[r][c], a_high, b_high[c]);
    }
  }
};

}  // namespace pydefect::cuda
