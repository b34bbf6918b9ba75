#include "common/cuda.h"
#include "gw_contrast/gw_contrast_args.h"

namespace icf {
namespace {

using namespace gw;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kSampleThreads = 128;
constexpr int kPairRows = 4;  // samples x, one per warp, and kWarp samples y to a block of the kernel in registers
constexpr int kChunk = 16;    // features staged at a time

template <typename T>
__device__ T warp_sum(T x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// ---- samples: one block each, x before y ---------------------------------------------------------------------------

template <typename F, typename T>
__global__ void moments_kernel(Side xs, Side ys, const F* x, const F* y, double eps, Moments<T> x_out, Moments<T> y_out) {
  ICF_DYNAMIC_SHARED(double, gram);  // [m, m]
  __shared__ double traces[kSampleThreads / kWarp];
  const bool first = int64_t(blockIdx.x) < xs.samples();
  const Side side = first ? xs : ys;
  const Moments<T> out = first ? x_out : y_out;
  const F* const frames = first ? x : y;
  const int64_t s = first ? blockIdx.x : blockIdx.x - xs.samples();
  const int64_t d = side.d, stride = side.row_stride();
  const int m = side.rows();
  T* const factor = out.factor + side.factor_at(s);
  const int64_t valid_frames = side.count(s);
  const T count = valid_frames > 0 ? T(valid_frames) : T(1);
  for (int64_t c = threadIdx.x; c < d; c += blockDim.x) {
    T base = 0, sum = 0, before = 0;
    for (int64_t t = 0; t < side.T; ++t) {
      const bool valid = side.valid(s, t);
      const T frame = valid ? T(frames[(s * side.T + t) * d + c]) : T(0);
      if (valid && before == 0) base = frame;  // exact zeros in a static clip
      const T scale = valid ? row_scale<T>(before, count) : T(0);
      if (t > 0) factor[(t - 1) * stride + c] = scale == 0 ? T(0) : scale * (sum - before * (frame - base));
      if (valid) {
        sum += frame - base;
        before += 1;
      }
    }
    out.mean[s * d + c] = base + sum / count;
  }
  __syncthreads();

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  double trace = 0;
  for (int e = warp; e < m * m; e += warps) {
    const int p = e / m, q = e % m;
    if (q > p || (q < p && eps == 0)) continue;
    T product = 0;
    for (int64_t c = lane; c < d; c += kWarp) product += factor[p * stride + c] * factor[q * stride + c];
    product = warp_sum(product);
    if (p == q) trace += product;
    if (eps > 0 && lane == 0) gram[p * m + q] = gram[q * m + p] = product / eps + (p == q);
  }
  if (lane == 0) traces[warp] = trace;
  __syncthreads();
  trace = 0;
  for (int w = 0; w < warps; ++w) trace += traces[w];
  const double freedom = valid_frames > 2 ? double(valid_frames - 1) : 1.0;
  double log_det = 0;
  if (eps > 0) {
    for (int k = 0; k < m; ++k) {
      log_det += log(gram[k * m + k]);
      __syncthreads();
      if (threadIdx.x == 0) scale_pivot_row(gram, m, k);
      __syncthreads();
      for (int i = threadIdx.x; i < m; i += blockDim.x) {
        if (i != k) eliminate(gram, m, k, i);
      }
      __syncthreads();
    }
    for (int e = threadIdx.x; e < m * m; e += blockDim.x) out.inverse[s * m * m + e] = T(gram[e] / (eps * freedom));
  }
  if (threadIdx.x == 0) {
    out.trace[s] = T(trace);
    out.entropy[s] = T(log_det / (2 * freedom));
  }
  if (isfinite(T(trace))) return;
  for (int p = 0; p < m; ++p) {  // the trace marks the pairs of this sample; its factor must not reach others
    for (int64_t c = threadIdx.x; c < d; c += blockDim.x) factor[p * stride + c] = T(0);
  }
}

template <typename F, typename T>
__global__ void frames_kernel(Side xs, Side ys, Incoming<T> x_in, Incoming<T> y_in, F* grad_x, F* grad_y) {
  const bool first = int64_t(blockIdx.x) < xs.samples();
  const Side side = first ? xs : ys;
  const Incoming<T> in = first ? x_in : y_in;
  F* const grad_frames = first ? grad_x : grad_y;
  const int64_t s = first ? blockIdx.x : blockIdx.x - xs.samples();
  const int64_t d = side.d, m = side.rows(), stride = side.row_stride(), group = s / side.B, at = side.factor_at(s);
  const T* const grad = in.grad + group * side.B * in.others + s % side.B * in.own_stride;
  const int64_t valid_frames = side.count(s);
  const T count = valid_frames > 0 ? T(valid_frames) : T(1);
  for (int64_t c = threadIdx.x; c < d; c += blockDim.x) {
    const T mean = in.mean[s * d + c];
    T total = 0, grad_mean = 0, later = 0, before = T(valid_frames);
    for (int64_t j = 0; j < in.others; ++j) {
      const T g = 2 * grad[j * in.other_stride];
      if (g == 0) continue;  // so that the NaN of a pair left out of the loss stays out
      total += g;
      grad_mean += g * (mean - in.other_mean[(group * in.others + j) * d + c]);
    }
    for (int64_t t = side.T - 1; t >= 0; --t) {
      T result = 0;
      if (side.valid(s, t)) {
        before -= 1;
        result = later + grad_mean / count;
        if (before > 0) {
          const int64_t row = at + (t - 1) * stride + c;
          T grad_row = in.grad_factor[row] + total * in.factor[row];
          if (in.inverse != nullptr) {
            T sum = 0;
            for (int64_t q = 0; q < m; ++q) sum += in.inverse[(s * m + t - 1) * m + q] * in.factor[at + q * stride + c];
            grad_row += in.grad_entropy[s] * sum;
          }
          const T scale = row_scale<T>(before, count);
          result -= before * scale * grad_row;
          later += scale * grad_row;
        }
      }
      grad_frames[(s * side.T + t) * d + c] = F(result);
    }
  }
}

// ---- pairs ---------------------------------------------------------------------------------------------------------

template <typename T>
struct Pairs {
  const T *x_mean, *y_mean, *x_factor, *y_factor, *x_trace, *y_trace;
  T *distance, *polar;  // polar [N, Bx, m, n, By], or null
  int64_t N, Bx, By, d;
  int m, n;
  Spectral spectral;
  T regularization;
};

// A thread per pair, the matrix in its registers: m and n are known when compiled. A warp holds one x and 32 y, a block
// kPairRows x; both are staged by chunks of features, means as one more row.
template <int ROWS, int COLS>
__global__ void __launch_bounds__(kPairRows* kWarp) register_pairs_kernel(Pairs<float> pairs) {
  __shared__ float x_chunk[kPairRows][ROWS + 1][kChunk];
  __shared__ float y_chunk[COLS + 1][kChunk][kWarp + 1];  // padded: stored along features, read along samples
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t group = blockIdx.z, first_i = int64_t(blockIdx.y) * kPairRows, first_j = int64_t(blockIdx.x) * kWarp;
  const int64_t Bx = pairs.Bx, By = pairs.By, d = pairs.d;
  float a[ROWS * COLS] = {}, v[COLS * COLS], norm[2 * COLS + 1], mean_part = 0;
  for (int64_t start = 0; start < d; start += kChunk) {
    __syncthreads();
    for (int e = threadIdx.x; e < kPairRows * (ROWS + 1) * kChunk; e += blockDim.x) {
      const int k = e % kChunk, r = e / kChunk % (ROWS + 1), w = e / kChunk / (ROWS + 1);
      const int64_t c = start + k, i = first_i + w;
      const float* row = r == ROWS ? pairs.x_mean + (group * Bx + i) * d : pairs.x_factor + ((group * Bx + i) * ROWS + r) * d;
      x_chunk[w][r][k] = i < Bx && c < d ? row[c] : 0.f;
    }
    for (int e = threadIdx.x; e < (COLS + 1) * kChunk * kWarp; e += blockDim.x) {
      const int k = e % kChunk, l = e / kChunk % kWarp, q = e / kChunk / kWarp;
      const int64_t c = start + k, j = first_j + l;
      const float* row = q == COLS ? pairs.y_mean + (group * By + j) * d : pairs.y_factor + ((group * COLS + q) * By + j) * d;
      y_chunk[q][k][l] = j < By && c < d ? row[c] : 0.f;
    }
    __syncthreads();
    float chunk_part = 0;  // one sum over all of d would lose a digit: its terms have one sign
#pragma unroll 2
    for (int k = 0; k < kChunk; ++k) {
      float x[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) x[r] = x_chunk[warp][r][k];
#pragma unroll
      for (int q = 0; q < COLS; ++q) {
        const float y = y_chunk[q][k][lane];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) a[q * ROWS + r] += x[r] * y;
      }
      const float difference = x_chunk[warp][ROWS][k] - y_chunk[COLS][k][lane];
      chunk_part += difference * difference;
    }
    mean_part += chunk_part;
  }
  const int64_t i = first_i + warp, j = first_j + lane;
  if (i >= Bx || j >= By) return;
  const float rest = mean_part + pairs.x_trace[group * Bx + i] + pairs.y_trace[group * By + j];
  const bool polar = pairs.polar != nullptr;
  pairs.distance[(group * Bx + i) * By + j] = rest - spectral_sum<ROWS, COLS, true, float>(
      a, v, norm, ROWS, COLS, polar, pairs.spectral, pairs.regularization, rest - rest);
  if (!polar) return;
  float* const to = pairs.polar + (group * Bx + i) * ROWS * COLS * By + j;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int c = 0; c < COLS; ++c) to[(r * COLS + c) * By] = a[c * ROWS + r];
  }
}

