// What every CUDA operator needs: the caller's device and stream, and checked calls.
//
// PyTorch's own helpers for this are symbols of its CUDA builds. A library that refers to them directly does
// not load where they are not in the global scope, so the stream is looked up at run time and errors are
// reported with the CUDA runtime's own words.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "../checks.h"

namespace pydefect::cuda {

inline void check_cuda(cudaError_t status, const char* what) {
  check(status == cudaSuccess, what, ": CUDA error: ", cudaGetErrorString(status));
}

// To be called right after every launch: a bad launch configuration shows there and nowhere else.
inline void check_launch(const char* kernel) {
  check_cuda(cudaGetLastError(), kernel);
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

inline int multiprocessors(int32_t device) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
             "cudaDeviceGetAttribute");
  return count;
}

}  // namespace pydefect::cuda
