// The arithmetic of one sample, alike on host and device. Formulas are derived in kernels/ms_deform_attn/README.md.
#pragma once
#include "common/inline.h"

#include <cmath>
#include <cstdint>

namespace icf::msda {

// Pixels of a coordinate as given: raw * scale + base + cell - 0.5, where cell is whole and base less than one, so that
// float32 keeps its digits far from the origin.
template <typename A>
struct Axis {
  A scale, base, cell;
};

template <typename A>
ICF_INLINE Axis<A> axis_of_location(A extent) {
  return {extent, A(0), A(0)};
}

template <typename A>
ICF_INLINE Axis<A> axis_of_offset(A extent, A reference, A scale) {
  const A cell = std::floor(reference * extent);
  return {scale, std::fma(reference, extent, -cell), cell};
}

// Pixels per unit of offset: offsets from a box are in P-ths of half its size.
template <typename A>
ICF_INLINE A box_scale(A extent, A box, A P) {
  return box * extent * (A(0.5) / P);
}

// The whole pixel at or below, but for the cell.
template <typename A>
ICF_INLINE A whole_pixel(A raw, A scale, A base) {
  return std::floor(raw * scale + base - A(0.5));
}

// What is left of the pixel, formed anew from the product, which a fused multiply-add then does not round: a float32 has
// few digits after 800.
template <typename A>
ICF_INLINE A fraction_of_pixel(A raw, A scale, A base, A whole) {
  return raw * scale - (whole + A(0.5)) + base;
}

// Whether this pixel or the next is on the map, as for infinite and undefined ones it is not.
template <typename A>
ICF_INLINE bool touches_map(A pixel, A extent) {
  return (pixel >= -1) & (pixel < extent);
}

// Of the corners (left, top), (left + 1, top), (left, top + 1) and (left + 1, top + 1), in this order below too.
template <typename A>
ICF_INLINE void corner_weights(A s, A t, A a, A& w0, A& w1, A& w2, A& w3) {
  w0 = (1 - t) * (1 - s) * a, w1 = (1 - t) * s * a;
  w2 = t * (1 - s) * a, w3 = t * s * a;
}

// Rows of value, -1 for what is outside of the map.
ICF_INLINE void corner_rows(bool touches, int32_t left, int32_t top, int32_t width, int32_t height, int32_t start,
                                 int32_t rows[4]) {
  const bool x0 = touches & (left >= 0), x1 = touches & (left + 1 < width), y0 = top >= 0, y1 = top + 1 < height;
  const int32_t first = start + top * width + left, below = first + width;
  rows[0] = x0 & y0 ? first : -1, rows[1] = x1 & y0 ? first + 1 : -1;
  rows[2] = x0 & y1 ? below : -1, rows[3] = x1 & y1 ? below + 1 : -1;
}

// From the dot products of the incoming gradient with the corners to the gradients of pixels and attention weight.
template <typename A>
ICF_INLINE void sample_gradient(A d0, A d1, A d2, A d3, A s, A t, A a, A& grad_x, A& grad_y, A& grad_a) {
  grad_x = a * ((1 - t) * (d1 - d0) + t * (d3 - d2));
  grad_y = a * ((1 - s) * (d2 - d0) + s * (d3 - d1));
  grad_a = (1 - t) * ((1 - s) * d0 + s * d1) + t * ((1 - s) * d2 + s * d3);
}

template <typename A>
ICF_INLINE A softmax_weight(A logit, A largest, A inverse_sum) {
  return std::exp(logit - largest) * inverse_sum;
}

// mean: the sum of a * grad_a over all points of the query.
template <typename A>
ICF_INLINE A logit_gradient(A a, A grad_a, A mean) {
  return a * (grad_a - mean);
}

}  // namespace icf::msda
