// What the CPU kernels of this room share: loops over one row, part of the ICF_SIMD clones that call them.
#pragma once
#include "common/pages.h"
#include "common/simd.h"
#include "gram_schmidt/gram_schmidt_math.h"

#include <algorithm>
#include <vector>

namespace icf {

inline Tensor new_result(const Tensor& like, const std::vector<int64_t>& shape, torch::headeronly::ScalarType type) {
  Tensor result = allocate(like, shape, type);
  prefer_huge_pages(result);
  return result;
}

template <typename A>
constexpr int64_t kWidth = sizeof(Vec<A>) / sizeof(A);

template <typename T>
ICF_INLINE void convert(const T* from, acc_t<T>* to, int64_t d) {
#pragma omp simd
  for (int64_t j = 0; j < d; ++j) to[j] = acc_t<T>(from[j]);
}

template <typename A>
ICF_INLINE A sum_of(const Vec<A>& v) {  // in halves: one element after the other would wait for each addition
  typedef A Half __attribute__((vector_size(16)));
  Half half[2];
  memcpy(half, &v, sizeof v);
  half[0] += half[1];
  if constexpr (sizeof(A) == 8) return half[0][0] + half[0][1];
  else return (half[0][0] + half[0][2]) + (half[0][1] + half[0][3]);
}

// x . y and x . z, in four sums each: one would wait for itself.
template <typename A>
ICF_INLINE void dot_both(const A* x, const A* y, const A* z, int64_t d, A& xy, A& xz) {
  constexpr int64_t lanes = kWidth<A>;
  Vec<A> with_y[4] = {}, with_z[4] = {};
  int64_t j = 0;
  for (; j + 4 * lanes <= d; j += 4 * lanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vec<A> part = load(x + j + i * lanes);
      with_y[i] += part * load(y + j + i * lanes);
      with_z[i] += part * load(z + j + i * lanes);
    }
  }
  for (; j + lanes <= d; j += lanes) {
    with_y[0] += load(x + j) * load(y + j);
    with_z[0] += load(x + j) * load(z + j);
  }
  xy = sum_of<A>((with_y[0] + with_y[1]) + (with_y[2] + with_y[3]));
  xz = sum_of<A>((with_z[0] + with_z[1]) + (with_z[2] + with_z[3]));
  for (; j < d; ++j) {
    xy += x[j] * y[j];
    xz += x[j] * z[j];
  }
}

template <typename A>
ICF_INLINE A dot(const A* x, const A* y, int64_t d) {
  A xy, unused;
  dot_both(x, y, y, d, xy, unused);  // the second is left out by the compiler
  return xy;
}

// Scales a row whose square would under- or overflow so that its largest element is 1. Returns the scale.
template <typename A>
ICF_INLINE A rescale(A* x, A& square, int64_t d) {
  if (!needs_scaling(square)) return 1;
  A largest = 0;
  for (int64_t j = 0; j < d; ++j) largest = std::abs(x[j]) > largest ? std::abs(x[j]) : largest;
  if (!(largest > 0 && largest <= std::numeric_limits<A>::max())) return 1;
  const A scale = 1 / std::max(largest, std::numeric_limits<A>::min());
  for (int64_t j = 0; j < d; ++j) x[j] *= scale;
  square = dot(x, x, d);
  return scale;
}

}  // namespace icf