// Shared memory of a pair below: a with an odd stride (no bank conflicts), v, squared norms and weights.
__host__ __device__ int shared_entries(int m, int n) {
  const int rows = m > n ? m : n, cols = m > n ? n : m;
  return (rows | 1) * cols + (cols | 1) * cols + cols;
}

// A warp per pair, the matrix in shared memory: any m and n. In each round of the tournament a lane turns two columns.
template <typename T>
__global__ void __launch_bounds__(kWarp) shared_pairs_kernel(Pairs<T> pairs) {
  ICF_DYNAMIC_SHARED(T, a);
  const int lane = threadIdx.x, m = pairs.m, n = pairs.n;
  const bool tall = m >= n;
  const int rows = tall ? m : n, cols = tall ? n : m, row_step = rows | 1, v_step = cols | 1;
  T *const v = a + row_step * cols, *const norm = v + v_step * cols;
  const int64_t j = blockIdx.x, i = blockIdx.y, group = blockIdx.z, d = pairs.d, By = pairs.By;
  const int64_t own_x = group * pairs.Bx + i, own_y = group * By + j;
  T rest = 0, largest = 0;
  for (int64_t c = lane; c < d; c += kWarp) {
    const T difference = pairs.x_mean[own_x * d + c] - pairs.y_mean[own_y * d + c];
    rest += difference * difference;
  }
  rest = warp_sum(rest) + pairs.x_trace[own_x] + pairs.y_trace[own_y];
  for (int p = 0; p < m; ++p) {
    const T* const x = pairs.x_factor + (own_x * m + p) * d;
    for (int q = 0; q < n; ++q) {
      const T* const y = pairs.y_factor + ((group * n + q) * By + j) * d;
      T product = 0;
      for (int64_t c = lane; c < d; c += kWarp) product += x[c] * y[c];
      product = warp_sum(product);
      largest = magnitude(product) > largest ? magnitude(product) : largest;
      if (lane == 0) a[tall ? q * row_step + p : p * row_step + q] = product;
    }
  }
  __syncwarp();
  const T scale = inverse_power_of_two(largest);
  for (int e = lane; e < rows * cols; e += kWarp) a[e / rows * row_step + e % rows] *= scale;
  for (int e = lane; e < cols * cols; e += kWarp) v[e / cols * v_step + e % cols] = T(e % (cols + 1) == 0);
  const int players = cols + cols % 2;
  const T tolerance = orthogonal<T>(rows);
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    __syncwarp();
    for (int c = lane; c < cols; c += kWarp) norm[c] = squared_norm<0, T>(a + c * row_step, rows);
    bool active = false;
    for (int round = 0; round < players - 1; ++round) {
      __syncwarp();
      for (int table = lane; table < players / 2; table += kWarp) {
        int p, q;
        tournament_pair(round, table, players, p, q);
        if (q >= cols) continue;  // an odd number of columns leaves one out
        T sine, tau;
        if (!angle<0, T>(a + p * row_step, a + q * row_step, rows, tolerance, norm[p], norm[q], sine, tau)) continue;
        active = true;
        turn<0, T>(a + p * row_step, a + q * row_step, rows, sine, tau);
        turn<0, T>(v + p * v_step, v + q * v_step, cols, sine, tau);
      }
    }
    if (!__any_sync(kAllLanes, active)) break;
  }
  __syncwarp();
  for (int c = lane; c < cols; c += kWarp) norm[c] = squared_norm<0, T>(a + c * row_step, rows);
  __syncwarp();
  T maximum = 0, total = 0;
  for (int c = 0; c < cols; ++c) maximum = norm[c] > maximum ? norm[c] : maximum;
  __syncwarp();
  const T rank_cut = square_root<T>(maximum) * (kEpsilon<T> * rows);
  for (int c = lane; c < cols; c += kWarp) {
    T value, weight;
    spectral_term<T>(pairs.spectral, norm[c], rank_cut, pairs.regularization * scale, value, weight);
    total += value;
    norm[c] = weight + (rest - rest);  // NaN marks the result
  }
  total = warp_sum(total);
  __syncwarp();
  if (lane == 0) pairs.distance[own_x * By + j] = rest - total / scale;
  if (pairs.polar == nullptr) return;
  T* const to = pairs.polar + own_x * m * n * By + j;
  for (int e = lane; e < m * n; e += kWarp) {
    const int p = e / n, q = e % n, r = tall ? p : q, c = tall ? q : p;
    T sum = 0;
    for (int k = 0; k < cols; ++k) sum += a[k * row_step + r] * norm[k] * v[k * v_step + c];
    to[int64_t(e) * By] = sum;
  }
}

