// Bindings of product.h.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "bound_product.h"

namespace lori {

namespace {

Tokens tokens(uintptr_t x, int64_t x_stride, uintptr_t y, int64_t y_stride) {
  return {reinterpret_cast<const uint16_t*>(x), reinterpret_cast<uint16_t*>(y), x_stride, y_stride};
}

void multiply(const Projection& projection, uintptr_t x, int64_t x_stride, int num_tokens, uintptr_t y, int64_t y_stride,
              int num_threads) {
  const nb::gil_scoped_release release;
  projection.multiply(tokens(x, x_stride, y, y_stride), num_tokens, num_threads);
}

void project(const Projection& projection, uintptr_t x, int64_t x_stride, int num_tokens, uintptr_t y, int64_t y_stride,
             uintptr_t s, int64_t s_stride, const std::vector<const BoundOperands*>& operands, const BoundRoute& route,
             int num_threads) {
  projection.check(operands.data(), operands.size(), route, num_tokens);
  const nb::gil_scoped_release release;
  projection.project(tokens(x, x_stride, y, y_stride), tokens(x, x_stride, s, s_stride), num_tokens, operands.data(), route,
                     num_threads);
}

template <typename Weight>
void pack_weights(Array<Weight, 2> weight, nb::ndarray<Weight, nb::ndim<1>, nb::c_contig, nb::device::cpu> panels) {
  const int num_outputs = static_cast<int>(weight.shape(0)), num_inputs = static_cast<int>(weight.shape(1));
  if (num_inputs % 2 || static_cast<int64_t>(panels.shape(0)) != part_size(num_outputs, num_inputs))
    throw nb::value_error("panels of the weights' size, and an even number of inputs, expected");
  const nb::gil_scoped_release release;
  pack_part(weight.data(), num_outputs, num_inputs, panels.data());
}

}  // namespace

void bind_product(nb::module_& m) {
  m.def("part_size", &part_size, nb::arg("num_outputs"), nb::arg("num_inputs"));
  m.def("pack_weights", &pack_weights<uint16_t>, nb::arg("weight"), nb::arg("panels"));
  m.def("pack_weights", &pack_weights<int8_t>, nb::arg("weight"), nb::arg("panels"));
  nb::class_<Projection>(m, "Projection")
      .def(nb::init<Array<uint16_t, 1>, const std::vector<int>&, const std::vector<int>&, int, std::optional<Array<float, 1> >,
                    std::optional<Array<int8_t, 1> >, std::optional<Array<float, 1> >, const std::string&>(),
           nb::arg("panels"), nb::arg("sizes"), nb::arg("reduced"), nb::arg("num_inputs"), nb::arg("bias").none(),
           nb::arg("narrow").none(), nb::arg("scales").none(), nb::arg("instruction_set"))
      .def("multiply", &multiply, nb::arg("x"), nb::arg("x_stride"), nb::arg("num_tokens"), nb::arg("y"), nb::arg("y_stride"),
           nb::arg("num_threads"))
      .def("project", &project, nb::arg("x"), nb::arg("x_stride"), nb::arg("num_tokens"), nb::arg("y"), nb::arg("y_stride"),
           nb::arg("s"), nb::arg("s_stride"), nb::arg("operands"), nb::arg("route"), nb::arg("num_threads"));
}

}  // namespace lori
