#include "common/tensor.h"
#include "gram_schmidt/gram_schmidt_cpu.h"

#include <algorithm>
#include <tuple>
#include <vector>

namespace icf {
namespace {

constexpr int64_t kGrain = 32768;  // multiplications worth a thread
constexpr int64_t kPanel = 4;      // rows that are projected together

// out[r][c] = rows[r] . q[c]. Rows have `width` elements, a multiple of the lanes.
template <int R, int C, typename A>
ICF_INLINE void dot_tile(const A* rows, const A* q, int64_t width, A* out, int64_t stride) {
  Vec<A> sum[R][C] = {};
  for (int64_t j = 0; j < width; j += kWidth<A>) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] += load(rows + r * width + j) * load(q + c * width + j);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) out[r * stride + c] = sum_of<A>(sum[r][c]);
  }
}

// rows[r] -= sum_c weights[r][c] q[c]
template <int R, int C, typename A>
ICF_INLINE void subtract_tile(A* rows, const A* q, int64_t width, const A* weights, int64_t stride) {
  for (int64_t j = 0; j < width; j += kWidth<A>) {
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      Vec<A> v = load(rows + r * width + j);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) v -= weights[r * stride + c] * load(q + c * width + j);
      store(rows + r * width + j, v);
    }
  }
}

template <typename A>
ICF_INLINE void dots(const A* rows, int64_t count, const A* q, int64_t n, int64_t width, A* out, int64_t stride) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) {
    int64_t c = 0;
    for (; c + 2 <= n; c += 2) dot_tile<4, 2>(rows + r * width, q + c * width, width, out + r * stride + c, stride);
    for (; c < n; ++c) dot_tile<4, 1>(rows + r * width, q + c * width, width, out + r * stride + c, stride);
  }
  for (; r < count; ++r) {
    int64_t c = 0;
    for (; c + 4 <= n; c += 4) dot_tile<1, 4>(rows + r * width, q + c * width, width, out + r * stride + c, stride);
    for (; c < n; ++c) dot_tile<1, 1>(rows + r * width, q + c * width, width, out + r * stride + c, stride);
  }
}

template <typename A>
ICF_INLINE void subtract(A* rows, int64_t count, const A* q, int64_t n, int64_t width, const A* weights,
                         int64_t stride) {
  int64_t r = 0;
  for (; r + 2 <= count; r += 2) {
    int64_t c = 0;
    for (; c + 4 <= n; c += 4) {
      subtract_tile<2, 4>(rows + r * width, q + c * width, width, weights + r * stride + c, stride);
    }
    for (; c < n; ++c) subtract_tile<2, 1>(rows + r * width, q + c * width, width, weights + r * stride + c, stride);
  }
  for (; r < count; ++r) {
    int64_t c = 0;
    for (; c + 4 <= n; c += 4) {
      subtract_tile<1, 4>(rows + r * width, q + c * width, width, weights + r * stride + c, stride);
    }
    for (; c < n; ++c) subtract_tile<1, 1>(rows + r * width, q + c * width, width, weights + r * stride + c, stride);
  }
}

// The rows of q, n x width, become orthonormal; l, n x n, is what they were made of: q before = l q after.
template <typename A>
ICF_SIMD void orthonormalise(A* q, A* l, int64_t n, int64_t width, A rank_tol, A threshold, A* again) {
  std::fill(l, l + n * n, A(0));
  for (int64_t start = 0; start < n; start += kPanel) {
    const int64_t count = std::min(kPanel, n - start);
    A *panel = q + start * width, before[kPanel], scale[kPanel];
    for (int64_t r = 0; r < count; ++r) {
      A square = dot(panel + r * width, panel + r * width, width);
      scale[r] = rescale(panel + r * width, square, width);
      before[r] = std::sqrt(square);
    }
    dots(panel, count, q, start, width, l + start * n, n);
    subtract(panel, count, q, start, width, l + start * n, n);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t k = start + r;
      A *v = q + k * width, *coefficients = l + k * n;
      dots(v, 1, panel, r, width, coefficients + start, n);
      subtract(v, 1, panel, r, width, coefficients + start, n);
      A length = std::sqrt(dot(v, v, width));
      if (k > 0 && length < threshold * before[r]) {
        dots(v, 1, q, k, width, again, n);
        subtract(v, 1, q, k, width, again, n);
        for (int64_t i = 0; i < k; ++i) coefficients[i] += again[i];
        length = std::sqrt(dot(v, v, width));
      }
      const bool dropped = length <= rank_tol * before[r];  // not a row with a NaN
      if (dropped) {
        std::fill(v, v + width, A(0));
      } else {
        const A inverse = 1 / length;
        for (int64_t j = 0; j < width; ++j) v[j] *= inverse;
      }
      coefficients[k] = dropped ? A(0) : length;
      for (int64_t i = 0; i <= k; ++i) coefficients[i] /= scale[r];
    }
  }
}

