// Picks the sums of rows from those of a window's slices, among which each row has its place. They are cut in planes of their
// halves, or of their bytes where instructions permute these (VBMI): a permutation of narrower words reaches more rows.
#pragma once

#include <immintrin.h>

#include "layout.h"

namespace lori {
namespace {

// The low halves of the sums of two slices, word by word in turn, and the high halves.
LORI_INLINE void to_planes(__m512 first, __m512 second, __m512i& low, __m512i& high) {
  const __m512i mask = _mm512_set1_epi32(0xffff), even = _mm512_castps_si512(first), odd = _mm512_castps_si512(second);
  low = _mm512_ternarylogic_epi32(mask, even, _mm512_slli_epi32(odd, 16), 0xca);  // mask ? even : odd << 16
  high = _mm512_ternarylogic_epi32(mask, _mm512_srli_epi32(even, 16), odd, 0xca);
}

// 32 rows as fp32, the even ones and the odd ones.
struct Rows {
  __m512 even, odd;
};

#ifdef __AVX512VBMI__
// The sums of kNumPairs pairs of slices, cut in planes of their bytes: bytes[k][i] has byte k of the sums at the places 64 i ..
// 64 i + 63.
template <int kNumPairs>
struct Planes {
  static constexpr int kRegisters = (kNumPairs + 1) / 2;
  __m512i bytes[4][kRegisters];

  template <typename SumOf>
  LORI_INLINE explicit Planes(SumOf sum_of) {
    const __m512i even = every_other_byte(0), odd = every_other_byte(1);
#pragma GCC unroll 4
    for (int i = 0; i < kRegisters; i++) {
      __m512i low[2], high[2];
      to_planes(sum_of(4 * i), sum_of(4 * i + 1), low[0], high[0]);
      if constexpr (kNumPairs > 1) {
        to_planes(sum_of(4 * i + 2), sum_of(4 * i + 3), low[1], high[1]);
      } else {
        low[1] = low[0];
        high[1] = high[0];
      }
      bytes[0][i] = _mm512_permutex2var_epi8(low[0], even, low[1]);
      bytes[1][i] = _mm512_permutex2var_epi8(low[0], odd, low[1]);
      bytes[2][i] = _mm512_permutex2var_epi8(high[0], even, high[1]);
      bytes[3][i] = _mm512_permutex2var_epi8(high[0], odd, high[1]);
    }
  }

  // The sums of 64 rows, or of the `left` last ones.
  LORI_INLINE void rows_at(const uint8_t* places, int left, Rows* rows) const {
    // In each 128 bits four rows of rows[0].even, then of rows[0].odd, rows[1].even and rows[1].odd: as they are unpacked.
    const __m512i places_of_rows =
        left >= 64 ? _mm512_loadu_si512(places) : _mm512_maskz_loadu_epi8((uint64_t{1} << left) - 1, places);
    const __m512i at = _mm512_permutexvar_epi8(unpacked_rows(), places_of_rows);
    const __m512i a = pick(bytes[0], at), b = pick(bytes[1], at), c = pick(bytes[2], at), d = pick(bytes[3], at);
    const __m512i ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
    const __m512i ab_high = _mm512_unpackhi_epi8(a, b), cd_high = _mm512_unpackhi_epi8(c, d);
    rows[0].even = _mm512_castsi512_ps(_mm512_unpacklo_epi16(ab, cd));
    rows[0].odd = _mm512_castsi512_ps(_mm512_unpackhi_epi16(ab, cd));
    rows[1].even = _mm512_castsi512_ps(_mm512_unpacklo_epi16(ab_high, cd_high));
    rows[1].odd = _mm512_castsi512_ps(_mm512_unpackhi_epi16(ab_high, cd_high));
  }

