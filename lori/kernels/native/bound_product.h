// product.h bound to its weights: layers that read one input as one product, the rows of A of each among them, and their deltas.
#pragma once

#include <optional>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "bound.h"
#include "product.h"

namespace lori {

struct Share {
  int part, num_parts;
  LORI_INLINE int64_t first(int64_t count) const { return count * part / num_parts; }
  LORI_INLINE int64_t last(int64_t count) const { return count * (part + 1) / num_parts; }
};

inline void barrier() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

class Projection {
 public:
  // `panels` holds the parts one after the other: each layer's W, of `sizes` outputs, then the A of all, of `reduced` rows each.
  // Where there is `narrow` it has those of W, in int8 with a scale for each output.
  Projection(Array<uint16_t, 1> panels, const std::vector<int>& sizes, const std::vector<int>& reduced, int num_inputs,
             std::optional<Array<float, 1>> bias, std::optional<Array<int8_t, 1>> narrow, std::optional<Array<float, 1>> scales,
             const std::string& instruction_set)
      : multiply_(lori::instruction_set(instruction_set).multiply),
        panels_(panels),
        bias_(bias),
        narrow_(narrow),
        scales_(scales),
        reduced_(reduced),
        num_inputs_(num_inputs) {
    if (num_inputs < 2 || num_inputs % 2) throw nb::value_error("an even number of inputs expected");
    if (sizes.empty()) throw nb::value_error("at least one layer expected");
    if (!reduced.empty() && reduced.size() != sizes.size())
      throw nb::value_error("rows of A for each layer, or for none, expected");
    if (narrow.has_value() != scales.has_value())
      throw nb::value_error("scales with weights in int8, and only with them, expected");
    int64_t at = 0, narrow_at = 0;
    for (const int size : sizes) {
      Part part{panels.data() + at, bias ? bias->data() + num_outputs_ : nullptr, size, num_inputs};
      if (narrow) part.panels = nullptr, part.narrow = narrow->data() + narrow_at, part.scales = scales->data() + num_outputs_;
      (narrow ? narrow_at : at) += part_size(size, num_inputs);
      parts_.push_back(part);
      num_outputs_ += size;
    }
    for (const int size : reduced) num_reduced_ += size;
    shrink_ = {panels.data() + at, nullptr, num_reduced_, num_inputs};
    at += part_size(num_reduced_, num_inputs);
    if (at != static_cast<int64_t>(panels.shape(0)) || narrow_at != static_cast<int64_t>(narrow ? narrow->shape(0) : 0) ||
        (bias && static_cast<int>(bias->shape(0)) != num_outputs_) ||
        (scales && static_cast<int>(scales->shape(0)) != num_outputs_))
      throw nb::value_error("panels, scales and bias do not have these sizes");
  }

  int num_inputs() const { return num_inputs_; }
  int num_outputs() const { return num_outputs_; }
  int num_reduced() const { return num_reduced_; }
  size_t num_layers() const { return parts_.size(); }

  // What is read first: with deltas the rows of A.
  const void* first_weights(bool has_deltas) const { return weights_of(has_deltas ? shrink_ : parts_[0]); }

  // y (T, sum of D) = W x + bias. `next` is what is read afterwards, or null.
  void multiply(const Tokens& tokens, int num_tokens, int num_threads, const void* next = nullptr) const {
    run(num_threads, [&](const Share& share) {
      Tokens part = tokens;
      for (size_t i = 0; i < parts_.size(); i++) {
        one(followed(i, next), part, num_tokens, share);
        part.y += parts_[i].num_outputs;
      }
    });
  }

  // y and s as above, and the deltas of the route added to y; `operands` and the route have been checked.
  void project(const Tokens& tokens, const Tokens& reduced, int num_tokens, const BoundOperands* const* operands,
               const BoundRoute& route, int num_threads, const void* next = nullptr) const {
    run(num_threads, [&](const Share& share) {
      Part shrink = shrink_;
      shrink.next = first_weights(false);
      one(shrink, reduced, num_tokens, share);
      int64_t output = 0, column = 0;
      for (size_t i = 0; i < parts_.size(); i++) {
        Tokens part = tokens;
        part.y += output;
        const Step step{reinterpret_cast<uint8_t*>(part.y), reinterpret_cast<const uint8_t*>(reduced.y + column),
                        tokens.y_stride * 2, reduced.y_stride * 2};
        if (share.num_parts == 1)
          windows(followed(i, next), part, num_tokens, *operands[i], route, step);
        else
          shared(followed(i, next), part, num_tokens, *operands[i], route, step, share);
        output += parts_[i].num_outputs;
        column += reduced_[i];
      }
    });
  }

