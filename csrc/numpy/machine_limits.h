// What the machine can do at most, measured: the figures that benchmarks are held against.
#pragma once

namespace pydefect {

struct MachineLimits {
  double float32_gflops;  // multiply-adds in registers, 10^9 operations (two each) a second
  double bf16_gflops;     // the same with bf16 products; 0 where the machine has no such instruction
  double copy_gbs;        // memory far larger than caches, 10^9 bytes read and written a second
};

// Of `threads` threads together, on the highest level that the machine has, whatever PYDEFECT_CPU_LEVEL says.
// Takes about 0.2 seconds and 256 MiB.
MachineLimits measure_machine_limits(int threads);

}  // namespace pydefect
