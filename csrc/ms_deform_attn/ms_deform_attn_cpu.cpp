// One thread owns one (image, head). It first copies the head's maps into a slice of its own, in the type computed in,
// with a border of zeros: every sample then reads its four corners without a test, rows of one head lie together in
// cache, 16-bit values are widened once, and any head size becomes a multiple of the vector width. The backward pass
// keeps the gradient of each row beside it, so it needs no atomics and gives the same bits at each run.
#include "common/pages.h"
#include "common/simd.h"
#include "ms_deform_attn/ms_deform_attn_args.h"
#include "ms_deform_attn/ms_deform_attn_library.h"
#include "ms_deform_attn/ms_deform_attn_math.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <tuple>
#include <utility>
#include <vector>

namespace icf {
namespace {

using namespace msda;
constexpr int64_t kChunk = 16;  // queries whose points are computed together, in lanes of n = L * P points a query
constexpr int64_t kVector = 8;  // channels of a slice are rounded up to it

template <typename A>
class Buffer {  // zeros, aligned to a cache line
 public:
  explicit Buffer(int64_t size) : data_(new (std::align_val_t{64}) A[size]()) {}
  A* get() const { return data_.get(); }

 private:
  struct Delete {
    void operator()(A* p) const { operator delete[](p, std::align_val_t{64}); }
  };
  std::unique_ptr<A[], Delete> data_;
};

struct Level {
  int64_t height, width, start;  // start: of the map in value
  int64_t first, pitch;          // rows of the slice: pixel (x, y) is row first + (y + 1) * pitch + x + 1
};

struct Geometry {
  int64_t B, S, M, D, Q, P, n, channels;  // channels: D rounded up
  int64_t rows = 0, outside = 0;          // of a slice; rows from `outside` on stay zero for any corner
  std::vector<Level> levels;

  // The right border of a line is the left border of the next: a line takes width + 1 rows.
  Geometry(const Tensor& value, const std::vector<int64_t>& sizes, const Tensor& weights)
      : B(value.size(0)), S(value.size(1)), M(value.size(2)), D(value.size(3)), Q(weights.size(1)), P(weights.size(4)),
        n(weights.size(3) * P), channels((D + kVector - 1) / kVector * kVector) {
    int64_t start = 0, widest = 0;
    for (size_t l = 0; l + 1 < sizes.size(); l += 2) {
      const int64_t height = sizes[l], width = sizes[l + 1];
      STD_TORCH_CHECK(height > 0 && width > 0 && height < INT32_MAX && width < INT32_MAX, "sizes must be positive");
      levels.push_back({height, width, start, rows, width + 1});
      start += height * width;
      rows += (height + 2) * (width + 1);
      widest = std::max(widest, width);
    }
    outside = rows;
    rows += widest + 3;
    STD_TORCH_CHECK(start == S && int64_t(levels.size()) == weights.size(3), "sizes must describe value");
    STD_TORCH_CHECK(rows < INT32_MAX, "value must have fewer than 2^31 pixels per image");
  }
};

// The points of a chunk of queries, one to a lane: kChunk * n of them.
template <typename A>
struct Lanes {
  Lanes(const Geometry& g, int64_t reference_size) : size(kChunk * g.n), numbers(26 * size), integers(9 * size) {
    A* next = numbers.get();
    for (A** array : {&width, &height, &scale_x, &scale_y, &cell_x, &cell_y, &base_x, &base_y, &raw_x, &raw_y, &weight,
                      &s, &t, &grad_x, &grad_y, &grad_weight})
      *array = std::exchange(next, next + size);
    corners = std::exchange(next, next + 4 * size), dots = std::exchange(next, next + 4 * size), staged = next;
    first = integers.get(), pitch = first + size, row = pitch + size, left = row + size, top = left + size;
    in_place = top + size;
    for (int64_t i = 0; i < size; ++i) {
      const Level& level = g.levels[i % g.n / g.P];
      width[i] = A(level.width), height[i] = A(level.height);
      scale_x[i] = reference_size ? A(1) : width[i], scale_y[i] = reference_size ? A(1) : height[i];
      first[i] = int32_t(level.first), pitch[i] = int32_t(level.pitch);
    }
  }

