#include "gram_schmidt/gram_schmidt_args.h"
#include "gram_schmidt/gram_schmidt_cpu.h"

#include <algorithm>
#include <vector>
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace icf {
namespace {

constexpr int64_t kGrain = 8192;  // elements worth a thread

int64_t padded(int64_t d) { return (d + 127) / 128 * 128; }  // what fill_noise may write

using Words = uint32_t[4][64];  // of 64 counters

void philox_block(uint64_t seed, uint64_t row, uint32_t first, int64_t counters, Words& w) {
  for (int64_t q = 0; q < counters; ++q) {
    philox_words(seed, row, first + uint32_t(q), 0, w[0][q], w[1][q], w[2][q], w[3][q]);
  }
}

#if defined(__x86_64__) && defined(__GNUC__)
// Written out, as compilers shuffle products of 32 x 32 bits between the rounds: here they stay in lanes of 64 bits, of
// which the lower halves count, those of even counters in c[0], of odd ones in c[1].
__attribute__((target("avx2"))) void philox_block_avx2(uint64_t seed, uint64_t row, uint32_t first, int64_t counters,
                                                       Words& w) {
  const __m256i m0 = _mm256_set1_epi64x(0xD2511F53u), m1 = _mm256_set1_epi64x(0xCD9E8D57u);
  for (int64_t q = 0; q < counters; q += 8) {
    __m256i c[2][4];
    for (int odd = 0; odd < 2; ++odd) {
      const int64_t start = int64_t(first) + q + odd;
      c[odd][0] = _mm256_setr_epi64x(start, start + 2, start + 4, start + 6);
      c[odd][1] = _mm256_set1_epi64x(uint32_t(row));
      c[odd][2] = _mm256_set1_epi64x(row >> 32);
      c[odd][3] = _mm256_setzero_si256();
    }
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 7
    for (int round = 0; round < 7; ++round) {
      for (auto& x : c) {
        const __m256i p0 = _mm256_mul_epu32(x[0], m0), p1 = _mm256_mul_epu32(x[2], m1);
        x[0] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), x[1]), _mm256_set1_epi64x(k0));
        x[1] = p1;
        x[2] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), x[3]), _mm256_set1_epi64x(k1));
        x[3] = p0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < 4; ++i) {
      const __m256i words = _mm256_blend_epi32(c[0][i], _mm256_slli_epi64(c[1][i], 32), 0xAA);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(w[i] + q), words);
    }
  }
}

// The same with 512 bits, of which a third operand of xor comes for nothing.
__attribute__((target("avx512f"))) void philox_block_avx512(uint64_t seed, uint64_t row, uint32_t first,
                                                            int64_t counters, Words& w) {
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53u), m1 = _mm512_set1_epi64(0xCD9E8D57u);
  for (int64_t q = 0; q < counters; q += 16) {
    __m512i c[2][4];
    for (int odd = 0; odd < 2; ++odd) {
      const __m512i step = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
      c[odd][0] = _mm512_add_epi64(_mm512_set1_epi64(int64_t(first) + q + odd), step);
      c[odd][1] = _mm512_set1_epi64(uint32_t(row));
      c[odd][2] = _mm512_set1_epi64(row >> 32);
      c[odd][3] = _mm512_setzero_si512();
    }
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 7
    for (int round = 0; round < 7; ++round) {
      for (auto& x : c) {
        const __m512i p0 = _mm512_mul_epu32(x[0], m0), p1 = _mm512_mul_epu32(x[2], m1);
        x[0] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), x[1], _mm512_set1_epi64(k0), 0x96);
        x[1] = p1;
        x[2] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), x[3], _mm512_set1_epi64(k1), 0x96);
        x[3] = p0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < 4; ++i) {
      const __m512i words = _mm512_mask_blend_epi32(0xAAAA, c[0][i], _mm512_slli_epi64(c[1][i], 32));
      _mm512_storeu_si512(w[i] + q, words);
    }
  }
}

const auto philox_words_of = __builtin_cpu_supports("avx512f") ? philox_block_avx512
                             : __builtin_cpu_supports("avx2")  ? philox_block_avx2
                                                               : philox_block;
