#include "gram_schmidt/gram_schmidt_args.h"
#include "gram_schmidt/gram_schmidt_cuda.h"

namespace icf {
namespace {

constexpr int64_t kWidest = 4096;  // elements of a row, held in shared memory

// One block per row of z. The reflector w = s q_0 - z/|z| lies in shared memory, then a warp at a time makes direction
// i of q_i: as q_i is orthogonal to q_0, its cosine to z is that to -w. Scratch: w [d], sums [kWarps], signs.
template <typename T, typename A = acc_t<T>>
__global__ void __launch_bounds__(kThreads) directions_kernel(const T* z, const int64_t* seed, T* out, int64_t k,
                                                              int64_t d) {
  ICF_DYNAMIC_SHARED(A, w);
  A* const partial = w + d;
  uint32_t* words = reinterpret_cast<uint32_t*>(partial + kWarps);
  const int64_t row = blockIdx.x;
  const HadamardRows rows(*seed, row, d);
  const A size = 1 / sqrt(A(d));
  const auto entry = [&](uint32_t index, int64_t j) {  // of the matrix with its columns' signs
    const bool negative = hadamard_negative(index, uint32_t(j)) != (words[j / 32] >> (j % 32) & 1u);
    return negative ? -size : size;
  };
  for (int64_t q = threadIdx.x; q < (d + 127) / 128; q += kThreads) {
    philox_words(*seed, row, uint32_t(q), 0, words[4 * q], words[4 * q + 1], words[4 * q + 2], words[4 * q + 3]);
  }
  A square, cosine = 0;
  load_scaled(z + row * d, w, d, square, partial);  // ends past a barrier: the signs are there, too
  const A inv_z = square == 0 ? A(0) : 1 / sqrt(square);
  for (int64_t j = threadIdx.x; j < d; j += kThreads) cosine += w[j] * inv_z * entry(rows[0], j);
  cosine = sum_block(cosine, partial);
  for (int64_t j = threadIdx.x; j < d; j += kThreads) {
    w[j] = (cosine > 0 ? -entry(rows[0], j) : entry(rows[0], j)) - w[j] * inv_z;
  }
  __syncthreads();
  const A inverse = 1 / (1 + fabs(cosine));
  for (int64_t i = threadIdx.x / 32; i < k; i += kWarps) {
    const uint32_t index = rows[i + 1];
    A weight = 0;
    for (int64_t j = threadIdx.x % 32; j < d; j += 32) weight -= w[j] * entry(index, j);
    weight = sum_warp(weight) * inverse;
    T* y = out + (row * k + i) * d;
    for (int64_t j = threadIdx.x % 32; j < d; j += 32) y[j] = T(entry(index, j) + weight * w[j]);
  }
}

Tensor directions(const Tensor& z, const Tensor& seed, int64_t k) {
  Tensor out = allocate(z, check_directions(z, seed, k));
  const int64_t d = z.size(-1);
  STD_TORCH_CHECK(d <= kWidest, "z must have rows of at most ", kWidest, " elements");
  if (out.numel() == 0) return out;
  const DeviceGuard guard(z.get_device_index());
  dispatch_floating(z.scalar_type(), "orthogonal_directions", [&](auto zero) {
    using T = decltype(zero);
    const int64_t bytes = (d + kWarps) * sizeof(acc_t<T>) + (d + 127) / 128 * 4 * sizeof(uint32_t);
    launch(directions_kernel<T>, z.numel() / d, kThreads, bytes, current_stream(z), z.const_data_ptr<T>(),
           seed.const_data_ptr<int64_t>(), out.mutable_data_ptr<T>(), k, d);
  });
  return out;
}

}  // namespace
}  // namespace icf

ICF_CUDA_LIBRARY(m) { m.impl("orthogonal_directions.cuda", TORCH_BOX(&icf::directions)); }