  int64_t size;
  Buffer<A> numbers;
  Buffer<int32_t> integers;
  A *width, *height;                       // of the level
  A *scale_x, *scale_y;                    // pixel = raw * scale + base + cell - 0.5
  A *cell_x, *cell_y, *base_x, *base_y;    // whole pixels, and less than one
  A *raw_x, *raw_y, *weight;               // coordinates as given; attention weight
  A *s, *t;                                // fractions
  A *grad_x, *grad_y, *grad_weight;        // with respect to pixels and attention weight
  A *corners, *dots;                       // [size, 4]: weights of the corners, attention weight included; their dot
                                           // products with the incoming gradient
  A *staged;                               // [size, 2]: on the way from and to tensors, in the type of these
  int32_t *first, *pitch, *row;            // row: of the corner with the smallest x and y, which is at (left, top)
  int32_t *left, *top, *in_place;          // in_place: [size, 4], rows of value for all corners, -1 outside
};

// What compilers would turn into a call of memcpy, which costs more than the few numbers of a query.
template <typename T>
ICF_INLINE void copy(const T* from, T* to, int64_t n) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) std::memcpy(to + i, from + i, 4 * sizeof(T));
  for (; i < n; ++i) std::memcpy(to + i, from + i, sizeof(T));
}

// Asks for rows of n, `stride` apart, before they are needed: one head's part of a query is too short for the hardware
// to foresee the next.
template <typename T>
ICF_INLINE void prefetch(const T* rows, int64_t stride, int64_t count, int64_t n) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t k = 0; k < count; ++k, rows += stride) {
    for (int64_t i = 0; i < n; i += line) ICF_PREFETCH(rows + i);
    ICF_PREFETCH(rows + n - 1);
  }
}

template <typename A>
ICF_INLINE void fill(A value, A* to, int64_t n) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int j = 0; j < 4; ++j) to[i + j] = value;
  for (; i < n; ++i) to[i] = value;
}

// exp for arguments up to 0, within 1 ulp, in a form that compilers vectorise; 0 below -87.
ICF_INLINE float exp_of_nonpositive(float x) {
  const float shifted = x * 1.44269504f + 12582912.f;  // rounds to an integer, which the low bits hold
  const float k = shifted - 12582912.f;
  const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = (1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f;
  p = (((((p * r + 4.1665795894e-2f) * r + 1.6666665459e-1f) * r + 5.0000001201e-1f) * r) + 1.f) * r + 1.f;
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = int32_t(uint32_t(bits + 127) << 23);
  float power;
  std::memcpy(&power, &bits, 4);
  return x < -87.f ? 0.f : p * power;
}
ICF_INLINE double exp_of_nonpositive(double x) { return std::exp(x); }

// In place. The exponentials of all queries are taken in one loop, as n is no multiple of the vector width.
template <typename A>
ICF_SIMD void softmax(A* logits, int64_t queries, int64_t n) {
  for (int64_t q = 0; q < queries; ++q) {
    A* a = logits + q * n;
    A largest = a[0];
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < n; ++i) largest = a[i] > largest ? a[i] : largest;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) a[i] -= largest;
  }
#pragma omp simd
  for (int64_t i = 0; i < queries * n; ++i) logits[i] = exp_of_nonpositive(logits[i]);
  for (int64_t q = 0; q < queries; ++q) {
    A* a = logits + q * n;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += a[i];
    const A inverse = 1 / sum;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) a[i] *= inverse;
  }
}

// Reads the points of queries [q, q + count) of one head into the lanes.
template <typename A, typename L>
ICF_SIMD void read_points(const Inputs<A, L>& in, const Geometry& g, int64_t b, int64_t q, int64_t m, int64_t count,
                          const Lanes<A>& lane) {
  const int64_t total = count * g.n, next = std::clamp<int64_t>(g.Q - q - count, 0, kChunk);
  L* staged = reinterpret_cast<L*>(lane.staged);
  const L* coordinates = in.coordinates + b * in.coordinates_b + q * in.coordinates_q + m * g.n * 2;
  prefetch(coordinates + count * in.coordinates_q, in.coordinates_q, next, 2 * g.n);
  for (int64_t k = 0; k < count; ++k) copy(coordinates + k * in.coordinates_q, staged + 2 * k * g.n, 2 * g.n);
#pragma omp simd
  for (int64_t i = 0; i < total; ++i) {
    lane.raw_x[i] = A(staged[2 * i]);
    lane.raw_y[i] = A(staged[2 * i + 1]);
  }
  const L* weights = in.weights + b * in.weights_b + q * in.weights_q + m * g.n;
  prefetch(weights + count * in.weights_q, in.weights_q, next, g.n);
  for (int64_t k = 0; k < count; ++k) copy(weights + k * in.weights_q, staged + k * g.n, g.n);
#pragma omp simd
  for (int64_t i = 0; i < total; ++i) lane.weight[i] = A(staged[i]);
}

