// The Python module: checks that y, s and the route fit the operands, whose own arrays it trusts, and divides a step between
// threads.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>

#include "bindings.h"
#include "bound.h"
#include "instruction_sets.h"
#include "pack.h"

namespace lori {

Dtype parse_dtype(const std::string& name) {
  if (name == "bfloat16") return Dtype::kBfloat16;
  if (name == "float32") return Dtype::kFloat32;
  throw nb::value_error(("dtype " + name + ", expected bfloat16 or float32").c_str());
}

namespace {

constexpr int64_t kItemsPerThread = 24;  // fewer are done before another thread has begun

std::vector<std::string> names_of_sets() {
  std::vector<std::string> names;
  for (const InstructionSet* set : instruction_sets()) names.emplace_back(set->name);
  return names;
}

// Whether y (T, D) and s (T, A, R) of these shapes and strides, in entries, are what the kernel reads and writes.
bool fits(const BoundOperands& bound, const BoundRoute& route, const std::array<int64_t, 2>& y,
          const std::array<int64_t, 2>& y_strides, const std::array<int64_t, 3>& s, const std::array<int64_t, 3>& s_strides) {
  const Operands& operands = bound.operands();
  for (size_t i = 0; i < route.num_terms(); i++) {
    const int basis = operands.basis_of[route.route().slots[i]];
    if (basis < 0 || basis >= s[1]) return false;
  }
  return y[0] == route.num_tokens() && s[0] == y[0] && y[1] == operands.num_outputs && s[2] == operands.rank &&
         (y_strides[0] >= y[1] || y[0] <= 1) && (y_strides[1] == 1 || y[1] == 1) && (s_strides[2] == 1 || s[2] == 1) &&
         (s_strides[1] == s[2] || s[1] == 1);
}

using Sizes = nb::typed<nb::tuple, int, nb::ellipsis>;  // a torch.Size, or strides

template <size_t kDims>
std::array<int64_t, kDims> sizes(const Sizes& tuple) {
  if (tuple.size() != kDims) throw nb::value_error("y of two dimensions and s of three expected");
  std::array<int64_t, kDims> out;
  for (size_t i = 0; i < kDims; i++) out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i));
  return out;
}

// Returns false where the shapes or strides are wrong, and has done nothing then. y and s are addresses.
bool add_delta(const BoundOperands& bound, const BoundRoute& route, uintptr_t y, const Sizes& y_shape, const Sizes& y_strides,
               uintptr_t s, const Sizes& s_shape, const Sizes& s_strides, int num_threads) {
  const Operands& operands = bound.operands();
  if (route.num_slots() > operands.num_slots) throw nb::value_error("the route names a slot that the operands do not have");
  const auto y_stride = sizes<2>(y_strides);
  const auto s_stride = sizes<3>(s_strides);
  if (!fits(bound, route, sizes<2>(y_shape), y_stride, sizes<3>(s_shape), s_stride)) return false;
  const nb::gil_scoped_release release;
  const ptrdiff_t size = operands.dtype == Dtype::kBfloat16 ? 2 : 4;
  const Step step{reinterpret_cast<uint8_t*>(y), reinterpret_cast<const uint8_t*>(s), y_stride[0] * size, s_stride[0] * size};
  const int64_t num_items = route.num_active() * operands.num_windows;
  const int num_parts = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(num_threads, num_items / kItemsPerThread)));
  if (num_parts == 1) {
    bound.expand()(operands, route.route(), step, 0, num_items);
    return true;
  }
#pragma omp parallel for num_threads(num_parts) schedule(static, 1)
  for (int part = 0; part < num_parts; part++)
    bound.expand()(operands, route.route(), step, num_items * part / num_parts, num_items * (part + 1) / num_parts);
  return true;
}

