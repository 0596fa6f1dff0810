// The kernel in AVX-512. Included twice, with and without the bfloat16 instructions (LORI_DOT).
//
// A window's sums stay in registers: an accumulator a slice. Each row picks its sum from them (planes_avx512.h). Rows of y are
// worked on 32 at a time, the even ones in one register and the odd ones in another, as their bfloat16 lie.
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "planes_avx512.h"
#include "walk.h"

namespace lori {
namespace {

constexpr int kPairs = kWindowSlices / 2;

// Where in the pool an adapter lies no processor foresees, so the memory is asked ahead for the block of a later item: 3 items
// ahead, and 3 lines for each slice, which is what a tenth kept takes. Other distances, more lines and fewer took longer.
constexpr int kItemsAhead = 3, kLinesAhead = 3;

inline __m512 high_halves(__m512i words) { return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(0xffff0000))); }
inline __m512 low_halves(__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }

inline __m512i load_words(const uint8_t* columns) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns)));
}
inline __m512i load_words(const uint16_t* columns) { return _mm512_loadu_si512(columns); }
inline __m512i load_dwords(const uint8_t* columns) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(columns)));
}
inline __m512i load_dwords(const uint16_t* columns) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns)));
}

// s of one token and basis in bfloat16, up to 64 entries: two registers, looked up by a permutation.
template <int kRegisters>
struct BfloatTable {
  static constexpr bool kInRegisters = true;
  using Value = uint16_t;
  __m512i s[kRegisters];

  BfloatTable(const uint8_t* row, int rank, float*) {
    for (int i = 0; i < kRegisters; i++) {
      const int left = rank - 32 * i;
      s[i] = _mm512_maskz_loadu_epi16(left >= 32 ? ~0u : (1u << left) - 1, row + 64 * i);
    }
  }
  __m512i look_up(__m512i columns) const {
    if constexpr (kRegisters == 1)
      return _mm512_permutexvar_epi16(columns, s[0]);
    else
      return _mm512_permutex2var_epi16(s[0], columns, s[1]);
  }
  // Adds two entries of each row.
  template <typename Column>
  __m512 add_pair(__m512 sum, const uint16_t* values, const Column* columns) const {
    const __m512i value = _mm512_loadu_si512(values), found = look_up(load_words(columns));
#ifdef LORI_DOT
    return _mm512_dpbf16_ps(sum, (__m512bh)value, (__m512bh)found);
#else
    return _mm512_fmadd_ps(low_halves(value), low_halves(found), _mm512_fmadd_ps(high_halves(value), high_halves(found), sum));
#endif
  }
  // Adds one entry of each row.
  template <typename Column>
  __m512 add_one(__m512 sum, const uint16_t* values, const Column* columns) const {
    const __m512i value = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
    const __m512i found = look_up(load_dwords(columns));
#ifdef LORI_DOT
    return _mm512_dpbf16_ps(sum, (__m512bh)value, (__m512bh)found);  // the high halves of value are zero
#else
    return _mm512_fmadd_ps(low_halves(value), low_halves(found), sum);
#endif
  }
};

// s in bfloat16 of any rank, gathered from memory.
struct BfloatMemory {
  static constexpr bool kInRegisters = false;
  using Value = uint16_t;
  const float* s;

  BfloatMemory(const uint8_t* row, int rank, float* buffer) : s(buffer) {
    const uint16_t* narrow = reinterpret_cast<const uint16_t*>(row);
    for (int i = 0; i < rank; i += kLanes) {
      const __mmask16 mask = rank - i >= kLanes ? 0xffff : (1u << (rank - i)) - 1;
      _mm512_store_ps(buffer + i, low_halves(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, narrow + i))));
    }
  }
  template <typename Column>
  __m512 add_pair(__m512 sum, const uint16_t* values, const Column* columns) const {
    const __m512i value = _mm512_loadu_si512(values), column = load_words(columns);
    sum = _mm512_fmadd_ps(high_halves(value), _mm512_i32gather_ps(_mm512_srli_epi32(column, 16), s, 4), sum);
    return _mm512_fmadd_ps(low_halves(value), _mm512_i32gather_ps(_mm512_and_si512(column, _mm512_set1_epi32(0xffff)), s, 4),
                           sum);
  }
  template <typename Column>
  __m512 add_one(__m512 sum, const uint16_t* values, const Column* columns) const {
    const __m512i value = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
    return _mm512_fmadd_ps(low_halves(value), _mm512_i32gather_ps(load_dwords(columns), s, 4), sum);
  }
};

// s in fp32, up to 32 entries.
struct FloatTable {
  static constexpr bool kInRegisters = true;
  using Value = float;
  __m512 s[2];

