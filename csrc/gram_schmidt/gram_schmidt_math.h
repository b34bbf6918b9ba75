// The arithmetic of one counter, pair or row, alike on host and device. Formulas and the layout of the counters are
// derived in kernels/gram_schmidt/README.md.
#pragma once
#include "common/inline.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace icf {

enum Noise : int64_t { kGaussian, kRademacher, kGiven };

template <typename To, typename From>
ICF_INLINE To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <int rounds = 7>
ICF_INLINE void philox(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
  const uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
  c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
  c1 = uint32_t(p1);
  c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
  c3 = uint32_t(p0);
  if constexpr (rounds > 1) philox<rounds - 1>(c0, c1, c2, c3, k0 + 0x9E3779B9u, k1 + 0xBB67AE85u);
}

// The four words of counter `column` of a row.
ICF_INLINE void philox_words(uint64_t seed, uint64_t row, uint32_t column, uint32_t stream, uint32_t& w0,
                                  uint32_t& w1, uint32_t& w2, uint32_t& w3) {
  w0 = column, w1 = uint32_t(row), w2 = uint32_t(row >> 32), w3 = stream;
  philox(w0, w1, w2, w3, uint32_t(seed), uint32_t(seed >> 32));
}

// The rows of the Hadamard matrix that row `row` of z gets: distinct, as an odd step meets all d, a power of two, of them.
struct HadamardRows {
  uint32_t first, step, mask;

  ICF_INLINE HadamardRows(uint64_t seed, uint64_t row, int64_t d) : mask(uint32_t(d - 1)) {
    uint32_t unused2, unused3;
    philox_words(seed, row, 0, 1, first, step, unused2, unused3);
    step |= 1u;
  }
  ICF_INLINE uint32_t operator[](int64_t i) const { return (first + uint32_t(i) * step) & mask; }
};

// Whether the element of the Hadamard matrix in this row and column is -1.
ICF_INLINE bool hadamard_negative(uint32_t row, uint32_t column) {
#if defined(__CUDA_ARCH__)
  return __popc(row & column) & 1;
#else
  return __builtin_popcount(row & column) & 1;
#endif
}

ICF_INLINE float with_sign(float x, uint32_t sign_in_bit_31) {
  return bits_of<float>(bits_of<uint32_t>(x) ^ (sign_in_bit_31 & 0x80000000u));
}

ICF_INLINE float square_root(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));  // within 2^-23, at a fraction of the cost
  return y;
#else
  return std::sqrt(x);
#endif
}

// Box-Muller: two independent normals of two words. Polynomials, so that all backends agree to rounding.
ICF_INLINE void gaussian_pair(uint32_t w0, uint32_t w1, float& n0, float& n1) {
  const float u = float(int32_t((w0 >> 8) | 1u)) * 0x1p-24f;  // odd, so never 0 and never 1
  const int32_t bits = bits_of<int32_t>(u), exponent = (bits - 0x3F3504F3) >> 23;  // u = 2^exponent (1 + m)
  const float m = bits_of<float>(bits - exponent * 0x800000) - 1.0f;  // in [sqrt(1/2) - 1, sqrt(2) - 1)
  float p = 0.08722349f;                                             // log(1 + m) / m, relative error 2.6e-8
  p = p * m - 0.14366840f;
  p = p * m + 0.14952268f;
  p = p * m - 0.16562393f;
  p = p * m + 0.19956833f;
  p = p * m - 0.25002074f;
  p = p * m + 0.33334187f;
  p = p * m - 0.49999988f;
  p = p * m + 1.0f;
  const float radius = square_root(-0.69314718f * float(exponent) - p * m);  // sqrt(-log u); the 2 is in cos, sin
  const float y = float(int32_t(w1 << 2) >> 8) * (0.78539816f * 0x1p-23f), t = y * y;  // angle - pi/4
  const float s = y * (((-1.9462112e-4f * t + 8.331585e-3f) * t - 0.16666637f) * t + 1.0f);
  const float c = ((-1.3585909e-3f * t + 4.1655026e-2f) * t - 0.49999857f) * t + 1.0f;
  n0 = with_sign(radius * (c - s), w1);       // sqrt(2) cos(pi/4 + y)
  n1 = with_sign(radius * (c + s), w1 << 1);  // sqrt(2) sin(pi/4 + y)
}

