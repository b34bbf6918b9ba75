#include "common/simd.h"
#include "gw_contrast/gw_contrast_cpu.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <memory>
#include <vector>

namespace icf {
namespace {

using namespace gw;
constexpr int64_t kTile = int64_t(1) << 22;  // entries of the cross-Gram matrix that are worked on at a time

// ---- samples: mean, factor, trace and entropy, and back ------------------------------------------------------------

template <typename F, typename T>
ICF_SIMD void moments_range(const Side& side, const F* frames, double eps, const Moments<T>& out, int64_t begin, int64_t end) {
  const int64_t d = side.d, m = side.rows(), stride = side.row_stride();
  std::vector<T> sum(d), base(d);
  std::vector<double> gram(m * m);
  for (int64_t s = begin; s < end; ++s) {
    T* const factor = out.factor + side.factor_at(s);
    T* const mean = out.mean + s * d;
    const T count = T(std::max<int64_t>(side.count(s), 1));
    std::fill(sum.begin(), sum.end(), T(0));
    std::fill(base.begin(), base.end(), T(0));
    T before = 0;
    for (int64_t t = 0; t < side.T; ++t) {
      const F* frame = frames + (s * side.T + t) * d;
      const bool valid = side.valid(s, t);
      if (valid && before == 0) {
        for (int64_t c = 0; c < d; ++c) base[c] = T(frame[c]);  // exact zeros in a static clip
      }
      const T scale = valid ? row_scale<T>(before, count) : T(0);
      if (t > 0) {
        T* const row = factor + (t - 1) * stride;
        if (scale == 0) {
          std::fill(row, row + d, T(0));
        } else {
#pragma omp simd
          for (int64_t c = 0; c < d; ++c) row[c] = scale * (sum[c] - before * (T(frame[c]) - base[c]));
        }
      }
      if (!valid) continue;
#pragma omp simd
      for (int64_t c = 0; c < d; ++c) sum[c] += T(frame[c]) - base[c];
      before += 1;
    }
    for (int64_t c = 0; c < d; ++c) mean[c] = base[c] + sum[c] / count;

    double trace = 0, log_det = 0;
    for (int64_t p = 0; p < m; ++p) {
      for (int64_t q = eps > 0 ? 0 : p; q <= p; ++q) {
        const T *x = factor + p * stride, *y = factor + q * stride;
        T product = 0;
#pragma omp simd reduction(+ : product)
        for (int64_t c = 0; c < d; ++c) product += x[c] * y[c];
        gram[p * m + q] = gram[q * m + p] = product / eps + (p == q);
        if (p == q) trace += product;
      }
    }
    out.trace[s] = T(trace);
    const double freedom = std::max<double>(before - 1, 1);
    if (eps > 0) {
      for (int k = 0; k < m; ++k) {
        log_det += std::log(gram[k * m + k]);
        scale_pivot_row(gram.data(), m, k);
        for (int i = 0; i < m; ++i) {
          if (i != k) eliminate(gram.data(), m, k, i);
        }
      }
      for (int64_t e = 0; e < m * m; ++e) out.inverse[s * m * m + e] = T(gram[e] / (eps * freedom));
    }
    out.entropy[s] = T(log_det / (2 * freedom));
    if (!std::isfinite(out.trace[s])) {  // the trace marks the pairs of this sample; its factor must not reach others
      for (int64_t p = 0; p < m; ++p) std::fill(factor + p * stride, factor + p * stride + d, T(0));
    }
  }
}

template <typename F, typename T>
ICF_SIMD void frames_range(const Side& side, const Incoming<T>& in, F* grad_frames, int64_t begin, int64_t end) {
  const int64_t d = side.d, m = side.rows(), stride = side.row_stride();
  std::vector<T> grad_mean(d), later(d), row(d);
  for (int64_t s = begin; s < end; ++s) {
    const int64_t group = s / side.B;
    const T* const mean = in.mean + s * d;
    const T* const grad = in.grad + group * side.B * in.others + s % side.B * in.own_stride;
    const T count = T(std::max<int64_t>(side.count(s), 1));
    T total = 0;
    std::fill(grad_mean.begin(), grad_mean.end(), T(0));
    std::fill(later.begin(), later.end(), T(0));
    for (int64_t j = 0; j < in.others; ++j) {
      const T g = 2 * grad[j * in.other_stride];
      if (g == 0) continue;  // so that the NaN of a pair left out of the loss stays out
      const T* const other = in.other_mean + (group * in.others + j) * d;
      total += g;
#pragma omp simd
      for (int64_t c = 0; c < d; ++c) grad_mean[c] += g * (mean[c] - other[c]);
    }
    T before = T(side.count(s));
    for (int64_t t = side.T - 1; t >= 0; --t) {
      F* const out = grad_frames + (s * side.T + t) * d;
      if (!side.valid(s, t)) {
        std::fill(out, out + d, F(0));
        continue;
      }
      before -= 1;
      if (before == 0) {
#pragma omp simd
        for (int64_t c = 0; c < d; ++c) out[c] = F(later[c] + grad_mean[c] / count);
        continue;
      }
      const int64_t at = side.factor_at(s) + (t - 1) * stride;
#pragma omp simd
      for (int64_t c = 0; c < d; ++c) row[c] = in.grad_factor[at + c] + total * in.factor[at + c];
      for (int64_t q = 0; in.inverse != nullptr && q < m; ++q) {
        const T g = in.grad_entropy[s] * in.inverse[(s * m + t - 1) * m + q];
        const T* const x = in.factor + side.factor_at(s) + q * stride;
#pragma omp simd
        for (int64_t c = 0; c < d; ++c) row[c] += g * x[c];
      }
      const T scale = row_scale<T>(before, count);
#pragma omp simd
      for (int64_t c = 0; c < d; ++c) {
        out[c] = F(later[c] + grad_mean[c] / count - before * scale * row[c]);
        later[c] += scale * row[c];
      }
    }
  }
}

// ---- pairs ---------------------------------------------------------------------------------------------------------

// Pairs of some rows i of the distances [I, J]; their cross-Gram matrices at [I, m, n, J], replaced by U f'(S) V^T.
template <typename T>
struct Pairs {
  T *cross, *distance;
  int64_t J;
  int m, n;
  bool polar;
  Spectral spectral;
  T regularization;
};

template <typename T>
ICF_SIMD void means_range(const T* x_mean, const T* y_mean, const T* x_trace, const T* y_trace, T* distance, int64_t Bx,
                          int64_t By, int64_t d, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t j = 0; j < By; ++j) {
      const int64_t other = i / Bx * By + j;
      const T *x = x_mean + i * d, *y = y_mean + other * d;
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < d; ++c) sum += (x[c] - y[c]) * (x[c] - y[c]);
      distance[i * By + j] = sum + x_trace[i] + y_trace[other];
    }
  }
}

