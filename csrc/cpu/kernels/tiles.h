// The tile registers of AMX: eight, each of 16 rows of 64 bytes here.
#pragma once

#include <cstdint>

#include "simd.h"

#if defined(__AMX_BF16__)

namespace pydefect::cpu::PYDEFECT_LEVEL {
namespace {

struct TileConfiguration {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_of_a_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Not a local variable: compilers think that the instruction reads its first eight bytes only, and leave out
// what they would have to write behind these.
alignas(64) const TileConfiguration tile_configuration;

void configure_tiles() {
  _tile_loadconfig(&tile_configuration);
}

void release_tiles() {
  _tile_release();
}

}  // namespace
}  // namespace pydefect::cpu::PYDEFECT_LEVEL

#endif
