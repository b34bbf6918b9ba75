// A group of 4 to 32 lanes owns one (image, head, query); a lane owns V neighbouring channels. The lanes first compute
// the corners of one sample each into shared memory, then all of them walk over the samples. In the backward pass the
// gradients of points have one owner each. The gradient of value is summed by blocks that own pixels (no atomics, the
// same bits every time), or where the maps are large for that and determinism was not asked for, by atomics.
#include "common/cuda.h"
#include "ms_deform_attn/ms_deform_attn_args.h"
#include "ms_deform_attn/ms_deform_attn_library.h"
#include "ms_deform_attn/ms_deform_attn_math.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

namespace icf {
namespace {

using namespace msda;
constexpr int kThreads = 128;
constexpr int kBlocks = 5;         // of them on a multiprocessor at least: 102 registers, none of which need spill
constexpr int kLevels = 128;       // as many as fit the parameters of a kernel with room to spare
constexpr int kShared = 48 << 10;  // bytes of shared memory that need no permission
constexpr int kOwners = 16;        // warps of a block that owns pixels; its rows are dealt to them in turn
constexpr int kOwnerThreads = 32 * kOwners;
constexpr int kTileBytes = 64 << 10;  // of sums in shared memory: two blocks or more on a multiprocessor
constexpr int64_t kTilesBeforeAtomics = 4;  // computed from instruction counts: each tile looks at every sample

struct Level {
  int32_t height, width, start;
};

struct Geometry {
  int64_t B, S, M, D, Q;
  int P, n, levels;
  Level level[kLevels];

  Geometry(const Tensor& value, const std::vector<int64_t>& sizes, const Tensor& weights)
      : B(value.size(0)), S(value.size(1)), M(value.size(2)), D(value.size(3)), Q(weights.size(1)),
        P(static_cast<int>(weights.size(4))), n(static_cast<int>(weights.size(3) * weights.size(4))),
        levels(static_cast<int>(sizes.size() / 2)) {
    STD_TORCH_CHECK(sizes.size() % 2 == 0 && levels <= kLevels && levels == weights.size(3),
                    "sizes must be height and width of each of at most 128 levels");
    STD_TORCH_CHECK(weights.size(4) > 0 && weights.size(3) * weights.size(4) < INT32_MAX / 2, "no or too many points");
    STD_TORCH_CHECK(S < INT32_MAX, "value must have fewer than 2^31 pixels per image");
    int64_t start = 0;
    for (int l = 0; l < levels; ++l) {
      const int64_t height = sizes[2 * l], width = sizes[2 * l + 1];
      STD_TORCH_CHECK(height > 0 && width > 0 && height <= S && width <= S, "sizes must be positive, within value");
      level[l] = {static_cast<int32_t>(height), static_cast<int32_t>(width), static_cast<int32_t>(start)};
      start += height * width;
      STD_TORCH_CHECK(start <= S, "sizes must describe value");
    }
    STD_TORCH_CHECK(start == S, "sizes must describe value");
  }
};

template <typename T>
struct Value {  // [B, S, M, D]
  const T* data;
  int64_t image, head;
  int32_t row;
};

template <typename A>
struct alignas(4 * sizeof(A) < 16 ? 4 * sizeof(A) : 16) Four {
  A x[4];
};

template <typename T, int V>
struct alignas(V * sizeof(T)) Pack {
  T x[V];
};

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

// The points of one query and head.
template <typename A, typename L>
struct Points {
  const L *coordinates, *weights;
  const A* reference;
  int reference_size;
  int64_t reference_l;
  A largest = 0, inverse = 0;  // of the softmax

  __device__ Points(const Inputs<A, L>& in, const Geometry& g, int64_t b, int64_t m, int64_t q)
      : coordinates(in.coordinates + b * in.coordinates_b + q * in.coordinates_q + m * g.n * 2),
        weights(in.weights + b * in.weights_b + q * in.weights_q + m * g.n),
        reference(in.reference == nullptr ? nullptr : in.reference + b * in.reference_b + q * in.reference_q),
        reference_size(static_cast<int>(in.reference_size)), reference_l(in.reference_l) {}

