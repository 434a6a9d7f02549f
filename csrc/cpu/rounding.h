// Whole multiples of a size: how many it takes, and how far they reach.
#pragma once

#include <cstdint>

namespace pydefect::cpu {

constexpr int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

constexpr int64_t round_up(int64_t a, int64_t multiple) {
  return divide_up(a, multiple) * multiple;
}

}  // namespace pydefect::cpu
