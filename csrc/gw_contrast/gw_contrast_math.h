// The arithmetic of one pair: scaling, one-sided Jacobi, spectral weights. V is a number, or on the host a vector of
// them (GCC's vector extension) with one pair per lane; the CUDA kernels and the CPU's run this same text.
#pragma once
#include "common/inline.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__CUDACC__)
#define ICF_UNROLL _Pragma("unroll")  // registers are not indexed: a kernel's loops over a matrix have to unroll
#define ICF_ROLLED _Pragma("unroll 1")
#else
#define ICF_UNROLL
#define ICF_ROLLED
#endif

namespace icf::gw {

enum class Spectral { plain, smooth, entropic };

template <typename V, typename = void>
struct Lane {
  using type = std::remove_cv_t<std::remove_reference_t<decltype(std::declval<V&>()[0])>>;
};
template <typename V>
struct Lane<V, std::enable_if_t<std::is_arithmetic_v<V>>> {
  using type = V;
};
template <typename V>
using lane_t = typename Lane<V>::type;
template <typename V>
constexpr int kLanes = sizeof(V) / sizeof(lane_t<V>);
template <typename V>
constexpr lane_t<V> kEpsilon = std::is_same_v<lane_t<V>, double> ? lane_t<V>(2.220446049250313e-16) : lane_t<V>(1.1920929e-7);
constexpr int kSweeps = 30;  // three times what matrices of order 63 take

template <typename V>
ICF_INLINE V square_root(const V& x) {
  if constexpr (std::is_arithmetic_v<V>) {
    return sqrt(x);
  } else {
    V root;
    for (int l = 0; l < kLanes<V>; ++l) root[l] = std::sqrt(x[l]);
    return root;
  }
}

template <typename V>
ICF_INLINE V log_1p(const V& x) {
  if constexpr (std::is_arithmetic_v<V>) {
    return log1p(x);
  } else {
    V result;
    for (int l = 0; l < kLanes<V>; ++l) result[l] = std::log1p(x[l]);
    return result;
  }
}

template <typename M>
ICF_INLINE bool any(const M& mask) {
  if constexpr (std::is_arithmetic_v<M>) {
    return mask;
  } else {
    lane_t<M> all = 0;
    for (int l = 0; l < kLanes<M>; ++l) all |= mask[l];
    return all != 0;
  }
}

template <typename V>
ICF_INLINE V magnitude(const V& x) {
  return x < 0 ? -x : x;
}

// 2^-floor(log2 x) for x >= 0, kept in the normal range: what brings x into [1, 2) without rounding.
template <typename V>
ICF_INLINE V inverse_power_of_two(const V& x) {
  using S = lane_t<V>;
  using Int = std::conditional_t<std::is_same_v<S, double>, int64_t, int32_t>;
  constexpr int kMantissa = std::is_same_v<S, double> ? 52 : 23;
  constexpr Int kTop = std::is_same_v<S, double> ? 2046 : 254;
  if constexpr (std::is_arithmetic_v<V>) {
    Int bits;
    memcpy(&bits, &x, sizeof x);
    const Int exponent = bits >> kMantissa;
    bits = (kTop - (exponent < 1 ? 1 : exponent > kTop - 1 ? kTop - 1 : exponent)) << kMantissa;
    V scale;
    memcpy(&scale, &bits, sizeof x);
    return scale;
  } else {
    V scale;
    for (int l = 0; l < kLanes<V>; ++l) scale[l] = inverse_power_of_two<S>(x[l]);
    return scale;
  }
}

// The tournament: in each of `players - 1` rounds (players even), `players / 2` disjoint pairs; after all of them each two
// have met once. Rotations of one round do not depend on one another.
ICF_INLINE void tournament_pair(int round, int table, int players, int& p, int& q) {
  const int ring = players - 1;
  p = (round + table) % ring;
  q = table == 0 ? ring : (round - table + ring) % ring;
  if (p > q) {
    const int swap = p;
    p = q;
    q = swap;
  }
}

// The square of |g| / sqrt(a b) below which two columns count as orthogonal: what rounding leaves of a sum of `rows`.
template <typename V>
ICF_INLINE lane_t<V> orthogonal(int rows) {
  using S = lane_t<V>;
  return kEpsilon<V> * kEpsilon<V> * (rows > 16 ? S(rows) / 4 : S(4));
}

// The plane rotation that makes two columns orthogonal, from their squared norms a, b and product g: its tangent, sine,
// and the sine's share tau = sine / (1 + cosine). Columns are scaled so that the largest is near 1: one below
// an epsilon of that is rounding error, and counts as orthogonal to all others.
template <typename V>
ICF_INLINE auto rotation(const V& a, const V& b, const V& g, lane_t<V> tolerance, V& tangent, V& sine, V& tau) {
  using S = lane_t<V>;
  const V zero = V{}, one = zero + S(1), never = zero + std::numeric_limits<S>::max();
  const V less = a < b ? a : b;
  const auto turn = g * g > (less > kEpsilon<V> * kEpsilon<V> ? tolerance * a * b : never);
  const V difference = b - a;
  const V root = square_root<V>(difference * difference + 4 * g * g);
  const V divisor = difference < 0 ? difference - root : difference + root;
  tangent = turn ? 2 * g / (turn ? divisor : one) : zero;
  const V secant = square_root<V>(one + tangent * tangent);
  sine = tangent / secant;
  tau = tangent / (one + secant);
  return turn;
}

// The rotation that makes two columns orthogonal; their squared norms follow it.
template <int ROWS, typename V>
ICF_INLINE auto angle(const V* x, const V* y, int rows, lane_t<V> tolerance, V& x_norm, V& y_norm, V& sine, V& tau) {
  V g = V{}, tangent;
  ICF_UNROLL
  for (int r = 0; r < (ROWS ? ROWS : rows); ++r) g += x[r] * y[r];
  const auto turning = rotation<V>(x_norm, y_norm, g, tolerance, tangent, sine, tau);
  x_norm -= tangent * g;
  y_norm += tangent * g;
  return turning;
}

// (cosine x - sine y, sine x + cosine y), by what is to be added: a small angle then leaves the norms as they are, where
// the cosine would be rounded to 1.
template <int ROWS, typename V>
ICF_INLINE void turn(V* x, V* y, int rows, const V& sine, const V& tau) {
  ICF_UNROLL
  for (int r = 0; r < (ROWS ? ROWS : rows); ++r) {
    const V old = x[r];
    x[r] -= sine * (y[r] + tau * old);
    y[r] += sine * (old - tau * y[r]);
  }
}

template <int SIZE, typename V>
ICF_INLINE void move_on(V* columns, int size, int count) {
  ICF_UNROLL
  for (int r = 0; r < (SIZE ? SIZE : size); ++r) {
    const V first = columns[r];
    ICF_UNROLL
    for (int c = 0; c + 1 < count; ++c) columns[c * size + r] = columns[(c + 1) * size + r];
    columns[(count - 1) * size + r] = first;
  }
}

template <int ROWS, typename V>
ICF_INLINE V squared_norm(const V* column, int rows) {
  V sum = V{};
  ICF_UNROLL
  for (int r = 0; r < (ROWS ? ROWS : rows); ++r) sum += column[r] * column[r];
  return sum;
}

// One-sided Jacobi: turns the columns of a, `cols` columns of `rows` each, into singular values times left singular
// vectors, and those of v into right singular vectors; squared singular values in norm. ROWS and COLS, if not 0, are
// known when compiled. RING, for registers: the columns move on after each round, so that the pairs stay where they are
// and the code of one round serves all. Returns the sweeps that it took.
template <int ROWS, int COLS, bool RING, typename V>
ICF_INLINE int jacobi(V* a, V* v, V* norm, int rows, int cols, bool with_v) {
  if (ROWS) rows = ROWS;
  if (COLS) cols = COLS;
  const int players = cols + cols % 2;
  const lane_t<V> tolerance = orthogonal<V>(rows);
  V *const sines = norm + cols, *const taus = sines + players / 2;
  ICF_UNROLL
  for (int i = 0; i < cols * cols; ++i) v[i] = V{} + lane_t<V>(i % (cols + 1) == 0);
  int sweep = 0;
  ICF_ROLLED
  for (bool active = true; active && sweep < kSweeps; ++sweep) {
    active = false;
    ICF_UNROLL
    for (int c = 0; c < cols; ++c) norm[c] = squared_norm<ROWS, V>(a + c * rows, rows);
    ICF_ROLLED
    for (int round = 0; round < players - 1; ++round) {
      decltype(*norm < *norm) turning{};  // all angles of a round first: their long latencies overlap
      ICF_UNROLL
      for (int table = 0; table < players / 2; ++table) {
        int p, q;
        tournament_pair(RING ? 0 : round, table, players, p, q);
        if (q >= cols) continue;  // an odd number of columns leaves one out
        turning |= angle<ROWS, V>(a + p * rows, a + q * rows, rows, tolerance, norm[p], norm[q], sines[table], taus[table]);
      }
      const bool turns = any(turning);
      active |= turns;
      ICF_UNROLL
      for (int table = 0; turns && table < players / 2; ++table) {
        int p, q;
        tournament_pair(RING ? 0 : round, table, players, p, q);
        if (q >= cols) continue;
        turn<ROWS, V>(a + p * rows, a + q * rows, rows, sines[table], taus[table]);
        if (with_v) turn<COLS, V>(v + p * cols, v + q * cols, cols, sines[table], taus[table]);
      }
      if constexpr (RING) {
        move_on<ROWS, V>(a, rows, players - 1);
        move_on<COLS, V>(v, cols, players - 1);
        move_on<1, V>(norm, 1, players - 1);
      }
    }
  }
  ICF_UNROLL
  for (int c = 0; c < cols; ++c) norm[c] = squared_norm<ROWS, V>(a + c * rows, rows);
  return sweep;
}

// f(sigma) and f'(sigma) / sigma for the squared singular value `square`.
template <typename V>
ICF_INLINE void spectral_term(Spectral spectral, const V& square, const V& rank_cut, const V& width, V& value,
                              V& weight) {
  using S = lane_t<V>;
  const V zero = V{}, one = zero + S(1), top = zero + std::numeric_limits<S>::max();
  const V r = width < top ? width : top;  // infinite beside a cross term of about 0, where r log1p(0) is to be 0
  if (spectral == Spectral::plain) {
    const V sigma = square_root<V>(square);
    const auto kept = sigma > rank_cut;
    value = 2 * sigma;
    weight = kept ? 2 / (kept ? sigma : one) : zero;
  } else if (spectral == Spectral::smooth) {
    const V root = square_root<V>(square + r * r);
    value = 2 * square / (root + r);
    weight = 2 / root;
  } else {
    const V sum = square_root<V>(4 * square + r * r) + r;
    const V u = 4 * square / sum;
    value = u - r * log_1p<V>(u / (2 * r));
    weight = 4 / sum;
  }
}

// The sum of f over the singular values of a, and, in a, U diag(f') V^T. `poison` is 0, or NaN to mark the result.
// Scratch: cols x cols in v, 2 cols + 1 in norm.
template <int ROWS, int COLS, bool RING, typename V>
ICF_INLINE V spectral_sum(V* a, V* v, V* norm, int rows, int cols, bool polar, Spectral spectral, lane_t<V> regularization,
                        const V& poison) {
  if (ROWS) rows = ROWS;
  if (COLS) cols = COLS;
  V largest = V{}, total = V{}, maximum = V{};
  ICF_UNROLL
  for (int i = 0; i < rows * cols; ++i) {
    const V size = magnitude<V>(a[i]);
    largest = size > largest ? size : largest;
  }
  const V scale = inverse_power_of_two<V>(largest);
  ICF_UNROLL
  for (int i = 0; i < rows * cols; ++i) a[i] *= scale;
  jacobi<ROWS, COLS, RING, V>(a, v, norm, rows, cols, polar);
  ICF_UNROLL
  for (int c = 0; c < cols; ++c) maximum = norm[c] > maximum ? norm[c] : maximum;
  const V rank_cut = square_root<V>(maximum) * (kEpsilon<V> * (rows > cols ? rows : cols));
  ICF_UNROLL
  for (int c = 0; c < cols; ++c) {
    V value, weight;
    spectral_term<V>(spectral, norm[c], rank_cut, regularization * scale, value, weight);
    total += value;
    norm[c] = weight + poison;
  }
  if (!polar) return total / scale;
  V* row = norm + cols;
  ICF_UNROLL
  for (int r = 0; r < rows; ++r) {
    ICF_UNROLL
    for (int c = 0; c < cols; ++c) row[c] = V{};
    ICF_UNROLL
    for (int k = 0; k < cols; ++k) {
      const V left = a[k * rows + r] * norm[k];
      ICF_UNROLL
      for (int c = 0; c < cols; ++c) row[c] += left * v[k * cols + c];
    }
    ICF_UNROLL
    for (int c = 0; c < cols; ++c) a[c * rows + r] = row[c];
  }
  return total / scale;
}

// Inversion in place without pivoting, for I + G / eps: for each k the row k, then all others.
ICF_INLINE void scale_pivot_row(double* matrix, int order, int k) {
  const double factor = 1 / matrix[k * order + k];
  matrix[k * order + k] = 1;
  for (int j = 0; j < order; ++j) matrix[k * order + j] *= factor;
}

ICF_INLINE void eliminate(double* matrix, int order, int k, int i) {
  const double factor = matrix[i * order + k];
  matrix[i * order + k] = 0;
  for (int j = 0; j < order; ++j) matrix[i * order + j] -= factor * matrix[k * order + j];
}

// What the row of the factor that compares a valid frame with the mean of `before` valid ones is divided by.
template <typename T>
ICF_INLINE T row_scale(T before, T count) {
  return before > 0 ? 1 / square_root<T>(before * (before + 1) * count) : T(0);
}

// Frames [N, B, T, d] of one side. The rows of its factor lie at [N, B, T-1, d] or, row by row, at [N, T-1, B, d].
struct Side {
  int64_t N, B, T, d;
  bool by_row;
  const bool* mask;  // [N, B, T] or null

  ICF_INLINE int64_t rows() const { return T - 1; }
  ICF_INLINE int64_t samples() const { return N * B; }
  ICF_INLINE int64_t row_stride() const { return by_row ? B * d : d; }
  ICF_INLINE int64_t factor_at(int64_t s) const { return s / B * rows() * B * d + s % B * (by_row ? d : rows() * d); }
  ICF_INLINE bool valid(int64_t s, int64_t t) const { return mask == nullptr || mask[s * T + t]; }
  ICF_INLINE int64_t count(int64_t s) const {
    int64_t n = 0;
    for (int64_t t = 0; t < T; ++t) n += valid(s, t);
    return n;
  }
};

// What becomes of the frames of one side.
template <typename T>
struct Moments {
  T *mean, *factor, *trace, *entropy, *inverse;
};

// What the gradient of one side is made of. grad_factor lacks what traces and entropies add to it.
template <typename T>
struct Incoming {
  const T *grad, *grad_entropy, *mean, *other_mean, *factor, *inverse, *grad_factor;
  int64_t others, own_stride, other_stride;  // of grad within a group
};

}  // namespace icf::gw
