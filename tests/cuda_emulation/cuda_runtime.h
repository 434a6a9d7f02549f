// CUDA on the CPU, for tests: what csrc/cuda uses of the language, the runtime and the instruction set, so
// that an ordinary C++ compiler takes those files as they are and their kernels run without a card.
//
// The threads of a block are fibers on one CPU thread. A fiber runs until a barrier, a warp's collective
// operation or its end; who runs next, and the order of the blocks, comes from a seeded generator, so that a
// missing barrier, a race between blocks or a use of what a copy has not yet brought shows as a wrong result
// for some seed. Divergence where all lanes must meet, launches beyond a card's limits and barriers that not
// every thread reaches are errors. With PYDEFECT_EMULATION_RACES ThreadSanitizer knows the fibers as threads
// and reports races within a block whatever their order was.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __restrict__ __restrict
// Blocks run one after the other. A block finds what the one before it left behind, never zeros.
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

using cudaStream_t = void*;

namespace emulation {

constexpr int kLanes = 32;
constexpr size_t kLargestMessage = 64;  // bytes that a lane shows the others in one operation

struct Fiber {
  uint3 index;
  int lane;
  int warp;
};

// Of the fiber that runs.
extern Fiber* current;
extern uint3 block_index;
extern dim3 block_size;
extern dim3 grid_size;
extern char* dynamic_shared;

// kWarp and kBlock order what threads read and write before and after, kCollective does not.
enum class Wait { kNothing, kWarp, kCollective, kBlock, kEnd };

void wait(Wait what, const char* where);
// A place for a lane's message; another one for every operation, so that none is overwritten unread.
void* message(int lane);
void next_message();
// A number below `bound` from the seeded generator.
unsigned random_below(unsigned bound);
void run(const char* name, dim3 grid, int threads, size_t shared, const std::function<void()>& kernel);

// Of functions whose accesses are no races: atomic operations, and the messages, which are registers on a
// card.
#define PYDEFECT_NO_RACE __attribute__((no_sanitize("thread")))

template <class T>
PYDEFECT_NO_RACE T exchange(const T& mine, int from_lane, const char* where) {
  static_assert(sizeof(T) <= kLargestMessage);
  next_message();
  std::memcpy(message(current->lane), &mine, sizeof(T));
  wait(Wait::kCollective, where);
  T theirs;
  std::memcpy(&theirs, message(from_lane), sizeof(T));
  return theirs;
}

}  // namespace emulation

#define threadIdx (emulation::current->index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_size)
#define gridDim (emulation::grid_size)

inline void __syncthreads() {
  emulation::wait(emulation::Wait::kBlock, "__syncthreads");
}
inline void __syncwarp() {
  emulation::wait(emulation::Wait::kWarp, "__syncwarp");
}
inline void __threadfence() {}

inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu)
    throw std::logic_error("the emulation knows collective operations of whole warps only");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  check_mask(mask);
  return emulation::exchange(value, emulation::current->lane ^ offset, "__shfl_xor_sync");
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  check_mask(mask);
  return emulation::exchange(value, lane & 31, "__shfl_sync");
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  check_mask(mask);
  emulation::exchange(predicate, 0, "__ballot_sync");
  unsigned result = 0;
  for (int lane = 0; lane < emulation::kLanes; ++lane) {
    int theirs;
    std::memcpy(&theirs, emulation::message(lane), sizeof(theirs));
    result |= static_cast<unsigned>(theirs != 0) << lane;
  }
  return result;
}

inline bool __any_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}

template <class T>
PYDEFECT_NO_RACE T atomicAdd(T* to, T value) {
  const T before = *to;
  *to = before + value;
  return before;
}
template <class T>
PYDEFECT_NO_RACE T atomicMax(T* to, T value) {
  const T before = *to;
  if (value > before) *to = value;
  return before;
}

template <class T>
PYDEFECT_NO_RACE T atomicMin(T* to, T value) {
  const T before = *to;
  if (value < before) *to = value;
  return before;
}

inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fsub_rn(float a, float b) {
  return a - b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fsqrt_rn(float a) {
  return std::sqrt(a);
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
template <class T>
T __ldg(const T* from) {
  return *from;
}
inline int __ffs(unsigned bits) {
  return __builtin_ffs(static_cast<int>(bits));
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline long long __double_as_longlong(double value) {
  return bits_as<long long>(value);
}
inline double __longlong_as_double(long long bits) {
  return bits_as<double>(bits);
}
inline unsigned __float_as_uint(float value) {
  return bits_as<unsigned>(value);
}
inline float __uint_as_float(unsigned bits) {
  return bits_as<float>(bits);
}
// In device code these take mixed integer types; std:: has no such overloads.
template <class A, class B>
constexpr auto min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
constexpr auto max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
