// Squared distances of listed rows, measured directly.
#pragma once

#include <cstdint>

#include "levels.h"

namespace pydefect::cpu {

struct SquaredDistancesKernel {
  // distances[i * stride + j] = squared distance of a[i] and b[j], bit for bit KnnKernel::squared_distance:
  // the same at every level, whichever way a and b are split over calls, and with a and b exchanged.
  void (*measure)(const float* const* a, int64_t rows,     // rows pointers to vectors
                  const float* const* b, int64_t columns,  // columns pointers to vectors
                  int64_t width,                           // of each vector
                  float* distances, int64_t stride);       // [rows, stride]

  // Lowers nearest[i] to distances[i] where that is smaller (never where it is NaN) and returns the place of
  // the largest value then, the first one of equals.
  int64_t (*lower)(float* nearest,          // [count], no NaN
                   const float* distances,  // [count]
                   int64_t count);          // at least 1
};

PYDEFECT_KERNEL(SquaredDistancesKernel, squared_distances_kernel)

}  // namespace pydefect::cpu