template <typename T>
__global__ void weights_kernel(const T* grad, const T* polar, T* weights, int64_t J, int64_t mn, int64_t entries) {
  for (int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; e < entries; e += int64_t(gridDim.x) * blockDim.x) {
    const T g = grad[e / (mn * J) * J + e % J];
    weights[e] = g == 0 ? T(0) : -g * polar[e];
  }
}

// ---- operators -----------------------------------------------------------------------------------------------------

template <typename T>
void launch_shared(const Pairs<T>& pairs, cudaStream_t stream) {
  const dim3 grid(pairs.By, pairs.Bx, pairs.N);
  launch(shared_pairs_kernel<T>, grid, kWarp, shared_entries(pairs.m, pairs.n) * sizeof(T), stream, pairs);
}

void launch_pairs(const Pairs<double>& pairs, cudaStream_t stream) { launch_shared(pairs, stream); }

void launch_pairs(const Pairs<float>& pairs, cudaStream_t stream) {
  const dim3 grid((pairs.By + kWarp - 1) / kWarp, (pairs.Bx + kPairRows - 1) / kPairRows, pairs.N);
  if (pairs.m == 4 && pairs.n == 4) {
    launch(register_pairs_kernel<4, 4>, grid, kPairRows * kWarp, 0, stream, pairs);
  } else if (pairs.m == 9 && pairs.n == 9) {
    launch(register_pairs_kernel<9, 9>, grid, kPairRows * kWarp, 0, stream, pairs);
  } else {
    launch_shared(pairs, stream);
  }
}

