#include "common/cuda.h"
#include "gram_schmidt/gram_schmidt_args.h"

#include <vector>

namespace icf {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kWidest = 1024;  // elements of a row, held in the registers of a warp

struct Options : BlendOptions {
  bool aligned;  // all rows may be read four elements at a time
};

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};

// A row is spread over L lanes, each with V times four neighbours: element 4 * (v * L + lane) and the next three.
template <typename A, int V>
using Part = A[V][4];

template <int L, int V, typename T, typename A>
__device__ __forceinline__ void read(const T* row, Part<A, V>& x, int lane, const Options& o) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int64_t column = 4 * (v * L + lane);
    if (o.aligned && column < o.d) {
      const Four<T> four = *reinterpret_cast<const Four<T>*>(row + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[v][i] = A(four.x[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[v][i] = column + i < o.d ? A(row[column + i]) : A(0);
    }
  }
}

template <int L, int V, typename T, typename A>
__device__ __forceinline__ void write(T* row, const Part<A, V>& x, int lane, const Options& o) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int64_t column = 4 * (v * L + lane);
    if (o.aligned && column < o.d) {
      Four<T> four;
#pragma unroll
      for (int i = 0; i < 4; ++i) four.x[i] = T(x[v][i]);
      *reinterpret_cast<Four<T>*>(row + column) = four;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (column + i < o.d) row[column + i] = T(x[v][i]);
      }
    }
  }
}

template <int L, typename A>
__device__ __forceinline__ A sum_lanes(A x) {
#pragma unroll
  for (int step = L / 2; step; step /= 2) x += __shfl_xor_sync(~0u, x, step, L);
  return x;
}

template <int L, int V, typename A>
__device__ __forceinline__ A dot(const Part<A, V>& x, const Part<A, V>& y) {
  A sum = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += x[v][i] * y[v][i];
  }
  return sum_lanes<L>(sum);
}

// Scales a row whose square would under- or overflow so that its largest element is 1. Returns the scale. All lanes of
// a warp take part, those of other rows too.
template <int L, int V, typename A>
__device__ __forceinline__ A rescale(Part<A, V>& x, A& square) {
  if (!__any_sync(~0u, needs_scaling(square))) return 1;
  A largest = 0;
  for (int v = 0; v < V; ++v) {
    for (int i = 0; i < 4; ++i) largest = fabs(x[v][i]) > largest ? fabs(x[v][i]) : largest;
  }
  for (int step = L / 2; step; step /= 2) {
    const A other = __shfl_xor_sync(~0u, largest, step, L);
    largest = other > largest ? other : largest;
  }
  const bool possible = needs_scaling(square) && largest > 0 && largest <= std::numeric_limits<A>::max();
  constexpr A least = std::numeric_limits<A>::min();
  const A scale = possible ? 1 / (largest > least ? largest : least) : A(1);
  for (int v = 0; v < V; ++v) {
    for (int i = 0; i < 4; ++i) x[v][i] *= scale;
  }
  square = dot<L, V>(x, x);
  return scale;
}

template <int L, int V, typename A>
__device__ __forceinline__ void draw(Part<A, V>& p, const A* given, int64_t row, int lane, const Options& o) {
  if (o.kind == kGiven) return read<L, V>(given + row * o.d, p, lane, o);
  const uint64_t seed = *o.seed;
  uint32_t w[4];
  if (o.kind == kRademacher) philox_words(seed, row, lane, 0, w[0], w[1], w[2], w[3]);  // counter `lane`, for all lanes
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int column = 4 * (v * L + lane);
    if (o.kind == kGaussian) {
      philox_words(seed, row, column / 4, 0, w[0], w[1], w[2], w[3]);
      gaussian_pair(w[0], w[1], p[v][0], p[v][1]);
      gaussian_pair(w[2], w[3], p[v][2], p[v][3]);
    } else {
      uint32_t bits = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t word = __shfl_sync(~0u, w[i], column / 128, L);
        if (column / 32 % 4 == i) bits = word;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) p[v][i] = bits >> (column % 32 + i) & 1 ? A(-1) : A(1);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (column + i >= o.d) p[v][i] = 0;
    }
  }
}

