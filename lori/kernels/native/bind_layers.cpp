// Bindings of layers.h.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "bindings.h"
#include "bound_layers.h"

namespace lori {

namespace {

void norm(const BoundLayers& layers, uintptr_t stream, int64_t stream_stride, uintptr_t added, int64_t added_stride,
          uintptr_t out, int64_t out_stride, int64_t num_rows, const Array<float, 1>& weight, float epsilon, int num_threads) {
  const auto size = static_cast<int64_t>(weight.shape(0));
  if (size % kLanes) throw nb::value_error("a multiple of 16 values a row expected");
  const Norm of{
      matrix(stream, stream_stride), matrix(added, added_stride), matrix(out, out_stride), weight.data(), size, epsilon};
  const nb::gil_scoped_release release;
  layers.norm(of, num_rows, num_threads);
}

void gate(const BoundLayers& layers, uintptr_t x, int64_t x_stride, uintptr_t out, int64_t out_stride, int64_t num_rows,
          int64_t size, int activation, int num_threads) {
  if (size % kLanes) throw nb::value_error("a multiple of 16 values a row expected");
  const Gate of{matrix(x, x_stride), matrix(out, out_stride), size, static_cast<Activation>(activation)};
  const nb::gil_scoped_release release;
  layers.gate(of, num_rows, num_threads);
}

void attend(const BoundLayers& layers, const BoundHeads& heads, const BoundSpans& spans, uintptr_t qkv, int64_t qkv_stride,
            uintptr_t out, int64_t out_stride, uintptr_t cosine, uintptr_t sine, uintptr_t memory, int64_t num_blocks,
            int num_threads) {
  spans.check(heads.heads(), num_blocks);
  const Attention of{matrix(qkv, qkv_stride),
                     matrix(out, out_stride),
                     reinterpret_cast<const float*>(cosine),
                     reinterpret_cast<const float*>(sine),
                     reinterpret_cast<uint8_t*>(memory),
                     spans.spans().data(),
                     spans.table()};
  const nb::gil_scoped_release release;
  layers.attend(heads.heads(), of, spans, num_threads);
}

}  // namespace

void bind_layers(nb::module_& m) {
  using MaybeNorm = std::optional<Array<float, 1>>;
  nb::class_<BoundSpans>(m, "Spans")
      .def(nb::init<Array<int32_t, 2>, Array<int32_t, 1>, int, int>(), nb::arg("spans"), nb::arg("table"), nb::arg("num_heads"),
           nb::arg("num_kv_heads"));
  nb::class_<BoundHeads>(m, "Heads")
      .def(nb::init<int, int, int, float, int, float, float, MaybeNorm, MaybeNorm>(), nb::arg("num_heads"),
           nb::arg("num_kv_heads"), nb::arg("head_size"), nb::arg("scale"), nb::arg("window"), nb::arg("softcap"),
           nb::arg("epsilon"), nb::arg("query_norm").none(), nb::arg("key_norm").none());
  nb::class_<BoundLayers>(m, "Layers")
      .def(nb::init<const std::string&, const std::string&>(), nb::arg("instruction_set"), nb::arg("dtype"))
      .def("norm", &norm, nb::arg("stream"), nb::arg("stream_stride"), nb::arg("added"), nb::arg("added_stride"), nb::arg("out"),
           nb::arg("out_stride"), nb::arg("num_rows"), nb::arg("weight"), nb::arg("epsilon"), nb::arg("num_threads"))
      .def("gate", &gate, nb::arg("x"), nb::arg("x_stride"), nb::arg("out"), nb::arg("out_stride"), nb::arg("num_rows"),
           nb::arg("size"), nb::arg("activation"), nb::arg("num_threads"))
      .def("attend", &attend, nb::arg("heads"), nb::arg("spans"), nb::arg("qkv"), nb::arg("qkv_stride"), nb::arg("out"),
           nb::arg("out_stride"), nb::arg("cosine"), nb::arg("sine"), nb::arg("memory"), nb::arg("num_blocks"),
           nb::arg("num_threads"))
      .def(
          "block_bytes",
          [](const BoundLayers& layers, const BoundHeads& heads) { return block_bytes(heads.heads(), layers.dtype()); },
          nb::arg("heads"));
}

}  // namespace lori
