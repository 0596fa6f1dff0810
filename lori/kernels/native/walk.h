// Walks over the items of a step. Included by each instruction set's file, so everything here has internal linkage: the linker
// must not give one of them code compiled for another.
#pragma once

#include "layout.h"

namespace lori {
namespace {

// Asks for the beginning of what the segment after this one reads, which no hardware foresees: it may lie anywhere in the pool.
inline void prefetch(const Operands& operands, const Route& route, int segment) {
  constexpr int kLines = 8;
  const uint8_t* block = operands.block(route.slots[route.segments[segment].first_term], 0);
  if (!block) return;
  for (int i = 0; i < kLines; i++) __builtin_prefetch(block + 64 * i);
}

// Calls visit(token, window, segment) for the items first .. last.
template <typename Visit>
void walk(const Operands& operands, const Route& route, int64_t first, int64_t last, Visit&& visit) {
  const int64_t num_windows = operands.num_windows;
  int64_t begin = 0;  // the first item of the segment
  for (int i = 0; i < route.num_segments && begin < last; i++) {
    const Segment& segment = route.segments[i];
    const int64_t end = begin + (segment.stop - segment.start) * num_windows;
    int64_t item = first > begin ? first : begin;
    const int64_t stop = last < end ? last : end;
    if (item < stop) {
      if (i + 1 < route.num_segments) prefetch(operands, route, i + 1);
      int token = segment.start + static_cast<int>((item - begin) / num_windows);
      int window = static_cast<int>((item - begin) % num_windows);
      for (; item < stop; item++) {
        visit(token, window, segment);
        if (++window == num_windows) window = 0, token++;
      }
    }
    begin = end;
  }
}

// Returns the first term at or after `term` whose adapter has entries in `window`.
inline int next_term(const Operands& operands, const Route& route, const Segment& segment, int term, int window) {
  while (term < segment.last_term && !operands.block(route.slots[term], window)) term++;
  return term;
}

}  // namespace
}  // namespace lori