// One vector of pairs, from `first`. ROWS >= COLS, or both 0 where they are not known when compiled.
template <int ROWS, int COLS, typename V, typename T = lane_t<V>>
ICF_INLINE void one_vector(const Pairs<T>& pairs, int64_t first, int64_t end, V* a, V* v, V* norm) {
  constexpr int kWidth = kLanes<V>;
  const bool tall = pairs.m >= pairs.n;
  const int rows = ROWS ? ROWS : tall ? pairs.m : pairs.n, cols = COLS ? COLS : tall ? pairs.n : pairs.m;
  const int64_t J = pairs.J, row_step = tall ? pairs.n * J : J, col_step = tall ? J : pairs.n * J;
  const int width = int(std::min<int64_t>(kWidth, end - first));
  int64_t at[kWidth];
  V poison{};
  for (int l = 0; l < kWidth; ++l) {
    const int64_t pair = first + std::min(l, width - 1);
    at[l] = pair / J * pairs.m * pairs.n * J + pair % J;
    poison[l] = pairs.distance[pair] - pairs.distance[pair];
  }
  const bool together = width == kWidth && at[kWidth - 1] == at[0] + kWidth - 1;
  for (int c = 0; c < cols; ++c) {
    for (int r = 0; r < rows; ++r) {
      const T* const from = pairs.cross + r * row_step + c * col_step;
      if (together) {
        std::memcpy(&a[c * rows + r], from + at[0], sizeof(V));
      } else {
        for (int l = 0; l < kWidth; ++l) a[c * rows + r][l] = from[at[l]];
      }
    }
  }
  const V tail = spectral_sum<ROWS, COLS, false, V>(a, v, norm, rows, cols, pairs.polar, pairs.spectral, pairs.regularization, poison);
  for (int l = 0; l < width; ++l) pairs.distance[first + l] -= tail[l];
  if (!pairs.polar) return;
  for (int c = 0; c < cols; ++c) {
    for (int r = 0; r < rows; ++r) {
      T* const to = pairs.cross + r * row_step + c * col_step;
      if (together) {
        std::memcpy(to + at[0], &a[c * rows + r], sizeof(V));
      } else {
        for (int l = 0; l < width; ++l) to[at[l]] = a[c * rows + r][l];
      }
    }
  }
}

