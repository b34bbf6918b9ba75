// The functions of gw_contrast_cpu.cpp that contrast_cpu.cpp calls.
#pragma once
#include "gw_contrast/gw_contrast_args.h"

namespace icf::gw {

Forward gaussian_w2(const Tensor& x, const Tensor& y, const OptionalTensor& x_mask, const OptionalTensor& y_mask,
                    std::string spectral, double regularization, double eps, bool polar);

std::tuple<Tensor, Tensor> gaussian_w2_backward(const Tensor& grad, const Tensor& grad_x_entropy,
                                                const Tensor& grad_y_entropy, const Tensor& x, const Tensor& y,
                                                const Tensor& x_mean, const Tensor& y_mean, const Tensor& x_factor,
                                                const Tensor& y_factor, const Tensor& x_inverse, const Tensor& y_inverse,
                                                const Tensor& polar, const OptionalTensor& x_mask,
                                                const OptionalTensor& y_mask);

}  // namespace icf::gw
