#include "pack.h"

#include <algorithm>
#include <cstring>

namespace lori {
namespace {

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Where the entry of a lane lies among a window's steps, in bytes. `begin` and `end` are those of its slice.
template <typename Value, typename Column>
struct Address {
  size_t value, column;

  Address(int begin, int end, int lane, int entry) {
    constexpr int kPerLane = 4 / sizeof(Value);
    const bool is_together = entry < (end - begin) / kPerLane * kPerLane;
    const int together = is_together ? kPerLane : 1, within = together * lane + entry % together;
    const size_t chunk = (begin + entry / together * together) * kLanes * (sizeof(Value) + sizeof(Column));
    value = chunk + within * sizeof(Value);
    column = chunk + together * kLanes * sizeof(Value) + within * sizeof(Column);
  }
};

template <typename Value, typename Column>
void fill(uint8_t* block, const uint16_t* ends, const uint8_t* positions, const Kept& b, const size_t* row_begins, int num_rows) {
  uint8_t* steps = block + kHeaderBytes;
  for (int row = 0; row < num_rows; row++) {
    const int slice = positions[row] / kLanes, begin = slice ? ends[slice - 1] : 0;
    for (size_t i = row_begins[row]; i < row_begins[row + 1]; i++) {
      const Address<Value, Column> at(begin, ends[slice], positions[row] % kLanes, static_cast<int>(i - row_begins[row]));
      if constexpr (sizeof(Value) == 2)
        *reinterpret_cast<Value*>(steps + at.value) = to_bfloat16(b.values[i]);
      else
        *reinterpret_cast<Value*>(steps + at.value) = b.values[i];
      *reinterpret_cast<Column*>(steps + at.column) = static_cast<Column>(b.indices[i] % b.rank);
    }
  }
}

template <typename Value, typename Column>
void unpack_window(const Operands& operands, const Window& block, int window, Value* out) {
  const int first_row = window * kWindowRows, num_rows = std::min(kWindowRows, operands.num_outputs - first_row);
  int row_at[kWindowRows] = {};  // by place
  for (int row = 0; row < num_rows; row++) row_at[block.places[row]] = first_row + row;
  int begin = 0;
  for (int slice = 0; slice < kWindowSlices; slice++) {
    const int end = block.ends[slice];
    for (int lane = 0; lane < kLanes; lane++) {
      Value* row = out + static_cast<int64_t>(row_at[place_of(slice * kLanes + lane)]) * operands.rank;
      for (int entry = 0; entry < end - begin; entry++) {
        const Address<Value, Column> at(begin, end, lane, entry);
        const Value value = *reinterpret_cast<const Value*>(block.steps + at.value);
        if (value) row[*reinterpret_cast<const Column*>(block.steps + at.column)] = value;  // padding is zero
      }
    }
    begin = end;
  }
}

}  // namespace

void unpack(const Operands& operands, int slot, uint8_t* out) {
  const size_t value_bytes = operands.dtype == Dtype::kBfloat16 ? 2 : 4;
  std::memset(out, 0, value_bytes * operands.rank * operands.num_outputs);
  for (int window = 0; window < operands.num_windows; window++) {
    if (!operands.block(slot, window)) continue;
    const Window block(operands.block(slot, window), kLanes * (value_bytes + (operands.rank <= 256 ? 1 : 2)));
    if (operands.dtype == Dtype::kBfloat16) {
      const auto run = operands.rank <= 256 ? unpack_window<uint16_t, uint8_t> : unpack_window<uint16_t, uint16_t>;
      run(operands, block, window, reinterpret_cast<uint16_t*>(out));
    } else {
      const auto run = operands.rank <= 256 ? unpack_window<float, uint8_t> : unpack_window<float, uint16_t>;
      run(operands, block, window, reinterpret_cast<float*>(out));
    }
  }
}

Packed pack(const Kept& b, Dtype dtype, int column_bytes) {
  const Operands shape{nullptr, nullptr, nullptr, 1, b.num_outputs, b.rank, dtype};
  const size_t entry_bytes = (dtype == Dtype::kBfloat16 ? 2 : 4) + column_bytes;
  Packed packed;
  size_t next = 0;
  for (int window = 0; window < shape.num_windows; window++) {
    const int num_rows = std::min(kWindowRows, b.num_outputs - window * kWindowRows);
    const int num_slices = (num_rows + kLanes - 1) / kLanes;
    size_t row_begins[kWindowRows + 1];
    int longest = 0;
    for (int row = 0; row < num_rows; row++) {
      row_begins[row] = next;
      const int64_t stop = static_cast<int64_t>(window * kWindowRows + row + 1) * b.rank;
      while (next < b.num_kept && b.indices[next] < stop) next++;
      longest = std::max(longest, static_cast<int>(next - row_begins[row]));
    }
    row_begins[num_rows] = next;
    if (!longest) {
      packed.starts.push_back(-1);
      continue;
    }
    // Longest rows first, rows of one length in their order.
    std::vector<int> at(longest + 2, 0);
    const auto length = [&](int row) { return static_cast<int>(row_begins[row + 1] - row_begins[row]); };
    for (int row = 0; row < num_rows; row++) at[longest - length(row) + 1]++;
    for (int i = 0; i <= longest; i++) at[i + 1] += at[i];
    uint8_t positions[kWindowRows];
    int slice_steps[kWindowSlices] = {};
    for (int row = 0; row < num_rows; row++) {
      const int position = at[longest - length(row)]++;
      positions[row] = static_cast<uint8_t>(position);
      slice_steps[position / kLanes] = std::max(slice_steps[position / kLanes], length(row));
    }
    uint16_t ends[kWindowSlices];
    for (int slice = 0, end = 0; slice < kWindowSlices; slice++) ends[slice] = static_cast<uint16_t>(end += slice_steps[slice]);
    const size_t num_bytes = kHeaderBytes + kLanes * num_slices + entry_bytes * kLanes * ends[num_slices - 1];
    const size_t start = packed.blocks.size();
    packed.starts.push_back(static_cast<int32_t>(start / kUnit));
    packed.blocks.resize(start + (num_bytes + kUnit - 1) / kUnit * kUnit);
    uint8_t* block = packed.blocks.data() + start;
    std::memcpy(block, ends, kHeaderBytes);
    uint8_t* places = block + kHeaderBytes + entry_bytes * kLanes * ends[num_slices - 1];
    for (int row = 0; row < num_rows; row++) places[row] = static_cast<uint8_t>(place_of(positions[row]));
    const auto fill_window = dtype == Dtype::kBfloat16 ? (column_bytes == 1 ? fill<uint16_t, uint8_t> : fill<uint16_t, uint16_t>)
                                                       : (column_bytes == 1 ? fill<float, uint8_t> : fill<float, uint16_t>);
    fill_window(block, ends, positions, b, row_begins, num_rows);
  }
  return packed;
}

}  // namespace lori
