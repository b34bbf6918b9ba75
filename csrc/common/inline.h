#pragma once

// A function called in the loops of a kernel: inlined, else it would not be part of every version that ICF_SIMD makes;
// under nvcc for both sides, so that host and device run the same text.
#if defined(__CUDACC__)
#define ICF_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__) || defined(__clang__)
#define ICF_INLINE inline __attribute__((always_inline))
#else
#define ICF_INLINE inline
#endif
