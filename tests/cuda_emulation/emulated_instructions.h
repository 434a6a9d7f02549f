// csrc/cuda/instructions.cuh on the CPU.
#pragma once

#include "cuda_runtime.h"

namespace emulation {

// A copy takes place when it is asked for or when it is waited for, by chance: memory that is read too early
// or overwritten too early shows.
void copy(void* to, const void* from, int valid, int bytes);
void commit();
void wait_for(int pending);

}  // namespace emulation

namespace pydefect::cuda {

template <int bytes>
inline void copy_async(void* shared, const void* global, int valid) {
  static_assert(bytes == 4 || bytes == 16);
  if (reinterpret_cast<uintptr_t>(shared) % bytes != 0 || reinterpret_cast<uintptr_t>(global) % bytes != 0) {
    throw std::logic_error("a misaligned asynchronous copy");
  }
  if (valid < 0 || valid > bytes) throw std::logic_error("an asynchronous copy of too many bytes");
  emulation::copy(shared, global, valid, bytes);
}

inline void commit_copies() {
  emulation::commit();
}

template <int pending>
inline void wait_for_copies() {
  emulation::wait_for(pending);
}

inline unsigned to_tf32(float value) {
  const unsigned bits = __float_as_uint(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & ~0x1fffu;
}

// Products are exact; their sum with the accumulator is rounded once, towards zero, as tensor cores do.
inline void multiply_tf32(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  struct Operands {
    unsigned a[4];
    unsigned b[2];
  } mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  emulation::exchange(mine, 0, "multiply_tf32");
  const int g = emulation::current->lane / 4;
  const int t = emulation::current->lane % 4;
  const auto of = [](int lane) -> const Operands& {
    return *static_cast<const Operands*>(emulation::message(lane));
  };
  // A tensor core ignores the bits behind tf32's.
  const auto read = [](unsigned bits) { return static_cast<double>(__uint_as_float(bits & ~0x1fffu)); };
  for (int i = 0; i < 4; ++i) {
    const int row = i / 2;  // 0: g, 1: g + 8
    const int column = 2 * t + i % 2;
    double sum = sums[i];
    for (int k = 0; k < 8; ++k) {
      sum += read(of(4 * g + k % 4).a[row + k / 4 * 2]) * read(of(4 * column + k % 4).b[k / 4]);
    }
    float rounded = static_cast<float>(sum);
    if (std::isfinite(rounded) && std::fabs(static_cast<double>(rounded)) > std::fabs(sum)) {
      rounded = std::nextafterf(rounded, 0.0f);
    }
    sums[i] = rounded;
  }
}

}  // namespace pydefect::cuda