// Returns false where the indices do not ascend or leave B.
bool pack_floats(const int32_t* indices, const float* values, size_t nnz, int num_outputs, int rank, Dtype dtype,
                 int column_bytes, Packed& packed) {
  int64_t last = -1;
  for (size_t i = 0; i < nnz; last = indices[i++])
    if (indices[i] <= last) return false;
  if (last >= static_cast<int64_t>(num_outputs) * rank) return false;
  std::vector<uint16_t> narrow;
  if (dtype == Dtype::kBfloat16) {
    narrow.resize(nnz);
    std::transform(values, values + nnz, narrow.begin(), to_bfloat16);
  }
  const void* bits = dtype == Dtype::kBfloat16 ? static_cast<const void*>(narrow.data()) : values;
  pack({indices, static_cast<const uint8_t*>(bits), nnz, num_outputs, rank}, dtype, column_bytes, packed);
  return true;
}

std::tuple<NewArray<uint8_t>, NewArray<int32_t>> pack_arrays(Array<int32_t, 1> indices, Array<float, 1> values, int num_outputs,
                                                             int rank, const std::string& dtype, int column_bytes) {
  if (rank < 1 || rank > (column_bytes == 1 ? 256 : kMaxRank)) throw nb::value_error("rank out of range");
  const size_t nnz = indices.shape(0);
  if (values.shape(0) != nnz) throw nb::value_error("as many values as indices expected");
  const Dtype value_dtype = parse_dtype(dtype);
  auto packed = std::make_unique<Packed>();
  bool is_sound;
  {
    const nb::gil_scoped_release release;
    is_sound = pack_floats(indices.data(), values.data(), nnz, num_outputs, rank, value_dtype, column_bytes, *packed);
  }
  if (!is_sound) throw nb::value_error("indices must ascend and lie in B");
  Packed* kept = packed.release();
  const nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<Packed*>(p); });
  return {new_array(kept->blocks, owner), new_array(kept->starts, owner)};
}

}  // namespace
}  // namespace lori

NB_MODULE(_lori_cpu, m) {
  using namespace lori;
  nb::set_leak_warnings(false);  // what a process holds to its end is no leak
  m.doc() =
      "The CPU kernel of lori; see lori/kernels.\n\nAn int in place of an array is its address: the caller has checked the "
      "array's shape and keeps it alive. Its stride is in entries.";
  m.attr("VERSION") = LORI_VERSION;
  m.attr("COMPILER") = LORI_COMPILER;
#ifdef _OPENMP
  m.attr("HAS_THREADS") = true;
#else
  m.attr("HAS_THREADS") = false;
#endif
  m.def("instruction_sets", &names_of_sets, "What this processor runs, the fastest first.");
  m.def("pack", &pack_arrays, nb::arg("indices"), nb::arg("values"), nb::arg("num_outputs"), nb::arg("rank"), nb::arg("dtype"),
        nb::arg("column_bytes"));
  bind_adapter(m);
  nb::class_<BoundOperands>(m, "Operands")
      .def(nb::init<Array<uint8_t, 1>, Array<int32_t, 2>, Array<int32_t, 1>, int, int, const std::string&, const std::string&>(),
           nb::arg("pool"), nb::arg("starts"), nb::arg("basis_of"), nb::arg("num_outputs"), nb::arg("rank"), nb::arg("dtype"),
           nb::arg("instruction_set"))
      .def("add_delta", &add_delta, nb::arg("route"), nb::arg("y"), nb::arg("y_shape"), nb::arg("y_strides"), nb::arg("s"),
           nb::arg("s_shape"), nb::arg("s_strides"), nb::arg("num_threads"),
           "Return false, having done nothing, where a shape or a stride is wrong.");
  nb::class_<BoundRoute>(m, "Route")
      .def(nb::init<Array<int32_t, 2>, Array<int32_t, 1>, Array<float, 1>, int>(), nb::arg("segments"), nb::arg("slots"),
           nb::arg("weights"), nb::arg("num_tokens"));
  bind_gaussians(m);
  bind_layers(m);
  bind_points(m);
  bind_product(m);
  bind_stack(m);
}
