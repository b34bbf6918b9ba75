// What host and device share (csrc/*/*_math.h), for the tests.
#include "gram_schmidt/gram_schmidt_math.h"
#include "gw_contrast/gw_contrast_math.h"
#include "ms_deform_attn/ms_deform_attn_math.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <vector>

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
template <typename T, int LANES>
struct Lanes {
  typedef T V __attribute__((vector_size(LANES * sizeof(T))));
};
template <typename T>
struct Lanes<T, 1> {
  typedef T V;
};

// ---- gw_contrast ---------------------------------------------------------------------------------------------------

// A matrix [cols, rows, lanes] through f(a, v, norm, rows, cols); a and v after it, and squared norms [cols, lanes].
template <typename T, int LANES, typename F>
auto on_columns(const Array<T>& columns, const F& f) {
  using V = typename Lanes<T, LANES>::V;
  const int cols = int(columns.shape(0)), rows = int(columns.shape(1));
  if (columns.ndim() != 3 || columns.shape(2) != LANES) throw py::value_error("columns must be [cols, rows, lanes]");
  std::vector<V> a(rows * cols), v(cols * cols), norm(2 * cols + 1);
  std::memcpy(a.data(), columns.data(), a.size() * sizeof(V));
  const auto result = f(a.data(), v.data(), norm.data(), rows, cols);
  const auto array = [&](const std::vector<V>& from, std::vector<py::ssize_t> shape) {
    return Array<T>(std::move(shape), reinterpret_cast<const T*>(from.data()));
  };
  return py::make_tuple(array(a, {cols, rows, LANES}), array(v, {cols, cols, LANES}), array(norm, {cols, LANES}), result);
}

template <typename T, int LANES>
py::tuple jacobi(const Array<T>& columns) {
  using V = typename Lanes<T, LANES>::V;
  return on_columns<T, LANES>(columns, [](V* a, V* v, V* norm, int rows, int cols) {
    return icf::gw::jacobi<0, 0, false, V>(a, v, norm, rows, cols, true);
  });
}

// ---- gram_schmidt --------------------------------------------------------------------------------------------------

template <int ROUNDS>
std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  icf::philox<ROUNDS>(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
  return counter;
}

// ---- ms_deform_attn ------------------------------------------------------------------------------------------------

// Rows and weights of the corners around a location in 0..1, of a map that starts at row `start`.
py::tuple corners(double x, double y, int width, int height, int start) {
  using namespace icf::msda;
  const auto horizontal = axis_of_location(double(width)), vertical = axis_of_location(double(height));
  const double left = whole_pixel(x, horizontal.scale, horizontal.base);
  const double top = whole_pixel(y, vertical.scale, vertical.base);
  const double s = fraction_of_pixel(x, horizontal.scale, horizontal.base, left);
  const double t = fraction_of_pixel(y, vertical.scale, vertical.base, top);
  const bool touches = touches_map(left, double(width)) & touches_map(top, double(height));
  std::array<int32_t, 4> rows;
  corner_rows(touches, touches ? int32_t(left) : 0, touches ? int32_t(top) : 0, width, height, start, rows.data());
  std::array<double, 4> weights;
  corner_weights(s, t, 1.0, weights[0], weights[1], weights[2], weights[3]);
  return py::make_tuple(rows, weights);
}

}  // namespace

PYBIND11_MODULE(icf_math, m) {
  m.def("jacobi_float64", jacobi<double, 1>);
  m.def("jacobi_float32", jacobi<float, 1>);
  m.def("jacobi_float32x16", jacobi<float, 16>);
  m.def("philox7", philox<7>);
  m.def("philox10", philox<10>);
  m.def("corners", corners);
}
