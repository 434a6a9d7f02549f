// bfloat16 numbers as the 16 bits that they are in memory, for loops that compilers make vectors of.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace pydefect {
namespace {  // files compiled for several instruction sets include this; see cpu/kernels/simd.h

PYDEFECT_HOST_DEVICE inline float widened(float value) {
  return value;
}

PYDEFECT_HOST_DEVICE inline float widened(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

PYDEFECT_HOST_DEVICE inline void narrow(float value, float& to) {
  to = value;
}

// To the nearest, ties to even; every NaN becomes the one that PyTorch has.
PYDEFECT_HOST_DEVICE inline void narrow(float value, uint16_t& to) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

}  // namespace
}  // namespace pydefect
