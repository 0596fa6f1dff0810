// Vectors of 16 floats, of which the compiler makes what the flags of the including file allow, and loads from and stores to
// bfloat16. Everything has internal linkage, see walk.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "layout.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace lori {
namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

LORI_INLINE Floats splat(float value) { return value - Floats{}; }

template <typename To, typename From>
LORI_INLINE To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

LORI_INLINE Floats load(const float* at) {
  Floats values;
  std::memcpy(&values, at, sizeof(values));
  return values;
}

LORI_INLINE Floats load(const uint16_t* at) {
  Halves halves;
  std::memcpy(&halves, at, sizeof(halves));
  return bits_of<Floats>(__builtin_convertvector(halves, Words) << 16);
}

LORI_INLINE void store(float* at, Floats values) { std::memcpy(at, &values, sizeof(values)); }

// Rounds to the nearest, ties to even.
LORI_INLINE void store(uint16_t* at, Floats values) {
#if defined(__AVX512BF16__)
  const __m256bh halves = _mm512_cvtneps_pbh(bits_of<__m512>(values));
  std::memcpy(at, &halves, sizeof(halves));
#else
  const Words bits = bits_of<Words>(values);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words sound = bits_of<Words>(values == values);  // all ones, or zero for a NaN
  const Halves halves = __builtin_convertvector((rounded & sound) | (((bits >> 16) | 0x40) & ~sound), Halves);
  std::memcpy(at, &halves, sizeof(halves));
#endif
}

LORI_INLINE float sum_of(Floats values) {
  float sum = 0;
  for (int i = 0; i < kLanes; i++) sum += values[i];
  return sum;
}

LORI_INLINE Floats greater(Floats a, Floats b) { return a > b ? a : b; }

LORI_INLINE float max_of(Floats values) {
  float most = values[0];
  for (int i = 1; i < kLanes; i++) most = values[i] > most ? values[i] : most;
  return most;
}

// e^x to 2 units in the last place, for x up to 88; 0 below -87. x = n ln 2 + r, |r| <= ln 2 / 2; the polynomial is Taylor's.
LORI_INLINE Floats exponential(Floats x) {
  const Floats least = splat(-87.0f), most = splat(88.0f);
  const Floats clamped = x < least ? least : x > most ? most : x;
  const Floats shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the fraction is rounded away
  const Floats n = shifted - 12582912.0f;
  const Floats r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Floats power = bits_of<Floats>((bits_of<Ints>(shifted) << 23) + 0x3f800000);
  const Floats value = p * power;
  return x < least ? splat(0.0f) : value;
}

LORI_INLINE Floats tanh_of(Floats x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }

}  // namespace
}  // namespace lori