  __device__ A weight(int i) const {
    const A w = A(weights[i]);
    return reference == nullptr ? w : softmax_weight(w, largest, inverse);
  }
  __device__ A raw(int i, int axis) const { return A(coordinates[2 * i + axis]); }
  __device__ Axis<A> axis(int level, int which, A extent, int P) const {
    if (reference == nullptr) return axis_of_location(extent);
    const A* r = reference + level * reference_l;
    return axis_of_offset(extent, r[which], reference_size == 4 ? box_scale(extent, r[2 + which], A(P)) : A(1));
  }
};

template <typename A>
struct Located {
  Level level;
  Axis<A> x, y;
  bool touches;
  int32_t left, top;
  A s, t;

  __device__ void corners(A a, int32_t (&rows)[4], A (&weights)[4]) const {
    corner_rows(touches, left, top, level.width, level.height, level.start, rows);
    corner_weights(s, t, a, weights[0], weights[1], weights[2], weights[3]);
  }
};

template <typename A, typename L>
__device__ __forceinline__ Located<A> locate(const Geometry& g, const Points<A, L>& points, int i) {
  const int l = i / g.P;
  const Level level = g.level[l];
  const A width = A(level.width), height = A(level.height);
  Located<A> at{level, points.axis(l, 0, width, g.P), points.axis(l, 1, height, g.P)};
  const A x = points.raw(i, 0), floor_x = whole_pixel(x, at.x.scale, at.x.base), left = floor_x + at.x.cell;
  const A y = points.raw(i, 1), floor_y = whole_pixel(y, at.y.scale, at.y.base), top = floor_y + at.y.cell;
  at.touches = touches_map(left, width) & touches_map(top, height);
  at.left = static_cast<int32_t>(at.touches ? left : A(0)), at.top = static_cast<int32_t>(at.touches ? top : A(0));
  at.s = at.touches ? fraction_of_pixel(x, at.x.scale, at.x.base, floor_x) : A(0);
  at.t = at.touches ? fraction_of_pixel(y, at.y.scale, at.y.base, floor_y) : A(0);
  return at;
}

template <typename A, typename F>
__device__ __forceinline__ A reduce_group(A x, int lanes, F combine) {
  for (int step = 1; step < lanes; step *= 2) x = combine(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

template <typename A>
__device__ __forceinline__ A sum_group(A x, int lanes) {
  return reduce_group(x, lanes, [](A a, A b) { return a + b; });
}

// The sums over the group of d[0] to d[3]; lane i of each four returns that of d[i].
template <typename A>
__device__ __forceinline__ A sum_group_of_four(const A (&d)[4], int lane, int lanes) {
  const bool odd = lane & 1, high = lane & 2;
  const A a = (odd ? d[1] : d[0]) + __shfl_xor_sync(~0u, odd ? d[0] : d[1], 1);
  const A b = (odd ? d[3] : d[2]) + __shfl_xor_sync(~0u, odd ? d[2] : d[3], 1);
  A c = (high ? b : a) + __shfl_xor_sync(~0u, high ? a : b, 2);
  for (int step = 4; step < lanes; step *= 2) c += __shfl_xor_sync(~0u, c, step);
  return c;
}

struct Split {
  int lanes = 4, chunk;  // lanes to a group, samples that it has slots for
  unsigned tiles;        // blocks to the queries of one image and head
};

// One group's place: its lanes, its query, and its slots for `chunk` samples in shared memory.
template <typename A>
struct Group {
  int lane, lanes, chunk;
  int64_t b, m, q;
  bool active;  // groups beyond the last query compute it again and store nothing
  int4* rows;
  Four<A>*weights, *dots;

  // An odd number of slots, so that the groups of a warp read from different banks.
  static __host__ __device__ int slots(int chunk) { return chunk | 1; }
  static int64_t bytes(int chunk, int fours) { return slots(chunk) * (sizeof(int4) + fours * sizeof(Four<A>)); }

  __device__ Group(const Geometry& g, unsigned char* memory, const Split& split)
      : lanes(split.lanes), chunk(split.chunk) {
    const unsigned groups = kThreads / lanes, own = threadIdx.x / lanes, head = blockIdx.x / split.tiles;
    lane = threadIdx.x % lanes;
    b = head / static_cast<unsigned>(g.M), m = head % static_cast<unsigned>(g.M);
    q = int64_t(blockIdx.x % split.tiles) * groups + own;
    active = q < g.Q;
    q = active ? q : g.Q - 1;
    rows = reinterpret_cast<int4*>(memory);
    weights = reinterpret_cast<Four<A>*>(rows + groups * slots(chunk)) + own * slots(chunk);
    dots = weights + groups * slots(chunk);
    rows += own * slots(chunk);
  }

  template <typename L>
  __device__ void normalise(Points<A, L>& points, int n) const {
    if (points.reference == nullptr) return;
    A largest = -std::numeric_limits<A>::infinity(), sum = 0;
    for (int i = lane; i < n; i += lanes) largest = fmax(largest, A(points.weights[i]));
    points.largest = reduce_group(largest, lanes, [](A a, A b) { return fmax(a, b); });
    for (int i = lane; i < n; i += lanes) sum += softmax_weight(A(points.weights[i]), points.largest, A(1));
    points.inverse = 1 / sum_group(sum, lanes);
  }

  template <typename L>
  __device__ void stage(const Geometry& g, const Points<A, L>& points, int first, int count) const {
    __syncwarp();
    for (int i = lane; i < count; i += lanes) {
      int32_t r[4];
      Four<A> w;
      locate(g, points, first + i).corners(points.weight(first + i), r, w.x);
      rows[i] = make_int4(r[0], r[1], r[2], r[3]);
      weights[i] = w;
    }
    __syncwarp();
  }
};

// A corner's channels, zero outside of the map, also where value holds NaN there.
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> corner(const T* value, int32_t row, int32_t stride) {
  Pack<T, V> v = {};
  if (row >= 0) v = load<T, V>(value + int64_t(row) * stride);
  return v;
}

template <typename T, typename A, typename L, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    forward_kernel(const __grid_constant__ Geometry g, const Value<T> value, const Inputs<A, L> in, T* out,
                   const Split split) {
  ICF_DYNAMIC_SHARED(unsigned char, memory);
  const Group<A> group(g, memory, split);
  const int lanes = split.lanes, chunk = split.chunk;
  Points<A, L> points(in, g, group.b, group.m, group.q);
  group.normalise(points, g.n);
  for (int64_t start = 0; start < g.D; start += lanes * V) {
    const int64_t c = start + group.lane * V;
    const T* const own = value.data + group.b * value.image + group.m * value.head + c;
    A sum[V] = {};
    for (int first = 0; first < g.n; first += chunk) {
      const int count = min(chunk, g.n - first);
      group.stage(g, points, first, count);
      if (c >= g.D) continue;
#pragma unroll 2
      for (int i = 0; i < count; ++i) {
        const int4 at = group.rows[i];
        const Four<A> w = group.weights[i];
        const Pack<T, V> v0 = corner<T, V>(own, at.x, value.row), v1 = corner<T, V>(own, at.y, value.row);
        const Pack<T, V> v2 = corner<T, V>(own, at.z, value.row), v3 = corner<T, V>(own, at.w, value.row);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          sum[j] += w.x[0] * A(v0.x[j]);
          sum[j] += w.x[1] * A(v1.x[j]);
          sum[j] += w.x[2] * A(v2.x[j]);
          sum[j] += w.x[3] * A(v3.x[j]);
        }
      }
    }
    if (c >= g.D || !group.active) continue;
    Pack<T, V> result;
#pragma unroll
    for (int j = 0; j < V; ++j) result.x[j] = T(sum[j]);
    *reinterpret_cast<Pack<T, V>*>(out + ((group.b * g.Q + group.q) * g.M + group.m) * g.D + c) = result;
  }
}

template <typename A, int V>
__device__ __forceinline__ void add_atomically(A* to, A weight, const A (&g)[V]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  constexpr bool kFours = false;
#else
  constexpr bool kFours = std::is_same_v<A, float> && V % 4 == 0;
#endif
  if constexpr (kFours) {
#pragma unroll
    for (int j = 0; j < V; j += 4)
      atomicAdd(reinterpret_cast<float4*>(to + j),
                make_float4(weight * g[j], weight * g[j + 1], weight * g[j + 2], weight * g[j + 3]));
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) atomicAdd(to + j, weight * g[j]);
  }
}

template <typename A, typename L>
struct Gradients {
  A* value;  // [B, S, M, D], added to atomically, or null
  L *coordinates, *weights;
  A* shares;       // of the heads in the gradient of reference points, [B, M, Q, levels, 2 or 4], or null
  A* normalisers;  // [B, M, Q, 2]: largest logit and inverse sum of the softmax
};

// Dot products of the incoming gradient with the corners of `count` samples, and what they add to value's gradient.
template <typename T, typename A, int V>
__device__ void walk(const Geometry& g, const Value<T>& value, const Group<A>& group, const T* grad, A* grad_value,
                     int count) {
  const T* const own = value.data + group.b * value.image + group.m * value.head;
  for (int64_t start = 0; start < g.D; start += group.lanes * V) {
    const int64_t c = start + group.lane * V;
    const bool inside = c < g.D;
    A incoming[V] = {};
    if (inside) {
      const Pack<T, V> given = load<T, V>(grad + c);
#pragma unroll
      for (int j = 0; j < V; ++j) incoming[j] = A(given.x[j]);
    }
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const int4 at = group.rows[i];
      const Four<A> w = group.weights[i];
      const int32_t rows[4] = {inside ? at.x : -1, inside ? at.y : -1, inside ? at.z : -1, inside ? at.w : -1};
      Pack<T, V> v[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) v[k] = corner<T, V>(own + c, rows[k], value.row);
      A d[4] = {};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int j = 0; j < V; ++j) d[k] += incoming[j] * A(v[k].x[j]);
        if (grad_value != nullptr && group.active && rows[k] >= 0)
          add_atomically(grad_value + ((group.b * g.S + rows[k]) * g.M + group.m) * g.D + c, w.x[k], incoming);
      }
      const A sum = sum_group_of_four(d, group.lane, group.lanes);
      if (group.lane < 4) group.dots[i].x[group.lane] = start == 0 ? sum : group.dots[i].x[group.lane] + sum;
    }
  }
  __syncwarp();
}

