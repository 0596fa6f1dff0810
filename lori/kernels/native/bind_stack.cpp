// All layers of a decoder in one call, in bfloat16: what Python would take between its calls adds up to a tenth of a small step.
//
// Shapes: T tokens of a step, P of them that the last layer computes after its attention, D width.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstring>
#include <mutex>
#include <utility>

#include "bindings.h"
#include "bound_layers.h"
#include "bound_product.h"

namespace lori {

namespace {

using MaybeNorm = std::optional<Array<float, 1> >;
using MaybeRows = std::optional<Array<int32_t, 1> >;

// A decoder's layer: attention, then the MLP, each on a norm of the stream, to which what it gives is added.
class Layer {
 public:
  Layer(Array<float, 1> attention_norm, const Projection* qkv, const BoundHeads* heads, int rope, const Projection* output,
        MaybeNorm attention_output_norm, Array<float, 1> mlp_norm, const Projection* gate_up, int activation,
        const Projection* down, MaybeNorm mlp_output_norm, float epsilon, uintptr_t memory)
      : attention_norm(attention_norm),
        mlp_norm(mlp_norm),
        attention_output_norm(attention_output_norm),
        mlp_output_norm(mlp_output_norm),
        qkv(*qkv),
        output(*output),
        gate_up(*gate_up),
        down(*down),
        heads(heads->heads()),
        rope(rope),
        activation(static_cast<Activation>(activation)),
        epsilon(epsilon),
        memory(reinterpret_cast<uint8_t*>(memory)) {
    const int width = qkv->num_inputs(), size = this->heads.head_size;
    const int attended = this->heads.num_heads * size, inner = down->num_inputs();
    if (qkv->num_outputs() != attended + 2 * this->heads.num_kv_heads * size || output->num_inputs() != attended ||
        output->num_outputs() != width || gate_up->num_inputs() != width || gate_up->num_outputs() != 2 * inner ||
        down->num_outputs() != width || width % kLanes || inner % kLanes)
      throw nb::value_error("these products are not those of a layer");
    for (const MaybeNorm& norm : {MaybeNorm(attention_norm), MaybeNorm(mlp_norm), attention_output_norm, mlp_output_norm})
      if (norm && static_cast<int>(norm->shape(0)) != width) throw nb::value_error("a norm is not of the layer's width");
  }

  std::array<const Projection*, 4> products() const { return {&qkv, &output, &gate_up, &down}; }

  const Array<float, 1> attention_norm, mlp_norm;
  const MaybeNorm attention_output_norm, mlp_output_norm;
  const Projection &qkv, &output, &gate_up, &down;
  const Heads heads;
  const int rope;
  const Activation activation;
  const float epsilon;
  uint8_t* const memory;
};

// What a step's layers share.
struct Pass {
  const BoundLayers& functions;
  const BoundSpans& spans;
  const BoundRoute* route;  // of the layer, or null
  const std::vector<std::pair<uintptr_t, uintptr_t> >& ropes;
  int num_tokens, num_threads;
  const BoundOperands* const* operands;  // of the next product
  uint16_t* reduced;

  void norm(uint16_t* stream, uint16_t* added, uint16_t* out, const Array<float, 1>& weight, float epsilon) const {
    const auto size = static_cast<int64_t>(weight.shape(0));
    functions.norm({rows(stream, size), rows(added, size), rows(out, size), weight.data(), size, epsilon}, num_tokens,
                   num_threads);
  }

  // `following` is the product after this one, or null.
  void project(const Projection& product, const Projection* following, const uint16_t* x, uint16_t* y) {
    const Tokens tokens{x, y, product.num_inputs(), product.num_outputs()};
    const void* next = following ? following->first_weights(route != nullptr) : nullptr;
    if (!route) return product.multiply(tokens, num_tokens, num_threads, next);
    product.project(tokens, {x, reduced, product.num_inputs(), product.num_reduced()}, num_tokens, operands, *route, num_threads,
                    next);
    operands += product.num_layers();
  }

  void attend(const Layer& layer, uint16_t* qkv, uint16_t* out) const {
    const auto& rope = ropes[layer.rope];
    const Attention attention{rows(qkv, layer.qkv.num_outputs()),
                              rows(out, layer.output.num_inputs()),
                              reinterpret_cast<const float*>(rope.first),
                              reinterpret_cast<const float*>(rope.second),
                              layer.memory,
                              spans.spans().data(),
                              spans.table()};
    functions.attend(layer.heads, attention, spans, num_threads);
  }

