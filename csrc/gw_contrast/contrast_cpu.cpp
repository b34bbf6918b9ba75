// The contrastive loss over distances and entropies of a batch, in one call with them. The formulas are those of
// gw_contrast in kernels/gw_contrast/api.py; the loss's derivative by each distance is found along with it.
#include "gw_contrast/gw_contrast_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace icf {
namespace {
using namespace gw;

struct Loss {
  double scale, gamma;  // logits are scale * distance, negative for a similarity
  bool in_distance, regularizer, symmetric;
};

using ContrastForward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

const bool* pairs_of(const OptionalTensor& mask, const Tensor& x) {
  const int64_t B = x.size(0);
  if (!mask.has_value()) return nullptr;
  STD_TORCH_CHECK(mask->is_contiguous() && mask->scalar_type() == torch::headeronly::ScalarType::Bool &&
                      mask->dim() == 2 && mask->size(0) == B && mask->size(1) == B && mask->device() == x.device(),
                  "positives and ignored must be contiguous, bool, [B, B] and on the device of x");
  return mask->const_data_ptr<bool>();
}

// log of a sum of exponentials, of those of n logits that count, and what each has of it.
template <typename T, typename F>
T log_sum(const T* logit, int64_t n, const F& counts, T* share) {
  T most = -std::numeric_limits<T>::infinity(), sum = 0;
  for (int64_t j = 0; j < n; ++j) {
    if (counts(j) && !(logit[j] <= most)) most = logit[j];  // a NaN stays
  }
  if (std::isinf(most)) most = 0;
  for (int64_t j = 0; j < n; ++j) sum += share[j] = counts(j) ? std::exp(logit[j] - most) : T(0);
  for (int64_t j = 0; j < n; ++j) share[j] /= sum;
  return std::log(sum) + most;
}

// The sum over rows, or columns, of -log of the share of the positives; adds its derivative by each distance to grad.
template <typename T>
T contrast_lines(const T* distance, const bool* positives, const bool* ignored, int64_t B, bool by_row, T scale,
                 T weight, T* grad) {
  std::vector<T> scratch(3 * B);
  T *logit = scratch.data(), *all = logit + B, *own = all + B, total = 0;
  for (int64_t i = 0; i < B; ++i) {
    const auto at = [&](int64_t j) { return by_row ? i * B + j : j * B + i; };
    const auto positive = [&](int64_t j) { return positives ? positives[at(j)] : i == j; };
    const auto counted = [&](int64_t j) { return positive(j) || !ignored || !ignored[at(j)]; };
    for (int64_t j = 0; j < B; ++j) logit[j] = scale * distance[at(j)];
    total += log_sum(logit, B, counted, all) - log_sum(logit, B, positive, own);
    for (int64_t j = 0; j < B; ++j) grad[at(j)] += weight * scale * (all[j] - own[j]);
  }
  return total;
}

template <typename T>
void contrast(const Loss& loss, const bool* positives, const bool* ignored, int64_t B, T* distance, const T* x_entropy,
              const T* y_entropy, T* value, T* grad, T* grad_x_entropy, T* grad_y_entropy) {
  if (loss.in_distance) {
    for (int64_t i = 0; i < B; ++i) {
      for (int64_t j = 0; j < B; ++j) distance[i * B + j] += T(loss.gamma) * (x_entropy[i] + y_entropy[j]);
    }
  }
  std::fill(grad, grad + B * B, T(0));
  const T weight = T(1) / T(loss.symmetric ? 2 * B : B), scale = T(loss.scale);
  *value = contrast_lines(distance, positives, ignored, B, true, scale, weight, grad);
  if (loss.symmetric) *value += contrast_lines(distance, positives, ignored, B, false, scale, weight, grad);
  *value *= weight;
  for (int64_t i = 0; i < B; ++i) {
    T row = 0, column = 0;
    for (int64_t j = 0; j < B; ++j) row += grad[i * B + j], column += grad[j * B + i];
    const T gamma = T(loss.gamma), share = gamma / T(2 * B);
    grad_x_entropy[i] = loss.in_distance ? gamma * row : loss.regularizer ? share : T(0);
    grad_y_entropy[i] = loss.in_distance ? gamma * column : loss.regularizer ? share : T(0);
    if (loss.regularizer) *value += share * (x_entropy[i] + y_entropy[i]);
  }
}

ContrastForward forward(const Tensor& x, const Tensor& y, const OptionalTensor& x_mask, const OptionalTensor& y_mask,
                        const OptionalTensor& positives, const OptionalTensor& ignored, std::string spectral,
                        double regularization, double eps, double scale, double gamma, std::string entropy,
                        bool symmetric, bool polar) {
  STD_TORCH_CHECK(x.dim() == 3 && y.dim() == 3 && x.size(0) == y.size(0) && x.size(0) > 0,
                  "x and y must be [B, T, d] with B alike and above 0");
  const int64_t B = x.size(0);
  auto [distance, x_entropy, y_entropy, x_mean, y_mean, x_factor, y_factor, x_inverse, y_inverse, factors] =
      gaussian_w2(x, y, x_mask, y_mask, spectral, regularization, eps, polar);
  const Loss loss{scale, gamma, eps > 0 && entropy == "in_distance", eps > 0 && entropy == "regularizer", symmetric};
  Tensor value = allocate(distance, {}), grad = allocate(distance, {1, B, B});
  Tensor grad_x_entropy = allocate(distance, {1, B}), grad_y_entropy = allocate(distance, {1, B});
  // named anew, as a lambda may not capture structured bindings before C++20
  const auto run = [&, &distance = distance, &x_entropy = x_entropy, &y_entropy = y_entropy](auto zero) {
    using T = acc_t<decltype(zero)>;
    const auto data = [](Tensor& t) { return t.mutable_data_ptr<T>(); };
    contrast<T>(loss, pairs_of(positives, x), pairs_of(ignored, x), B, data(distance), data(x_entropy), data(y_entropy),
                data(value), data(grad), data(grad_x_entropy), data(grad_y_entropy));
  };
  dispatch_floating(distance.scalar_type(), "gw_contrast", run);
  return {value, grad, grad_x_entropy, grad_y_entropy, x_mean, y_mean, x_factor, y_factor, x_inverse, y_inverse, factors};
}

// The saved derivatives times the gradient of the loss.
Tensor times(const Tensor& t, const Tensor& grad) {
  Tensor out = allocate(t, t.sizes());
  dispatch_floating(t.scalar_type(), "gw_contrast_backward", [&](auto zero) {
    using T = acc_t<decltype(zero)>;
    const T factor = *grad.const_data_ptr<T>(), *from = t.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    for (int64_t i = 0; i < t.numel(); ++i) to[i] = factor * from[i];
  });
  return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& y, const Tensor& grad_distance,
                                    const Tensor& grad_x_entropy, const Tensor& grad_y_entropy, const Tensor& x_mean,
                                    const Tensor& y_mean, const Tensor& x_factor, const Tensor& y_factor,
                                    const Tensor& x_inverse, const Tensor& y_inverse, const Tensor& polar,
                                    const OptionalTensor& x_mask, const OptionalTensor& y_mask) {
  STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == grad_distance.scalar_type(),
                  "grad must be one number of the dtype of the loss");
  for (const Tensor& t : {grad_distance, grad_x_entropy, grad_y_entropy}) ICF_CHECK_CONTIGUOUS(t);
  return gaussian_w2_backward(times(grad_distance, grad), times(grad_x_entropy, grad), times(grad_y_entropy, grad), x, y,
                              x_mean, y_mean, x_factor, y_factor, x_inverse, y_inverse, polar, x_mask, y_mask);
}

}  // namespace
}  // namespace icf

STABLE_TORCH_LIBRARY_IMPL(icf, CPU, m) {
  m.impl("gw_contrast.cpp", TORCH_BOX(&icf::forward));
  m.impl("gw_contrast_backward.cpp", TORCH_BOX(&icf::backward));
}