  FloatTable(const uint8_t* row, int rank, float*) {
    const uint32_t mask = rank >= 32 ? ~0u : (1u << rank) - 1;
    s[0] = _mm512_maskz_loadu_ps(mask & 0xffff, row);
    s[1] = _mm512_maskz_loadu_ps(mask >> 16, row + 64);
  }
  template <typename Column>
  __m512 add_one(__m512 sum, const float* values, const Column* columns) const {
    return _mm512_fmadd_ps(_mm512_loadu_ps(values), _mm512_permutex2var_ps(s[0], load_dwords(columns), s[1]), sum);
  }
};

// s in fp32 of any rank.
struct FloatMemory {
  static constexpr bool kInRegisters = false;
  using Value = float;
  const float* s;

  FloatMemory(const uint8_t* row, int, float*) : s(reinterpret_cast<const float*>(row)) {}
  template <typename Column>
  __m512 add_one(__m512 sum, const float* values, const Column* columns) const {
    return _mm512_fmadd_ps(_mm512_loadu_ps(values), _mm512_i32gather_ps(load_dwords(columns), s, 4), sum);
  }
};

// sums[slice] = the products of a window with s.
template <int kNumPairs, typename Column, typename Source>
LORI_INLINE void multiply(const Window& window, const Source& s, const uint8_t* later, __m512 (&sums)[2 * kNumPairs]) {
  using Value = typename Source::Value;
  constexpr size_t kStepBytes = kLanes * (sizeof(Value) + sizeof(Column));
  const uint8_t* at = window.steps;
  int begin = 0;
#pragma GCC unroll 16
  for (int slice = 0; slice < 2 * kNumPairs; slice++) {
    __m512 sum = _mm512_setzero_ps();
    unsigned steps = window.ends[slice] - begin;  // none beyond the window's own slices
    begin = window.ends[slice];
    if constexpr (sizeof(Value) == 2) {
      // Counted by address: a count beside it takes as long as the products.
      for (const uint8_t* last = at + steps / 2 * (2 * kStepBytes); at != last; at += 2 * kStepBytes)
        sum =
            s.add_pair(sum, reinterpret_cast<const Value*>(at), reinterpret_cast<const Column*>(at + 2 * kLanes * sizeof(Value)));
      steps %= 2;
    }
    for (; steps > 0; steps--, at += kStepBytes)
      sum = s.add_one(sum, reinterpret_cast<const Value*>(at), reinterpret_cast<const Column*>(at + kLanes * sizeof(Value)));
    sums[slice] = sum;
    for (int line = 0; line < kLinesAhead; line++) __builtin_prefetch(later + 64 * (kLinesAhead * slice + line));
  }
}

LORI_INLINE Rows load_rows(const uint16_t* y, uint32_t mask) {
  const __m512i words = mask == ~0u ? _mm512_loadu_si512(y) : _mm512_maskz_loadu_epi16(mask, y);
  return {low_halves(words), high_halves(words)};
}

// A store by a mask takes many times as long as a whole one.
LORI_INLINE void store_rows(uint16_t* y, uint32_t mask, Rows rows) {
#ifdef LORI_DOT
  const __m512i turns =
      _mm512_or_si512(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                      _mm512_setr_epi32(16 << 16, 17 << 16, 18 << 16, 19 << 16, 20 << 16, 21 << 16, 22 << 16, 23 << 16, 24 << 16,
                                        25 << 16, 26 << 16, 27 << 16, 28 << 16, 29 << 16, 30 << 16, 31 << 16));
  const __m512i words = _mm512_permutexvar_epi16(turns, (__m512i)_mm512_cvtne2ps_pbh(rows.odd, rows.even));
#else
  const auto round = [](__m512 value) {  // to the nearest, ties to even; NaN stays one
    const __m512i bits = _mm512_castps_si512(value), one = _mm512_set1_epi32(1);
    const __m512i tie = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(tie, _mm512_set1_epi32(0x7fff)));
    return _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
  };
  const __m512i words =
      _mm512_ternarylogic_epi32(_mm512_set1_epi32(0xffff), _mm512_srli_epi32(round(rows.even), 16), round(rows.odd), 0xca);
#endif
  if (mask == ~0u)
    _mm512_storeu_si512(y, words);
  else
    _mm512_mask_storeu_epi16(y, mask, words);
}

inline Rows load_rows(const float* y, uint32_t mask) {
  const __m512 a = _mm512_maskz_loadu_ps(mask & 0xffff, y), b = _mm512_maskz_loadu_ps(mask >> 16, y + kLanes);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b)};
}

