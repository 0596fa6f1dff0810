// The kernel in AVX2. s is looked up by permutations: in bfloat16 up to rank 64, in fp32 up to 32; beyond that by gathers.
//
// A window's sums go to memory, in the order of the places, from which each row picks its own. Four tokens with the same terms are
// computed together: their sums lie side by side, and one load picks all four.
#pragma once

#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "walk.h"

namespace lori {
namespace {

constexpr int kGroup = 4;                             // tokens with the same terms for which a window is read once
constexpr int kItemsAhead = kGroup, kLinesAhead = 3;  // the memory is asked ahead for the block after a group

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
  static constexpr bool kMayGroup = true;
  using Value = uint16_t;
  __m256i low[kTables], high[kTables];

  LORI_INLINE void read(const uint8_t* row, int rank, float*) {
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
    const auto select = [&](int i) {
      return _mm256_blendv_epi8(_mm256_shuffle_epi8(plane[i], columns), _mm256_shuffle_epi8(plane[i + 1], columns), is_16);
    };
    if constexpr (kTables == 2) {
      return select(0);
    } else {
      return _mm256_blendv_epi8(select(0), select(2), _mm256_slli_epi16(columns, 2));
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
  static constexpr bool kMayGroup = false;  // each token would need a buffer
  using Value = uint16_t;
  const float* s;

  LORI_INLINE void read(const uint8_t* row, int rank, float* buffer) {
    s = buffer;
    for (int i = 0; i < rank; i++) {
      uint16_t narrow;
      std::memcpy(&narrow, row + 2 * i, sizeof(narrow));
      const uint32_t bits = static_cast<uint32_t>(narrow) << 16;
      std::memcpy(buffer + i, &bits, sizeof(bits));
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

// s in fp32, up to 32 entries.
struct FloatTable {
  static constexpr bool kMayGroup = true;
  using Value = float;
  __m256 s[4];

  LORI_INLINE void read(const uint8_t* row, int rank, float*) {
    alignas(32) float values[32] = {};
    std::memcpy(values, row, sizeof(float) * rank);
    for (int i = 0; i < 4; i++) s[i] = _mm256_load_ps(values + 8 * i);
  }
  LORI_INLINE void add_one(Sums& sums, const float* values, const uint8_t* columns) const {
    for (int i = 0; i < 2; i++) {
      const __m256i at = load_columns(columns + 8 * i);
      const __m256 is_8 = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)), is_16 = _mm256_castsi256_ps(_mm256_slli_epi32(at, 27));
      const auto select = [&](int first) {
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(s[first], at), _mm256_permutevar8x32_ps(s[first + 1], at), is_8);
      };
      const __m256 found = _mm256_blendv_ps(select(0), select(2), is_16);
      sums.part[i] = _mm256_fmadd_ps(_mm256_loadu_ps(values + 8 * i), found, sums.part[i]);
    }
  }
};

// s in fp32 of any rank, gathered from memory.
struct FloatMemory {
  static constexpr bool kMayGroup = true;
  using Value = float;
  const float* s;

  LORI_INLINE void read(const uint8_t* row, int, float*) { s = reinterpret_cast<const float*>(row); }
  template <typename Column>
  LORI_INLINE void add_one(Sums& sums, const float* values, const Column* columns) const {
    for (int i = 0; i < 2; i++)
      sums.part[i] = _mm256_fmadd_ps(_mm256_loadu_ps(values + 8 * i), _mm256_i32gather_ps(s, load_columns(columns + 8 * i), 4),
                                     sums.part[i]);
  }
};

// The same four values of four vectors side by side: in each half, to[i] = {from[0][i], from[1][i], from[2][i], from[3][i]}.
LORI_INLINE void transpose(const __m256* from, __m256* to) {
  const __m256 low = _mm256_unpacklo_ps(from[0], from[1]), high = _mm256_unpackhi_ps(from[0], from[1]);
  const __m256 other_low = _mm256_unpacklo_ps(from[2], from[3]), other_high = _mm256_unpackhi_ps(from[2], from[3]);
  const auto halves = [](__m256 a, __m256 b) { return _mm256_shuffle_ps(a, b, 0x44); };
  const auto others = [](__m256 a, __m256 b) { return _mm256_shuffle_ps(a, b, 0xee); };
  to[0] = halves(low, other_low);
  to[1] = others(low, other_low);
  to[2] = halves(high, other_high);
  to[3] = others(high, other_high);
}

// Stores the sums of a slice of a group: sums[4 place + token].
LORI_INLINE void store_slice(const Sums* sums_of_tokens, int slice, float* sums) {
  for (int i = 0; i < 2; i++) {
    const __m256 tokens[] = {sums_of_tokens[0].part[i], sums_of_tokens[1].part[i], sums_of_tokens[2].part[i],
                             sums_of_tokens[3].part[i]};
    __m256 rows[4];
    transpose(tokens, rows);
    float* to = sums + kGroup * place_of(slice * kLanes + 8 * i);
    for (int lane = 0; lane < 4; lane++) {
      _mm_store_ps(to + 2 * kGroup * lane, _mm256_castps256_ps128(rows[lane]));
      _mm_store_ps(to + 2 * kGroup * (lane + 4), _mm256_extractf128_ps(rows[lane], 1));
    }
  }
}

// Stores the sums of two slices of one token: sums[place].
LORI_INLINE void store_slices(const Sums& even, const Sums& odd, int slice, float* sums) {
  for (int i = 0; i < 2; i++) {  // lane by lane in turn, see place_of
    const __m256 low = _mm256_unpacklo_ps(even.part[i], odd.part[i]), high = _mm256_unpackhi_ps(even.part[i], odd.part[i]);
    float* to = sums + 32 * (slice / 2) + 16 * i;
    _mm256_store_ps(to, _mm256_permute2f128_ps(low, high, 0x20));
    _mm256_store_ps(to + 8, _mm256_permute2f128_ps(low, high, 0x31));
  }
}

// The products of a window with s of one token or of a group.
template <int kTokens, typename Column, typename Source>
LORI_INLINE void multiply(const Window& window, int num_slices, const Source* s, const uint8_t* later, float* sums) {
  using Value = typename Source::Value;
  constexpr size_t kStepBytes = kLanes * (sizeof(Value) + sizeof(Column));
  const uint8_t* at = window.steps;
  int begin = 0;
  Sums before = {};
  for (int slice = 0; slice < num_slices; slice++) {
    Sums sum[kTokens] = {};
    unsigned steps = window.ends[slice] - begin;
    begin = window.ends[slice];
    if constexpr (sizeof(Value) == 2) {
      for (const uint8_t* last = at + steps / 2 * (2 * kStepBytes); at != last; at += 2 * kStepBytes)
        for (int t = 0; t < kTokens; t++)
          s[t].add_pair(sum[t], reinterpret_cast<const Value*>(at),
                        reinterpret_cast<const Column*>(at + 2 * kLanes * sizeof(Value)));
      steps %= 2;
    }
    for (; steps > 0; steps--, at += kStepBytes)
      for (int t = 0; t < kTokens; t++)
        s[t].add_one(sum[t], reinterpret_cast<const Value*>(at), reinterpret_cast<const Column*>(at + kLanes * sizeof(Value)));
    for (int line = 0; line < kLinesAhead; line++) __builtin_prefetch(later + 64 * (kLinesAhead * slice + line));
    if constexpr (kTokens == kGroup) {
      store_slice(sum, slice, sums);
    } else if (slice % 2 == 0 && slice + 1 < num_slices) {
      before = sum[0];
    } else if (slice % 2 == 0) {
      store_slices(sum[0], Sums{}, slice, sums);
    } else {
      store_slices(before, sum[0], slice, sums);
    }
  }
}

// 16 rows of y in fp32. Of bfloat16 the even rows, then the odd rows, as the halves of words have them; of fp32 rows 0 to 7, then
// 8 to 15.
struct Rows {
  __m256 part[2];
};
template <typename Value>
constexpr int row_at(int part, int lane) {
  return sizeof(Value) == 2 ? 2 * lane + part : 8 * part + lane;
}

LORI_INLINE Rows load_rows(const uint16_t* y) {
  const __m256i words = load_256(y);
  return {{low_halves(words), high_halves(words)}};
}
LORI_INLINE Rows load_rows(const float* y) { return {{_mm256_loadu_ps(y), _mm256_loadu_ps(y + 8)}}; }

LORI_INLINE void store_rows(uint16_t* y, const Rows& rows) {
  const auto round = [](__m256 value) {  // to the nearest, ties to even; NaN stays one
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i tie = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(tie, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    return _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), _mm256_cmp_ps(value, value, _CMP_UNORD_Q)));
  };
  const __m256i words = _mm256_blend_epi16(_mm256_srli_epi32(round(rows.part[0]), 16), round(rows.part[1]), 0xaa);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), words);
}
LORI_INLINE void store_rows(float* y, const Rows& rows) {
  for (int i = 0; i < 2; i++) _mm256_storeu_ps(y + 8 * i, rows.part[i]);
}

