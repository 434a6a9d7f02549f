// Marks what both the CPU's and the GPU's code call.
#pragma once

#ifdef __CUDACC__
#define PYDEFECT_HOST_DEVICE __host__ __device__
#else
#define PYDEFECT_HOST_DEVICE
#endif
