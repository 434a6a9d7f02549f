#include "machine_limits.h"

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "../cpu/aligned.h"
#include "../cpu/dispatch.h"
#include "../cpu/kernels/machine_limits.h"

namespace pydefect {
namespace {

using Clock = std::chrono::steady_clock;

// The shortest of `rounds` times from the first thread's start to the last one's end. One round more comes
// first: it brings in memory and wakes the clock up.
double best_seconds(int threads, int rounds, const std::function<void(int)>& part) {
  std::vector<Clock::time_point> starts(threads), ends(threads);
  double best = 0;
  int round = 0;
  std::barrier together(threads);
  std::barrier done(threads, [&]() noexcept {
    const auto start = *std::min_element(starts.begin(), starts.end());
    const auto end = *std::max_element(ends.begin(), ends.end());
    const double seconds = std::chrono::duration<double>(end - start).count();
    if (round == 1 || seconds < best) best = seconds;
    ++round;
  });
  const auto work = [&](int thread) {
    for (int i = 0; i <= rounds; ++i) {
      together.arrive_and_wait();
      starts[thread] = Clock::now();
      part(thread);
      ends[thread] = Clock::now();
      done.arrive_and_wait();
    }
  };
  std::vector<std::jthread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  work(0);
  others.clear();
  return best;
}

double gflops(int threads, float (*kernel)(int64_t), int64_t operations) {
  if (kernel == nullptr) return 0;
  // About 5 ms at 100 * 10^9 operations a second.
  const int64_t rounds = 500'000'000 / operations;
  std::vector<float> results(threads * 16);  // a cache line each
  const double seconds =
      best_seconds(threads, 10, [&](int thread) { results[thread * 16] = kernel(rounds); });
  return static_cast<double>(rounds) * operations * threads / seconds * 1e-9;
}

double copy_gbs(int threads) {
  constexpr int64_t kBytes = int64_t{128} << 20;
  cpu::AlignedBuffer<std::byte> from(kBytes), to(kBytes);
  const auto copy = [&](int thread) {
    const int64_t begin = kBytes * thread / threads, end = kBytes * (thread + 1) / threads;
    std::memcpy(to.data() + begin, from.data() + begin, end - begin);
  };
  // Untouched memory would be one page of zeros, read from cache over and over.
  std::memset(from.data(), 1, kBytes);
  return 2.0 * kBytes / best_seconds(threads, 5, copy) * 1e-9;
}

}  // namespace

MachineLimits measure_machine_limits(int threads) {
  using namespace cpu;
  const Level level = usable_levels().back();
  const MachineLimitsKernel& kernel = PYDEFECT_KERNEL_AT(level, machine_limits_kernel);
  return {gflops(threads, kernel.float32, kernel.float32_operations),
          level == Level::amx ? gflops(threads, kernel.amx, kernel.amx_operations)
                              : gflops(threads, kernel.bf16, kernel.bf16_operations),
          copy_gbs(threads)};
}

}  // namespace pydefect