Forward forward(const Tensor& x, const Tensor& y, const OptionalTensor& x_mask, const OptionalTensor& y_mask,
                std::string spectral, double regularization, double eps, bool polar) {
  const Side xs = side_of(x, x_mask, false), ys = side_of(y, y_mask, true);
  const Spectral kind = spectral_of(spectral);
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  Results out = new_results(x, y, xs, ys, eps, polar);
  const int64_t order = xs.T > ys.T ? xs.rows() : ys.rows(), samples = xs.samples() + ys.samples();
  STD_TORCH_CHECK(xs.N <= 65535 && xs.B <= 65535 && order <= 48, "gaussian_w2: too many groups, samples or frames");
  if (samples == 0) return out.all();
  dispatch_floating(x.scalar_type(), "gaussian_w2", [&](auto zero) {
    using F = decltype(zero);
    using T = acc_t<F>;
    const auto data = [](const Tensor& t) { return t.const_data_ptr<T>(); };
    launch(moments_kernel<F, T>, samples, kSampleThreads, eps > 0 ? order * order * sizeof(double) : 0, stream, xs, ys,
           x.const_data_ptr<F>(), y.const_data_ptr<F>(), eps, out.x_moments<T>(), out.y_moments<T>());
    if (out.distance.numel() == 0) return;
    const bool matrix = xs.T > 1 && ys.T > 1;
    launch_pairs(Pairs<T>{data(out.x_mean), data(out.y_mean), data(out.x_factor), data(out.y_factor), data(out.x_trace),
                          data(out.y_trace), out.distance.mutable_data_ptr<T>(),
                          polar && matrix ? out.polar.mutable_data_ptr<T>() : nullptr, xs.N, xs.B, ys.B, xs.d,
                          int(xs.rows()), int(ys.rows()), kind, T(regularization)}, stream);
  });
  return out.all();
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& grad_x_entropy, const Tensor& grad_y_entropy,
                                    const Tensor& x, const Tensor& y, const Tensor& x_mean, const Tensor& y_mean,
                                    const Tensor& x_factor, const Tensor& y_factor, const Tensor& x_inverse,
                                    const Tensor& y_inverse, const Tensor& polar, const OptionalTensor& x_mask,
                                    const OptionalTensor& y_mask) {
  const Side xs = side_of(x, x_mask, false), ys = side_of(y, y_mask, true);
  check_saved(xs, ys, {grad, grad_x_entropy, grad_y_entropy, x_mean, y_mean, x_factor, y_factor, x_inverse, y_inverse, polar});
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  const int64_t N = xs.N, Bx = xs.B, By = ys.B, m = xs.rows(), n = ys.rows(), d = xs.d;
  const bool pairs = polar.numel() > 0, entropy = x_inverse.dim() != 1;
  Tensor grad_x = allocate(x, x.sizes()), grad_y = allocate(y, y.sizes());
  Tensor grad_x_factor = pairs ? allocate(x_factor, x_factor.sizes()) : torch::stable::new_zeros(x_factor, {N, Bx, m, d});
  Tensor grad_y_factor = pairs ? allocate(y_factor, y_factor.sizes()) : torch::stable::new_zeros(y_factor, {N, n, By, d});
  if (xs.samples() + ys.samples() == 0) return {grad_x, grad_y};
  dispatch_floating(x.scalar_type(), "gaussian_w2_backward", [&](auto zero) {
    using F = decltype(zero);
    using T = acc_t<F>;
    const auto data = [](const Tensor& t) { return t.const_data_ptr<T>(); };
    if (pairs) {
      Tensor weights = allocate(polar, {N, Bx * m, n * By});
      const int64_t blocks = polar.numel() / 256 + 1;
      launch(weights_kernel<T>, blocks < 65535 ? blocks : 65535, 256, 0, stream, data(grad), data(polar),
             weights.mutable_data_ptr<T>(), By, m * n, polar.numel());
      const Tensor x_rows = torch::stable::view(x_factor, {N, Bx * m, d});
      const Tensor y_rows = torch::stable::view(y_factor, {N, n * By, d});
      multiply(torch::stable::view(grad_x_factor, {N, Bx * m, d}), weights, y_rows);
      multiply(torch::stable::view(grad_y_factor, {N, n * By, d}), torch::stable::transpose(weights, 1, 2), x_rows);
    }
    const Incoming<T> x_in{data(grad), data(grad_x_entropy), data(x_mean), data(y_mean), data(x_factor),
                           entropy ? data(x_inverse) : nullptr, data(grad_x_factor), By, By, 1};
    const Incoming<T> y_in{data(grad), data(grad_y_entropy), data(y_mean), data(x_mean), data(y_factor),
                           entropy ? data(y_inverse) : nullptr, data(grad_y_factor), Bx, 1, By};
    launch(frames_kernel<F, T>, xs.samples() + ys.samples(), kSampleThreads, 0, stream, xs, ys, x_in, y_in,
           grad_x.mutable_data_ptr<F>(), grad_y.mutable_data_ptr<F>());
  });
  return {grad_x, grad_y};
}

}  // namespace
}  // namespace icf

ICF_CUDA_LIBRARY(m) {
  m.impl("gaussian_w2.cuda", TORCH_BOX(&icf::forward));
  m.impl("gaussian_w2_backward.cuda", TORCH_BOX(&icf::backward));
}
