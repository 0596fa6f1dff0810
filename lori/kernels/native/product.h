// The product of bfloat16 tokens with frozen weights, y = W x.
//
// The weights of a part, (D, N), are cut in panels of 48 outputs; the last has as many as are left, rounded up to 16 and filled
// with zeros. A panel is (N / 2, outputs, 2): two inputs of an output lie together, as one instruction of AVX-512 takes them;
// other sets widen them to fp32 in registers. Weights in int8 have a scale for each output. Shapes: T tokens, D outputs, N inputs
// (even).
#pragma once

#include "layout.h"

namespace lori {

constexpr int kPanelOutputs = 48;
constexpr int kTileRows = 8;      // tokens that are multiplied with a panel at a time: 24 sums of 16 outputs stay in registers
constexpr int kMaxInputs = 4096;  // of a panel at a time, so that it stays in the second cache
constexpr int kRowBlock = 256;    // tokens that meet all panels before the next do
constexpr int kWidened = 256;  // inputs of a panel of int8 that are made bfloat16 at a time, so that they stay in the first cache

struct Part {
  const uint16_t* panels;  // null where the weights are in int8
  const float* bias;       // (D,) or null
  int num_outputs, num_inputs;
  const int8_t* narrow = nullptr;
  const float* scales = nullptr;  // (D,), of `narrow`
  const void* next = nullptr;     // what one thread reads after these weights, which AMX asks for; null: nothing

  LORI_INLINE int num_panels() const { return (num_outputs + kPanelOutputs - 1) / kPanelOutputs; }
  LORI_INLINE int panel_outputs(int panel) const {  // rounded up
    const int left = num_outputs - panel * kPanelOutputs;
    return left < kPanelOutputs ? (left + kLanes - 1) / kLanes * kLanes : kPanelOutputs;
  }
  LORI_INLINE int64_t panel_at(int i) const { return int64_t{i} * kPanelOutputs * num_inputs; }  // in weights
};

// Weights of the panels of a part.
LORI_INLINE int64_t part_size(int num_outputs, int num_inputs) {
  return int64_t{num_inputs} * ((num_outputs + kLanes - 1) / kLanes * kLanes);
}

struct Tokens {
  const uint16_t* x;
  uint16_t* y;
  int64_t x_stride, y_stride;  // in values
};

// Memory that is asked for while the product computes: what adds the deltas after it finds them in the cache.
struct Ahead {
  struct Range {
    const uint8_t *begin, *end;
  };
  const Range *next, *last;
  const uint8_t *at, *end;
  Ahead(const Range* first, const Range* last) : next(first), last(last), at(nullptr), end(nullptr) {}
};

// Multiplies the tokens first_row .. last_row with the panels first_panel .. last_panel. `sums` is scratch: kRowBlock x
// kPanelOutputs.
using Multiply = void (*)(const Part&, const Tokens&, int first_row, int last_row, int first_panel, int last_panel, Ahead&,
                          float* sums);

// Lays out weights (D, N), row by row, as panels.
template <typename Weight>
void pack_part(const Weight* weight, int num_outputs, int num_inputs, Weight* panels);

}  // namespace lori
