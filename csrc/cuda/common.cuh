// What every CUDA operator needs: the caller's device and stream, and checked launches.
//
// PyTorch's own helpers for this are symbols of its CUDA builds. A library that refers to them directly does
// not load where they are not in the global scope, so the stream is looked up at run time and errors are
// reported with the CUDA runtime's own words.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "../checks.h"

#ifndef PYDEFECT_CUDA_EMULATION
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

// The dispatch key of these operators. Tests run them on the CPU: tests/cuda_emulation.
#ifndef PYDEFECT_CUDA_KEY
#define PYDEFECT_CUDA_KEY CUDA
#endif

namespace pydefect::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kGridLimit = 65535;  // blocks in a grid's second dimension, and in its third

__host__ __device__ constexpr int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) {
  return divide_up(a, b) * b;
}

#ifdef PYDEFECT_CUDA_EMULATION

class Device {
 public:
  explicit Device(const Tensor&) {}

  // Few, so that small tests have work for several of them.
  int multiprocessors() const { return 3; }

  template <class... Parameters, class... Arguments>
  void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
              Arguments... arguments) const {
    emulation::run(name, grid, threads, shared, [&] { kernel(static_cast<Parameters>(arguments)...); });
  }
};

__device__ inline char* dynamic_shared_memory() {
  return emulation::dynamic_shared;
}

#else

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next launch, which may succeed, would be taken for the one that failed
  check(false, what, ": CUDA error: ", cudaGetErrorString(status));
}

// The stream that PyTorch currently uses on the device.
inline cudaStream_t current_stream(int32_t device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    void* symbol = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    check(symbol != nullptr, "pydefect: this PyTorch has no CUDA streams; its CUDA build is needed");
    return reinterpret_cast<Getter>(symbol);
  }();
  void* stream = nullptr;
  check(getter(device, &stream) == 0, "pydefect: PyTorch has no current stream for CUDA device ", device);
  return static_cast<cudaStream_t>(stream);
}

// The device of a tensor: current as long as this lives, with the stream that is current on it.
class Device {
 public:
  explicit Device(const Tensor& tensor)
      : index_(tensor.get_device_index()), guard_(index_), stream_(current_stream(index_)) {}

  int multiprocessors() const {
    int count = 0;
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_),
               "cudaDeviceGetAttribute");
    return count;
  }

  // kernel<<<grid, threads, shared, stream>>>(arguments...). A bad launch configuration shows right after the
  // launch and nowhere else.
  template <class... Parameters, class... Arguments>
  void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
              Arguments... arguments) const {
    constexpr size_t kWithoutAsking = size_t{48} << 10;
    if (shared > kWithoutAsking) {
      const void* const symbol = reinterpret_cast<const void*>(kernel);
      check_cuda(
          cudaFuncSetAttribute(symbol, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
          name);
      // Otherwise the first-level cache may keep what a second block of the multiprocessor needs.
      check_cuda(cudaFuncSetAttribute(symbol, cudaFuncAttributePreferredSharedMemoryCarveout,
                                      cudaSharedmemCarveoutMaxShared),
                 name);
    }
    kernel<<<grid, threads, shared, stream_>>>(static_cast<Parameters>(arguments)...);
    check_cuda(cudaGetLastError(), name);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// The shared memory that a launch asked for.
__device__ inline char* dynamic_shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

#endif

// Blocks for `count` pieces of work that a grid goes through in strides: enough to fill the device.
inline unsigned blocks_for(const Device& device, int64_t count) {
  const int64_t most = 16 * device.multiprocessors();
  return static_cast<unsigned>(count < 1 ? 1 : count < most ? count : most);
}

inline Tensor new_floats(const Tensor& like, std::initializer_list<int64_t> size) {
  return torch::stable::new_empty(like, {size.begin(), size.size()}, torch::headeronly::ScalarType::Float);
}

inline Tensor new_of(const Tensor& like, std::initializer_list<int64_t> size,
                     torch::headeronly::ScalarType type) {
  return torch::stable::new_empty(like, {size.begin(), size.size()}, type);
}

}  // namespace pydefect::cuda