// Adds the samples [first, first + count) to the head's share in the gradient of the reference points. A lane owns a
// component of a level; what was computed of the samples lies in `dots`.
template <typename A, typename L>
__device__ void share_reference(const Geometry& g, const Group<A>& group, const Points<A, L>& points, A* share,
                                int first, int count) {
  const int size = points.reference_size;
  for (int j = group.lane; j < g.levels * size; j += group.lanes) {
    const int l = j / size, which = j % size, axis = which % 2;
    const int begin = max(l * g.P, first), end = min((l + 1) * g.P, first + count);
    if (begin >= end) continue;
    A sum = begin == l * g.P ? A(0) : share[j];
    const A extent = A(axis ? g.level[l].height : g.level[l].width);
    const A factor = which < 2 ? extent : box_scale(extent, A(1), A(g.P));
    for (int i = begin; i < end; ++i)
      sum += factor * group.dots[i - first].x[axis] * (which < 2 ? A(1) : points.raw(i, axis));
    share[j] = sum;
  }
}

template <typename T, typename A, typename L, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    backward_kernel(const __grid_constant__ Geometry g, const Value<T> value, const Inputs<A, L> in, const T* grad,
                    const Gradients<A, L> to, const Split split) {
  ICF_DYNAMIC_SHARED(unsigned char, memory);
  const Group<A> group(g, memory, split);
  const int lanes = split.lanes, chunk = split.chunk;
  Points<A, L> points(in, g, group.b, group.m, group.q);
  group.normalise(points, g.n);
  const int64_t query = (group.b * g.Q + group.q) * g.M + group.m, own = (group.b * g.M + group.m) * g.Q + group.q;
  const bool fused = points.reference != nullptr;
  if (fused && group.active && group.lane == 0) {
    to.normalisers[2 * own] = points.largest;
    to.normalisers[2 * own + 1] = points.inverse;
  }
  A mean = 0;  // of the softmax's gradient; needs all samples before the first can be stored
  for (int pass = fused && g.n > chunk ? 0 : 1; pass < 2; ++pass) {
    for (int first = 0; first < g.n; first += chunk) {
      const int count = min(chunk, g.n - first);
      group.stage(g, points, first, count);
      walk<T, A, V>(g, value, group, grad + query * g.D, pass == 0 ? nullptr : to.value, count);
      A partial = 0;
      for (int i = group.lane; i < count; i += lanes) {
        const Located<A> at = locate(g, points, first + i);
        const A a = points.weight(first + i);
        Four<A>& d = group.dots[i];
        A x, y, grad_a;
        sample_gradient(d.x[0], d.x[1], d.x[2], d.x[3], at.s, at.t, a, x, y, grad_a);
        d = {x, y, grad_a, a};
        partial += a * grad_a;
      }
      if (pass == 0 || g.n <= chunk) mean += sum_group(partial, lanes);
      if (pass == 0) continue;
      for (int i = group.active ? group.lane : count; i < count; i += lanes) {
        const Located<A> sample = locate(g, points, first + i);
        const Four<A> d = group.dots[i];
        const int64_t e = query * g.n + first + i;
        to.coordinates[2 * e] = L(d.x[0] * sample.x.scale);
        to.coordinates[2 * e + 1] = L(d.x[1] * sample.y.scale);
        to.weights[e] = L(fused ? logit_gradient(d.x[3], d.x[2], mean) : d.x[2]);
      }
      __syncwarp();
      if (fused && group.active)
        share_reference(g, group, points, to.shares + own * g.levels * points.reference_size, first, count);
    }
  }
}