// The axes of the points of queries [q, q + count).
template <typename A, typename L>
ICF_SIMD void read_reference(const Inputs<A, L>& in, const Geometry& g, int64_t b, int64_t q, int64_t count,
                             const Lanes<A>& lane) {
  const bool box = in.reference_size == 4;
  const A P = A(g.P);
  for (int64_t k = 0, i = 0; k < count; ++k) {
    const A* reference = in.reference + b * in.reference_b + (q + k) * in.reference_q;
    for (const Level& level : g.levels) {
      const A width = A(level.width), height = A(level.height);
      const Axis<A> x = axis_of_offset(width, reference[0], box ? box_scale(width, reference[2], P) : A(1));
      const Axis<A> y = axis_of_offset(height, reference[1], box ? box_scale(height, reference[3], P) : A(1));
      fill(x.base, lane.base_x + i, g.P), fill(x.cell, lane.cell_x + i, g.P);
      fill(y.base, lane.base_y + i, g.P), fill(y.cell, lane.cell_y + i, g.P);
      if (box) fill(x.scale, lane.scale_x + i, g.P), fill(y.scale, lane.scale_y + i, g.P);
      reference += in.reference_l, i += g.P;
    }
  }
}

// Corners and their weights. What touches no pixel, or is not a number, goes to rows of zeros. This order
// of statements vectorises; a test of float32's accuracy fails where it does not.
template <typename A>
ICF_SIMD void locate(const Lanes<A>& lane, int64_t count, int32_t outside) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const A floor_x = whole_pixel(lane.raw_x[i], lane.scale_x[i], lane.base_x[i]);
    const A floor_y = whole_pixel(lane.raw_y[i], lane.scale_y[i], lane.base_y[i]);
    A left = floor_x + lane.cell_x[i], top = floor_y + lane.cell_y[i];
    const bool touches = touches_map(left, lane.width[i]) & touches_map(top, lane.height[i]);
    A s = fraction_of_pixel(lane.raw_x[i], lane.scale_x[i], lane.base_x[i], floor_x);
    A t = fraction_of_pixel(lane.raw_y[i], lane.scale_y[i], lane.base_y[i], floor_y);
    left = touches ? left : A(0), top = touches ? top : A(0);
    s = touches ? s : A(0), t = touches ? t : A(0);
    const A a = lane.weight[i];
    const int32_t row = lane.first[i] + (int32_t(top) + 1) * lane.pitch[i] + int32_t(left) + 1;
    lane.row[i] = touches ? row : outside, lane.left[i] = int32_t(left), lane.top[i] = int32_t(top);
    lane.s[i] = s, lane.t[i] = t;
    A* w = lane.corners + 4 * i;
    corner_weights(s, t, a, w[0], w[1], w[2], w[3]);
  }
}

// Sums over n points of the weighted corners: C channels from `value` on, of rows of `channels`, which are C where ALL
// says so.
template <int BYTES, int C, bool ALL, typename A>
ICF_INLINE void gather(const A* value, const Lanes<A>& lane, int64_t channels, int64_t begin, int64_t n, A* out) {
  constexpr int64_t lanes = BYTES / sizeof(A), V = C / lanes;
  const int64_t stride = ALL ? C : channels;
  Vec<A, BYTES> top[V] = {}, bottom[V] = {};
  for (int64_t i = begin; i < begin + n; ++i) {
    const A* v0 = value + int64_t(lane.row[i]) * stride;
    const A* v2 = v0 + int64_t(lane.pitch[i]) * stride;
    const A* w = lane.corners + 4 * i;
#pragma GCC unroll 8
    for (int64_t j = 0; j < V; ++j) {
      top[j] += w[0] * load<BYTES>(v0 + j * lanes);
      bottom[j] += w[2] * load<BYTES>(v2 + j * lanes);
      top[j] += w[1] * load<BYTES>(v0 + j * lanes + stride);
      bottom[j] += w[3] * load<BYTES>(v2 + j * lanes + stride);
    }
  }
#pragma GCC unroll 8
  for (int64_t j = 0; j < V; ++j) store(out + j * lanes, top[j] + bottom[j]);
}