template <int L, int V, typename A>
__device__ __forceinline__ void draw_and_project(Part<A, V>& p, const Part<A, V>& z, const A* given, int64_t row,
                                                 int lane, const Options& o, BlendRow<A>& terms) {
  draw<L, V>(p, given, row, lane, o);
  terms.pp = dot<L, V>(p, p);
  if (o.kind == kGiven) rescale<L, V>(p, terms.pp);
  terms.pz = dot<L, V>(p, z);
  terms.rr = terms.pp;
  terms.kappa = 0;
  const bool needed = needs_projection(terms.zz, terms.pz, terms.pp);
  if (__any_sync(~0u, needed)) {  // rare for noise drawn here
    if (needed) terms.kappa = terms.pz / terms.zz;
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int i = 0; i < 4; ++i) p[v][i] -= terms.kappa * z[v][i];
    }
    terms.pp = dot<L, V>(p, p);
    terms.pz = dot<L, V>(p, z);
  }
}

// Index of this thread's row; the last rows are repeated, as all lanes of a warp must take part in its sums.
template <int L>
__device__ __forceinline__ int64_t row_of_thread(int64_t rows, bool& live) {
  const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / L;
  live = row < rows;
  return live ? row : rows - 1;
}

template <int L, int V, typename T, typename A = acc_t<T>>
__global__ void __launch_bounds__(kThreads) forward_kernel(const T* z_rows, const A* ratio, const A* given, T* out,
                                                           int64_t rows, Options o) {
  bool live;
  const int64_t row = row_of_thread<L>(rows, live);
  const int lane = threadIdx.x % L;
  Part<A, V> z, p;
  BlendRow<A> terms;
  read<L, V>(z_rows + (row / (o.shared * o.inner) * o.inner + row % o.inner) * o.d, z, lane, o);
  terms.zz = dot<L, V>(z, z);
  terms.scale = rescale<L, V>(z, terms.zz);
  draw_and_project<L, V>(p, z, given, row, lane, o, terms);
  A z_coef, p_coef;
  blend_forward(terms, ratio[row], o.restore_norm, z_coef, p_coef);
#pragma unroll
  for (int v = 0; v < V; ++v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) z[v][i] = z_coef * z[v][i] + p_coef * p[v][i];
  }
  if (live) write<L, V>(out + row * o.d, z, lane, o);
}

// Over rows of z: the gradients of the rows that share one are added up in registers.
template <int L, int V, typename T, typename A = acc_t<T>>
__global__ void __launch_bounds__(kThreads) backward_kernel(const T* grad, const T* z_rows, const A* ratio,
                                                            const A* given, T* grad_z, A* grad_ratio, int64_t rows,
                                                            Options o) {
  bool live;
  const int64_t row = row_of_thread<L>(rows, live);
  const int lane = threadIdx.x % L;
  Part<A, V> z, p, g, sum = {};
  BlendRow<A> terms;
  read<L, V>(z_rows + row * o.d, z, lane, o);
  terms.zz = dot<L, V>(z, z);
  terms.scale = rescale<L, V>(z, terms.zz);
  for (int64_t k = 0; k < o.shared; ++k) {
    const int64_t index = (row / o.inner * o.shared + k) * o.inner + row % o.inner;
    draw_and_project<L, V>(p, z, given, index, lane, o, terms);
    read<L, V>(grad + index * o.d, g, lane, o);
    const A gz = dot<L, V>(g, z), gp = dot<L, V>(g, p);
    A g_coef, z_coef, p_coef, of_ratio;
    blend_backward(terms, ratio[index], o.restore_norm, gz, gp, g_coef, z_coef, p_coef, of_ratio);
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[v][i] += g_coef * g[v][i] + z_coef * z[v][i] + p_coef * p[v][i];
    }
    if (live && lane == 0) grad_ratio[index] = of_ratio;
  }
  if (live) write<L, V>(grad_z + row * o.d, sum, lane, o);
}

__global__ void noise_kernel(const int64_t* seed, float* out, int64_t rows, int64_t d, int64_t kind) {
  const int64_t counters = (d + 3) / 4, i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= rows * counters) return;
  const int64_t row = i / counters, column = i % counters * 4;
  uint32_t w[4];
  float x[4];
  philox_words(*seed, row, kind == kGaussian ? column / 4 : column / 128, 0, w[0], w[1], w[2], w[3]);
  if (kind == kGaussian) {
    gaussian_pair(w[0], w[1], x[0], x[1]);
    gaussian_pair(w[2], w[3], x[2], x[3]);
  } else {
    for (int j = 0; j < 4; ++j) x[j] = w[column / 32 % 4] >> (column % 32 + j) & 1 ? -1.0f : 1.0f;
  }
  for (int j = 0; j < 4 && column + j < d; ++j) out[row * d + column + j] = x[j];
}