  // Throws unless `operands` are those of these layers, and the route is of these tokens and of slots that the operands have.
  void check(const BoundOperands* const* operands, size_t num_operands, const BoundRoute& route, int num_tokens) const {
    if (num_operands != parts_.size() || reduced_.size() != parts_.size() || route.num_tokens() != num_tokens)
      throw nb::value_error("as many operands as layers, and a route of these tokens, expected");
    for (size_t i = 0; i < parts_.size(); i++) {
      const Operands& of = operands[i]->operands();
      if (of.num_outputs != parts_[i].num_outputs || of.dtype != Dtype::kBfloat16 || reduced_[i] % of.rank)
        throw nb::value_error("the operands are not of this layer");
      if (route.num_slots() > of.num_slots) throw nb::value_error("the route names a slot that the operands do not have");
      for (size_t term = 0; term < route.num_terms(); term++) {
        const int basis = of.basis_of[route.route().slots[term]];
        if (basis < 0 || basis >= reduced_[i] / of.rank)
          throw nb::value_error("a slot is of a basis that this layer does not have");
      }
    }
  }

 private:
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

  static const void* weights_of(const Part& part) {
    return part.narrow ? static_cast<const void*>(part.narrow) : static_cast<const void*>(part.panels);
  }

  // A part with what is read after it: the next one, or `next`.
  Part followed(size_t i, const void* next) const {
    Part part = parts_[i];
    part.next = i + 1 < parts_.size() ? weights_of(parts_[i + 1]) : next;
    return part;
  }

  // A layer window by window: as soon as a window's outputs are there its deltas follow, and meanwhile the memory is asked for
  // those of the next one.
  void windows(const Part& part, const Tokens& tokens, int num_tokens, const BoundOperands& bound, const BoundRoute& route,
               const Step& step) const {
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
      multiply_(part, tokens, 0, num_tokens, panel, last_panel, ahead, sums);
      panel = last_panel;
      bound.expand()(operands, route.route(), step, window * route.num_active(), (window + 1) * route.num_active());
    }
  }

  void shared(const Part& part, const Tokens& tokens, int num_tokens, const BoundOperands& bound, const BoundRoute& route,
              const Step& step, const Share& share) const {
    const Operands& operands = bound.operands();
    const int64_t items = route.num_active() * operands.num_windows;
    one(part, tokens, num_tokens, share);
    barrier();
    bound.expand()(operands, route.route(), step, share.first(items), share.last(items));
  }

  // A share of a part: of its panels, and where there are few of them of the tokens too.
  void one(const Part& part, const Tokens& tokens, int num_tokens, const Share& share) const {
    float sums[kRowBlock * kPanelOutputs];
    Ahead ahead(nullptr, nullptr);
    const int panels = part.num_panels();
    const int row_parts = panels >= 4 * share.num_parts ? 1 : std::max(1, std::min(share.num_parts, num_tokens / 32));
    const int64_t items = int64_t{panels} * row_parts;
    for (int64_t item = share.first(items); item < share.last(items);) {
      const int row_part = static_cast<int>(item / panels), panel = static_cast<int>(item % panels);
      const int count = static_cast<int>(std::min<int64_t>(panels - panel, share.last(items) - item));
      const Share rows{row_part, row_parts};
      multiply_(part, tokens, static_cast<int>(rows.first(num_tokens)), static_cast<int>(rows.last(num_tokens)), panel,
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

  Multiply multiply_;
  Array<uint16_t, 1> panels_;
  std::optional<Array<float, 1>> bias_;
  std::optional<Array<int8_t, 1>> narrow_;
  std::optional<Array<float, 1>> scales_;
  std::vector<Part> parts_;
  Part shrink_{};
  std::vector<int> reduced_;
  int num_inputs_, num_outputs_ = 0, num_reduced_ = 0;
};

}  // namespace lori
