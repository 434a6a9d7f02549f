// Any processor: GCC's generic vectors, which are SSE2 on x86-64 and NEON on 64-bit Arm.
#include <cstring>

#include "knn_tile.h"

namespace pydefect::cpu {
namespace {

struct Portable {
  static constexpr int lanes = 4;
  using type = float __attribute__((vector_size(16)));

  static type load(const float* from) {
    type value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  }
  static void store(float* to, type value) { std::memcpy(to, &value, sizeof(value)); }
  static type broadcast(float value) { return type{value, value, value, value}; }
  static type multiply_add(type a, type b, type c) { return a * b + c; }
  static uint32_t greater(type a, type b) {
    const auto larger = a > b;
    return (larger[0] & 1u) | (larger[1] & 2u) | (larger[2] & 4u) | (larger[3] & 8u);
  }
};

}  // namespace

const KnnKernel knn_portable{4, 8, score_tile<Portable, 4, 2>, squared_distance<Portable>};

}  // namespace pydefect::cpu
