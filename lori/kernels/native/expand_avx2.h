// The kernel in AVX2. s in bfloat16 is looked up by permutations of its bytes, up to rank 64; beyond that, and in fp32, by
// gathers.
//
// A window's sums go to memory, in the order of the places, from which each row picks its own.
#pragma once

#include <immintrin.h>

#include "vectors.h"
#include "walk.h"

namespace lori {
namespace {

constexpr int kItemsAhead = 3, kLinesAhead = 3;  // as expand_avx512.h asks the memory ahead

LORI_INLINE __m256i load_256(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
LORI_INLINE __m128i load_128(const void* at) { return _mm_loadu_si128(static_cast<const __m128i*>(at)); }
LORI_INLINE __m256 high_halves(__m256i words) {
  return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(0xffff0000)));
}
LORI_INLINE __m256 low_halves(__m256i words) { return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)); }

// The columns of 8 rows.
LORI_INLINE __m256i load_columns(const uint8_t* columns) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(columns)));
}
LORI_INLINE __m256i load_columns(const uint16_t* columns) { return _mm256_cvtepu16_epi32(load_128(columns)); }
// The columns of 8 rows of two entries each: words of 32 bits have one in each half.
LORI_INLINE __m256i load_column_pairs(const uint8_t* columns) { return _mm256_cvtepu8_epi16(load_128(columns)); }
LORI_INLINE __m256i load_column_pairs(const uint16_t* columns) { return load_256(columns); }

// The sums of 16 rows: of the first 8, and of the others.
struct Sums {
  __m256 part[2];
};

// s of one token and basis in bfloat16, up to 16 kTables entries: their low bytes and their high bytes.
template <int kTables>
struct BfloatTable {
  using Value = uint16_t;
  __m256i low[kTables], high[kTables];

  BfloatTable(const uint8_t* row, int rank, float*) {
    alignas(32) uint16_t s[16 * kTables] = {};
    std::memcpy(s, row, sizeof(uint16_t) * rank);
    const __m128i evens = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m128i odds = _mm_setr_epi8(1, 3, 5, 7, 9, 11, 13, 15, -1, -1, -1, -1, -1, -1, -1, -1);
    for (int i = 0; i < kTables; i++) {
      const __m128i first = load_128(s + 16 * i), second = load_128(s + 16 * i + 8);
      low[i] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(_mm_shuffle_epi8(first, evens), _mm_shuffle_epi8(second, evens)));
      high[i] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(_mm_shuffle_epi8(first, odds), _mm_shuffle_epi8(second, odds)));
    }
  }
  // The bytes of a plane at 32 columns.
  static LORI_INLINE __m256i look_up(const __m256i* plane, __m256i columns) {
    const __m256i is_16 = _mm256_slli_epi16(columns, 3);  // bit 4 of a byte becomes its highest
    const auto of_two = [&](int i) {
      return _mm256_blendv_epi8(_mm256_shuffle_epi8(plane[i], columns), _mm256_shuffle_epi8(plane[i + 1], columns), is_16);
    };
    if constexpr (kTables == 2) {
      return of_two(0);
    } else {
      return _mm256_blendv_epi8(of_two(0), of_two(2), _mm256_slli_epi16(columns, 2));
    }
  }
  // Adds two entries of each row.
  LORI_INLINE void add_pair(Sums& sums, const uint16_t* values, const uint8_t* columns) const {
    // The bytes lie so that the words that are made of them come out in the values' order.
    const __m256i at = _mm256_permute4x64_epi64(load_256(columns), 0xd8);
    const __m256i lows = look_up(low, at), highs = look_up(high, at);
    const __m256i found[] = {_mm256_unpacklo_epi8(lows, highs), _mm256_unpackhi_epi8(lows, highs)};
    for (int i = 0; i < 2; i++) {
      const __m256i value = load_256(values + 16 * i);
      sums.part[i] = _mm256_fmadd_ps(high_halves(value), high_halves(found[i]), sums.part[i]);
      sums.part[i] = _mm256_fmadd_ps(low_halves(value), low_halves(found[i]), sums.part[i]);
    }
  }
  // Adds one entry of each row.
  LORI_INLINE void add_one(Sums& sums, const uint16_t* values, const uint8_t* columns) const {
    const __m256i at = _mm256_castsi128_si256(load_128(columns));
    const __m128i lows = _mm256_castsi256_si128(look_up(low, at)), highs = _mm256_castsi256_si128(look_up(high, at));
    const __m128i found[] = {_mm_unpacklo_epi8(lows, highs), _mm_unpackhi_epi8(lows, highs)};
    for (int i = 0; i < 2; i++) {
      const __m256 value = low_halves(_mm256_cvtepu16_epi32(load_128(values + 8 * i)));
      sums.part[i] = _mm256_fmadd_ps(value, low_halves(_mm256_cvtepu16_epi32(found[i])), sums.part[i]);
    }
  }
};

