// The kernel as plain loops; the compiler makes of them what the flags of the including file allow.
#pragma once

#include <cstring>

#include "walk.h"

namespace lori {
namespace {

inline float widen(float value) { return value; }
inline float widen(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void narrow(float value, float* out) { *out = value; }
inline void narrow(float value, uint16_t* out) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  *out =
      value != value ? static_cast<uint16_t>(bits >> 16 | 0x40) : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Adds kEntries entries of each row.
template <int kEntries, typename Value, typename Column>
void add(const uint8_t* at, const float* s, float* sum) {
  const Value* values = reinterpret_cast<const Value*>(at);
  const Column* columns = reinterpret_cast<const Column*>(values + kEntries * kLanes);
  for (int entry = kEntries - 1; entry >= 0; entry--)
    for (int lane = 0; lane < kLanes; lane++)
      sum[lane] += widen(values[kEntries * lane + entry]) * s[columns[kEntries * lane + entry]];
}

// sums[place] = the products of one window with s, fp32.
template <typename Value, typename Column>
void multiply(const Window& window, int num_slices, const float* s, float* sums) {
  constexpr int kPerLane = 4 / sizeof(Value);  // entries of a row that lie together
  constexpr size_t kStepBytes = kLanes * (sizeof(Value) + sizeof(Column));
  const uint8_t* at = window.steps;
  int begin = 0;
  for (int slice = 0; slice < num_slices; slice++) {
    float sum[kLanes] = {};
    int steps = window.ends[slice] - begin;
    begin = window.ends[slice];
    for (; steps >= kPerLane; steps -= kPerLane, at += kPerLane * kStepBytes) add<kPerLane, Value, Column>(at, s, sum);
    for (; steps > 0; steps--, at += kStepBytes) add<1, Value, Column>(at, s, sum);
    for (int lane = 0; lane < kLanes; lane++) sums[place_of(slice * kLanes + lane)] = sum[lane];
  }
}

template <typename Value, typename Column>
void expand_item(const Operands& operands, const Route& route, const Step& step, const Item& item) {
  const Segment& segment = *item.segment;
  const int first_row = item.window * kWindowRows;
  const int num_rows = operands.num_outputs - first_row < kWindowRows ? operands.num_outputs - first_row : kWindowRows;
  float total[kWindowRows] = {}, sums[kWindowRows], s[kMaxRank];
  bool any = false;
  for (int term = segment.first_term;; term++) {
    term = next_term(operands, route, segment, term, item.window);
    if (term == segment.last_term) break;
    any = true;
    const int slot = route.slots[term];
    const Window block(operands.block(slot, item.window), kLanes * (sizeof(Value) + sizeof(Column)));
    const Value* narrow_s = reinterpret_cast<const Value*>(step.s + item.token * step.s_stride) +
                            static_cast<int64_t>(operands.basis_of[slot]) * operands.rank;
    for (int i = 0; i < operands.rank; i++) s[i] = widen(narrow_s[i]);
    multiply<Value, Column>(block, (num_rows + kLanes - 1) / kLanes, s, sums);
    for (int row = 0; row < num_rows; row++) total[row] += route.weights[term] * sums[block.places[row]];
  }
  if (!any) return;
  Value* y = reinterpret_cast<Value*>(step.y + item.token * step.y_stride) + first_row;
  for (int row = 0; row < num_rows; row++) narrow(widen(y[row]) + total[row], y + row);
}

template <typename Value, typename Column>
void expand(const Operands& operands, const Route& route, const Step& step, int64_t first, int64_t last) {
  if (first == last) return;
  Walk walk(operands, route, first);
  for (int64_t i = first; i < last; i++, ++walk) expand_item<Value, Column>(operands, route, step, *walk);
}

inline Expand choose(const Operands& operands) {
  if (operands.dtype == Dtype::kBfloat16) return operands.rank <= 256 ? expand<uint16_t, uint8_t> : expand<uint16_t, uint16_t>;
  return operands.rank <= 256 ? expand<float, uint8_t> : expand<float, uint16_t>;
}

}  // namespace
}  // namespace lori