struct Gather {
  template <int BYTES, typename A>
  static ICF_INLINE void run(const A* value, const Lanes<A>& lane, const Geometry& g, int64_t count, A* out) {
    constexpr int kRest = std::min<int>(BYTES, kVector * sizeof(A));
    for (int64_t k = 0; k < count; ++k, out += g.channels) {
      int64_t c = g.channels == 32 ? 32 : 0;
      if (c) gather<BYTES, 32, true>(value, lane, g.channels, k * g.n, g.n, out);
      for (; c + 32 <= g.channels; c += 32)
        gather<BYTES, 32, false>(value + c, lane, g.channels, k * g.n, g.n, out + c);
      for (; c < g.channels; c += kVector)
        gather<kRest, kVector, false>(value + c, lane, g.channels, k * g.n, g.n, out + c);
    }
  }
};

// Few points of large maps are sampled where value lies, its rows `stride` apart. Finds the rows of n points and asks for
// them, long before they are needed.
template <typename T, typename A>
ICF_SIMD void find_in_place(const T* value, int64_t stride, const Lanes<A>& lane, const Geometry& g, int64_t begin,
                            int64_t n) {
  for (int64_t i = begin; i < begin + n; ++i) {
    const Level& level = g.levels[i % g.n / g.P];
    int32_t* rows = lane.in_place + 4 * i;
    corner_rows(true, lane.left[i], lane.top[i], int32_t(level.width), int32_t(level.height), int32_t(level.start), rows);
    for (int k = 0; k < 4; ++k) {
      rows[k] = lane.row[i] < g.outside ? rows[k] : -1;
      if (rows[k] >= 0) prefetch(value + rows[k] * stride, stride, 1, g.D);
    }
  }
}

// zeros: a row of them.
template <typename T, typename A>
ICF_SIMD void gather_in_place(const T* value, int64_t stride, const T* zeros, const Lanes<A>& lane, const Geometry& g,
                              int64_t count, A* out) {
  find_in_place(value, stride, lane, g, 0, g.n);
  for (int64_t k = 0; k < count; ++k, out += g.channels) {
    if (k + 1 < count) find_in_place(value, stride, lane, g, (k + 1) * g.n, g.n);
    std::fill(out, out + g.D, A(0));
    for (int64_t i = k * g.n; i < (k + 1) * g.n; ++i) {
      const T* v[4];
      for (int c = 0; c < 4; ++c) {
        const int32_t row = lane.in_place[4 * i + c];
        v[c] = row < 0 ? zeros : value + row * stride;
      }
      const A* w = lane.corners + 4 * i;
#pragma omp simd
      for (int64_t c = 0; c < g.D; ++c) {
        const A top = w[0] * A(v[0][c]) + w[1] * A(v[1][c]), bottom = w[2] * A(v[2][c]) + w[3] * A(v[3][c]);
        out[c] += top + bottom;
      }
    }
  }
}

// The sums of the numbers in each of four vectors.
template <typename A, int BYTES>
ICF_INLINE Vec<A, 4 * sizeof(A)> sums_of(const Vec<A, BYTES> (&p)[4]) {
  if constexpr (BYTES > 16) {
    Vec<A, BYTES / 2> half[4];
    for (int k = 0; k < 4; ++k) {
      Vec<A, BYTES / 2> both[2];
      std::memcpy(both, &p[k], sizeof both);
      half[k] = both[0] + both[1];
    }
    return sums_of<A, BYTES / 2>(half);
  } else if constexpr (sizeof(A) == 8) {
    return Vec<A, 32>{p[0][0] + p[0][1], p[1][0] + p[1][1], p[2][0] + p[2][1], p[3][0] + p[3][1]};
  } else {
#if defined(__clang__)
#define ICF_PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ICF_PICK(a, b, ...) __builtin_shuffle(a, b, Vec<int32_t, 16>{__VA_ARGS__})
#endif
    const Vec<A, 16> a = ICF_PICK(p[0], p[1], 0, 4, 1, 5) + ICF_PICK(p[0], p[1], 2, 6, 3, 7);
    const Vec<A, 16> b = ICF_PICK(p[2], p[3], 0, 4, 1, 5) + ICF_PICK(p[2], p[3], 2, 6, 3, 7);
    return ICF_PICK(a, b, 0, 1, 4, 5) + ICF_PICK(a, b, 2, 3, 6, 7);
#undef ICF_PICK
  }
}

