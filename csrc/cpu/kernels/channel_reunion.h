// What one instruction set level offers to the channel reunion module. Maps are [positions, channels].
#pragma once

#include <cstdint>

#include "levels.h"

namespace pydefect::cpu {

struct ChannelReunionKernel {
  // weights[p] = bias + sum_c direction[c] * map[p][c], and pooled[c] += sum_p weights[p] * map[p][c]: one
  // pass over the map.
  void (*pool)(const float* map, const float* direction, float bias, int64_t positions, int64_t channels,
               float* weights, float* pooled);

  // out[p][c] = map[p][c] * scale[c]
  void (*scale)(const float* map, const float* scale, int64_t positions, int64_t channels, float* out);

  // sums[c] += sum_p a[p][c] * b[p][c]
  void (*add_products)(const float* a, const float* b, int64_t positions, int64_t channels, float* sums);

  // With t[p] = sum_c d_pooled[c] * map[p][c], the gradient of weights[p]:
  // d_map[p][c] = d_out[p][c] * scale[c] + weights[p] * d_pooled[c] + t[p] * direction[c],
  // d_direction[c] += sum_p t[p] * map[p][c] and d_bias += sum_p t[p].
  void (*backward)(const float* d_out, const float* map,
                   const float* scale,      // [channels], so are the next two
                   const float* direction,  //
                   const float* d_pooled,   //
                   const float* weights,    // [positions]
                   int64_t positions, int64_t channels,
                   float* d_map,        // [positions, channels]
                   float* d_direction,  // [channels]
                   float* d_bias);      // [1]
};

PYDEFECT_KERNEL(ChannelReunionKernel, channel_reunion_kernel)

}  // namespace pydefect::cpu
