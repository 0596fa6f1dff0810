// B of one adapter and module into the run-time layout.
#pragma once

#include <cstring>
#include <vector>

#include "layout.h"

namespace lori {

struct Packed {
  std::vector<uint8_t> blocks;  // the windows one after the other, each in whole units
  std::vector<int32_t> starts;  // (num_windows,) where each begins, in units of its module's blocks; -1: empty
};

// B (num_outputs, rank) of which `nnz` entries are there: `indices`, row-major and ascending, of `values`, which are of the
// layout's dtype and need not be aligned.
struct Kept {
  const int32_t* indices;
  const uint8_t* values;
  size_t nnz;
  int num_outputs, rank;
};

inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Appends B to `packed`. `column_bytes` are 1 or 2, as the operands' rank has it, which may be above B's own.
void pack(const Kept& b, Dtype dtype, int column_bytes, Packed& packed);

}  // namespace lori
