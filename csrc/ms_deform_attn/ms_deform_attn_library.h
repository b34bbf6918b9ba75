// The four operators of a device, from the two functions that it has: `locations` and `weights` as they are given, or
// fused, with reference points, where these are offsets and logits.
#pragma once
#include "ms_deform_attn/ms_deform_attn_args.h"

#include <string>
#include <tuple>
#include <vector>

namespace icf::msda {

using Gradients4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of value, reference points, coordinates and weights

using Forward = Tensor(const Tensor& value, const std::vector<int64_t>& sizes, const Tensor* reference,
                       const Tensor& coordinates, const Tensor& weights);
using Backward = Gradients4(const Tensor& grad, const Tensor& value, const std::vector<int64_t>& sizes,
                            const Tensor* reference, const Tensor& coordinates, const Tensor& weights,
                            bool deterministic);

template <Forward& run_forward, Backward& run_backward>
struct Operators {
  static Tensor forward(const Tensor& value, std::vector<int64_t> sizes, const Tensor& locations,
                        const Tensor& weights) {
    return run_forward(value, sizes, nullptr, locations, weights);
  }

  static std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& value,
                                                     std::vector<int64_t> sizes, const Tensor& locations,
                                                     const Tensor& weights, bool deterministic) {
    auto [grad_value, none, grad_locations, grad_weights] =
        run_backward(grad, value, sizes, nullptr, locations, weights, deterministic);
    return {grad_value, grad_locations, grad_weights};
  }

  static Tensor forward_fused(const Tensor& value, std::vector<int64_t> sizes, const Tensor& reference,
                              const Tensor& offsets, const Tensor& logits) {
    return run_forward(value, sizes, &reference, offsets, logits);
  }

  static Gradients4 backward_fused(const Tensor& grad, const Tensor& value, std::vector<int64_t> sizes,
                                   const Tensor& reference, const Tensor& offsets, const Tensor& logits,
                                   bool deterministic) {
    return run_backward(grad, value, sizes, &reference, offsets, logits, deterministic);
  }

  template <typename Library>
  static void add_to(Library& m, const std::string& backend) {
    m.impl(("ms_deform_attn." + backend).c_str(), TORCH_BOX(&Operators::forward));
    m.impl(("ms_deform_attn_backward." + backend).c_str(), TORCH_BOX(&Operators::backward));
    m.impl(("ms_deform_attn_fused." + backend).c_str(), TORCH_BOX(&Operators::forward_fused));
    m.impl(("ms_deform_attn_fused_backward." + backend).c_str(), TORCH_BOX(&Operators::backward_fused));
  }
};

}  // namespace icf::msda