inline void store_rows(float* y, uint32_t mask, Rows rows) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  _mm512_mask_storeu_ps(y, mask & 0xffff, _mm512_permutex2var_ps(rows.even, first, rows.odd));
  _mm512_mask_storeu_ps(y + kLanes, mask >> 16, _mm512_permutex2var_ps(rows.even, second, rows.odd));
}

// Adds weight * sums to the rows of a window: the first term reads y, the last writes it, `totals` are kept between them.
template <int kNumPairs, typename Value>
LORI_INLINE void add_rows(Value* y, int num_rows, const uint8_t* places, const Planes<kNumPairs>& planes, __m512 weight,
                          bool is_first, bool is_last, Rows* totals) {
  const auto add = [&](auto is_first_term, auto is_last_term) __attribute__((always_inline)) {
    for (int row = 0; row < num_rows; row += 64) {
      Rows sums[2];
      planes.rows_at(places + row, num_rows - row, sums);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const int at = row + 32 * half, left = num_rows - at;
        if (left <= 0) break;
        const uint32_t mask = left >= 32 ? ~0u : (1u << left) - 1;
        Rows rows = is_first_term ? load_rows(y + at, mask) : totals[at / 32];
        rows.even = _mm512_fmadd_ps(weight, sums[half].even, rows.even);
        rows.odd = _mm512_fmadd_ps(weight, sums[half].odd, rows.odd);
        if (is_last_term)
          store_rows(y + at, mask, rows);
        else
          totals[at / 32] = rows;
      }
    }
  };
  if (is_first && is_last)
    add(std::true_type(), std::true_type());
  else if (is_first)
    add(std::true_type(), std::false_type());
  else if (is_last)
    add(std::false_type(), std::true_type());
  else
    add(std::false_type(), std::false_type());
}

// What is added to y: one item, and the one to ask the memory for.
struct Work {
  const Operands& operands;
  const Route& route;
  const Step& step;
  Item item, later;
};

template <int kNumPairs, typename Column, typename Source>
void expand_item(const Work& work) {
  using Value = typename Source::Value;
  const Operands& operands = work.operands;
  const Route& route = work.route;
  const Item &item = work.item, &later = work.later;
  const Segment& segment = *item.segment;
  int term = next_term(operands, route, segment, segment.first_term, item.window), later_term = later.segment->first_term;
  if (term == segment.last_term) return;
  const int rows_left = operands.num_outputs - item.window * kWindowRows,
            num_rows = rows_left < kWindowRows ? rows_left : kWindowRows;
  Value* y = reinterpret_cast<Value*>(work.step.y + item.token * work.step.y_stride) + item.window * kWindowRows;
  alignas(64) float buffer[kMaxRank];  // s in fp32, where the source needs it
  Rows totals[kPairs];
  for (bool is_first = true;; is_first = false) {
    const int slot = route.slots[term];
    const Window block(operands.block(slot, item.window), kLanes * (sizeof(Value) + sizeof(Column)));
    const Source s(work.step.s + item.token * work.step.s_stride +
                       sizeof(Value) * operands.basis_of[slot] * static_cast<size_t>(operands.rank),
                   operands.rank, buffer);
    const __m512 weight = _mm512_set1_ps(route.weights[term]);
    term = next_term(operands, route, segment, term + 1, item.window);
    const bool is_last = term == segment.last_term;
    const uint8_t* later_block = operands.block(route.slots[later_term], later.window);
    if (later_term + 1 < later.segment->last_term) later_term++;
    __m512 sums[2 * kNumPairs];
    multiply<kNumPairs, Column>(block, s, later_block ? later_block : block.steps, sums);
    const Planes<kNumPairs> planes([&](int slice) { return sums[slice]; });
    add_rows(y, num_rows, block.places, planes, weight, is_first, is_last, totals);
    if (is_last) return;
  }
}

constexpr int kGroup = 4;  // tokens with the same terms for which a window is read once