// One block owns rows tile, tile + tiles, ... of value's gradient in one image and head, and 32 channels of them. It
// computes 512 samples at a time; every warp looks at all of them and adds what falls into rows of its own, in order.
template <typename T, typename A, typename L>
__global__ void __launch_bounds__(kOwnerThreads)
    grad_value_kernel(const __grid_constant__ Geometry g, const Inputs<A, L> in, const T* grad, const A* normalisers,
                      T* grad_value, unsigned tiles, unsigned slices) {
  ICF_DYNAMIC_SHARED(unsigned char, memory);
  A* const weights = reinterpret_cast<A*>(memory);                         // [4, kOwnerThreads]
  int* const rows = reinterpret_cast<int*>(weights + 4 * kOwnerThreads);   // [4, kOwnerThreads], of the tile, or -1
  int* const queries = rows + 4 * kOwnerThreads;                           // [kOwnerThreads], from the first on
  A* const sums = reinterpret_cast<A*>(queries + kOwnerThreads);           // [rows of the tile, 32]
  const unsigned tile = blockIdx.x % tiles, slice = blockIdx.x / tiles % slices, head = blockIdx.x / tiles / slices;
  const int64_t b = head / static_cast<unsigned>(g.M), m = head % static_cast<unsigned>(g.M);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t c = int64_t(slice) * 32 + lane, row_stride = g.M * g.D;
  const int own_rows = static_cast<int>((static_cast<unsigned>(g.S) - tile + tiles - 1) / tiles);
  for (int i = threadIdx.x; i < own_rows * 32; i += kOwnerThreads) sums[i] = 0;
  int64_t first_query = 0;
  int first_point = 0;
  while (first_query < g.Q) {
    const int step = (first_point + static_cast<int>(threadIdx.x)) / g.n;
    const int i = (first_point + static_cast<int>(threadIdx.x)) % g.n;
    const int64_t q = first_query + step;
    int32_t r[4] = {-1, -1, -1, -1};
    A w[4] = {};
    if (q < g.Q) {
      Points<A, L> points(in, g, b, m, q);
      if (points.reference != nullptr) {
        const A* normaliser = normalisers + 2 * ((b * g.M + m) * g.Q + q);
        points.largest = normaliser[0], points.inverse = normaliser[1];
      }
      locate(g, points, i).corners(points.weight(i), r, w);
    }
    __syncthreads();  // all warps are done with the samples before
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const unsigned row = static_cast<unsigned>(r[k]);
      rows[k * kOwnerThreads + threadIdx.x] = r[k] >= 0 && row % tiles == tile ? static_cast<int>(row / tiles) : -1;
      weights[k * kOwnerThreads + threadIdx.x] = w[k];
    }
    queries[threadIdx.x] = step;
    __syncthreads();
    const T* const incoming = grad + (b * g.Q + first_query) * row_stride + m * g.D + c;
    for (int e = lane; e < 4 * kOwnerThreads; e += 32) {
      const int candidate = rows[e];
      unsigned mask = __ballot_sync(~0u, candidate >= 0 && candidate % kOwners == warp);
      while (mask) {  // four loads are on their way before the first is waited for
        int to[4];
        A share[4];
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          to[u] = -1, share[u] = 0;
          if (mask == 0) continue;
          const int from = e - lane + __ffs(static_cast<int>(mask)) - 1;
          mask &= mask - 1;
          to[u] = rows[from];
          if (c < g.D) share[u] = weights[from] * A(incoming[queries[from % kOwnerThreads] * row_stride]);
        }
#pragma unroll
        for (int u = 0; u < 4; ++u)
          if (to[u] >= 0) sums[to[u] * 32 + lane] += share[u];
      }
    }
    first_query += (first_point + kOwnerThreads) / g.n;
    first_point = (first_point + kOwnerThreads) % g.n;
  }
  __syncthreads();
  if (c >= g.D) return;
  for (int i = warp; i < own_rows; i += kOwners)
    grad_value[(b * g.S + int64_t(i) * tiles + tile) * row_stride + m * g.D + c] = T(sums[i * 32 + lane]);
}