#else
const auto philox_words_of = philox_block;
#endif

template <typename A>
ICF_INLINE void fill_noise(A* r, int64_t d, uint64_t seed, uint64_t row, int64_t kind) {
  Words w;
  const int64_t counters = kind == kGaussian ? (d + 3) / 4 : (d + 127) / 128;
  for (int64_t first = 0; first < counters; first += 64) {
    const int64_t count = std::min<int64_t>(64, (counters - first + 7) / 8 * 8);
    philox_words_of(seed, row, uint32_t(first), count, w);
    if (kind == kGaussian) {
      A* normals = r + 4 * first;
#pragma omp simd
      for (int64_t q = 0; q < count; ++q) {
        gaussian_pair(w[0][q], w[1][q], normals[4 * q], normals[4 * q + 1]);
        gaussian_pair(w[2][q], w[3][q], normals[4 * q + 2], normals[4 * q + 3]);
      }
    } else {
      for (int64_t i = 0; i < 4 * std::min<int64_t>(64, counters - first); ++i) {
        A* signs = r + 128 * first + 32 * i;
        const uint32_t word = w[i % 4][i / 4];
#pragma omp simd
        for (int64_t j = 0; j < 32; ++j) signs[j] = word >> j & 1 ? A(-1) : A(1);
      }
    }
  }
}

template <typename T>
ICF_INLINE BlendRow<acc_t<T>> load_row(const T* from, acc_t<T>* z, int64_t d) {
  convert(from, z, d);
  BlendRow<acc_t<T>> row{};
  row.zz = dot(z, z, d);
  row.scale = rescale(z, row.zz, d);
  return row;
}

template <typename A>
ICF_INLINE void project_noise(const A* noise, const A* z, A* p, uint64_t index, const BlendOptions& o, BlendRow<A>& row) {
  if (o.kind == kGiven) {
    convert(noise + index * o.d, p, o.d);
  } else {
    fill_noise(p, o.d, uint64_t(*o.seed), index, o.kind);
  }
  A pp, pz;
  dot_both(p, p, z, o.d, pp, pz);
  if (o.kind == kGiven && rescale(p, pp, o.d) != 1) pz = dot(p, z, o.d);
  row.kappa = 0;
  row.rr = pp;
  if (needs_projection(row.zz, pz, pp)) {
    row.kappa = pz / row.zz;
    for (int64_t j = 0; j < o.d; ++j) p[j] -= row.kappa * z[j];
    dot_both(p, p, z, o.d, pp, pz);
  }
  row.pp = pp;
  row.pz = pz;
}

template <typename T, typename A = acc_t<T>>
ICF_SIMD void forward_rows(const T* z, const A* ratio, const A* noise, T* out, BlendOptions o, int64_t begin, int64_t end,
                           A* zs, A* p) {
  for (int64_t i = begin; i < end; ++i) {
    BlendRow<A> row = load_row(z + (i / (o.shared * o.inner) * o.inner + i % o.inner) * o.d, zs, o.d);
    project_noise(noise, zs, p, i, o, row);
    A z_coef, p_coef;
    blend_forward(row, ratio[i], o.restore_norm, z_coef, p_coef);
    T* y = out + i * o.d;
#pragma omp simd
    for (int64_t j = 0; j < o.d; ++j) y[j] = round_to<T>(z_coef * zs[j] + p_coef * p[j]);
  }
}

// Over rows of z, so that each thread adds up the gradients of the rows that it owns.
template <typename T, typename A = acc_t<T>>
ICF_SIMD void backward_rows(const T* grad, const T* z, const A* ratio, const A* noise, T* grad_z, A* grad_ratio,
                            BlendOptions o, int64_t begin, int64_t end, A* zs, A* p, A* g, A* sum) {
  for (int64_t i = begin; i < end; ++i) {
    BlendRow<A> row = load_row(z + i * o.d, zs, o.d);
    for (int64_t j = 0; j < o.d; ++j) sum[j] = 0;
    for (int64_t k = 0; k < o.shared; ++k) {
      const int64_t index = (i / o.inner * o.shared + k) * o.inner + i % o.inner;
      project_noise(noise, zs, p, index, o, row);
      convert(grad + index * o.d, g, o.d);
      A gz, gp, g_coef, z_coef, p_coef;
      dot_both(g, zs, p, o.d, gz, gp);
      blend_backward(row, ratio[index], o.restore_norm, gz, gp, g_coef, z_coef, p_coef, grad_ratio[index]);
#pragma omp simd
      for (int64_t j = 0; j < o.d; ++j) sum[j] += g_coef * g[j] + z_coef * zs[j] + p_coef * p[j];
    }
    T* y = grad_z + i * o.d;
#pragma omp simd
    for (int64_t j = 0; j < o.d; ++j) y[j] = round_to<T>(sum[j]);
  }
}