// Adds the corners' shares of `grad` to the gradients beside the values, and the dot products of `grad` with the values
// to lane.dots. Rows hold `channels` values, then as many gradients.
template <int BYTES, int C, bool ALL, typename A>
ICF_INLINE void scatter(A* slice, const A* grad, const Lanes<A>& lane, int64_t channels, int64_t begin, int64_t n) {
  constexpr int64_t lanes = BYTES / sizeof(A), V = C / lanes;
  const int64_t beside = ALL ? C : channels, stride = 2 * beside;
  Vec<A, BYTES> g[V];
  for (int64_t j = 0; j < V; ++j) g[j] = load<BYTES>(grad + j * lanes);
  for (int64_t i = begin; i < begin + n; ++i) {
    A *top = slice + int64_t(lane.row[i]) * stride, *bottom = top + int64_t(lane.pitch[i]) * stride;
    A *corners[4] = {top, top + stride, bottom, bottom + stride}, *dots = lane.dots + 4 * i;
    Vec<A, BYTES> p[4] = {};
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const A w = lane.corners[4 * i + k];
#pragma GCC unroll 8
      for (int64_t j = 0; j < V; ++j) {
        A* corner = corners[k] + j * lanes;
        p[k] += g[j] * load<BYTES>(corner);
        store(corner + beside, load<BYTES>(corner + beside) + w * g[j]);
      }
    }
    store(dots, load<4 * sizeof(A)>(dots) + sums_of<A, BYTES>(p));
  }
}

struct Scatter {
  template <int BYTES, typename A>
  static ICF_INLINE void run(A* slice, const A* grad, const Lanes<A>& lane, const Geometry& g, int64_t count) {
    std::fill(lane.dots, lane.dots + 4 * count * g.n, A(0));
    constexpr int kRest = std::min<int>(BYTES, kVector * sizeof(A));
    for (int64_t k = 0; k < count; ++k, grad += g.channels) {
      int64_t c = g.channels == 32 ? 32 : 0;
      if (c) scatter<BYTES, 32, true>(slice, grad, lane, g.channels, k * g.n, g.n);
      for (; c + 32 <= g.channels; c += 32)
        scatter<BYTES, 32, false>(slice + c, grad + c, lane, g.channels, k * g.n, g.n);
      for (; c < g.channels; c += kVector)
        scatter<kRest, kVector, false>(slice + c, grad + c, lane, g.channels, k * g.n, g.n);
    }
  }
};

// As Scatter, with value and its gradient where they lie; these have rows `stride` and `grad_stride` apart.
template <typename A>
ICF_SIMD void scatter_in_place(const A* value, int64_t stride, A* grad_value, int64_t grad_stride, const A* grad,
                               const Lanes<A>& lane, const Geometry& g, int64_t count) {
  find_in_place(value, stride, lane, g, 0, g.n);
  for (int64_t k = 0; k < count; ++k, grad += g.channels) {
    if (k + 1 < count) find_in_place(value, stride, lane, g, (k + 1) * g.n, g.n);
    for (int64_t i = 4 * k * g.n; i < 4 * (k + 1) * g.n; ++i) {
      A dot = 0;
      if (lane.in_place[i] >= 0) {
        const A* v = value + lane.in_place[i] * stride;
        A *to = grad_value + lane.in_place[i] * grad_stride, w = lane.corners[i];
#pragma omp simd reduction(+ : dot)
        for (int64_t c = 0; c < g.D; ++c) {
          dot += grad[c] * v[c];
          to[c] += w * grad[c];
        }
      }
      lane.dots[i] = dot;
    }
  }
}

// From the dot products to the gradients of the coordinates as given and of the weights.
template <typename A>
ICF_SIMD void differentiate(const Lanes<A>& lane, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const A* d = lane.dots + 4 * i;
    sample_gradient(d[0], d[1], d[2], d[3], lane.s[i], lane.t[i], lane.weight[i], lane.grad_x[i], lane.grad_y[i],
                    lane.grad_weight[i]);
  }
}

// Replaces the gradients of the weights by those of the logits.
template <typename A>
ICF_SIMD void softmax_backward(const A* weights, A* grads, int64_t queries, int64_t n) {
  for (int64_t q = 0; q < queries; ++q, weights += n, grads += n) {
    A mean = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t i = 0; i < n; ++i) mean += weights[i] * grads[i];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) grads[i] = logit_gradient(weights[i], grads[i], mean);
  }
}

