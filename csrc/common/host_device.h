#pragma once

// Marks arithmetic that CUDA kernels and the CPU share.
#if defined(__CUDACC__)
#define ICF_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define ICF_HOST_DEVICE inline __attribute__((always_inline))  // else it would not be part of the clones of ICF_SIMD
#else
#define ICF_HOST_DEVICE inline
#endif