// The places of 16 rows, a byte each: two loads of words instead of 16 of bytes.
struct Places {
  uint64_t words[2];
  LORI_INLINE explicit Places(const uint8_t* at) { std::memcpy(words, at, sizeof(words)); }
  LORI_INLINE size_t operator[](int row) const { return words[row / 8] >> 8 * (row % 8) & 0xff; }
};

template <typename Value>
LORI_INLINE void pick(const float* sums, const Places& places, Rows (&picked)[1]) {
  for (int i = 0; i < 2; i++) {
    const auto at = [&](int lane) { return sums[places[row_at<Value>(i, lane)]]; };
    picked[0].part[i] = _mm256_setr_ps(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7));
  }
}
template <typename Value>
LORI_INLINE void pick(const float* sums, const Places& places, Rows (&picked)[kGroup]) {
  for (int i = 0; i < 2; i++) {
    const auto at = [&](int lane) { return _mm_load_ps(sums + kGroup * places[row_at<Value>(i, lane)]); };
    __m256 rows[4], tokens[kGroup];
    for (int lane = 0; lane < 4; lane++) rows[lane] = _mm256_insertf128_ps(_mm256_castps128_ps256(at(lane)), at(lane + 4), 1);
    transpose(rows, tokens);
    for (int t = 0; t < kGroup; t++) picked[t].part[i] = tokens[t];
  }
}

