// B of one adapter and module into the run-time layout, and back.
#pragma once

#include <vector>

#include "layout.h"

namespace lori {

struct Packed {
  std::vector<uint8_t> blocks;  // the windows one after the other, each in whole units
  std::vector<int32_t> starts;  // (num_windows,) where each begins, in units; -1: empty
};

// B (num_outputs, rank) of which `num_kept` entries are there: `indices`, row-major and ascending, of `values`.
struct Kept {
  const int32_t* indices;
  const float* values;
  size_t num_kept;
  int num_outputs, rank;
};

// `column_bytes` are 1 or 2, as the operands' rank has it, which may be above B's own.
Packed pack(const Kept& b, Dtype dtype, int column_bytes);

// Writes the B of one slot as (num_outputs, rank) of the operands' dtype.
void unpack(const Operands& operands, int slot, uint8_t* out);

}  // namespace lori