// The head's maps of an image into a slice whose borders are zero already, of rows of `width`.
template <typename T, typename A>
ICF_SIMD void pack(const T* value, int64_t stride, const Geometry& g, A* slice, int64_t width) {
  for (const Level& level : g.levels)
    for (int64_t y = 0; y < level.height; ++y) {
      const T* from = value + (level.start + y * level.width) * stride;
      A* to = slice + (level.first + (y + 1) * level.pitch + 1) * width;
      if (y + 1 < level.height) prefetch(from + level.width * stride, stride, level.width, g.D);
      for (int64_t x = 0; x < level.width; ++x, from += stride, to += width)
#pragma omp simd
        for (int64_t c = 0; c < g.D; ++c) to[c] = A(from[c]);
    }
}

// The way back for gradients, [S, D] of rows `stride` apart, from behind the values; there they become zeros again.
template <typename T, typename A>
ICF_SIMD void unpack(A* slice, const Geometry& g, int64_t stride, T* value) {
  for (const Level& level : g.levels)
    for (int64_t y = 0; y < level.height; ++y) {
      A* from = slice + (level.first + (y + 1) * level.pitch + 1) * 2 * g.channels + g.channels;
      T* to = value + (level.start + y * level.width) * stride;
      for (int64_t x = 0; x < level.width; ++x, from += 2 * g.channels, to += stride) {
#pragma omp simd
        for (int64_t c = 0; c < g.D; ++c) to[c] = round_to<T>(from[c]);
        std::fill(from, from + g.channels, A(0));
      }
    }
}

// Adds to `row` those that follow it, `size` apart.
template <typename A>
ICF_SIMD void add_parts(A* row, int64_t size, int64_t parts, int64_t width) {
  for (int64_t p = 1; p < parts; ++p)
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) row[c] += row[p * size + c];
}

// Rows of D, `stride` apart, to or from rows of `channels`; one of the types is what is computed in.
template <typename From, typename To>
ICF_SIMD void copy_rows(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t rows, int64_t D) {
  for (int64_t r = 0; r < rows; ++r, from += from_stride, to += to_stride)
#pragma omp simd
    for (int64_t c = 0; c < D; ++c) to[c] = round_to<To>(acc_t<To>(from[c]));
}

// The lanes' gradients of one head into the tensors. [B, Q, M, n, 2] and [B, Q, M, n].
template <typename A, typename L>
ICF_SIMD void write_gradients(const Lanes<A>& lane, const Geometry& g, int64_t count, L* grad_coordinates,
                              L* grad_weights) {
  const int64_t total = count * g.n;
  L* staged = reinterpret_cast<L*>(lane.staged);
#pragma omp simd
  for (int64_t i = 0; i < total; ++i) {
    staged[2 * i] = round_to<L>(lane.grad_x[i] * lane.scale_x[i]);
    staged[2 * i + 1] = round_to<L>(lane.grad_y[i] * lane.scale_y[i]);
  }
  for (int64_t k = 0; k < count; ++k) copy(staged + 2 * k * g.n, grad_coordinates + k * g.M * g.n * 2, 2 * g.n);
#pragma omp simd
  for (int64_t i = 0; i < total; ++i) staged[i] = round_to<L>(lane.grad_weight[i]);
  for (int64_t k = 0; k < count; ++k) copy(staged + k * g.n, grad_weights + k * g.M * g.n, g.n);
}

// One head's share of the gradient of the reference points of `count` queries, [.., levels, 2 or 4].
template <typename A>
void reduce_reference(const Lanes<A>& lane, const Geometry& g, int64_t count, int64_t size, A* grad) {
  for (int64_t i = 0; i < count * g.n; grad += size) {
    A sum[4] = {};
    const A width = lane.width[i], height = lane.height[i];
    for (int64_t p = 0; p < g.P; ++p, ++i) {
      sum[0] += lane.grad_x[i], sum[1] += lane.grad_y[i];
      sum[2] += lane.grad_x[i] * lane.raw_x[i], sum[3] += lane.grad_y[i] * lane.raw_y[i];
    }
    grad[0] = sum[0] * width, grad[1] = sum[1] * height;
    if (size == 4) grad[2] = sum[2] * width * (A(0.5) / g.P), grad[3] = sum[3] * height * (A(0.5) / g.P);
  }
}

