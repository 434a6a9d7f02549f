// What the loader of this library asks before anything runs: whether the driver knows the CUDA that the
// kernels were compiled with. Where it does not, they load all the same and every launch fails.
#include <cuda_runtime.h>

// Both as 1000 * major + 10 * minor; `known` is 0 where there is no driver to ask.
extern "C" __attribute__((visibility("default"))) void pydefect_cuda_versions(int* compiled, int* known) {
  *compiled = CUDART_VERSION;
  if (cudaDriverGetVersion(known) == cudaSuccess) return;
  (void)cudaGetLastError();
  *known = 0;
}
