// Vectors of 16 values, each a few registers of the set that the flags of the including file allow; loads from and stores to
// bfloat16. Everything has internal linkage, see walk.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "layout.h"

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif

namespace lori {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;  // values of a register
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kParts = kLanes / kWidth;
typedef float Vector __attribute__((vector_size(4 * kWidth)));
typedef int32_t SignedVector __attribute__((vector_size(4 * kWidth)));
typedef uint32_t WordVector __attribute__((vector_size(4 * kWidth)));
typedef uint16_t HalfVector __attribute__((vector_size(2 * kWidth)));

// A vector type of 16 values that is wider than a register would be kept in memory; registers side by side are not.
template <typename Part>
struct Sixteen {
  Part part[kParts];
};
using Floats = Sixteen<Vector>;
using Ints = Sixteen<SignedVector>;

// Calls run(part) for each part and returns what it gives.
template <typename To, typename Run>
LORI_INLINE To each(Run run) {
  To to;
  for (int i = 0; i < kParts; i++) to.part[i] = run(i);
  return to;
}

template <typename To, typename From>
LORI_INLINE To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

LORI_INLINE Floats splat(float value) {
  return each<Floats>([&](int) { return value - Vector{}; });
}

// a b + sum, rounded once where the set has an instruction for that. Left to the compiler, the same sum over another number of
// rows may be rounded in another way.
LORI_INLINE Vector fused_multiply_add(Vector a, Vector b, Vector sum) {
#if defined(__AVX512F__)
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__ARM_FEATURE_FMA)
  for (int i = 0; i < kWidth; i++) sum[i] = __builtin_fmaf(a[i], b[i], sum[i]);
  return sum;
#else
  return sum + a * b;
#endif
}

#define LORI_OPERATOR(op)                                                                 \
  template <typename Part>                                                                \
  LORI_INLINE Sixteen<Part> operator op(const Sixteen<Part>& a, const Sixteen<Part>& b) { \
    return each<Sixteen<Part>>([&](int i) { return a.part[i] op b.part[i]; });            \
  }
LORI_OPERATOR(+)
LORI_OPERATOR(-)
LORI_OPERATOR(*) LORI_OPERATOR(/) LORI_OPERATOR(&)
#undef LORI_OPERATOR

#define LORI_OPERATOR(op)                                       \
  LORI_INLINE Floats operator op(const Floats& a, float b) {    \
    return each<Floats>([&](int i) { return a.part[i] op b; }); \
  }                                                             \
  LORI_INLINE Floats operator op(float a, const Floats& b) {    \
    return each<Floats>([&](int i) { return a op b.part[i]; }); \
  }
    LORI_OPERATOR(+) LORI_OPERATOR(-) LORI_OPERATOR(*) LORI_OPERATOR(/)
#undef LORI_OPERATOR

        LORI_INLINE Ints operator+(const Ints& a, int32_t b) {
  return each<Ints>([&](int i) { return a.part[i] + b; });
}
LORI_INLINE Floats operator-(const Floats& a) {
  return each<Floats>([&](int i) { return -a.part[i]; });
}
LORI_INLINE Floats& operator+=(Floats& a, const Floats& b) { return a = a + b; }

// All ones where it holds.
#define LORI_COMPARISON(op)                                                           \
  template <typename Part>                                                            \
  LORI_INLINE Ints operator op(const Sixteen<Part>& a, const Sixteen<Part>& b) {      \
    return each<Ints>([&](int i) { return (SignedVector)(a.part[i] op b.part[i]); }); \
  }                                                                                   \
  LORI_INLINE Ints operator op(const Ints& a, int32_t b) {                            \
    return each<Ints>([&](int i) { return a.part[i] op b; });                         \
  }
LORI_COMPARISON(<)
LORI_COMPARISON(>)
LORI_COMPARISON(>=) LORI_COMPARISON(==)
#undef LORI_COMPARISON

    LORI_INLINE Floats select(const Ints& condition, const Floats& yes, const Floats& no) {
  return each<Floats>([&](int i) { return condition.part[i] ? yes.part[i] : no.part[i]; });
}

// first, first + 1, …
LORI_INLINE Ints count_from(int32_t first) {
  int32_t values[kLanes];
  for (int i = 0; i < kLanes; i++) values[i] = first + i;
  Ints count;
  std::memcpy(&count, values, sizeof(count));
  return count;
}

LORI_INLINE Floats load(const float* at) {
  Floats values;
  for (int i = 0; i < kParts; i++) std::memcpy(&values.part[i], at + i * kWidth, sizeof(Vector));
  return values;
}

LORI_INLINE Floats load(const uint16_t* at) {
  return each<Floats>([&](int i) {
    HalfVector halves;
    std::memcpy(&halves, at + i * kWidth, sizeof(halves));
    return (Vector)(__builtin_convertvector(halves, WordVector) << 16);
  });
}

LORI_INLINE void store(float* at, const Floats& values) {
  for (int i = 0; i < kParts; i++) std::memcpy(at + i * kWidth, &values.part[i], sizeof(Vector));
}

// Rounds to the nearest, ties to even.
LORI_INLINE void store(uint16_t* at, const Floats& values) {
#if defined(__AVX512BF16__)
  const __m256bh halves = _mm512_cvtneps_pbh((__m512)values.part[0]);
  std::memcpy(at, &halves, sizeof(halves));
#else
  for (int i = 0; i < kParts; i++) {
    const WordVector bits = (WordVector)values.part[i];
    const WordVector rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const WordVector sound = (WordVector)(values.part[i] == values.part[i]);  // all ones, or zero for a NaN
    const HalfVector halves = __builtin_convertvector((rounded & sound) | (((bits >> 16) | 0x40) & ~sound), HalfVector);
    std::memcpy(at + i * kWidth, &halves, sizeof(halves));
  }
#endif
}

LORI_INLINE float sum_of(const Floats& values) {
  float all[kLanes], sum = 0;
  store(all, values);
  for (int i = 0; i < kLanes; i++) sum += all[i];
  return sum;
}

LORI_INLINE Floats greater(const Floats& a, const Floats& b) { return select(a > b, a, b); }

LORI_INLINE float max_of(const Floats& values) {
  float all[kLanes];
  store(all, values);
  float most = all[0];
  for (int i = 1; i < kLanes; i++) most = all[i] > most ? all[i] : most;
  return most;
}

// e^x to 2 units in the last place, for x up to 88; 0 below -87. x = n ln 2 + r, |r| <= ln 2 / 2; the polynomial is Taylor's.
LORI_INLINE Floats exponential(const Floats& x) {
  const Floats least = splat(-87.0f), most = splat(88.0f);
  const Floats clamped = select(x < least, least, select(x > most, most, x));
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
  const Floats power = each<Floats>([&](int i) { return (Vector)(((SignedVector)shifted.part[i] << 23) + 0x3f800000); });
  return select(x < least, splat(0.0f), p * power);
}

LORI_INLINE Floats tanh_of(const Floats& x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }

}  // namespace
}  // namespace lori