 private:
  static LORI_INLINE __m512i every_other_byte(int first) {
    alignas(64) uint8_t numbers[64];
    for (int i = 0; i < 64; i++) numbers[i] = static_cast<uint8_t>(first + 2 * i);
    return _mm512_load_si512(numbers);
  }
  static LORI_INLINE __m512i unpacked_rows() {
    alignas(64) uint8_t rows[64];
    for (int i = 0; i < 64; i++) rows[i] = static_cast<uint8_t>(i / 16 * 8 + i % 4 * 2 + i / 4 % 2 + i / 8 % 2 * 32);
    return _mm512_load_si512(rows);
  }
  // The bytes of a plane at 64 places.
  static LORI_INLINE __m512i pick(const __m512i* plane, __m512i at) {
    if constexpr (kRegisters == 1) {
      return _mm512_permutexvar_epi8(at, plane[0]);
    } else if constexpr (kRegisters == 2) {
      return _mm512_permutex2var_epi8(plane[0], at, plane[1]);
    } else {
      const __m512i below = _mm512_permutex2var_epi8(plane[0], at, plane[1]);
      return _mm512_mask_blend_epi8(_mm512_movepi8_mask(at), below, _mm512_permutex2var_epi8(plane[2], at, plane[3]));
    }
  }
};
#else
// The sums of kNumPairs pairs of slices, cut in planes of their low and high halves: those of slices 2 i and 2 i + 1, word by
// word in turn.
template <int kNumPairs>
struct Planes {
  __m512i low[kNumPairs], high[kNumPairs];

  template <typename SumOf>
  LORI_INLINE explicit Planes(SumOf sum_of) {
#pragma GCC unroll 8
    for (int i = 0; i < kNumPairs; i++) to_planes(sum_of(2 * i), sum_of(2 * i + 1), low[i], high[i]);
  }

  // The sums of 64 rows, or of the `left` last ones.
  LORI_INLINE void rows_at(const uint8_t* places, int left, Rows* rows) const {
    rows[0] = rows_of(load_places(places, left));
    rows[1] = left > 32 ? rows_of(load_places(places + 32, left - 32)) : rows[0];  // not read, but never undefined
  }

 private:
  // The places of 32 rows, or of the `left` last ones.
  static LORI_INLINE __m512i load_places(const uint8_t* places, int left) {
    const __m128i* at = reinterpret_cast<const __m128i*>(places);
    if (left > kLanes) return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    return _mm512_cvtepu8_epi16(_mm256_castsi128_si256(_mm_loadu_si128(at)));
  }
  // The words of a plane at 32 places.
  static LORI_INLINE __m512i pick(const __m512i* plane, __m512i places, __mmask32 is_64, __mmask32 is_128) {
    if constexpr (kNumPairs == 1) return _mm512_permutexvar_epi16(places, plane[0]);
    __m512i found[4];
#pragma GCC unroll 4
    for (int i = 0; i < kNumPairs / 2; i++) found[i] = _mm512_permutex2var_epi16(plane[2 * i], places, plane[2 * i + 1]);
    if constexpr (kNumPairs >= 4) found[0] = _mm512_mask_blend_epi16(is_64, found[0], found[1]);
    if constexpr (kNumPairs == 8)
      found[0] = _mm512_mask_blend_epi16(is_128, found[0], _mm512_mask_blend_epi16(is_64, found[2], found[3]));
    return found[0];
  }
  LORI_INLINE Rows rows_of(__m512i places) const {
    const __mmask32 is_64 = _mm512_test_epi16_mask(places, _mm512_set1_epi16(64));
    const __mmask32 is_128 = _mm512_test_epi16_mask(places, _mm512_set1_epi16(128));
    const __m512i lower = pick(low, places, is_64, is_128), upper = pick(high, places, is_64, is_128);
    const __m512i half = _mm512_set1_epi32(0xffff);
    return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(half, lower, _mm512_slli_epi32(upper, 16), 0xca)),
            _mm512_castsi512_ps(_mm512_ternarylogic_epi32(half, _mm512_srli_epi32(lower, 16), upper, 0xca))};
  }
};
#endif

}  // namespace
}  // namespace lori
