#include "gram_schmidt/gram_schmidt_args.h"
#include "gram_schmidt/gram_schmidt_cpu.h"

#include <algorithm>
#include <vector>

namespace icf {
namespace {

constexpr int64_t kGrain = 16384;  // elements worth a thread

// x becomes its product with the Hadamard matrix, in O(d log d).
template <typename A>
ICF_INLINE void hadamard_transform(A* x, int64_t d) {
  for (int64_t half = 1; half < d; half *= 2) {
    for (int64_t i = 0; i < d; i += 2 * half) {
#pragma omp simd
      for (int64_t j = i; j < i + half; ++j) {
        const A a = x[j], b = x[j + half];
        x[j] = a + b;
        x[j + half] = a - b;
      }
    }
  }
}

// k rows of the Hadamard matrix with signs, reflected so that one more becomes z. B: lanes that share a sign.
template <int B, typename T, typename A = acc_t<T>>
ICF_SIMD void direction_rows(const T* z, T* out, uint64_t seed, int64_t k, int64_t d, int64_t begin, int64_t end,
                             A* signs, A* w, A* cosine) {
  const A size = 1 / std::sqrt(A(d));
  for (int64_t i = begin; i < end; ++i) {
    convert(z + i * d, w, d);
    A square = dot(w, w, d);
    rescale(w, square, d);
    const A inv_z = square == 0 ? A(0) : 1 / std::sqrt(square);
    for (int64_t q = 0; q < (d + 127) / 128; ++q) {
      uint32_t word[4];
      philox_words(seed, i, uint32_t(q), 0, word[0], word[1], word[2], word[3]);
      for (int64_t first = 128 * q; first < std::min(d, 128 * (q + 1)); first += 32) {
        const uint32_t bits = word[first % 128 / 32];
#pragma omp simd
        for (int64_t j = 0; j < std::min<int64_t>(32, d - first); ++j) signs[first + j] = bits >> j & 1 ? -size : size;
      }
    }
    for (int64_t j = 0; j < d; ++j) {
      w[j] *= inv_z;
      cosine[j] = w[j] * signs[j];
    }
    hadamard_transform(cosine, d);
    const HadamardRows rows(seed, i, d);
    const A c0 = cosine[rows[0]];
    for (int64_t row = 0; row <= k; ++row) {
      const uint32_t index = rows[row];
      A lane[B], weight = row ? cosine[index] / (1 + std::abs(c0)) : A(-1);
      for (int b = 0; b < B; ++b) lane[b] = hadamard_negative(index, uint32_t(b)) ? A(-1) : A(1);
      if (row == 0 && c0 > 0) {
        for (int b = 0; b < B; ++b) lane[b] = -lane[b];
      }
      T* y = row ? out + (i * k + row - 1) * d : nullptr;
      for (int64_t j = 0; j < d; j += B) {
        const A sign = hadamard_negative(index, uint32_t(j)) ? A(-1) : A(1);
#pragma omp simd
        for (int b = 0; b < B; ++b) {
          const A value = signs[j + b] * (lane[b] * sign) + weight * w[j + b];
          if (row == 0) w[j + b] = value;  // the reflector, q_0 up to its sign minus z/|z|
          else y[j + b] = round_to<T>(value);
        }
      }
    }
  }
}

Tensor directions(const Tensor& z, const Tensor& seed, int64_t k) {
  Tensor out = new_result(z, check_directions(z, seed, k), z.scalar_type());
  const int64_t d = z.size(-1);
  const uint64_t key = uint64_t(*seed.const_data_ptr<int64_t>());
  dispatch_floating(z.scalar_type(), "orthogonal_directions", [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    torch::stable::parallel_for(0, z.numel() / d, kGrain / ((k + 1) * d) + 1, [&](int64_t begin, int64_t end) {
      std::vector<A> scratch(3 * d);
      const auto rows = d >= 16 ? direction_rows<16, T> : direction_rows<2, T>;
      rows(z.const_data_ptr<T>(), out.mutable_data_ptr<T>(), key, k, d, begin, end, scratch.data(), scratch.data() + d,
           scratch.data() + 2 * d);
    });
  });
  return out;
}

}  // namespace
}  // namespace icf

STABLE_TORCH_LIBRARY_IMPL(icf, CPU, m) { m.impl("orthogonal_directions.cpp", TORCH_BOX(&icf::directions)); }