#if defined(__CUDACC__)
inline __host__ __device__ __noinline__  // rare on a GPU, and long
#else
ICF_INLINE
#endif
void gaussian_pair(uint32_t w0, uint32_t w1, double& n0, double& n1) {
  const double radius = sqrt(-2 * log(double((w0 >> 8) | 1u) * 0x1p-24));
  const double angle = 0.78539816339744831 * (1 + double(int32_t(w1 << 2) >> 8) * 0x1p-23);
  n0 = (w1 >> 31 ? -radius : radius) * cos(angle);
  n1 = (w1 >> 30 & 1 ? -radius : radius) * sin(angle);
}

// Sums of squares outside are too near to under- or overflow: the row is scaled first.
template <typename A>
ICF_INLINE bool needs_scaling(A square) {
  constexpr A eps = std::numeric_limits<A>::epsilon();
  constexpr A least = std::numeric_limits<A>::min() / (eps * eps), most = std::numeric_limits<A>::max() * (eps * eps);
  return !(square >= least && square <= most);
}

// Whether less than a quarter of the noise's square is orthogonal to z, so that subtracting the projection from the
// sums alone would lose digits, and the noise itself has to be projected.
template <typename A>
ICF_INLINE bool needs_projection(A zz, A pz, A pp) {
  return zz > 0 && pp * zz - pz * pz < pp * zz / 4;
}

// A row of z times `scale`, and noise p = r - kappa z.
template <typename A>
struct BlendRow {
  A scale, kappa, rr, zz, pz, pp;  // rr: r.r, zz: z.z of the scaled row, and so on
};

template <typename A>
struct BlendTerms {
  A a, b, inv_z, inv_n, e, norm;

  // u = (p - e z/|z|) / n is the unit vector of the noise, e = p.z/|z|
  ICF_INLINE BlendTerms(const BlendRow<A>& row, A ratio) {
    constexpr A tol = 8 * std::numeric_limits<A>::epsilon();  // noise of which no more is left is parallel to z
    const A rho = ratio < 0 ? A(0) : ratio > 1 ? A(1) : ratio;
    a = sqrt(1 - rho);
    b = sqrt(rho);
    inv_z = row.zz == 0 ? A(0) : 1 / sqrt(row.zz);
    e = row.pz * inv_z;
    const A nn = row.pp - e * e;
    inv_n = nn <= tol * tol * row.rr ? A(0) : 1 / sqrt(nn);
    norm = row.zz * inv_z / row.scale;
  }
};

// z' = z_coef z + p_coef p
template <typename A>
ICF_INLINE void blend_forward(const BlendRow<A>& row, A ratio, bool restore_norm, A& z_coef, A& p_coef) {
  const BlendTerms<A> t(row, ratio);
  const A size = restore_norm ? t.norm : A(1);
  z_coef = size * (t.a - t.b * t.e * t.inv_n) * t.inv_z;
  p_coef = size * t.b * t.inv_n;
}

// grad_z = g_coef g + z_coef z + p_coef p, of the unscaled z, where gz = g.z and gp = g.p
template <typename A>
ICF_INLINE void blend_backward(const BlendRow<A>& row, A ratio, bool restore_norm, A gz, A gp, A& g_coef,
                                    A& z_coef, A& p_coef, A& grad_ratio) {
  const BlendTerms<A> t(row, ratio);
  const A g_unit = gz * t.inv_z, gu = (gp - t.e * g_unit) * t.inv_n;
  const A c = row.kappa * row.zz * t.inv_z + t.e;  // r.z/|z|
  const A k = t.a - t.b * c * t.inv_n, f = t.b * t.inv_n * (c * t.inv_n * gu - g_unit);
  const A size = restore_norm ? A(row.zz != 0) : t.inv_z * row.scale;
  g_coef = k * size;
  p_coef = f * size;
  z_coef = -(k * g_unit + t.e * f) * t.inv_z * size;
  if (restore_norm) z_coef += (t.a * g_unit + t.b * gu) * t.inv_z;
  grad_ratio = (gu / t.b - g_unit / t.a) / 2 * (restore_norm ? t.norm : A(1));
  if (ratio <= 0 || ratio >= 1) grad_ratio = 0;
}

}  // namespace icf
