// Float32 matrices as tensor cores multiply them here: every number as the sum of two float16, x = (high +
// low) * scale. A scale is a power of two that brings the largest number it holds for to 2^14..2^15, so that
//     |x - (high + low) * scale| <= 2^-22 |x| + 2^-39 |largest|,
// whatever the numbers' range: as many bits as two TF32 parts would have, at twice their speed and in half
// their memory. Sums of products of such parts stay far below float32's end.
//
// A row is stored in slices of 32 numbers, the high parts of a slice and then its low parts: 128 bytes.
// Beyond the row's end there are zeros. A scale holds for a row or, where sums over long rows would need
// another pass for the largest number, for a group of four slices of it.
#pragma once

#include "common.cuh"
#include "instructions.cuh"
#include "reductions.cuh"

namespace pydefect::cuda {

constexpr int kSlice = 32;
constexpr int kSliceParts = 2 * kSlice;
constexpr int kGroupSlices = 4;
constexpr int kGroup = kGroupSlices * kSlice;

constexpr int64_t slices_of(int64_t width) {
  return divide_up(width, kSlice);
}

constexpr int64_t groups_of(int64_t width) {
  return divide_up(width, kGroup);
}

// Rows of a split matrix, from some row on.
struct SplitRows {
  const uint16_t* parts;  // [count, slices, 2, kSlice]
  int64_t count;
  int64_t slices;
  int64_t width;

  __device__ SplitRows from(int64_t row) const {
    return {parts + row * slices * kSliceParts, count - row, slices, width};
  }
};

struct SplitTensor {
  Tensor parts;
  Tensor scales;  // [count] or [count, groups]
  int64_t width;