  void gate(const Layer& layer, uint16_t* hidden, uint16_t* out) const {
    const int64_t size = layer.down.num_inputs();
    functions.gate({rows(hidden, 2 * size), rows(out, size), size, layer.activation}, num_tokens, num_threads);
  }

  static Matrix rows(uint16_t* at, int64_t stride) { return {reinterpret_cast<uint8_t*>(at), stride}; }
};

constexpr int kLineValues = 32;  // of a line of memory; rows that lie across lines are read and written twice

// Room that grows, from the beginning of a line on.
class Scratch {
 public:
  void reserve(int64_t num_values) {
    if (static_cast<int64_t>(values_.size()) < num_values + kLineValues) values_.resize(num_values + kLineValues);
  }
  uint16_t* at() {
    const auto address = reinterpret_cast<uintptr_t>(values_.data());
    return values_.data() + (-address / 2) % kLineValues;
  }

 private:
  std::vector<uint16_t> values_;
};

class Stack {
 public:
  Stack(const BoundLayers* functions, const std::vector<const Layer*>& layers, int64_t num_blocks)
      : functions_(*functions), layers_(layers), num_blocks_(num_blocks) {
    if (layers.empty() || functions->dtype() != Dtype::kBfloat16) throw nb::value_error("layers in bfloat16 expected");
    for (const Layer* layer : layers) {
      if (layer->qkv.num_inputs() != layers[0]->qkv.num_inputs()) throw nb::value_error("layers of one width expected");
      for (const Projection* product : layer->products()) {
        num_operands_ += product->num_layers();
        num_reduced_ = std::max<int64_t>(num_reduced_, product->num_reduced());
        num_between_ = std::max<int64_t>({num_between_, product->num_inputs(), product->num_outputs()});
      }
    }
    for (int64_t* of : {&num_reduced_, &num_between_}) *of = (*of + kLineValues - 1) / kLineValues * kLineValues;
  }

  // Adds to `stream` (T, D) what all layers give but the last MLP, which goes to `added` (T, D). `routes` has one for each layer,
  // or none. `operands` are those of all products in their order, where there are routes. Where there are `rows` (P,), ascending,
  // the last layer computes only these after its attention, with the route `last_route` of P tokens: they are then the first P
  // rows of `stream` and `added`.
  void forward(uintptr_t stream, uintptr_t added, const BoundSpans& spans,
               const std::vector<std::pair<uintptr_t, uintptr_t> >& ropes, const std::vector<const BoundRoute*>& routes,
               const std::vector<const BoundOperands*>& operands, int num_threads, MaybeRows rows, const BoundRoute* last_route) {
    check(spans, ropes, routes, operands);
    if (last_route && !rows) throw nb::value_error("a route of the last layer's rows, and no rows, were given");
    if (rows) check_rows(*rows, spans.num_tokens(), last_route, operands);
    const nb::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t num_tokens = spans.num_tokens();
    scratch_.reserve(num_tokens * (2 * num_between_ + num_reduced_));
    uint16_t *first = scratch_.at(), *second = first + num_tokens * num_between_;
    Pass pass{functions_,
              spans,
              nullptr,
              ropes,
              static_cast<int>(num_tokens),
              num_threads,
              operands.data(),
              second + num_tokens * num_between_};
    auto *x = reinterpret_cast<uint16_t*>(stream), *out = reinterpret_cast<uint16_t*>(added);
    for (size_t i = 0; i < layers_.size(); i++) {
      const Layer* layer = layers_[i];
      if (!routes.empty()) pass.route = routes[i];
      pass.norm(x, i == 0 ? nullptr : out, first, layer->attention_norm, layer->epsilon);
      pass.project(layer->qkv, &layer->output, first, second);
      pass.attend(*layer, second, first);
      if (rows && i + 1 == layers_.size()) {
        keep_rows(*rows, x, layer->output.num_outputs());
        keep_rows(*rows, first, layer->output.num_inputs());
        pass.num_tokens = static_cast<int>(rows->shape(0));
        pass.route = last_route;
      }
      pass.project(layer->output, &layer->gate_up, first, out);
      if (layer->attention_output_norm) pass.norm(out, nullptr, out, *layer->attention_output_norm, layer->epsilon);
      pass.norm(x, out, first, layer->mlp_norm, layer->epsilon);
      pass.project(layer->gate_up, &layer->down, first, second);
      pass.gate(*layer, second, first);
      pass.project(layer->down, i + 1 < layers_.size() ? &layers_[i + 1]->qkv : nullptr, first, out);
      if (layer->mlp_output_norm) pass.norm(out, nullptr, out, *layer->mlp_output_norm, layer->epsilon);
    }
  }

