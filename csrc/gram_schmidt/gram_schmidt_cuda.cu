#include "common/cuda.h"
#include "gram_schmidt/gram_schmidt_cuda.h"

#include <vector>

namespace icf {
namespace {

// out[i] = rows[i] . v for each i < count, a warp at a time; ends with a barrier.
template <typename A>
__device__ void dots(const A* rows, const A* v, int64_t count, int64_t d, A* out) {
  for (int64_t i = threadIdx.x / 32; i < count; i += kWarps) {
    A sum = 0;
    for (int64_t j = threadIdx.x % 32; j < d; j += 32) sum += rows[i * d + j] * v[j];
    sum = sum_warp(sum);
    if (threadIdx.x % 32 == 0) out[i] = sum;
  }
  __syncthreads();
}

// One block per matrix. Each thread owns columns threadIdx.x, + kThreads, ...; the basis lies in shared memory, or in
// the result where that is too small. Scratch: weights [n], partial sums [kWarps], then the basis.
template <typename T, typename A = acc_t<T>>
__global__ void __launch_bounds__(kThreads) forward_kernel(const T* vectors, A* q_out, A* l_out, int64_t n, int64_t d,
                                                           A rank_tol, A threshold, bool in_shared) {
  ICF_DYNAMIC_SHARED(A, weights);
  A* const partial = weights + n;
  const int64_t matrix = blockIdx.x;
  A *result = q_out + matrix * n * d, *q = in_shared ? partial + kWarps : result;
  A* l = l_out ? l_out + matrix * n * n : nullptr;
  for (int64_t k = 0; k < n; ++k) {
    A *v = q + k * d, square;
    const A scale = load_scaled(vectors + (matrix * n + k) * d, v, d, square, partial);
    const A before = sqrt(square);
    A length = before;
    if (l) {
      for (int64_t i = threadIdx.x; i < n; i += kThreads) l[k * n + i] = 0;
    }
    for (int pass = 0; pass < 2 && k > 0; ++pass) {
      dots(q, v, k, d, weights);
      square = 0;
      for (int64_t j = threadIdx.x; j < d; j += kThreads) {
        A x = v[j];
        for (int64_t i = 0; i < k; ++i) x -= weights[i] * q[i * d + j];
        v[j] = x;
        square += x * x;
      }
      if (l) {
        for (int64_t i = threadIdx.x; i < k; i += kThreads) l[k * n + i] += weights[i];
      }
      length = sqrt(sum_block(square, partial));
      if (!(length < threshold * before)) break;
    }
    const bool dropped = length <= rank_tol * before;  // not a row with a NaN
    for (int64_t j = threadIdx.x; j < d; j += kThreads) {
      v[j] = dropped ? A(0) : v[j] / length;
      result[k * d + j] = v[j];
    }
    if (l) {
      for (int64_t i = threadIdx.x; i <= k; i += kThreads) {
        l[k * n + i] = (i < k ? l[k * n + i] : dropped ? A(0) : length) / scale;
      }
    }
    __syncthreads();
  }
}

// One block per matrix, rows from the last to the first; see README.md. Scratch: weights [n].
template <typename A>
__global__ void __launch_bounds__(kThreads) backward_kernel(const A* grads, const A* q_all, const A* l_all, A* out,
                                                            int64_t n, int64_t d) {
  ICF_DYNAMIC_SHARED(A, weights);
  const int64_t matrix = blockIdx.x;
  const A *g = grads + matrix * n * d, *q = q_all + matrix * n * d, *l = l_all + matrix * n * n;
  A* x = out + matrix * n * d;
  for (int64_t k = n - 1; k >= 0; --k) {
    dots(q, g + k * d, k + 1, d, weights);
    dots(g + (k + 1) * d, q + k * d, n - k - 1, d, weights + k + 1);
    const A diagonal = l[k * n + k];
    for (int64_t j = threadIdx.x; j < d; j += kThreads) {
      A v = g[k * d + j];
      for (int64_t i = 0; i < n; ++i) v -= weights[i] * q[i * d + j];
      for (int64_t i = k + 1; i < n; ++i) v -= l[i * n + k] * x[i * d + j];
      x[k * d + j] = diagonal == 0 ? A(0) : v / diagonal;
    }
    __syncthreads();
  }
}

std::tuple<Tensor, Tensor> forward(const Tensor& vectors, double rank_tol, double threshold, bool keep_l) {
  ICF_CHECK_CONTIGUOUS(vectors);
  STD_TORCH_CHECK(vectors.dim() >= 2, "vectors must be [*, n, d]");
  const int64_t n = vectors.size(-2), d = vectors.size(-1);
  const auto type = wide(vectors.scalar_type());
  std::vector<int64_t> shape(vectors.sizes().begin(), vectors.sizes().end());
  Tensor q = allocate(vectors, shape, type);
  shape.back() = n;
  if (!keep_l) shape = {0};
  Tensor l = allocate(vectors, shape, type);
  if (vectors.numel() == 0) return {q, l};
  const DeviceGuard guard(vectors.get_device_index());
  dispatch_floating(vectors.scalar_type(), "gram_schmidt", [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const int64_t least = (n + kWarps) * sizeof(A), all = least + n * d * sizeof(A);
    STD_TORCH_CHECK(least <= kShared, "gram_schmidt: too many rows, ", n);
    launch(forward_kernel<T>, vectors.numel() / (n * d), kThreads, all <= kShared ? all : least,
           current_stream(vectors), vectors.const_data_ptr<T>(), q.mutable_data_ptr<A>(),
           keep_l ? l.mutable_data_ptr<A>() : nullptr, n, d, A(rank_tol), A(threshold), all <= kShared);
  });
  return {q, l};
}

Tensor backward(const Tensor& grad, const Tensor& q, const Tensor& l) {
  ICF_CHECK_CONTIGUOUS(q);
  ICF_CHECK_CONTIGUOUS(l);
  ICF_CHECK_LIKE(grad, q);
  STD_TORCH_CHECK(q.dim() >= 2, "q must be [*, n, d]");
  const int64_t n = q.size(-2), d = q.size(-1);
  STD_TORCH_CHECK(l.numel() * d == q.numel() * n && l.scalar_type() == q.scalar_type() && l.device() == q.device(),
                  "l must be [*, n, n], of the dtype and on the device of q");
  Tensor out = allocate(q, q.sizes());
  if (q.numel() == 0) return out;
  const DeviceGuard guard(q.get_device_index());
  dispatch_floating(q.scalar_type(), "gram_schmidt_backward", [&](auto zero) {
    using A = acc_t<decltype(zero)>;
    launch(backward_kernel<A>, q.numel() / (n * d), kThreads, n * sizeof(A), current_stream(q),
           grad.const_data_ptr<A>(), q.const_data_ptr<A>(), l.const_data_ptr<A>(), out.mutable_data_ptr<A>(), n, d);
  });
  return out;
}

}  // namespace
}  // namespace icf

ICF_CUDA_LIBRARY(m) {
  m.impl("gram_schmidt.cuda", TORCH_BOX(&icf::forward));
  m.impl("gram_schmidt_backward.cuda", TORCH_BOX(&icf::backward));
}
