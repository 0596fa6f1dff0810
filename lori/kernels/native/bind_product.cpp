// Bindings of product.h: layers that read one input as one product, the rows of A of each among them, and their deltas after it.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "bindings.h"
#include "bound.h"
#include "product.h"

namespace lori {

#ifndef LORI_AVX512_BF16
void bind_product(nb::module_&) {}  // there is no other code for it yet
#else

namespace {

struct Share {
  int part, num_parts;
  LORI_INLINE int64_t first(int64_t count) const { return count * part / num_parts; }
  LORI_INLINE int64_t last(int64_t count) const { return count * (part + 1) / num_parts; }
};

void barrier() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

class Projection {
 public:
  // `panels` holds the parts one after the other: each layer's W, of `sizes` outputs, then each layer's A, of `reduced`.
  Projection(Array<uint16_t, 1> panels, const std::vector<int>& sizes, const std::vector<int>& reduced, int num_inputs,
             std::optional<Array<float, 1> > bias)
      : panels_(panels), bias_(bias) {
    if (num_inputs < 2 || num_inputs % 2) throw nb::value_error("an even number of inputs expected");
    int64_t at = 0, output = 0;
    for (const int size : sizes) add(parts_, size, num_inputs, &at, bias ? bias->data() + output : nullptr), output += size;
    for (const int size : reduced) add(shrinks_, size, num_inputs, &at, nullptr);
    if (at != static_cast<int64_t>(panels.shape(0)) || (bias && static_cast<int64_t>(bias->shape(0)) != output))
      throw nb::value_error("panels and bias do not have these sizes");
  }

  // y (T, sum of D) = W x + bias.
  void multiply(uintptr_t x, int64_t x_stride, int num_tokens, uintptr_t y, int64_t y_stride, int num_threads) const {
    const nb::gil_scoped_release release;
    const Tokens tokens = make(x, x_stride, y, y_stride);
    run(num_threads, [&](const Share& share) { all(parts_, tokens, num_tokens, share); });
  }

  // s (T, sum of A R) = A x.
  void reduce(uintptr_t x, int64_t x_stride, int num_tokens, uintptr_t s, int64_t s_stride, int num_threads) const {
    const nb::gil_scoped_release release;
    const Tokens tokens = make(x, x_stride, s, s_stride);
    run(num_threads, [&](const Share& share) { all(shrinks_, tokens, num_tokens, share); });
  }

  // y and s as above, and the deltas of the route added to y.
  void project(uintptr_t x, int64_t x_stride, int num_tokens, uintptr_t y, int64_t y_stride, uintptr_t s, int64_t s_stride,
               const std::vector<const BoundOperands*>& operands, const BoundRoute& route, int num_threads) const {
    if (operands.size() != parts_.size() || operands.size() != shrinks_.size() || route.num_tokens() != num_tokens)
      throw nb::value_error("as many operands as layers, and a route of these tokens, expected");
    for (size_t i = 0; i < operands.size(); i++) check(*operands[i], route, static_cast<int>(i));
    const nb::gil_scoped_release release;
    const Tokens tokens = make(x, x_stride, y, y_stride), reduced = make(x, x_stride, s, s_stride);
    run(num_threads, [&](const Share& share) {
      all(shrinks_, reduced, num_tokens, share);
      int64_t output = 0, column = 0;
      for (size_t i = 0; i < parts_.size(); i++) {
        Tokens part = tokens;
        part.y += output;
        const Step step{reinterpret_cast<uint8_t*>(part.y), reinterpret_cast<const uint8_t*>(reduced.y + column), y_stride * 2,
                        s_stride * 2};
        if (share.num_parts == 1)
          windows(parts_[i], part, num_tokens, *operands[i], route, step);
        else
          shared(parts_[i], part, num_tokens, *operands[i], route, step, share);
        output += parts_[i].num_outputs;
        column += shrinks_[i].num_outputs;
      }
    });
  }

 private:
  static Tokens make(uintptr_t x, int64_t x_stride, uintptr_t y, int64_t y_stride) {
    return {reinterpret_cast<const uint16_t*>(x), reinterpret_cast<uint16_t*>(y), x_stride, y_stride};
  }

  void add(std::vector<Part>& to, int size, int num_inputs, int64_t* at, const float* bias) {
    to.push_back({panels_.data() + *at, bias, size, num_inputs});
    *at += part_bytes(size, num_inputs) / 2;
  }

  void check(const BoundOperands& bound, const BoundRoute& route, int layer) const {
    const Operands& operands = bound.operands();
    if (operands.num_outputs != parts_[layer].num_outputs || operands.dtype != Dtype::kBfloat16 ||
        shrinks_[layer].num_outputs % operands.rank)
      throw nb::value_error("the operands are not of this layer");
    if (route.num_slots() > operands.num_slots) throw nb::value_error("the route names a slot that the operands do not have");
    const int num_bases = shrinks_[layer].num_outputs / operands.rank;
    for (size_t i = 0; i < route.num_terms(); i++) {
      const int basis = operands.basis_of[route.route().slots[i]];
      if (basis < 0 || basis >= num_bases) throw nb::value_error("a slot is of a basis that this layer does not have");
    }
  }

