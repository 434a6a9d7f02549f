// Work shared out to a few threads, for code that takes NumPy arrays: it has no PyTorch whose pool it could
// use.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace pydefect {

// Calls work(task, thread) for every task below `tasks`, each once, on at most `threads` threads. The first
// exception is thrown on after all threads have stopped.
template <class Work>
void share_out(int64_t tasks, int threads, const Work& work) {
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex guard;
  const auto take = [&](int thread) {
    try {
      for (int64_t task = next++; task < tasks; task = next++) work(task, thread);
    } catch (...) {
      next = tasks;
      const std::lock_guard lock(guard);
      if (!error) error = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> others;
    const auto wanted = std::min<int64_t>(threads, tasks);
    for (int thread = 1; thread < wanted; ++thread) others.emplace_back(take, thread);
    take(0);
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace pydefect
