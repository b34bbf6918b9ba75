// Vectors, and conversions that compilers vectorise, for loops that are part of ICF_SIMD clones.
#pragma once
#include "common/tensor.h"

#include <cstdint>
#include <cstring>

#if defined(__GNUC__) || defined(__clang__)
#define ICF_PREFETCH(address) __builtin_prefetch(address)
#else
#define ICF_PREFETCH(address)
#endif

namespace icf {

template <typename A, int BYTES>
struct Simd {
  typedef A Vec __attribute__((vector_size(BYTES)));
};
template <typename A, int BYTES = 32>
using Vec = typename Simd<A, BYTES>::Vec;

template <int BYTES = 32, typename A>
ICF_INLINE Vec<A, BYTES> load(const A* x) {
  Vec<A, BYTES> v;
  std::memcpy(&v, x, sizeof v);
  return v;
}

template <typename A, typename V>
ICF_INLINE void store(A* x, const V& v) {
  std::memcpy(x, &v, sizeof v);
}

// at_level<F>(...) calls F::run<BYTES>(...), compiled for the machine's level and with vectors of the BYTES that it has.
// ICF_SIMD has one text for all levels, and vectors wider than a level's are taken to pieces, one number at a time.
#ifdef ICF_SIMD_CLONES
template <typename F, typename... Args>
__attribute__((target("arch=x86-64-v4"))) void at_v4(const Args&... args) {
  F::template run<64>(args...);
}
template <typename F, typename... Args>
__attribute__((target("arch=x86-64-v3"))) void at_v3(const Args&... args) {
  F::template run<32>(args...);
}
#endif

template <typename F, typename... Args>
void at_level(const Args&... args) {
#ifdef ICF_SIMD_CLONES
  if (__builtin_cpu_supports("x86-64-v4")) return at_v4<F>(args...);
  if (__builtin_cpu_supports("x86-64-v3")) return at_v3<F>(args...);
#endif
  F::template run<16>(args...);
}

template <typename T>
ICF_INLINE T round_to(acc_t<T> x) {
  return T(x);
}

template <>
ICF_INLINE torch::headeronly::BFloat16 round_to(float x) {  // as the constructor does, but without a branch
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  return {uint16_t(x != x ? 0x7FC0u : rounded), torch::headeronly::BFloat16::from_bits()};
}

}  // namespace icf