// Calls f with the lanes and the parts per lane that hold a row of d elements.
template <typename F>
void dispatch_width(int64_t d, const F& f) {
  using std::integral_constant;
  if (d <= 32) return f(integral_constant<int, 8>{}, integral_constant<int, 1>{});
  if (d <= 256) return f(integral_constant<int, 32>{}, integral_constant<int, 2>{});
  return f(integral_constant<int, 32>{}, integral_constant<int, 8>{});
}

template <typename... P>
bool aligned_rows(int64_t d, size_t bytes, P... pointers) {
  return d % 4 == 0 && (... && (reinterpret_cast<uintptr_t>(pointers) % bytes == 0));
}

Options check(const Tensor& z, const Tensor& ratio, const Tensor& noise, const std::vector<int64_t>& options) {
  const Options o{check_blend(z, ratio, noise, options), false};
  STD_TORCH_CHECK(o.d <= kWidest, "z must have rows of at most ", kWidest, " elements");
  return o;
}

int blocks(int64_t threads) { return static_cast<int>((threads + kThreads - 1) / kThreads); }

Tensor forward(const Tensor& z, const Tensor& ratio, const Tensor& noise, std::vector<int64_t> options) {
  Options o = check(z, ratio, noise, options);
  std::vector<int64_t> shape(ratio.sizes().begin(), ratio.sizes().end());
  shape.push_back(o.d);
  Tensor out = allocate(z, shape);
  if (out.numel() == 0) return out;
  const DeviceGuard guard(z.get_device_index());
  dispatch_floating(z.scalar_type(), "orthogonal_blend", [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T* rows = z.const_data_ptr<T>();
    const A* given = o.kind == kGiven ? noise.const_data_ptr<A>() : nullptr;
    T* result = out.mutable_data_ptr<T>();
    o.aligned = aligned_rows(o.d, 4 * sizeof(T), rows, result) && aligned_rows(o.d, 4 * sizeof(A), given);
    dispatch_width(o.d, [&](auto lanes, auto parts) {
      launch(forward_kernel<lanes(), parts(), T>, blocks(ratio.numel() * lanes()), kThreads, 0, current_stream(z), rows,
             ratio.const_data_ptr<A>(), given, result, ratio.numel(), o);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& z, const Tensor& ratio, const Tensor& noise,
                                    std::vector<int64_t> options) {
  Options o = check(z, ratio, noise, options);
  check_blend_grad(grad, z, ratio, o);
  Tensor grad_z = allocate(z, z.sizes()), grad_ratio = allocate(ratio, ratio.sizes());
  if (z.numel() == 0) return {grad_z, grad_ratio};
  const DeviceGuard guard(z.get_device_index());
  dispatch_floating(z.scalar_type(), "orthogonal_blend_backward", [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T *rows = z.const_data_ptr<T>(), *incoming = grad.const_data_ptr<T>();
    const A* given = o.kind == kGiven ? noise.const_data_ptr<A>() : nullptr;
    T* result = grad_z.mutable_data_ptr<T>();
    const int64_t count = z.numel() / o.d;
    o.aligned = aligned_rows(o.d, 4 * sizeof(T), rows, incoming, result) && aligned_rows(o.d, 4 * sizeof(A), given);
    dispatch_width(o.d, [&](auto lanes, auto parts) {
      launch(backward_kernel<lanes(), parts(), T>, blocks(count * lanes()), kThreads, 0, current_stream(z), incoming,
             rows, ratio.const_data_ptr<A>(), given, result, grad_ratio.mutable_data_ptr<A>(), count, o);
    });
  });
  return {grad_z, grad_ratio};
}

Tensor philox_noise(const Tensor& seed, std::vector<int64_t> shape, int64_t kind) {
  check_seed(seed);
  STD_TORCH_CHECK(!shape.empty(), "shape must not be empty");
  Tensor out = allocate(seed, shape, torch::headeronly::ScalarType::Float);
  if (out.numel() == 0) return out;
  const DeviceGuard guard(seed.get_device_index());
  const int64_t d = shape.back(), rows = out.numel() / d;
  launch(noise_kernel, blocks(rows * ((d + 3) / 4)), kThreads, 0, current_stream(seed), seed.const_data_ptr<int64_t>(),
         out.mutable_data_ptr<float>(), rows, d, kind);
  return out;
}

}  // namespace
}  // namespace icf

ICF_CUDA_LIBRARY(m) {
  m.impl("orthogonal_blend.cuda", TORCH_BOX(&icf::forward));
  m.impl("orthogonal_blend_backward.cuda", TORCH_BOX(&icf::backward));
  m.impl("philox_noise.cuda", TORCH_BOX(&icf::philox_noise));
}