// s in bfloat16 of any rank, gathered from memory.
struct BfloatMemory {
  using Value = uint16_t;
  const float* s;

  BfloatMemory(const uint8_t* row, int rank, float* buffer) : s(buffer) {
    for (int i = 0; i < rank; i++) {
      uint16_t narrow;
      std::memcpy(&narrow, row + 2 * i, sizeof(narrow));
      buffer[i] = bits_of<float>(static_cast<uint32_t>(narrow) << 16);
    }
  }
  template <typename Column>
  LORI_INLINE void add_pair(Sums& sums, const uint16_t* values, const Column* columns) const {
    for (int i = 0; i < 2; i++) {
      const __m256i value = load_256(values + 16 * i), column = load_column_pairs(columns + 16 * i);
      const __m256 second = _mm256_i32gather_ps(s, _mm256_srli_epi32(column, 16), 4);
      const __m256 first = _mm256_i32gather_ps(s, _mm256_and_si256(column, _mm256_set1_epi32(0xffff)), 4);
      sums.part[i] = _mm256_fmadd_ps(high_halves(value), second, sums.part[i]);
      sums.part[i] = _mm256_fmadd_ps(low_halves(value), first, sums.part[i]);
    }
  }
  template <typename Column>
  LORI_INLINE void add_one(Sums& sums, const uint16_t* values, const Column* columns) const {
    for (int i = 0; i < 2; i++) {
      const __m256 value = low_halves(_mm256_cvtepu16_epi32(load_128(values + 8 * i)));
      sums.part[i] = _mm256_fmadd_ps(value, _mm256_i32gather_ps(s, load_columns(columns + 8 * i), 4), sums.part[i]);
    }
  }
};

// s in fp32.
struct FloatMemory {
  using Value = float;
  const float* s;

  FloatMemory(const uint8_t* row, int, float*) : s(reinterpret_cast<const float*>(row)) {}
  template <typename Column>
  LORI_INLINE void add_one(Sums& sums, const float* values, const Column* columns) const {
    for (int i = 0; i < 2; i++)
      sums.part[i] = _mm256_fmadd_ps(_mm256_loadu_ps(values + 8 * i), _mm256_i32gather_ps(s, load_columns(columns + 8 * i), 4),
                                     sums.part[i]);
  }
};

// sums[place] = the products of a window with s.
template <typename Column, typename Source>
LORI_INLINE void multiply(const Window& window, int num_slices, const Source& s, const uint8_t* later, float* sums) {
  using Value = typename Source::Value;
  constexpr size_t kStepBytes = kLanes * (sizeof(Value) + sizeof(Column));
  const uint8_t* at = window.steps;
  int begin = 0;
  Sums of_slice[2] = {};
  for (int slice = 0; slice < num_slices; slice++) {
    Sums sum = {};
    unsigned steps = window.ends[slice] - begin;
    begin = window.ends[slice];
    if constexpr (sizeof(Value) == 2) {
      for (const uint8_t* last = at + steps / 2 * (2 * kStepBytes); at != last; at += 2 * kStepBytes)
        s.add_pair(sum, reinterpret_cast<const Value*>(at), reinterpret_cast<const Column*>(at + 2 * kLanes * sizeof(Value)));
      steps %= 2;
    }
    for (; steps > 0; steps--, at += kStepBytes)
      s.add_one(sum, reinterpret_cast<const Value*>(at), reinterpret_cast<const Column*>(at + kLanes * sizeof(Value)));
    for (int line = 0; line < kLinesAhead; line++) __builtin_prefetch(later + 64 * (kLinesAhead * slice + line));
    of_slice[slice % 2] = sum;
    if (slice % 2 == 0 && slice + 1 < num_slices) continue;
    for (int i = 0; i < 2; i++) {  // lane by lane in turn, see place_of
      const __m256 low = _mm256_unpacklo_ps(of_slice[0].part[i], of_slice[1].part[i]);
      const __m256 high = _mm256_unpackhi_ps(of_slice[0].part[i], of_slice[1].part[i]);
      float* to = sums + 32 * (slice / 2) + 16 * i;
      _mm256_store_ps(to, _mm256_permute2f128_ps(low, high, 0x20));
      _mm256_store_ps(to + 8, _mm256_permute2f128_ps(low, high, 0x31));
    }
  }
}

