// What one instruction set level offers to the spatial reunion module. Maps are [positions, channels].
#pragma once

#include <cstdint>

#include "levels.h"

namespace pydefect::cpu {

// Where bilinear upsampling takes one line of the fine grid from: (1 - share) * first + share * second.
struct Blend {
  int64_t first;
  int64_t second;
  float share;
};

struct SpatialReunionKernel {
  // out[i] = (1 - share) * a[i] + share * b[i]
  void (*blend)(const float* a, const float* b, float share, int64_t count, float* out);

  // to[i] += factor * from[i]
  void (*add_scaled)(const float* from, float factor, int64_t count, float* to);

  // One row of the gated map, g = local * sigmoid(u + features) with u upsampled along the row, seen by each
  // tap of the 3x3 convolution: taps[k][x] = sum_c weight[k][c] * g[x][c].
  void (*gate_row)(const float* features,  // [width, channels]
                   const float* local,     // [width, channels]
                   const float* coarse,    // [coarse width, channels], already upsampled across rows
                   const Blend* columns,   // [width]
                   const float* weight,    // [9, channels]
                   int64_t width, int64_t channels,
                   float* taps);  // [9, width]

  // sums[c] += sum_p weights[p] * map[p][c]; without weights they are all 1.
  void (*add_weighted)(const float* map, const float* weights, int64_t positions, int64_t channels,
                       float* sums);

  // dots[p] = sum_c vector[c] * map[p][c]
  void (*dot)(const float* map, const float* vector, int64_t positions, int64_t channels, float* dots);

  // out[p][c] = map[p][c] + vector[c]
  void (*add)(const float* map, const float* vector, int64_t positions, int64_t channels, float* out);

  // Back through gate_row, given d_taps[k][x], and through the context sum and the residual. With
  // d_g = sum_k d_taps[k] * weight[k] and h = d_g * local * s * (1 - s), s the sigmoid:
  // d_features = d_out + position_weights[x] * d_context + h, d_local = d_g * s,
  // d_weight[k][c] += sum_x d_taps[k][x] * g[x][c], and d_coarse (overwritten) is the adjoint of the
  // upsampling along the row, applied to h.
  void (*gate_row_backward)(const float* d_out, const float* features,
                            const float* local,             // all [width, channels]
                            const float* coarse,            // [coarse width, channels]
                            const Blend* columns,           // [width]
                            const float* weight,            // [9, channels]
                            const float* position_weights,  // [width]
                            const float* d_context,         // [channels]
                            const float* d_taps,            // [9, width]
                            int64_t width, int64_t coarse_width, int64_t channels,
                            float* d_features,  // [width, channels]
                            float* d_local,     // [width, channels]
                            float* d_coarse,    // [coarse width, channels]
                            float* d_weight);   // [9, channels]
};

PYDEFECT_KERNEL(SpatialReunionKernel, spatial_reunion_kernel)

}  // namespace pydefect::cpu