// A window of y of one token or of a group: (kTokens, num_rows).
template <typename Value>
struct Target {
  Value* y;
  ptrdiff_t y_stride;  // in values
  int num_rows;
};

// Adds weight * sums to 16 rows from `row` on: the first term reads y, the last writes it, `totals` are kept between them.
template <bool kIsFirst, bool kIsLast, int kTokens, typename Value>
LORI_INLINE void add_slice(Value* y, ptrdiff_t y_stride, const Places& places, const float* sums, __m256 weight, Rows* totals) {
  Rows picked[kTokens];
  pick<Value>(sums, places, picked);
  for (int t = 0; t < kTokens; t++) {
    Rows rows = kIsFirst ? load_rows(y + t * y_stride) : totals[t];
    for (int i = 0; i < 2; i++) rows.part[i] = _mm256_fmadd_ps(weight, picked[t].part[i], rows.part[i]);
    if (kIsLast)
      store_rows(y + t * y_stride, rows);
    else
      totals[t] = rows;
  }
}

template <bool kIsFirst, bool kIsLast, int kTokens, typename Value>
LORI_INLINE void add_rows(const Target<Value>& to, const uint8_t* places, const float* sums, __m256 weight,
                          Rows (*totals)[kTokens]) {
  int row = 0;
  for (; row + kLanes <= to.num_rows; row += kLanes)
    add_slice<kIsFirst, kIsLast, kTokens>(to.y + row, to.y_stride, Places(places + row), sums, weight, totals[row / kLanes]);
  if (row == to.num_rows) return;
  const size_t left = to.num_rows - row;
  Value tail[kTokens * kLanes] = {};
  uint8_t tail_places[kLanes] = {};
  std::memcpy(tail_places, places + row, left);
  for (int t = 0; kIsFirst && t < kTokens; t++)
    std::memcpy(tail + t * kLanes, to.y + t * to.y_stride + row, sizeof(Value) * left);
  add_slice<kIsFirst, kIsLast, kTokens>(tail, kLanes, Places(tail_places), sums, weight, totals[row / kLanes]);
  for (int t = 0; kIsLast && t < kTokens; t++) std::memcpy(to.y + t * to.y_stride + row, tail + t * kLanes, sizeof(Value) * left);
}

