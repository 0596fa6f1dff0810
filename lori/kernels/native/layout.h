// The run-time layout as the kernels see it; lori/kernels/layout.py says what it is and why.
#pragma once

#include <cstddef>
#include <cstdint>

// The files of the instruction sets include this: what is not inlined, the linker might give to all as one of them compiled it.
#define LORI_INLINE __attribute__((always_inline)) inline

namespace lori {

constexpr int kLanes = 16;         // rows of a slice
constexpr int kWindowSlices = 16;  // slices of a full window
constexpr int kWindowRows = kLanes * kWindowSlices;
constexpr int kUnit = 16;  // bytes; windows start at multiples of it
constexpr int kMaxRank = 2048;
constexpr int kHeaderBytes = 2 * kWindowSlices;

// As std::min, which the linker might take from a file of another instruction set.
LORI_INLINE int least(int a, int b) { return a < b ? a : b; }

enum class Dtype { kBfloat16, kFloat32 };

// The place of the row that comes at a position in its window's order.
LORI_INLINE int place_of(int position) {
  const int slice = position / kLanes, lane = position % kLanes;
  return 32 * (slice / 2) + 2 * lane + slice % 2;
}

// One window of one slot.
struct Window {
  const uint16_t* ends;   // (kWindowSlices,) in steps: slice j has the steps ends[j - 1] .. ends[j]
  const uint8_t* steps;   // the steps, one or two together: values, then columns
  const uint8_t* places;  // (rows,) the place of a row's sum: 32 (slice / 2) + 2 lane + slice % 2

  LORI_INLINE Window(const uint8_t* block, size_t step_bytes)
      : ends(reinterpret_cast<const uint16_t*>(block)),
        steps(block + kHeaderBytes),
        places(steps + step_bytes * ends[kWindowSlices - 1]) {}
};

struct Operands {
  const uint8_t* pool;
  const int32_t* starts;    // (num_slots, num_windows) where a window begins in the pool, in units; negative: empty
  const int32_t* basis_of;  // (num_slots,)
  int num_slots, num_outputs, rank;
  Dtype dtype;
  int num_slices, num_windows;

  LORI_INLINE Operands(const uint8_t* pool, const int32_t* starts, const int32_t* basis_of, int num_slots, int num_outputs,
                       int rank, Dtype dtype)
      : pool(pool),
        starts(starts),
        basis_of(basis_of),
        num_slots(num_slots),
        num_outputs(num_outputs),
        rank(rank),
        dtype(dtype),
        num_slices((num_outputs + kLanes - 1) / kLanes),
        num_windows((num_slices + kWindowSlices - 1) / kWindowSlices) {}

  // Returns the block of a window, or null where it is empty.
  LORI_INLINE const uint8_t* block(int slot, int window) const {
    const int32_t start = starts[static_cast<int64_t>(slot) * num_windows + window];
    return start < 0 ? nullptr : pool + static_cast<int64_t>(start) * kUnit;
  }
};

// Terms first_term .. last_term of the route apply to the tokens start .. stop.
struct Segment {
  int32_t start, stop, first_term, last_term;
};

struct Route {
  const Segment* segments;  // ascending, none overlaps another, none without terms
  const int32_t* slots;
  const float* weights;
  int num_segments, num_terms;
};

struct Step {
  uint8_t* y;
  const uint8_t* s;
  ptrdiff_t y_stride, s_stride;  // bytes from a token to the next
};

// Adds the deltas of the items first .. last; an item is one window of one token of the route, counted window by window.
using Expand = void (*)(const Operands&, const Route&, const Step&, int64_t first, int64_t last);

}  // namespace lori
