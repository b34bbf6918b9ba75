// What kernels of this room with a block per row or matrix share. Thread t owns columns t, t + kThreads, and so on.
#pragma once
#include "common/cuda.h"
#include "gram_schmidt/gram_schmidt_math.h"

namespace icf {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int64_t kShared = 48 << 10;  // bytes of shared memory that need no permission

template <typename A>
__device__ __forceinline__ A sum_warp(A x) {
#pragma unroll
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// Combines a value of each thread of the block; ends with every thread past a barrier.
template <typename A, typename F>
__device__ A reduce_block(A x, A* partial, F combine) {
#pragma unroll
  for (int step = 16; step; step /= 2) x = combine(x, __shfl_xor_sync(~0u, x, step));
  __syncthreads();
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  x = partial[0];
  for (int i = 1; i < kWarps; ++i) x = combine(x, partial[i]);
  return x;
}

template <typename A>
__device__ A sum_block(A x, A* partial) {
  return reduce_block(x, partial, [](A a, A b) { return a + b; });
}

// Reads a row into v, scaled so that its square neither under- nor overflows; returns the scale. All threads take part.
template <typename T, typename A>
__device__ A load_scaled(const T* from, A* v, int64_t d, A& square, A* partial) {
  A largest = 0;
  square = 0;
  for (int64_t j = threadIdx.x; j < d; j += kThreads) {
    v[j] = A(from[j]);
    square += v[j] * v[j];
    largest = fabs(v[j]) > largest ? fabs(v[j]) : largest;
  }
  square = sum_block(square, partial);
  if (!needs_scaling(square)) return 1;
  largest = reduce_block(largest, partial, [](A a, A b) { return a > b ? a : b; });
  if (!(largest > 0 && largest <= std::numeric_limits<A>::max())) return 1;
  constexpr A least = std::numeric_limits<A>::min();
  const A scale = 1 / (largest > least ? largest : least);
  square = 0;
  for (int64_t j = threadIdx.x; j < d; j += kThreads) {
    v[j] *= scale;
    square += v[j] * v[j];
  }
  square = sum_block(square, partial);
  return scale;
}

}  // namespace icf
