// csrc/cuda/instructions.cuh on the CPU.
#pragma once

#include "cuda_fp16.h"
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

inline uint16_t half_bits(float value) {
  return __half(value).x;
}

inline float half_value(uint16_t bits) {
  return static_cast<float>(__half(bits, __half::from_bits()));
}

inline float quick_root(float value) {
  return std::sqrt(value);
}

inline float quick_inverse_root(float value) {
  return 1.0f / std::sqrt(value);
}

inline float quick_power_of_2(float value) {
  return std::exp2(value);
}

inline void load_matrices(unsigned (&to)[4], const char* shared, int offset) {
  shared += offset;
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) throw std::logic_error("a misaligned row of a matrix");
  emulation::exchange(shared, 0, "load_matrices");
  const int lane = emulation::current->lane;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const char* row;
    std::memcpy(&row, emulation::message(matrix * 8 + lane / 4), sizeof(row));
    std::memcpy(&to[matrix], row + lane % 4 * sizeof(unsigned), sizeof(unsigned));
  }
}

// Products are exact; their sum with the accumulator is rounded once, towards zero, as tensor cores do.
inline void multiply_half(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  struct Operands {
    unsigned a[4];
    unsigned b[2];
  } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulation::exchange(mine, 0, "multiply_half");
  const int g = emulation::current->lane / 4;
  const int t = emulation::current->lane % 4;
  const auto of = [](int lane) -> const Operands& {
    return *static_cast<const Operands*>(emulation::message(lane));
  };
  const auto read = [](unsigned two, int which) {
    return static_cast<double>(half_value(static_cast<uint16_t>(two >> 16 * which)));
  };
  for (int i = 0; i < 4; ++i) {
    const int row = i / 2;  // 0: g, 1: g + 8
    const int column = 2 * t + i % 2;
    double sum = sums[i];
    for (int k = 0; k < 16; ++k) {
      const int lane = k % 8 / 2;
      sum += read(of(4 * g + lane).a[row + k / 8 * 2], k % 2) * read(of(4 * column + lane).b[k / 8], k % 2);
    }
    float rounded = static_cast<float>(sum);
    if (std::isfinite(rounded) && std::fabs(static_cast<double>(rounded)) > std::fabs(sum)) {
      rounded = std::nextafterf(rounded, 0.0f);
    }
    sums[i] = rounded;
  }
}

}  // namespace pydefect::cuda