LORI_INLINE Floats pick(const float* sums, const uint8_t* places) {
  Floats picked;
  for (int i = 0; i < kParts; i++, places += kWidth)
    picked.part[i] = (Vector)_mm256_setr_ps(sums[places[0]], sums[places[1]], sums[places[2]], sums[places[3]], sums[places[4]],
                                            sums[places[5]], sums[places[6]], sums[places[7]]);
  return picked;
}

// Adds weight * sums to the rows of a window: the first term reads y, the last writes it, `totals` are kept between them.
template <typename Value>
LORI_INLINE void add_rows(Value* y, int num_rows, const uint8_t* places, const float* sums, float weight, bool is_first,
                          bool is_last, float* totals) {
  for (int row = 0; row < num_rows; row += kLanes) {
    Value some[kLanes] = {};
    uint8_t of_some[kLanes] = {};
    const int left = num_rows - row;
    Value* at = y + row;
    if (left < kLanes) {
      std::memcpy(some, at, sizeof(Value) * left);
      std::memcpy(of_some, places + row, left);
    }
    const Floats picked = pick(sums, left < kLanes ? of_some : places + row);
    Floats total = is_first ? load(left < kLanes ? some : at) : load(totals + row);
    for (int i = 0; i < kParts; i++) total.part[i] += picked.part[i] * weight;
    if (!is_last) {
      store(totals + row, total);
    } else if (left < kLanes) {
      store(some, total);
      std::memcpy(at, some, sizeof(Value) * left);
    } else {
      store(at, total);
    }
  }
}

template <typename Column, typename Source>
void expand_item(const Operands& operands, const Route& route, const Step& step, const Item& item, const Item& later) {
  using Value = typename Source::Value;
  const Segment& segment = *item.segment;
  int term = next_term(operands, route, segment, segment.first_term, item.window), later_term = later.segment->first_term;
  if (term == segment.last_term) return;
  const int rows_left = operands.num_outputs - item.window * kWindowRows,
            num_rows = rows_left < kWindowRows ? rows_left : kWindowRows;
  Value* y = reinterpret_cast<Value*>(step.y + item.token * step.y_stride) + item.window * kWindowRows;
  float buffer[kMaxRank], totals[kWindowRows];
  alignas(32) float sums[kWindowRows];
  for (bool is_first = true;; is_first = false) {
    const int slot = route.slots[term];
    const float weight = route.weights[term];
    const Window block(operands.block(slot, item.window), kLanes * (sizeof(Value) + sizeof(Column)));
    const Source s(
        step.s + item.token * step.s_stride + sizeof(Value) * operands.basis_of[slot] * static_cast<size_t>(operands.rank),
        operands.rank, buffer);
    term = next_term(operands, route, segment, term + 1, item.window);
    const bool is_last = term == segment.last_term;
    const uint8_t* later_block = operands.block(route.slots[later_term], later.window);
    if (later_term + 1 < later.segment->last_term) later_term++;
    multiply<Column>(block, (num_rows + kLanes - 1) / kLanes, s, later_block ? later_block : block.steps, sums);
    add_rows(y, num_rows, block.places, sums, weight, is_first, is_last, totals);
    if (is_last) return;
  }
}

template <typename Column, typename Source>
void expand(const Operands& operands, const Route& route, const Step& step, int64_t first, int64_t last) {
  if (first == last) return;
  Walk walk(operands, route, first), ahead(operands, route, first);
  for (int i = 0; i < kItemsAhead; i++) ++ahead;
  for (int64_t i = first; i < last; i++, ++walk, ++ahead) expand_item<Column, Source>(operands, route, step, *walk, *ahead);
}

inline Expand choose(const Operands& operands) {
  if (operands.dtype == Dtype::kFloat32)
    return operands.rank <= 256 ? expand<uint8_t, FloatMemory> : expand<uint16_t, FloatMemory>;
  if (operands.rank <= 32) return expand<uint8_t, BfloatTable<2>>;
  if (operands.rank <= 64) return expand<uint8_t, BfloatTable<4>>;
  return operands.rank <= 256 ? expand<uint8_t, BfloatMemory> : expand<uint16_t, BfloatMemory>;
}

}  // namespace
}  // namespace lori
