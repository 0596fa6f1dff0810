#include "pack.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace lori {
namespace {

// Nothing below branches on an entry: rows are short, and a processor guesses their ends wrong.

// Divides numbers below 2^31 by one up to kMaxRank, exactly, without a division.
class Divisor {
 public:
  explicit Divisor(int divisor) : factor_(((uint64_t{1} << 63) - 1) / divisor + 1) {}
  uint32_t divide(int32_t value) const {
    return static_cast<uint32_t>(static_cast<unsigned __int128>(factor_) * (2 * static_cast<uint64_t>(value)) >> 64);
  }

 private:
  uint64_t factor_;  // 2^63 / divisor, rounded up
};

// Returns where the entries of each row end, one past the last.
std::vector<uint32_t> row_ends(const Kept& b, const Divisor& rank) {
  std::vector<uint32_t> ends(b.num_outputs);
  for (size_t i = 0; i < b.nnz; i++) ends[rank.divide(b.indices[i])] = static_cast<uint32_t>(i + 1);
  uint32_t end = 0;
  for (uint32_t& row : ends) row = end = std::max(end, row);
  return ends;
}

// One window of B: its rows and their entries, and the order that the rows come in.
struct Block {
  const uint32_t* row_ends;  // of its rows
  uint32_t first, last;      // its entries
  int first_row, num_rows;
  uint8_t positions[kWindowRows];  // where each row comes in the order
  uint16_t ends[kWindowSlices];    // of the slices, in steps

  uint32_t begin(int row) const { return row ? row_ends[row - 1] : first; }
  int length(int row) const { return static_cast<int>(row_ends[row] - begin(row)); }

  // Longest rows first, rows of one length in their order.
  void sort() {
    int longest = 0, slice_steps[kWindowSlices] = {};
    for (int row = 0; row < num_rows; row++) longest = std::max(longest, length(row));
    std::array<int, kMaxRank + 2> at;
    std::fill_n(at.begin(), longest + 2, 0);
    for (int row = 0; row < num_rows; row++) at[longest - length(row) + 1]++;
    for (int i = 0; i <= longest; i++) at[i + 1] += at[i];
    for (int row = 0; row < num_rows; row++) {
      const int position = at[longest - length(row)]++;
      positions[row] = static_cast<uint8_t>(position);
      slice_steps[position / kLanes] = std::max(slice_steps[position / kLanes], length(row));
    }
    for (int slice = 0, end = 0; slice < kWindowSlices; slice++) ends[slice] = static_cast<uint16_t>(end += slice_steps[slice]);
  }
};

// Writes the steps of a window; `Address` says where, and this gives the same.
template <typename Value, typename Column>
void fill(uint8_t* steps, const Kept& b, const Divisor& rank, const Block& block) {
  constexpr uint32_t kPerLane = 4 / sizeof(Value), kStepBytes = kLanes * (sizeof(Value) + sizeof(Column));
  struct {
    uint32_t first, num_together;    // its first entry, and how many stand before an odd step
    uint32_t value, column;          // where its first pair of entries stands
    uint32_t value_odd, column_odd;  // how far before where a pair would stand one of an odd step does
  } rows[kWindowRows];
  for (int row = 0; row < block.num_rows; row++) {
    const uint32_t slice = block.positions[row] / kLanes, lane = block.positions[row] % kLanes;
    const uint32_t begin = slice ? block.ends[slice - 1] : 0, num_steps = block.ends[slice] - begin, chunk = begin * kStepBytes;
    rows[row] = {block.begin(row),
                 num_steps / kPerLane * kPerLane,
                 chunk + 4 * lane,
                 chunk + 4 * kLanes + kPerLane * lane * uint32_t{sizeof(Column)},
                 (kPerLane - 1) * lane * uint32_t{sizeof(Value)},
                 (kPerLane - 1) * (kLanes * uint32_t{sizeof(Value)} + lane * uint32_t{sizeof(Column)})};
  }
  // Of its own, since what is written below might be what a pointer points at.
  const Divisor divisor = rank;
  const int32_t* const indices = b.indices;
  const uint8_t* const values = b.values;
  const uint32_t divided_by = static_cast<uint32_t>(b.rank), first_row = static_cast<uint32_t>(block.first_row),
                 last = block.last;
  for (uint32_t i = block.first; i < last; i++) {
    const uint32_t number = divisor.divide(indices[i]);
    const auto& row = rows[number - first_row];
    const uint32_t entry = i - row.first, second = entry % kPerLane, chunk = (entry - second) * kStepBytes;
    const uint32_t is_odd = kPerLane == 1 || entry < row.num_together ? 0 : ~uint32_t{0};
    const Column column = static_cast<Column>(indices[i] - number * divided_by);
    const uint32_t value_at = row.value + chunk + second * uint32_t{sizeof(Value)} - (row.value_odd & is_odd);
    const uint32_t column_at = row.column + chunk + second * uint32_t{sizeof(Column)} - (row.column_odd & is_odd);
    std::memcpy(steps + value_at, values + i * sizeof(Value), sizeof(Value));
    std::memcpy(steps + column_at, &column, sizeof(Column));
  }
}

}  // namespace

void pack(const Kept& b, Dtype dtype, int column_bytes, Packed& packed) {
  const size_t step_bytes = kLanes * ((dtype == Dtype::kBfloat16 ? 2 : 4) + column_bytes), origin = packed.blocks.size();
  const auto fill_steps = dtype == Dtype::kBfloat16 ? (column_bytes == 1 ? fill<uint16_t, uint8_t> : fill<uint16_t, uint16_t>)
                                                    : (column_bytes == 1 ? fill<float, uint8_t> : fill<float, uint16_t>);
  const Divisor rank(b.rank);
  const std::vector<uint32_t> ends = row_ends(b, rank);
  Block block;
  block.last = 0;
  for (int first_row = 0; first_row < b.num_outputs; first_row += kWindowRows) {
    block.first_row = first_row, block.num_rows = std::min(kWindowRows, b.num_outputs - first_row);
    block.row_ends = ends.data() + first_row;
    block.first = block.last, block.last = block.row_ends[block.num_rows - 1];
    if (block.first == block.last) {
      packed.starts.push_back(-1);
      continue;
    }
    block.sort();
    const size_t start = packed.blocks.size(), num_step_bytes = step_bytes * block.ends[kWindowSlices - 1];
    const size_t num_bytes = kHeaderBytes + num_step_bytes + (block.num_rows + kLanes - 1) / kLanes * kLanes;
    packed.starts.push_back(static_cast<int32_t>((start - origin) / kUnit));
    packed.blocks.resize(start + (num_bytes + kUnit - 1) / kUnit * kUnit);
    uint8_t* out = packed.blocks.data() + start;
    std::memcpy(out, block.ends, kHeaderBytes);
    fill_steps(out + kHeaderBytes, b, rank, block);
    for (int row = 0; row < block.num_rows; row++)
      out[kHeaderBytes + num_step_bytes + row] = static_cast<uint8_t>(place_of(block.positions[row]));
  }
}

}  // namespace lori