  SplitRows rows() const {
    return {static_cast<const uint16_t*>(parts.const_data_ptr()), parts.size(0), parts.size(1), width};
  }
};

inline Tensor new_parts(const Tensor& like, int64_t count, int64_t width) {
  return new_of(like, {count, slices_of(width), kSliceParts}, torch::headeronly::ScalarType::Half);
}

struct Scaling {
  float factor;  // of a number before it is split
  float scale;   // its inverse, of what the parts stand for
};

// Of the largest number's bits without its sign. Numbers that are not finite make it 1: nothing is promised
// then. Denormal numbers are not raised all the way, which leaves their parts exact.
__device__ inline Scaling scaling_of(unsigned largest) {
  const int exponent = static_cast<int>(largest >> 23);
  if (exponent == 255) return {1.0f, 1.0f};
  const int biased = min(127 + 14 + 127 - exponent, 253);
  return {__uint_as_float(static_cast<unsigned>(biased) << 23),
          __uint_as_float(static_cast<unsigned>(254 - biased) << 23)};
}

// The larger of two numbers' bits is the larger magnitude's, and a NaN's is the largest of all.
__device__ inline unsigned magnitude(float value) {
  return __float_as_uint(value) & 0x7fffffffu;
}

__device__ inline unsigned warp_largest(unsigned value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = max(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
}

struct Parts {
  uint16_t high;
  uint16_t low;
};

__device__ inline Parts split(float scaled) {
  const uint16_t high = half_bits(scaled);
  return {high, half_bits(scaled - half_value(high))};
}

__device__ inline void store_parts(float scaled, uint16_t* slice, int place) {
  const Parts parts = split(scaled);
  slice[place] = parts.high;
  slice[kSlice + place] = parts.low;
}

// --- A scale a row
// --------------------------------------------------------------------------------------------

constexpr int kSplitThreads = 256;

// A warp a row. Squared norms come along where they are asked for.
static __global__ void split_rows(const float* rows,  // [count, width]
                                  int64_t count, int width, int slices,
                                  uint16_t* parts,          // [count, slices, 2, kSlice]
                                  float* scales,            // [count]
                                  double* squared_norms) {  // [count] or null
  const int lane = threadIdx.x % kWarp;
  constexpr int kWarps = kSplitThreads / kWarp;
  for (int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; i < count;
       i += int64_t{gridDim.x} * kWarps) {
    const float* const row = rows + i * width;
    unsigned largest = 0;
    double norm = 0.0;
#pragma unroll 4
    for (int d = lane; d < width; d += kWarp) {
      const float value = row[d];
      largest = max(largest, magnitude(value));
      norm += static_cast<double>(value) * value;
    }
    const Scaling scaling = scaling_of(warp_largest(largest));
    uint16_t* const own = parts + i * slices * kSliceParts;
#pragma unroll 4
    for (int slice = 0; slice < slices; ++slice) {
      const int d = slice * kSlice + lane;
      store_parts(d < width ? row[d] * scaling.factor : 0.0f, own + slice * kSliceParts, lane);
    }
    if (lane == 0) scales[i] = scaling.scale;
    if (squared_norms == nullptr) continue;
    norm = warp_sum(norm);
    if (lane == 0) squared_norms[i] = norm;
  }
}

inline SplitTensor split_by_row(const Device& device, const Tensor& rows,
                                const Tensor* squared_norms = nullptr) {
  const int64_t count = rows.size(0);
  const SplitTensor split{new_parts(rows, count, rows.size(1)), new_floats(rows, {count}), rows.size(1)};
  device.launch("split_rows", split_rows, blocks_for(device, divide_up(count, kSplitThreads / kWarp)),
                kSplitThreads, 0, rows.const_data_ptr<float>(), count, static_cast<int>(rows.size(1)),
                static_cast<int>(split.parts.size(1)), static_cast<uint16_t*>(split.parts.mutable_data_ptr()),
                split.scales.mutable_data_ptr<float>(),
                squared_norms == nullptr ? nullptr : squared_norms->mutable_data_ptr<double>());
  return split;
}

// --- A scale a group
// ------------------------------------------------------------------------------------------

constexpr int kSplitTile = 32;  // rows that a block splits a group of

// A source gives the number at (row, depth), and says which of the two lies together in memory. A block has a
// group of kSplitTile rows.
template <class Source>
static __global__ void split_groups(Source source, int64_t count, int64_t depth, int64_t slices,
                                    uint16_t* parts,  // [count, slices, 2, kSlice]
                                    float* scales) {  // [count, groups]
  __shared__ float tile[kSplitTile][kGroup + 1];
  const int64_t groups = divide_up(slices, kGroupSlices);
  const int64_t group = blockIdx.x % groups;
  const int64_t first_row = blockIdx.x / groups * kSplitTile;
  const int64_t first_depth = group * kGroup;
  const bool along_rows = source.along_rows();
  for (int i = threadIdx.x; i < kSplitTile * kGroup; i += kSplitThreads) {
    const int row = along_rows ? i % kSplitTile : i / kGroup;
    const int d = along_rows ? i / kSplitTile : i % kGroup;
    const bool inside = first_row + row < count && first_depth + d < depth;
    tile[row][d] = inside ? source.at(first_row + row, first_depth + d) : 0.0f;
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  for (int row = threadIdx.x / kWarp; row < kSplitTile && first_row + row < count;
       row += kSplitThreads / kWarp) {
    unsigned largest = 0;
#pragma unroll
    for (int slice = 0; slice < kGroupSlices; ++slice) {
      largest = max(largest, magnitude(tile[row][slice * kSlice + lane]));
    }
    const Scaling scaling = scaling_of(warp_largest(largest));
    const int64_t first_slice = group * kGroupSlices;
    uint16_t* const own = parts + ((first_row + row) * slices + first_slice) * kSliceParts;
#pragma unroll
    for (int slice = 0; slice < kGroupSlices; ++slice) {
      if (first_slice + slice < slices) {
        store_parts(tile[row][slice * kSlice + lane] * scaling.factor, own + slice * kSliceParts, lane);
      }
    }
    if (lane == 0) scales[(first_row + row) * groups + group] = scaling.scale;
  }
}

template <class Source>
SplitTensor split_by_group(const Device& device, const Tensor& like, const Source& source, int64_t count,
                           int64_t depth) {
  const SplitTensor split{new_parts(like, count, depth), new_floats(like, {count, groups_of(depth)}), depth};
  const int64_t blocks = divide_up(count, kSplitTile) * groups_of(depth);
  device.launch("split_groups", split_groups<Source>, static_cast<unsigned>(blocks), kSplitThreads, 0, source,
                count, depth, split.parts.size(1), static_cast<uint16_t*>(split.parts.mutable_data_ptr()),
                split.scales.mutable_data_ptr<float>());
  return split;
}

// A matrix in memory as rows of a split one: its own rows, or its columns.
struct MatrixRows {
  const float* data;
  int64_t stride;

  __device__ bool along_rows() const { return false; }
  __device__ float at(int64_t row, int64_t depth) const { return data[row * stride + depth]; }
};

struct MatrixColumns {
  const float* data;
  int64_t stride;

  __device__ bool along_rows() const { return true; }
  __device__ float at(int64_t row, int64_t depth) const { return data[depth * stride + row]; }
};

}  // namespace pydefect::cuda