// ---- launches ------------------------------------------------------------------------------------------------------

template <typename T>
constexpr int kVector = 16 / sizeof(T);

template <typename T>
Value<T> value_of(const Tensor& value) {
  STD_TORCH_CHECK(value.stride(1) < INT32_MAX, "pixels of value must be less than 2^31 elements apart");
  return {value.const_data_ptr<T>(), value.stride(0), value.stride(2), static_cast<int32_t>(value.stride(1))};
}

// Whether rows of D channels, `strides` apart from `data`, can be read 16 bytes at a time.
template <typename T>
bool aligned(const T* data, int64_t D, std::initializer_list<int64_t> strides) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && D % kVector<T> == 0 &&
         std::all_of(strides.begin(), strides.end(), [](int64_t stride) { return stride % kVector<T> == 0; });
}

// `fours` as in Group::bytes.
template <typename A>
struct Plan {
  Split split;
  int64_t blocks, shared;

  Plan(const Geometry& g, int vector, int fours) {
    while (split.lanes < 32 && split.lanes * vector < g.D) split.lanes *= 2;
    const int64_t groups = kThreads / split.lanes, tiles = (g.Q + groups - 1) / groups;
    split.chunk = g.n;
    while (groups * Group<A>::bytes(split.chunk, fours) > kShared) split.chunk = (split.chunk + 1) / 2;
    blocks = g.B * g.M * tiles;
    shared = groups * Group<A>::bytes(split.chunk, fours);
    STD_TORCH_CHECK(blocks <= INT32_MAX, "ms_deform_attn: too many images, heads and queries");
    split.tiles = static_cast<unsigned>(tiles);
  }
};

