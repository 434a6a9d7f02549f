// One integer orders neighbours: nearer first, ties to the lower row, NaN last.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace pydefect {

using RankingKey = uint64_t;

// The bits of non-negative floats order as the floats do; NaN, whatever its sign, is made the largest of all.
PYDEFECT_HOST_DEVICE inline RankingKey ranking_key(float distance, int64_t row) {
  uint32_t bits = 0x7fffffffu;
  if (distance == distance) memcpy(&bits, &distance, sizeof(bits));
  return (static_cast<uint64_t>(bits) << 32) | static_cast<uint64_t>(row);
}

PYDEFECT_HOST_DEVICE inline float key_distance(RankingKey key) {
  const uint32_t bits = static_cast<uint32_t>(key >> 32);
  float distance;
  memcpy(&distance, &bits, sizeof(distance));
  return distance;
}

PYDEFECT_HOST_DEVICE inline int64_t key_row(RankingKey key) {
  return static_cast<int64_t>(key & 0xffffffffu);
}

}  // namespace pydefect