struct ForPairs {  // a vector holds one pair per lane
  template <int BYTES, typename T>
  static ICF_INLINE void run(const Pairs<T>& pairs, int64_t begin, int64_t end) {
    using V = Vec<T, BYTES>;
    const int rows = std::max(pairs.m, pairs.n), cols = std::min(pairs.m, pairs.n);
    if (cols == 0) return;
    const std::unique_ptr<V[]> a(new V[rows * cols]), v(new V[cols * cols]), norm(new V[2 * cols + 1]);
    for (int64_t first = begin; first < end; first += kLanes<V>) {
      if (rows == 4 && cols == 4) {
        one_vector<4, 4, V>(pairs, first, end, a.get(), v.get(), norm.get());
      } else if (rows == 9 && cols == 9) {
        one_vector<9, 9, V>(pairs, first, end, a.get(), v.get(), norm.get());
      } else {
        one_vector<0, 0, V>(pairs, first, end, a.get(), v.get(), norm.get());
      }
    }
  }
};

template <typename T>
ICF_SIMD void weights_range(const T* grad, const T* polar, T* weights, int64_t J, int64_t mn, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t e = i * mn; e < (i + 1) * mn; ++e) {
#pragma omp simd
      for (int64_t j = 0; j < J; ++j) weights[e * J + j] = grad[i * J + j] == 0 ? T(0) : -grad[i * J + j] * polar[e * J + j];
    }
  }
}

// ---- operators -----------------------------------------------------------------------------------------------------

// The matrix product without the dispatcher, and so without autocast: out = beta out + a b, batched.
void multiply(Tensor& out, const Tensor& a, const Tensor& b, double beta) {
  if (beta == 0) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_bmm_out(out.get(), a.get(), b.get()));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_baddbmm_out(out.get(), out.get(), a.get(), b.get(), beta, 1.0));
  }
}

Tensor slice(Tensor t, int64_t dim, int64_t start, int64_t length) {
  return length == t.size(dim) ? t : torch::stable::narrow(t, dim, start, length);  // which is found by its name each time
}

template <typename T>
Tensor zeros(const Tensor& like, std::initializer_list<int64_t> shape) {
  Tensor out = allocate(like, shape);
  std::fill_n(out.mutable_data_ptr<T>(), out.numel(), T(0));
  return out;
}

// Calls f(groups begin, count, rows begin, count) for tiles that are whole groups, or a part of one.
template <typename F>
void for_tiles(int64_t N, int64_t Bx, int64_t entries_per_row, const F& f) {
  const int64_t rows = std::max<int64_t>(1, kTile / std::max<int64_t>(1, entries_per_row));
  if (rows < Bx) {
    for (int64_t g = 0; g < N; ++g) {
      for (int64_t i = 0; i < Bx; i += rows) f(g, int64_t(1), i, std::min(rows, Bx - i));
    }
  } else {
    const int64_t groups = rows / std::max<int64_t>(1, Bx);
    for (int64_t g = 0; g < N; g += groups) f(g, std::min(groups, N - g), int64_t(0), Bx);
  }
}

// Rows i .. i + rows - 1 of groups g .. g + groups - 1 of t [N, B, ...], as [groups, rows * inner, columns].
Tensor tile(const Tensor& t, int64_t g, int64_t groups, int64_t i, int64_t rows, int64_t inner, int64_t columns) {
  Tensor part = slice(t, 0, g, groups);
  if (rows != t.size(1)) part = slice(part, 1, i, rows);
  return torch::stable::view(part, {groups, rows * inner, columns});
}

}  // namespace

Forward gw::gaussian_w2(const Tensor& x, const Tensor& y, const OptionalTensor& x_mask, const OptionalTensor& y_mask,
                        std::string spectral, double regularization, double eps, bool polar) {
  const Side xs = side_of(x, x_mask, false), ys = side_of(y, y_mask, true);
  const Spectral kind = spectral_of(spectral);
  Results out = new_results(x, y, xs, ys, eps, polar);
  const int64_t N = xs.N, Bx = xs.B, By = ys.B, m = xs.rows(), n = ys.rows(), d = xs.d;
  dispatch_floating(x.scalar_type(), "gaussian_w2", [&](auto zero) {
    using F = decltype(zero);
    using T = acc_t<F>;
    const auto data = [](Tensor& t) { return t.mutable_data_ptr<T>(); };
    const auto moments = [&](const Side& side, const Tensor& frames, const Moments<T>& out) {
      torch::stable::parallel_for(0, side.samples(), 4, [&](int64_t begin, int64_t end) {
        moments_range(side, frames.const_data_ptr<F>(), eps, out, begin, end);
      });
    };
    moments(xs, x, out.x_moments<T>());
    moments(ys, y, out.y_moments<T>());
    if (out.distance.numel() == 0) return;
    torch::stable::parallel_for(0, N * Bx, 1 + 4096 / By, [&](int64_t begin, int64_t end) {
      means_range(data(out.x_mean), data(out.y_mean), data(out.x_trace), data(out.y_trace), data(out.distance), Bx, By, d,
                  begin, end);
    });
    if (m == 0 || n == 0) return;
    const Tensor columns = torch::stable::transpose(torch::stable::view(out.y_factor, {N, n * By, d}), 1, 2);
    for_tiles(N, Bx, m * n * By, [&](int64_t g, int64_t groups, int64_t i, int64_t rows) {
      Tensor cross = polar ? tile(out.polar, g, groups, i, rows, m, n * By)
                           : allocate(out.distance, {groups, rows * m, n * By});
      multiply(cross, tile(out.x_factor, g, groups, i, rows, m, d), slice(columns, 0, g, groups), 0);
      const Pairs<T> pairs{data(cross), data(out.distance) + (g * Bx + i) * By, By, int(m), int(n), polar, kind,
                           T(regularization)};
      torch::stable::parallel_for(0, groups * rows * By, 64, [&](int64_t begin, int64_t end) {
        at_level<ForPairs>(pairs, begin, end);
      });
    });
  });
  return out.all();
}