template <typename A, typename L>
void locate(const Inputs<A, L>& in, const Geometry& g, int64_t b, int64_t q, int64_t m, int64_t count,
            const Lanes<A>& lane) {
  read_points(in, g, b, q, m, count, lane);
  if (in.reference != nullptr) {
    read_reference(in, g, b, q, count, lane);
    softmax(lane.weight, count, g.n);
  }
  locate(lane, count * g.n, int32_t(g.outside));
}

// Their four rows each are fewer than twice the rows of a slice.
bool few_points(const Geometry& g) { return 2 * g.Q * g.n < g.S; }

template <typename T, typename A, typename L>
void forward_all(const Tensor& value, const Geometry& g, const Inputs<A, L>& in, T* out) {
  // With few heads and many threads, several threads work on the queries of one head, each with its own slice.
  const int64_t heads = g.B * g.M, threads = torch::stable::get_num_threads();
  const int64_t parts = std::clamp<int64_t>(2 * threads / heads, 1, std::max<int64_t>(g.Q / 256, 1));
  const int64_t step = (g.Q + parts - 1) / parts;
  const bool in_place = few_points(g);
  const T* data = value.const_data_ptr<T>();
  torch::stable::parallel_for(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
    const Lanes<A> lane(g, in.reference_size);
    const Buffer<A> slice(in_place ? 0 : g.rows * g.channels), sums(kChunk * g.channels);
    const Buffer<T> zeros(in_place ? g.D : 0);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / parts / g.M, m = unit / parts % g.M, first = unit % parts * step;
      const T* own = data + b * value.stride(0) + m * value.stride(2);
      if (!in_place && (unit == begin || unit % parts == 0)) pack(own, value.stride(1), g, slice.get(), g.channels);
      for (int64_t q = first; q < std::min(first + step, g.Q); q += kChunk) {
        const int64_t count = std::min({kChunk, first + step - q, g.Q - q});
        locate(in, g, b, q, m, count, lane);
        if (in_place) {
          gather_in_place(own, value.stride(1), zeros.get(), lane, g, count, sums.get());
        } else {
          at_level<Gather>(slice.get(), lane, g, count, sums.get());
        }
        copy_rows(sums.get(), g.channels, out + ((b * g.Q + q) * g.M + m) * g.D, g.M * g.D, count, g.D);
      }
    }
  });
}

template <typename T, typename A, typename L>
void backward_all(const T* grad, const Tensor& value, const Geometry& g, const Inputs<A, L>& in, T* grad_value,
                  L* grad_coordinates, L* grad_weights, A* grad_reference, bool deterministic) {
  const int64_t row = g.M * g.D, levels = int64_t(g.levels.size());
  const int64_t reference_row = levels * in.reference_size;
  const Buffer<A> shares(g.B * g.M * g.Q * reference_row);  // of the heads, [B, M, Q, levels, 2 or 4]
  const T* data = value.const_data_ptr<T>();
  // With fewer heads than threads, several threads work on the queries of one head, each with its own slice; these are
  // added up in order, so the bits depend on the number of threads, unless determinism is asked for.
  const bool in_place = std::is_same_v<T, A> && few_points(g);  // sums of 16-bit numbers need a wider slice
  const int64_t heads = g.B * g.M, most = deterministic || in_place ? 1 : std::max<int64_t>(g.Q / 256, 1);
  const int64_t parts = std::clamp<int64_t>(torch::stable::get_num_threads() / std::max<int64_t>(heads, 1), 1, most);
  const int64_t step = (g.Q + parts - 1) / parts, size = g.rows * 2 * g.channels;
  const Buffer<A> shared(parts > 1 ? heads * parts * size : 0);
  if (in_place) {
    torch::stable::parallel_for(0, g.B * g.S, 256, [&](int64_t begin, int64_t end) {
      std::fill(grad_value + begin * row, grad_value + end * row, T(0));
    });
  }
  torch::stable::parallel_for(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
    const Lanes<A> lane(g, in.reference_size);
    const Buffer<A> own(parts > 1 || in_place ? 0 : size), grads(kChunk * g.channels);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit / parts, b = head / g.M, m = head % g.M, first = unit % parts * step;
      const int64_t last = std::min(first + step, g.Q);
      A* slice = parts > 1 ? shared.get() + unit * size : own.get();
      const T* from = data + b * value.stride(0) + m * value.stride(2);
      T* to = grad_value + b * g.S * row + m * g.D;
      if (!in_place) pack(from, value.stride(1), g, slice, 2 * g.channels);
      for (int64_t q = first; q < last; q += kChunk) {
        const int64_t count = std::min(kChunk, last - q), query = (b * g.Q + q) * g.M + m;
        locate(in, g, b, q, m, count, lane);
        prefetch(grad + (query + count * g.M) * g.D, row, std::clamp<int64_t>(last - q - count, 0, kChunk), g.D);
        copy_rows(grad + query * g.D, row, grads.get(), g.channels, count, g.D);
        prefetch(grad_coordinates + query * g.n * 2, g.M * g.n * 2, count, g.n * 2);
        prefetch(grad_weights + query * g.n, g.M * g.n, count, g.n);
        if constexpr (std::is_same_v<T, A>) {
          if (in_place) scatter_in_place(from, value.stride(1), to, row, grads.get(), lane, g, count);
        }
        if (!in_place) at_level<Scatter>(slice, grads.get(), lane, g, count);
        differentiate(lane, count * g.n);
        if (in.reference != nullptr) {
          softmax_backward(lane.weight, lane.grad_weight, count, g.n);
          reduce_reference(lane, g, count, in.reference_size, shares.get() + (head * g.Q + q) * reference_row);
        }
        write_gradients(lane, g, count, grad_coordinates + query * g.n * 2, grad_weights + query * g.n);
      }
      if (parts == 1 && !in_place) unpack(slice, g, row, to);
    }
  });
  if (parts > 1) {
    torch::stable::parallel_for(0, heads * g.rows, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        add_parts(shared.get() + i / g.rows * parts * size + i % g.rows * 2 * g.channels, size, parts, 2 * g.channels);
    });
    torch::stable::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        unpack(shared.get() + i * parts * size, g, row, grad_value + i / g.M * g.S * row + i % g.M * g.D);
    });
  }
  torch::stable::parallel_for(0, g.B * g.Q, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * reference_row; i < end * reference_row; ++i) {
      const int64_t b = i / (g.Q * reference_row), within = i % (g.Q * reference_row);
      A sum = 0;
      for (int64_t m = 0; m < g.M; ++m) sum += shares.get()[(b * g.M + m) * g.Q * reference_row + within];
      grad_reference[i] = sum;
    }
  });
}