// sums[slice][token] = the products of a window with s of each of the tokens.
template <int kNumPairs, int kTokens, typename Column, typename Source>
LORI_INLINE void multiply_group(const Window& window, const Source* s, __m512 (&sums)[2 * kNumPairs][kTokens]) {
  using Value = typename Source::Value;
  constexpr size_t kStepBytes = kLanes * (sizeof(Value) + sizeof(Column));
  const uint8_t* at = window.steps;
  int begin = 0;
  for (int slice = 0; slice < 2 * kNumPairs; slice++) {
    __m512 sum[kTokens];
    for (int t = 0; t < kTokens; t++) sum[t] = _mm512_setzero_ps();
    unsigned steps = window.ends[slice] - begin;
    begin = window.ends[slice];
    if constexpr (sizeof(Value) == 2) {
      for (const uint8_t* last = at + steps / 2 * (2 * kStepBytes); at != last; at += 2 * kStepBytes)
        for (int t = 0; t < kTokens; t++)
          sum[t] = s[t].add_pair(sum[t], reinterpret_cast<const Value*>(at),
                                 reinterpret_cast<const Column*>(at + 2 * kLanes * sizeof(Value)));
      steps %= 2;
    }
    for (; steps > 0; steps--, at += kStepBytes)
      for (int t = 0; t < kTokens; t++)
        sum[t] = s[t].add_one(sum[t], reinterpret_cast<const Value*>(at),
                              reinterpret_cast<const Column*>(at + kLanes * sizeof(Value)));
    for (int t = 0; t < kTokens; t++) sums[slice][t] = sum[t];
  }
}

// Adds one window of all terms of a segment to kGroup tokens that follow one another.
template <int kNumPairs, typename Column, typename Source>
void expand_group(const Work& work) {
  using Value = typename Source::Value;
  const Operands& operands = work.operands;
  const Route& route = work.route;
  const Item& item = work.item;
  const Segment& segment = *item.segment;
  const int rows_left = operands.num_outputs - item.window * kWindowRows,
            num_rows = rows_left < kWindowRows ? rows_left : kWindowRows;
  Value* y = reinterpret_cast<Value*>(work.step.y + item.token * work.step.y_stride) + item.window * kWindowRows;
  const ptrdiff_t y_stride = work.step.y_stride / static_cast<ptrdiff_t>(sizeof(Value));
  Rows totals[kGroup][kPairs];
  int term = next_term(operands, route, segment, segment.first_term, item.window);
  for (bool is_first = true; term < segment.last_term; is_first = false) {
    const int slot = route.slots[term];
    const Window block(operands.block(slot, item.window), kLanes * (sizeof(Value) + sizeof(Column)));
    const uint8_t* row = work.step.s + item.token * work.step.s_stride +
                         sizeof(Value) * operands.basis_of[slot] * static_cast<size_t>(operands.rank);
    const Source s[kGroup] = {Source(row, operands.rank, nullptr), Source(row + work.step.s_stride, operands.rank, nullptr),
                              Source(row + 2 * work.step.s_stride, operands.rank, nullptr),
                              Source(row + 3 * work.step.s_stride, operands.rank, nullptr)};
    const __m512 weight = _mm512_set1_ps(route.weights[term]);
    term = next_term(operands, route, segment, term + 1, item.window);
    __m512 sums[2 * kNumPairs][kGroup];
    multiply_group<kNumPairs, kGroup, Column>(block, s, sums);
    for (int t = 0; t < kGroup; t++) {
      const Planes<kNumPairs> planes([&](int slice) { return sums[slice][t]; });
      add_rows(y + t * y_stride, num_rows, block.places, planes, weight, is_first, term == segment.last_term, totals[t]);
    }
  }
}

template <int kNumPairs, typename Column, typename Source>
void expand_one_or_more(const Work& work, bool is_group) {
  if constexpr (Source::kInRegisters) {
    if (is_group) return expand_group<kNumPairs, Column, Source>(work);
  }
  expand_item<kNumPairs, Column, Source>(work);
}

template <typename Column, typename Source>
void expand(const Operands& operands, const Route& route, const Step& step, int64_t first, int64_t last) {
  if (first == last) return;
  Walk walk(operands, route, first), ahead(operands, route, first);
  for (int i = 0; i < kItemsAhead; i++) ++ahead;
  for (int64_t i = first; i < last;) {
    const Work work{operands, route, step, *walk, *ahead};
    const Segment& segment = *work.item.segment;
    const bool is_group = Source::kInRegisters && segment.stop - work.item.token >= kGroup && last - i >= kGroup;
    const int num_slices = operands.num_slices - work.item.window * kWindowSlices;
    if (num_slices > 8)
      expand_one_or_more<8, Column, Source>(work, is_group);
    else if (num_slices > 4)
      expand_one_or_more<4, Column, Source>(work, is_group);
    else if (num_slices > 2)
      expand_one_or_more<2, Column, Source>(work, is_group);
    else
      expand_one_or_more<1, Column, Source>(work, is_group);
    const int count = is_group ? kGroup : 1;
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
  if (operands.rank <= 32) return expand<uint8_t, BfloatTable<1>>;
  if (operands.rank <= 64) return expand<uint8_t, BfloatTable<2>>;
  return operands.rank <= 256 ? expand<uint8_t, BfloatMemory> : expand<uint16_t, BfloatMemory>;
}

}  // namespace
}  // namespace lori
