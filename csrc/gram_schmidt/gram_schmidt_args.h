// Arguments of this room's operators and their checks, alike for the CPU and CUDA.
#pragma once
#include "common/tensor.h"
#include "gram_schmidt/gram_schmidt_math.h"

#include <vector>

namespace icf {

struct BlendOptions {
  int64_t d, kind, shared, inner;  // output row (i, k, j) belongs to row i * inner + j of z
  const int64_t* seed;             // null where the noise is given
  bool restore_norm;
};

inline void check_seed(const Tensor& seed) {
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == torch::headeronly::ScalarType::Long,
                  "seed must be an int64 tensor of one element");
}

inline BlendOptions check_blend(const Tensor& z, const Tensor& ratio, const Tensor& noise,
                                const std::vector<int64_t>& options) {
  ICF_CHECK_CONTIGUOUS(z);
  ICF_CHECK_CONTIGUOUS(ratio);
  ICF_CHECK_CONTIGUOUS(noise);
  STD_TORCH_CHECK(z.dim() > 0 && options.size() == 4, "z must be [*, d], and options four");
  const int64_t d = z.size(-1), kind = options[0], shared = options[1], inner = options[2];
  STD_TORCH_CHECK(shared > 0 && inner > 0 && z.numel() * shared == ratio.numel() * d &&
                      ratio.numel() % (shared * inner) == 0,
                  "ratio must have ", shared, " elements per row of z");
  STD_TORCH_CHECK(ratio.scalar_type() == wide(z.scalar_type()) && ratio.device() == z.device() &&
                      noise.device() == z.device(),
                  "ratio must be of the dtype computed in, and ratio and noise on the device of z");
  if (kind == kGiven) {
    STD_TORCH_CHECK(noise.numel() == ratio.numel() * d && noise.scalar_type() == ratio.scalar_type(),
                    "noise must be of the shape of the result and of the dtype of ratio");
  } else {
    STD_TORCH_CHECK(kind == kGaussian || kind == kRademacher, "noise must be one of 0, 1 and 2, got ", kind);
    check_seed(noise);
  }
  return {d, kind, shared, inner, kind == kGiven ? nullptr : noise.const_data_ptr<int64_t>(), options[3] != 0};
}

inline void check_blend_grad(const Tensor& grad, const Tensor& z, const Tensor& ratio, const BlendOptions& o) {
  ICF_CHECK_CONTIGUOUS(grad);
  STD_TORCH_CHECK(grad.numel() == ratio.numel() * o.d && grad.scalar_type() == z.scalar_type() &&
                      grad.device() == z.device(),
                  "grad must be of the shape of the result, and of the dtype and on the device of z");
}

// The shape of the result: k rows in place of each of z.
inline std::vector<int64_t> check_directions(const Tensor& z, const Tensor& seed, int64_t k) {
  ICF_CHECK_CONTIGUOUS(z);
  const int64_t d = z.dim() ? z.size(-1) : 0;
  STD_TORCH_CHECK(d > 1 && (d & (d - 1)) == 0 && d < (int64_t(1) << 31) && k >= 0 && k < d,
                  "z must be [*, d] with d a power of two above k");
  check_seed(seed);
  STD_TORCH_CHECK(seed.device() == z.device(), "seed must be on the device of z");
  std::vector<int64_t> shape(z.sizes().begin(), z.sizes().end());
  shape.insert(shape.end() - 1, k);
  return shape;
}

}  // namespace icf