template <typename T>
ICF_SIMD void noise_rows(T* out, uint64_t seed, int64_t kind, int64_t d, int64_t begin, int64_t end, T* r) {
  for (int64_t i = begin; i < end; ++i) {
    fill_noise(r, d, seed, i, kind);
    convert(r, out + i * d, d);
  }
}

Tensor forward(const Tensor& z, const Tensor& ratio, const Tensor& noise, std::vector<int64_t> options) {
  const BlendOptions o = check_blend(z, ratio, noise, options);
  std::vector<int64_t> shape(ratio.sizes().begin(), ratio.sizes().end());
  shape.push_back(o.d);
  Tensor out = new_result(z, shape, z.scalar_type());
  dispatch_floating(z.scalar_type(), "orthogonal_blend", [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    torch::stable::parallel_for(0, ratio.numel(), kGrain / o.d + 1, [&](int64_t begin, int64_t end) {
      std::vector<A> scratch(2 * padded(o.d));
      forward_rows(z.const_data_ptr<T>(), ratio.const_data_ptr<A>(),
                   o.kind == kGiven ? noise.const_data_ptr<A>() : nullptr, out.mutable_data_ptr<T>(), o, begin, end,
                   scratch.data(), scratch.data() + padded(o.d));
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& z, const Tensor& ratio, const Tensor& noise,
                                    std::vector<int64_t> options) {
  const BlendOptions o = check_blend(z, ratio, noise, options);
  check_blend_grad(grad, z, ratio, o);
  Tensor grad_z = allocate(z, z.sizes()), grad_ratio = allocate(ratio, ratio.sizes());
  prefer_huge_pages(grad_z);
  dispatch_floating(z.scalar_type(), "orthogonal_blend_backward", [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const int64_t size = padded(o.d);
    torch::stable::parallel_for(0, z.numel() / o.d, kGrain / (o.d * o.shared) + 1, [&](int64_t begin, int64_t end) {
      std::vector<A> scratch(4 * size);
      A* s = scratch.data();
      backward_rows(grad.const_data_ptr<T>(), z.const_data_ptr<T>(), ratio.const_data_ptr<A>(),
                    o.kind == kGiven ? noise.const_data_ptr<A>() : nullptr, grad_z.mutable_data_ptr<T>(),
                    grad_ratio.mutable_data_ptr<A>(), o, begin, end, s, s + size, s + 2 * size, s + 3 * size);
    });
  });
  return {grad_z, grad_ratio};
}

Tensor philox_noise(const Tensor& seed, std::vector<int64_t> shape, int64_t kind) {
  check_seed(seed);
  STD_TORCH_CHECK(!shape.empty(), "shape must not be empty");
  Tensor out = new_result(seed, shape, torch::headeronly::ScalarType::Float);
  const int64_t d = shape.back(), rows = d ? out.numel() / d : 0;
  torch::stable::parallel_for(0, rows, kGrain / (d + 1) + 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(padded(d));
    noise_rows(out.mutable_data_ptr<float>(), uint64_t(*seed.const_data_ptr<int64_t>()), kind, d, begin, end,
               scratch.data());
  });
  return out;
}

}  // namespace
}  // namespace icf

STABLE_TORCH_LIBRARY_IMPL(icf, CPU, m) {
  m.impl("orthogonal_blend.cpp", TORCH_BOX(&icf::forward));
  m.impl("orthogonal_blend_backward.cpp", TORCH_BOX(&icf::backward));
  m.impl("philox_noise.cpp", TORCH_BOX(&icf::philox_noise));
}