// Calls f with the number of channels that a lane reads at once.
template <typename T, typename F>
void with_vector(bool vector, const F& f) {
  if (vector) return f(std::integral_constant<int, kVector<T>>{});
  f(std::integral_constant<int, 1>{});
}

Tensor run_forward(const Tensor& value, const std::vector<int64_t>& sizes, const Tensor* reference,
                   const Tensor& coordinates, const Tensor& weights) {
  check_value(value);
  Tensor out;
  dispatch(value, coordinates, [&](auto t, auto l) {
    using T = decltype(t);
    using A = acc_t<T>;
    using L = decltype(l);
    const auto in = read<A, L>(value, reference, coordinates, weights);
    const Geometry g(value, sizes, weights);
    const DeviceGuard guard(value.get_device_index());
    out = allocate(value, {g.B, g.Q, g.M * g.D});
    if (out.numel() == 0) return;
    const Value<T> maps = value_of<T>(value);
    with_vector<T>(aligned(maps.data, g.D, {maps.image, maps.head, maps.row}), [&](auto vector) {
      const Plan<A> plan(g, vector, 1);
      launch(forward_kernel<T, A, L, vector>, plan.blocks, kThreads, plan.shared, current_stream(value), g, maps, in,
             out.mutable_data_ptr<T>(), plan.split);
    });
  });
  return out;
}