 private:
  // Moves rows of a matrix to its beginning.
  static void keep_rows(const Array<int32_t, 1>& rows, uint16_t* matrix, int64_t size) {
    for (size_t i = 0; i < rows.shape(0); i++)
      std::memmove(matrix + i * size, matrix + rows.data()[i] * size, sizeof(*matrix) * size);
  }

  void check_rows(const Array<int32_t, 1>& rows, int num_tokens, const BoundRoute* route,
                  const std::vector<const BoundOperands*>& operands) const {
    int32_t least = 0;
    for (size_t i = 0; i < rows.shape(0); i++) {
      if (rows.data()[i] < least || rows.data()[i] >= num_tokens)
        throw nb::value_error("ascending rows of the step's tokens expected");
      least = rows.data()[i] + 1;
    }
    if (!route) return;
    if (operands.empty()) throw nb::value_error("a route of the last layer's rows, and none of the step, were given");
    size_t first = operands.size();
    for (const Projection* product : layers_.back()->products()) first -= product->num_layers();
    for (const Projection* product : layers_.back()->products()) {
      if (product != &layers_.back()->qkv)
        product->check(operands.data() + first, product->num_layers(), *route, static_cast<int>(rows.shape(0)));
      first += product->num_layers();
    }
  }

  void check(const BoundSpans& spans, const std::vector<std::pair<uintptr_t, uintptr_t> >& ropes,
             const std::vector<const BoundRoute*>& routes, const std::vector<const BoundOperands*>& operands) const {
    if (!routes.empty() && routes.size() != layers_.size()) throw nb::value_error("a route for each layer, or none, expected");
    if (operands.size() != (routes.empty() ? 0 : num_operands_))
      throw nb::value_error("operands of all products, or none without a route, expected");
    const BoundOperands* const* of = operands.data();
    for (size_t i = 0; i < layers_.size(); i++) {
      const Layer* layer = layers_[i];
      spans.check(layer->heads, num_blocks_);
      if (layer->rope < 0 || layer->rope >= static_cast<int>(ropes.size())) throw nb::value_error("a layer's RoPE is missing");
      if (routes.empty()) continue;
      if (!routes[i]) throw nb::value_error("a layer's route is missing");
      for (const Projection* product : layer->products()) {
        product->check(of, product->num_layers(), *routes[i], spans.num_tokens());
        of += product->num_layers();
      }
    }
  }

  const BoundLayers& functions_;
  const std::vector<const Layer*> layers_;
  const int64_t num_blocks_;
  int64_t num_reduced_ = 0, num_between_ = 0;  // values of a row, in whole lines of memory
  size_t num_operands_ = 0;
  Scratch scratch_;
  std::mutex mutex_;  // of the scratch
};

}  // namespace

void bind_stack(nb::module_& m) {
  nb::class_<Layer>(m, "Layer")
      .def(nb::init<Array<float, 1>, const Projection*, const BoundHeads*, int, const Projection*, MaybeNorm, Array<float, 1>,
                    const Projection*, int, const Projection*, MaybeNorm, float, uintptr_t>(),
           nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 6>(), nb::keep_alive<1, 9>(),
           nb::keep_alive<1, 11>(), nb::arg("attention_norm"), nb::arg("qkv"), nb::arg("heads"), nb::arg("rope"),
           nb::arg("output"), nb::arg("attention_output_norm").none(), nb::arg("mlp_norm"), nb::arg("gate_up"),
           nb::arg("activation"), nb::arg("down"), nb::arg("mlp_output_norm").none(), nb::arg("epsilon"), nb::arg("memory"));
  nb::class_<Stack>(m, "Stack")
      .def(nb::init<const BoundLayers*, const std::vector<const Layer*>&, int64_t>(), nb::keep_alive<1, 2>(),
           nb::keep_alive<1, 3>(), nb::arg("functions"), nb::arg("layers"), nb::arg("num_blocks"))
      .def("forward", &Stack::forward, nb::arg("stream"), nb::arg("added"), nb::arg("spans"), nb::arg("ropes"), nb::arg("routes"),
           nb::arg("operands"), nb::arg("num_threads"), nb::arg("rows").none() = nb::none(),
           nb::arg("last_route").none() = nb::none());
}

}  // namespace lori
