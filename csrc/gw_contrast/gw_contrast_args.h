// Arguments and results of gaussian_w2 and its backward, alike for the CPU and CUDA.
#pragma once
#include "common/tensor.h"
#include "gw_contrast/gw_contrast_math.h"

#include <array>
#include <optional>
#include <string>
#include <tuple>

namespace icf::gw {
using OptionalTensor = std::optional<Tensor>;
using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline Side side_of(const Tensor& frames, const OptionalTensor& mask, bool by_row) {
  ICF_CHECK_CONTIGUOUS(frames);
  STD_TORCH_CHECK((frames.dim() == 4 || frames.dim() == 3) && frames.size(-2) > 0,
                  "frames must be [N, B, T, d], or [B, T, d] of one group, with T above 0");
  Side side{frames.dim() == 4 ? frames.size(0) : 1, frames.size(-3), frames.size(-2), frames.size(-1), by_row, nullptr};
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->is_contiguous() && mask->scalar_type() == torch::headeronly::ScalarType::Bool &&
                    mask->device() == frames.device() && mask->numel() == side.samples() * side.T,
                    "a mask must be contiguous, bool, [N, B, T] and on the device of its frames");
    side.mask = mask->const_data_ptr<bool>();
  }
  return side;
}

inline Spectral spectral_of(const std::string& name) {
  STD_TORCH_CHECK(name == "plain" || name == "smooth" || name == "entropic", "gaussian_w2 is not implemented for ", name);
  return name == "plain" ? Spectral::plain : name == "smooth" ? Spectral::smooth : Spectral::entropic;
}

struct Results {
  Tensor distance, x_entropy, y_entropy, x_mean, y_mean, x_factor, y_factor, x_inverse, y_inverse, polar, x_trace, y_trace;

  Forward all() const {
    return {distance, x_entropy, y_entropy, x_mean, y_mean, x_factor, y_factor, x_inverse, y_inverse, polar};
  }
  template <typename T>
  static Moments<T> moments(Tensor& mean, Tensor& factor, Tensor& trace, Tensor& entropy, Tensor& inverse) {
    return {mean.mutable_data_ptr<T>(), factor.mutable_data_ptr<T>(), trace.mutable_data_ptr<T>(),
            entropy.mutable_data_ptr<T>(), inverse.mutable_data_ptr<T>()};
  }
  template <typename T>
  Moments<T> x_moments() {
    return moments<T>(x_mean, x_factor, x_trace, x_entropy, x_inverse);
  }
  template <typename T>
  Moments<T> y_moments() {
    return moments<T>(y_mean, y_factor, y_trace, y_entropy, y_inverse);
  }
};

inline Results new_results(const Tensor& x, const Tensor& y, const Side& xs, const Side& ys, double eps, bool polar) {
  STD_TORCH_CHECK(xs.N == ys.N && xs.d == ys.d && x.scalar_type() == y.scalar_type() && x.device() == y.device(),
                  "x and y must agree in N, d, dtype and device");
  using torch::headeronly::ScalarType;
  const auto type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const auto make = [&](std::initializer_list<int64_t> shape) { return allocate(x, shape, type); };
  const int64_t N = xs.N, Bx = xs.B, By = ys.B, m = xs.rows(), n = ys.rows(), d = xs.d;
  return {make({N, Bx, By}), make({N, Bx}), make({N, By}), make({N, Bx, d}), make({N, By, d}), make({N, Bx, m, d}),
          make({N, n, By, d}), eps > 0 ? make({N, Bx, m, m}) : make({0}), eps > 0 ? make({N, By, n, n}) : make({0}),
          polar ? make({N, Bx, m, n, By}) : make({0}), make({N, Bx}), make({N, By})};
}

// The incoming gradients and what the forward saved, in the order of the schema.
inline void check_saved(const Side& xs, const Side& ys, const std::array<Tensor, 10>& tensors) {
  const int64_t N = xs.N, Bx = xs.B, By = ys.B, m = xs.rows(), n = ys.rows(), d = xs.d;
  const bool entropy = tensors[7].dim() != 1;
  const int64_t sizes[] = {N * Bx * By, N * Bx, N * By, N * Bx * d, N * By * d, N * Bx * m * d, N * n * By * d,
                           entropy ? N * Bx * m * m : 0, entropy ? N * By * n * n : 0, N * Bx * m * n * By};
  STD_TORCH_CHECK(xs.N == ys.N && xs.d == ys.d, "x and y must agree in N and d");
  for (size_t i = 0; i < tensors.size(); ++i) {
    STD_TORCH_CHECK(tensors[i].is_contiguous() && tensors[i].scalar_type() == tensors[0].scalar_type() &&
                    tensors[i].device() == tensors[0].device() && tensors[i].numel() == sizes[i],
                    "gaussian_w2_backward: contiguous tensors of one dtype and matching shapes are needed, saved with "
                    "polar=True");
  }
}

}  // namespace icf::gw