template <typename T, typename A, typename L>
void launch_owners(const Geometry& g, const Inputs<A, L>& in, const T* grad, const A* normalisers, T* grad_value,
                   int64_t tiles, cudaStream_t stream) {
  const int64_t slices = (g.D + 31) / 32, blocks = g.B * g.M * slices * tiles;
  STD_TORCH_CHECK(blocks <= INT32_MAX, "ms_deform_attn_backward: too many images, heads and channels");
  const int64_t staged = kOwnerThreads * (4 * sizeof(A) + 5 * sizeof(int));
  const int64_t shared = staged + (g.S + tiles - 1) / tiles * 32 * sizeof(A);
  const auto kernel = grad_value_kernel<T, A, L>;
  permit_shared(kernel, shared);
  launch(kernel, blocks, kOwnerThreads, shared, stream, g, in, grad, normalisers, grad_value,
         static_cast<unsigned>(tiles), static_cast<unsigned>(slices));
}

Gradients4 run_backward(const Tensor& grad, const Tensor& value, const std::vector<int64_t>& sizes,
                        const Tensor* reference, const Tensor& coordinates, const Tensor& weights, bool deterministic) {
  check_value(value);
  Tensor grad_value, grad_reference, grad_coordinates, grad_weights;
  dispatch(value, coordinates, [&](auto t, auto l) {
    using T = decltype(t);
    using A = acc_t<T>;
    using L = decltype(l);
    constexpr auto wide = std::is_same_v<A, double> ? torch::headeronly::ScalarType::Double
                                                    : torch::headeronly::ScalarType::Float;
    const auto in = read<A, L>(value, reference, coordinates, weights);
    const Geometry g(value, sizes, weights);
    check_grad(grad, value, g.Q);
    const DeviceGuard guard(value.get_device_index());
    const cudaStream_t stream = current_stream(value);
    const int64_t tiles = (g.S * 32 * int64_t(sizeof(A)) + kTileBytes - 1) / kTileBytes;
    const bool atomics = !deterministic && tiles > kTilesBeforeAtomics;
    grad_coordinates = allocate(coordinates, coordinates.sizes());
    grad_weights = allocate(weights, weights.sizes());
    Tensor sums, shares, normalisers;
    if (atomics) {
      sums = torch::stable::new_zeros(value, value.sizes(), wide);
    } else {
      grad_value = allocate(value, value.sizes());
    }
    if (reference != nullptr) {
      shares = allocate(*reference, {g.B, g.M, g.Q, g.levels, in.reference_size});
      normalisers = allocate(*reference, {g.B, g.M, g.Q, 2});
    }
    const T* const incoming = grad.const_data_ptr<T>();
    const Gradients<A, L> to{atomics ? sums.mutable_data_ptr<A>() : nullptr, grad_coordinates.mutable_data_ptr<L>(),
                             grad_weights.mutable_data_ptr<L>(), reference ? shares.mutable_data_ptr<A>() : nullptr,
                             reference ? normalisers.mutable_data_ptr<A>() : nullptr};
    if (weights.numel() > 0) {
      const Value<T> maps = value_of<T>(value);
      const bool vector = aligned(maps.data, g.D, {maps.image, maps.head, maps.row}) && aligned(incoming, g.D, {});
      with_vector<T>(vector, [&](auto vector) {
        const Plan<A> plan(g, vector, 2);
        launch(backward_kernel<T, A, L, vector>, plan.blocks, kThreads, plan.shared, stream, g, maps, in, incoming, to,
               plan.split);
      });
    }
    if (!atomics && value.numel() > 0)
      launch_owners<T, A, L>(g, in, incoming, to.normalisers, grad_value.mutable_data_ptr<T>(), tiles, stream);
    if (atomics) {
      grad_value = std::is_same_v<T, A> ? sums : allocate(value, value.sizes());
      if (!std::is_same_v<T, A>) torch::stable::copy_(grad_value, sums);
    }
    if (reference != nullptr) {
      const int64_t heads = 1;
      grad_reference = torch::stable::sum(shares, torch::headeronly::IntHeaderOnlyArrayRef(&heads, 1));
    }
  });
  return {grad_value, grad_reference, grad_coordinates, grad_weights};
}

using Registered = Operators<run_forward, run_backward>;

}  // namespace
}  // namespace icf

ICF_CUDA_LIBRARY(m) { icf::Registered::add_to(m, "cuda"); }