  template <typename Run>
  static void run(int num_threads, Run run) {
    if (num_threads <= 1) return run(Share{0, 1});
#ifdef _OPENMP
#pragma omp parallel num_threads(num_threads)
    run(Share{omp_get_thread_num(), omp_get_num_threads()});
#else
    run(Share{0, 1});
#endif
  }

  static void all(const std::vector<Part>& parts, const Tokens& tokens, int num_tokens, const Share& share) {
    Tokens part = tokens;
    for (const Part& of : parts) {
      one(of, part, num_tokens, share);
      part.y += of.num_outputs;
    }
  }

  // A layer window by window: as soon as a window's outputs are there its deltas follow, and meanwhile the memory is asked for
  // those of the next one.
  static void windows(const Part& part, const Tokens& tokens, int num_tokens, const BoundOperands& bound, const BoundRoute& route,
                      const Step& step) {
    float sums[kRowBlock * kPanelOutputs];
    const Operands& operands = bound.operands();
    std::vector<Ahead::Range> ranges;
    int panel = 0;
    for (int window = 0; window < operands.num_windows; window++) {
      const int last_output = std::min((window + 1) * kWindowRows, part.num_outputs);
      const int last_panel = (last_output + kPanelOutputs - 1) / kPanelOutputs;
      ranges.clear();
      if (window == 0) add_blocks(operands, route.route(), 0, ranges);
      if (window + 1 < operands.num_windows) add_blocks(operands, route.route(), window + 1, ranges);
      Ahead ahead(ranges.data(), ranges.data() + ranges.size());
      multiply_avx512_bf16(part, tokens, 0, num_tokens, panel, last_panel, ahead, sums);
      panel = last_panel;
      bound.expand()(operands, route.route(), step, window * route.num_active(), (window + 1) * route.num_active());
    }
  }

  static void shared(const Part& part, const Tokens& tokens, int num_tokens, const BoundOperands& bound, const BoundRoute& route,
                     const Step& step, const Share& share) {
    const Operands& operands = bound.operands();
    const int64_t items = route.num_active() * operands.num_windows;
    one(part, tokens, num_tokens, share);
    barrier();
    bound.expand()(operands, route.route(), step, share.first(items), share.last(items));
  }

  // A share of a part: of its panels, and where there are few of them of the tokens too.
  static void one(const Part& part, const Tokens& tokens, int num_tokens, const Share& share) {
    float sums[kRowBlock * kPanelOutputs];
    Ahead ahead(nullptr, nullptr);
    const int panels = part.num_panels();
    const int row_parts = panels >= 4 * share.num_parts ? 1 : std::max(1, std::min(share.num_parts, num_tokens / 32));
    const int64_t items = int64_t{panels} * row_parts;
    for (int64_t item = share.first(items); item < share.last(items);) {
      const int row_part = static_cast<int>(item / panels), panel = static_cast<int>(item % panels);
      const int count = static_cast<int>(std::min<int64_t>(panels - panel, share.last(items) - item));
      const Share rows{row_part, row_parts};
      multiply_avx512_bf16(part, tokens, static_cast<int>(rows.first(num_tokens)), static_cast<int>(rows.last(num_tokens)), panel,
                           panel + count, ahead, sums);
      item += count;
    }
  }

  // Adds where a window of the route's slots lies.
  static void add_blocks(const Operands& operands, const Route& route, int window, std::vector<Ahead::Range>& ranges) {
    constexpr int64_t kLikely = 3072, kMost = 32768;  // bytes of a window: where the next does not say, and at most
    for (int term = 0; term < route.num_terms; term++) {
      const uint8_t* begin = operands.block(route.slots[term], window);
      if (!begin) continue;
      const uint8_t* next = window + 1 < operands.num_windows ? operands.block(route.slots[term], window + 1) : nullptr;
      const bool follows = next && next > begin && next - begin <= kMost;
      ranges.push_back({begin, follows ? next : begin + kLikely});
    }
  }

  Array<uint16_t, 1> panels_;
  std::optional<Array<float, 1> > bias_;
  std::vector<Part> parts_, shrinks_;
};

void pack_weights(Array<uint16_t, 2> weight, nb::ndarray<uint16_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> panels) {
  const int num_outputs = static_cast<int>(weight.shape(0)), num_inputs = static_cast<int>(weight.shape(1));
  if (num_inputs % 2 || static_cast<int64_t>(panels.shape(0)) != part_bytes(num_outputs, num_inputs) / 2)
    throw nb::value_error("panels of the weights' size, and an even number of inputs, expected");
  const nb::gil_scoped_release release;
  pack_part(weight.data(), num_outputs, num_inputs, panels.data());
}

}  // namespace

void bind_product(nb::module_& m) {
  m.def("part_size", [](int num_outputs, int num_inputs) { return part_bytes(num_outputs, num_inputs) / 2; });
  m.def("pack_weights", &pack_weights);
  nb::class_<Projection>(m, "Projection")
      .def(
          nb::init<Array<uint16_t, 1>, const std::vector<int>&, const std::vector<int>&, int, std::optional<Array<float, 1> > >(),
          nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none())
      .def("multiply", &Projection::multiply)
      .def("reduce", &Projection::reduce)
      .def("project", &Projection::project);
}

#endif

}  // namespace lori