// x, n x width, holds the gradient of q and becomes that of the vectors; s: n x n of scratch. See README.md.
template <typename A>
ICF_SIMD void gradient_of_vectors(A* x, const A* q, const A* l, int64_t n, int64_t width, A* s) {
  dots(x, n, q, n, width, s, n);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < i; ++j) s[j * n + i] = s[i * n + j];
  }
  subtract(x, n, q, n, width, s, n);
  for (int64_t k = n - 1; k >= 0; --k) {
    A *v = x + k * width, diagonal = l[k * n + k];
    for (int64_t i = k + 1; i < n; ++i) s[i] = l[i * n + k];
    subtract(v, 1, x + (k + 1) * width, n - k - 1, width, s + k + 1, n);
    for (int64_t j = 0; j < width; ++j) v[j] = diagonal == 0 ? A(0) : v[j] / diagonal;
  }
}

template <typename A>
int64_t padded(int64_t d) {
  return (d + kWidth<A> - 1) / kWidth<A> * kWidth<A>;
}

template <typename From, typename To>
void copy_rows(const From* from, int64_t from_width, To* to, int64_t to_width, int64_t rows) {
  const int64_t d = std::min(from_width, to_width);
  for (int64_t i = 0; i < rows; ++i) {
    std::copy_n(from + i * from_width, d, to + i * to_width);
    std::fill(to + i * to_width + d, to + (i + 1) * to_width, To(0));
  }
}

std::tuple<Tensor, Tensor> forward(const Tensor& vectors, double rank_tol, double threshold, bool keep_l) {
  ICF_CHECK_CONTIGUOUS(vectors);
  STD_TORCH_CHECK(vectors.dim() >= 2, "vectors must be [*, n, d]");
  const int64_t n = vectors.size(-2), d = vectors.size(-1), batch = n * d ? vectors.numel() / (n * d) : 0;
  const auto type = wide(vectors.scalar_type());
  std::vector<int64_t> shape(vectors.sizes().begin(), vectors.sizes().end());
  Tensor q = new_result(vectors, shape, type);
  shape.back() = n;
  if (!keep_l) shape = {0};
  Tensor l = allocate(vectors, shape, type);
  dispatch_floating(vectors.scalar_type(), "gram_schmidt", [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const int64_t width = padded<A>(d);
    torch::stable::parallel_for(0, batch, kGrain / (n * n * d + 1) + 1, [&](int64_t begin, int64_t end) {
      std::vector<A> scratch(n + n * n + (width == d ? 0 : n * width));
      for (int64_t i = begin; i < end; ++i) {
        A *again = scratch.data(), *coefficients = keep_l ? l.mutable_data_ptr<A>() + i * n * n : again + n;
        A *out = q.mutable_data_ptr<A>() + i * n * d, *work = width == d ? out : again + n + n * n;
        copy_rows(vectors.const_data_ptr<T>() + i * n * d, d, work, width, n);
        orthonormalise(work, coefficients, n, width, A(rank_tol), A(threshold), again);
        if (work != out) copy_rows(work, width, out, d, n);
      }
    });
  });
  return {q, l};
}

Tensor backward(const Tensor& grad, const Tensor& q, const Tensor& l) {
  ICF_CHECK_CONTIGUOUS(q);
  ICF_CHECK_CONTIGUOUS(l);
  ICF_CHECK_LIKE(grad, q);
  STD_TORCH_CHECK(q.dim() >= 2, "q must be [*, n, d]");
  const int64_t n = q.size(-2), d = q.size(-1), batch = n * d ? q.numel() / (n * d) : 0;
  STD_TORCH_CHECK(l.numel() * d == q.numel() * n && l.scalar_type() == q.scalar_type(),
                  "l must be [*, n, n] and of the dtype of q");
  Tensor out = allocate(q, q.sizes());
  prefer_huge_pages(out);
  dispatch_floating(q.scalar_type(), "gram_schmidt_backward", [&](auto zero) {
    using A = acc_t<decltype(zero)>;
    const int64_t width = padded<A>(d);
    torch::stable::parallel_for(0, batch, kGrain / (n * n * d + 1) + 1, [&](int64_t begin, int64_t end) {
      std::vector<A> scratch(n * n + 2 * n * width);
      A *s = scratch.data(), *x = s + n * n, *basis = x + n * width;
      for (int64_t i = begin; i < end; ++i) {
        copy_rows(grad.const_data_ptr<A>() + i * n * d, d, x, width, n);
        copy_rows(q.const_data_ptr<A>() + i * n * d, d, basis, width, n);
        gradient_of_vectors(x, basis, l.const_data_ptr<A>() + i * n * n, n, width, s);
        copy_rows(x, width, out.mutable_data_ptr<A>() + i * n * d, d, n);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace icf

STABLE_TORCH_LIBRARY_IMPL(icf, CPU, m) {
  m.impl("gram_schmidt.cpp", TORCH_BOX(&icf::forward));
  m.impl("gram_schmidt_backward.cpp", TORCH_BOX(&icf::backward));
}