std::tuple<Tensor, Tensor> gw::gaussian_w2_backward(
    const Tensor& grad, const Tensor& grad_x_entropy, const Tensor& grad_y_entropy, const Tensor& x, const Tensor& y,
    const Tensor& x_mean, const Tensor& y_mean, const Tensor& x_factor, const Tensor& y_factor, const Tensor& x_inverse,
    const Tensor& y_inverse, const Tensor& polar, const OptionalTensor& x_mask, const OptionalTensor& y_mask) {
  const int64_t N = x_factor.size(0), Bx = x_factor.size(1), m = x_factor.size(2), d = x_factor.size(3);
  const int64_t n = y_factor.size(1), By = y_factor.size(2);
  Tensor grad_x = allocate(x, x.sizes()), grad_y = allocate(y, y.sizes());
  const Side xs = side_of(x, x_mask, false), ys = side_of(y, y_mask, true);
  check_saved(xs, ys, {grad, grad_x_entropy, grad_y_entropy, x_mean, y_mean, x_factor, y_factor, x_inverse, y_inverse, polar});
  dispatch_floating(x.scalar_type(), "gaussian_w2_backward", [&](auto zero) {
    using F = decltype(zero);
    using T = acc_t<F>;
    const auto data = [](const Tensor& t) { return t.const_data_ptr<T>(); };
    Tensor grad_x_factor = zeros<T>(x_factor, {N, Bx, m, d}), grad_y_factor = zeros<T>(y_factor, {N, n * By, d});
    if (polar.numel() > 0) {
      const Tensor rows_of_y = torch::stable::view(y_factor, {N, n * By, d});
      for_tiles(N, Bx, m * n * By, [&](int64_t g, int64_t groups, int64_t i, int64_t rows) {
        Tensor weights = allocate(polar, {groups, rows * m, n * By});
        const int64_t first = g * Bx + i;
        torch::stable::parallel_for(0, groups * rows, 1 + 32768 / (m * n * By), [&](int64_t begin, int64_t end) {
          weights_range(data(grad) + first * By, data(polar) + first * m * n * By, weights.mutable_data_ptr<T>(), By, m * n, begin, end);
        });
        Tensor x_part = tile(grad_x_factor, g, groups, i, rows, m, d);
        Tensor y_part = slice(grad_y_factor, 0, g, groups);
        multiply(x_part, weights, slice(rows_of_y, 0, g, groups), 0);
        multiply(y_part, torch::stable::transpose(weights, 1, 2), tile(x_factor, g, groups, i, rows, m, d), rows < Bx);
      });
    }
    const auto frames = [&](const Side& side, const Incoming<T>& in, Tensor& out) {
      torch::stable::parallel_for(0, side.samples(), 4, [&](int64_t begin, int64_t end) {
        frames_range(side, in, out.mutable_data_ptr<F>(), begin, end);
      });
    };
    const bool with_entropy = x_inverse.dim() != 1;
    frames(xs, {data(grad), data(grad_x_entropy), data(x_mean), data(y_mean), data(x_factor),
                with_entropy ? data(x_inverse) : nullptr, data(grad_x_factor), By, By, 1}, grad_x);
    frames(ys, {data(grad), data(grad_y_entropy), data(y_mean), data(x_mean), data(y_factor),
                with_entropy ? data(y_inverse) : nullptr, data(grad_y_factor), Bx, 1, By}, grad_y);
  });
  return {grad_x, grad_y};
}

}  // namespace icf

STABLE_TORCH_LIBRARY_IMPL(icf, CPU, m) {
  m.impl("gaussian_w2.cpp", TORCH_BOX(&icf::gw::gaussian_w2));
  m.impl("gaussian_w2_backward.cpp", TORCH_BOX(&icf::gw::gaussian_w2_backward));
}