Tensor run_forward(const Tensor& value, const std::vector<int64_t>& sizes, const Tensor* reference,
                   const Tensor& coordinates, const Tensor& weights) {
  check_value(value);
  Tensor out;
  dispatch(value, coordinates, [&](auto t, auto l) {
    using T = decltype(t);
    const auto in = read<acc_t<T>, decltype(l)>(value, reference, coordinates, weights);
    const Geometry g(value, sizes, weights);
    out = allocate(value, {g.B, g.Q, g.M * g.D});
    prefer_huge_pages(out);
    if (out.numel() > 0) forward_all(value, g, in, out.mutable_data_ptr<T>());
  });
  return out;
}

Gradients4 run_backward(const Tensor& grad, const Tensor& value, const std::vector<int64_t>& sizes,
                        const Tensor* reference, const Tensor& coordinates, const Tensor& weights, bool deterministic) {
  check_value(value);
  Tensor grad_value, grad_reference, grad_coordinates, grad_weights;
  dispatch(value, coordinates, [&](auto t, auto l) {
    using T = decltype(t);
    using A = acc_t<T>;
    using L = decltype(l);
    const auto in = read<A, L>(value, reference, coordinates, weights);
    const Geometry g(value, sizes, weights);
    check_grad(grad, value, g.Q);
    grad_value = allocate(value, value.sizes());
    grad_coordinates = allocate(coordinates, coordinates.sizes());
    grad_weights = allocate(weights, weights.sizes());
    for (const Tensor& t : {grad_value, grad_coordinates, grad_weights}) prefer_huge_pages(t);
    A* reference_data = nullptr;
    if (reference != nullptr) {
      grad_reference = allocate(*reference, reference->sizes());
      reference_data = grad_reference.mutable_data_ptr<A>();
    }
    backward_all(grad.const_data_ptr<T>(), value, g, in, grad_value.mutable_data_ptr<T>(),
                 grad_coordinates.mutable_data_ptr<L>(), grad_weights.mutable_data_ptr<L>(), reference_data, deterministic);
  });
  return {grad_value, grad_reference, grad_coordinates, grad_weights};
}

using Registered = Operators<run_forward, run_backward>;

}  // namespace
}  // namespace icf

STABLE_TORCH_LIBRARY_IMPL(icf, CPU, m) { icf::Registered::add_to(m, "cpp"); }
