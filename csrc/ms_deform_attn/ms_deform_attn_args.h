// Arguments of the operators, alike for the CPU and CUDA.
#pragma once
#include "common/tensor.h"

#include <utility>

namespace icf::msda {

// What is read of the points of a query, as [B, Q, M, n] with strides for B and Q.
template <typename A, typename L>
struct Inputs {
  const L *coordinates, *weights;
  int64_t coordinates_b, coordinates_q, weights_b, weights_q;
  const A* reference = nullptr;  // [B, Q, levels, 2 or 4]; if given, coordinates are offsets and weights are logits
  int64_t reference_size = 0, reference_b = 0, reference_q = 0, reference_l = 0;
};

// Calls f with the types of value and of the coordinates, which are those of value or what is computed in.
template <typename F>
void dispatch(const Tensor& value, const Tensor& coordinates, const F& f) {
  dispatch_floating(value.scalar_type(), "ms_deform_attn", [&](auto t) {
    using A = acc_t<decltype(t)>;
    if (coordinates.scalar_type() == value.scalar_type()) return f(t, t);
    if constexpr (!std::is_same_v<A, decltype(t)>) {
      if (coordinates.scalar_type() == torch::headeronly::ScalarType::Float) return f(t, A{});
    }
    STD_TORCH_CHECK(false, "coordinates must be of the type of value or of float");
  });
}

inline void check_rows(const Tensor& t, const char* name) {  // contiguous but for images and queries
  int64_t expected = 1;
  for (int64_t i = t.dim() - 1; i > 1; expected *= t.size(i--))
    STD_TORCH_CHECK(t.size(i) == 1 || t.stride(i) == expected, name, " must be contiguous from its third dimension on");
}

template <typename A, typename L>
Inputs<A, L> read(const Tensor& value, const Tensor* reference, const Tensor& coordinates, const Tensor& weights) {
  STD_TORCH_CHECK(coordinates.dim() == 6 && coordinates.size(5) == 2 && weights.dim() == 5, "points must be 2-D");
  for (int64_t i = 0; i < 5; ++i)
    STD_TORCH_CHECK(coordinates.size(i) == weights.size(i), "coordinates and weights must agree in shape");
  STD_TORCH_CHECK(weights.size(0) == value.size(0) && weights.size(2) == value.size(2), "value and weights must agree");
  STD_TORCH_CHECK(weights.scalar_type() == coordinates.scalar_type(), "coordinates and weights must agree in type");
  STD_TORCH_CHECK(coordinates.device() == value.device() && weights.device() == value.device(),
                  "coordinates and weights must be on the device of value");
  check_rows(coordinates, "coordinates");
  check_rows(weights, "weights");
  Inputs<A, L> in{coordinates.const_data_ptr<L>(), weights.const_data_ptr<L>(), coordinates.stride(0),
                  coordinates.stride(1), weights.stride(0), weights.stride(1)};
  if (reference != nullptr) {
    STD_TORCH_CHECK(reference->dim() == 4 && reference->stride(3) == 1 && reference->device() == value.device(),
                    "reference points must be [B, Q, L, 2 or 4] on the device of value");
    for (const auto& [i, j] : {std::pair{0, 0}, {1, 1}, {2, 3}})
      STD_TORCH_CHECK(reference->size(i) == weights.size(j), "reference points and weights must agree in shape");
    in.reference = reference->const_data_ptr<A>();
    in.reference_size = reference->size(3);
    STD_TORCH_CHECK(in.reference_size == 2 || in.reference_size == 4, "reference points must be [B, Q, L, 2 or 4]");
    in.reference_b = reference->stride(0), in.reference_q = reference->stride(1), in.reference_l = reference->stride(2);
  }
  return in;
}

inline void check_value(const Tensor& value) {
  STD_TORCH_CHECK(value.dim() == 4 && value.stride(3) == 1, "value must be [B, S, M, D], its channels contiguous");
}

inline void check_grad(const Tensor& grad, const Tensor& value, int64_t queries) {
  STD_TORCH_CHECK(grad.is_contiguous() && grad.scalar_type() == value.scalar_type() && grad.dim() == 3 &&
                      grad.device() == value.device() && grad.size(0) == value.size(0) && grad.size(1) == queries &&
                      grad.size(2) == value.size(2) * value.size(3),
                  "grad must be contiguous [B, Q, M * D] of the type and on the device of value");
}

}  // namespace icf::msda