// Adds one window of all terms of a segment to one token, or to a group of tokens that follow one another.
template <int kTokens, typename Column, typename Source>
void expand_tokens(const Operands& operands, const Route& route, const Step& step, const Item& item, const Item& later) {
  using Value = typename Source::Value;
  const Segment& segment = *item.segment;
  int term = next_term(operands, route, segment, segment.first_term, item.window), later_term = later.segment->first_term;
  if (term == segment.last_term) return;
  const int rows_left = operands.num_outputs - item.window * kWindowRows,
            num_rows = rows_left < kWindowRows ? rows_left : kWindowRows;
  const Target<Value> to{reinterpret_cast<Value*>(step.y + item.token * step.y_stride) + item.window * kWindowRows,
                         step.y_stride / static_cast<ptrdiff_t>(sizeof(Value)), num_rows};
  float buffer[kTokens == 1 ? kMaxRank : 1];  // s in fp32, where the source needs it
  Rows totals[kWindowSlices][kTokens];
  alignas(32) float sums[kTokens * kWindowRows];
  for (bool is_first = true;; is_first = false) {
    const int slot = route.slots[term];
    const __m256 weight = _mm256_set1_ps(route.weights[term]);
    const Window block(operands.block(slot, item.window), kLanes * (sizeof(Value) + sizeof(Column)));
    Source s[kTokens];
    for (int t = 0; t < kTokens; t++)
      s[t].read(step.s + (item.token + t) * step.s_stride +
                    sizeof(Value) * operands.basis_of[slot] * static_cast<size_t>(operands.rank),
                operands.rank, buffer);
    term = next_term(operands, route, segment, term + 1, item.window);
    const bool is_last = term == segment.last_term;
    const uint8_t* later_block = operands.block(route.slots[later_term], later.window);
    if (later_term + 1 < later.segment->last_term) later_term++;
    multiply<kTokens, Column>(block, (num_rows + kLanes - 1) / kLanes, s, later_block ? later_block : block.steps, sums);
    const auto add = [&](auto is_first_term, auto is_last_term) __attribute__((always_inline)) {
      add_rows<is_first_term.value, is_last_term.value, kTokens>(to, block.places, sums, weight, totals);
    };
    if (is_first && is_last)
      add(std::true_type(), std::true_type());
    else if (is_first)
      add(std::true_type(), std::false_type());
    else if (is_last)
      add(std::false_type(), std::true_type());
    else
      add(std::false_type(), std::false_type());
    if (is_last) return;
  }
}

template <typename Column, typename Source>
void expand(const Operands& operands, const Route& route, const Step& step, int64_t first, int64_t last) {
  if (first == last) return;
  Walk walk(operands, route, first), ahead(operands, route, first);
  for (int i = 0; i < kItemsAhead; i++) ++ahead;
  for (int64_t i = first; i < last;) {
    const Item item = *walk;
    int count = 1;
    if (Source::kMayGroup && item.segment->stop - item.token >= kGroup && last - i >= kGroup) {
      expand_tokens<Source::kMayGroup ? kGroup : 1, Column, Source>(operands, route, step, item, *ahead);
      count = kGroup;
    } else {
      expand_tokens<1, Column, Source>(operands, route, step, item, *ahead);
    }
    walk.skip(count);
    for (int n = 0; n < count; n++) ++ahead;
    i += count;
  }
}

inline Expand choose(const Operands& operands) {
  if (operands.dtype == Dtype::kFloat32)
    return operands.rank <= 32    ? expand<uint8_t, FloatTable>
           : operands.rank <= 256 ? expand<uint8_t, FloatMemory>
                                  : expand<uint16_t, FloatMemory>;
  if (operands.rank <= 32) return expand<uint8_t, BfloatTable<2>>;
  if (operands.rank <= 64) return expand<uint8_t, BfloatTable<4>>;
  return operands.rank <= 256 ? expand<uint8_t, BfloatMemory> : expand<uint16_t, BfloatMemory>;
}

}  // namespace
}  // namespace lori
