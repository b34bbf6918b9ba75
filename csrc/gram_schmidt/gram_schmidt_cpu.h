// What the CPU kernels of this room share: loops over one row, part of the ICF_SIMD clones that call them.
#pragma once
#include "common/tensor.h"
#include "gram_schmidt/gram_schmidt_math.h"

#include <algorithm>

namespace icf {

constexpr auto wide(torch::headeronly::ScalarType type) {  // the dtype computed in
  using torch::headeronly::ScalarType;
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename T>
ICF_INLINE void convert(const T* from, acc_t<T>* to, int64_t d) {
#pragma omp simd
  for (int64_t j = 0; j < d; ++j) to[j] = acc_t<T>(from[j]);
}

template <typename T>
ICF_INLINE T round_to(acc_t<T> x) {
  return T(x);
}

template <>
ICF_INLINE torch::headeronly::BFloat16 round_to(float x) {  // as the constructor does, but without a branch
  const uint32_t bits = bits_of<uint32_t>(x), rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  return {uint16_t(x != x ? 0x7FC0u : rounded), torch::headeronly::BFloat16::from_bits()};
}

template <typename A>
ICF_INLINE A dot(const A* x, const A* y, int64_t d) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < d; ++j) sum += x[j] * y[j];
  return sum;
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
