// The functions of layers.h as loops over vectors. Included by each instruction set's file, see walk.h.
#pragma once

#include "layers.h"
#include "vectors.h"

namespace lori {
namespace {

// V words: how many values of a row lie together, so that one instruction multiplies and adds them.
template <typename Value>
constexpr int kTogether = 4 / sizeof(Value);

template <typename Value>
void norm_rows(const Norm& norm, int64_t first, int64_t last) {
  const Rows<Value> stream = norm.stream.as<Value>(), added = norm.added.as<Value>(), out = norm.out.as<Value>();
  for (int64_t i = first; i < last; i++) {
    Value* x = stream.row(i);
    Floats squares = {};
    for (int64_t j = 0; j < norm.size; j += kLanes) {
      Floats value = load(x + j);
      if (added.at) {
        store(x + j, value + load(added.row(i) + j));
        value = load(x + j);  // as rounded
      }
      squares += value * value;
    }
    const float scale = 1.0f / __builtin_sqrtf(sum_of(squares) / static_cast<float>(norm.size) + norm.epsilon);
    for (int64_t j = 0; j < norm.size; j += kLanes) store(out.row(i) + j, load(x + j) * scale * load(norm.weight + j));
  }
}

// erf by Abramowitz and Stegun 7.1.26 would be off by 1e-7; the library's is exact, and this activation is rare.
LORI_INLINE Floats gelu(Floats x) {
  float values[kLanes];
  store(values, x);
  for (float& value : values) value = 0.5f * value * (1.0f + __builtin_erff(value * 0.70710678f));
  return load(values);
}

template <typename Value, Activation kActivation>
void gate_rows(const Gate& gate, int64_t first, int64_t last) {
  const Rows<Value> x = gate.x.as<Value>(), out = gate.out.as<Value>();
  for (int64_t i = first; i < last; i++) {
    const Value *gated = x.row(i), *up = gated + gate.size;
    for (int64_t j = 0; j < gate.size; j += kLanes) {
      const Floats value = load(gated + j);
      Floats active;
      if constexpr (kActivation == Activation::kSilu)
        // The exponential ends at 88: what is far below would not be divided by enough.
        active = select(value < splat(-88.0f), splat(0.0f), value / (1.0f + exponential(-value)));
      else if constexpr (kActivation == Activation::kGeluTanh)
        active = 0.5f * value * (1.0f + tanh_of(0.79788456f * (value + 0.044715f * value * value * value)));
      else
        active = gelu(value);
      store(out.row(i) + j, active * load(up + j));
    }
  }
}

template <typename Value>
void gate_any(const Gate& gate, int64_t first, int64_t last) {
  switch (gate.activation) {
    case Activation::kSilu:
      return gate_rows<Value, Activation::kSilu>(gate, first, last);
    case Activation::kGeluTanh:
      return gate_rows<Value, Activation::kGeluTanh>(gate, first, last);
    case Activation::kGelu:
      return gate_rows<Value, Activation::kGelu>(gate, first, last);
  }
}

// A layer's block: where its keys and values are.
template <typename Value>
struct Block {
  Value *keys, *values;
  LORI_INLINE Block(const Heads& heads, uint8_t* memory, int32_t block) {
    const int64_t size = int64_t{heads.num_kv_heads} * heads.head_size * kBlockTokens;
    keys = reinterpret_cast<Value*>(memory) + 2 * size * block;
    values = keys + size;
  }
  LORI_INLINE Value* head(Value* of, const Heads& heads, int kv_head) const {
    return of + int64_t{kv_head} * heads.head_size * kBlockTokens;
  }
};

// Normalises (where there is a norm) and turns one head by its position: x cos + rotated x sin, halves swapped.
template <typename Value>
void turn(Value* x, int size, const float* norm, float epsilon, const float* cosine, const float* sine) {
  float turned[512], value[512];
  Floats squares = {};
  for (int i = 0; i < size; i += kLanes) {
    const Floats v = load(x + i);
    store(value + i, v);
    squares += v * v;
  }
  if (norm) {
    const float scale = 1.0f / __builtin_sqrtf(sum_of(squares) / static_cast<float>(size) + epsilon);
    for (int i = 0; i < size; i += kLanes) store(value + i, load(value + i) * scale * load(norm + i));
  }
  const int half = size / 2;
  for (int i = 0; i < half; i++) {
    turned[i] = value[i] * cosine[i] - value[i + half] * sine[i];
    turned[i + half] = value[i + half] * cosine[i + half] + value[i] * sine[i + half];
  }
  for (int i = 0; i < size; i += kLanes) store(x + i, load(turned + i));
}

// Makes the values (16 / V, E, V) of a block's tokens from `token` on zero.
template <typename Value>
LORI_INLINE void clear_values(Value* values, int size, int token) {
  constexpr int kV = kTogether<Value>;
  for (; token % kV; token++)
    for (int e = 0; e < size; e++) values[(token / kV * size + e) * kV + token % kV] = 0;
  std::memset(values + token * size, 0, sizeof(Value) * size * (kBlockTokens - token));
}

// Turns the queries and keys of the step's rows first .. last, which lie in the span, and puts keys and values into memory.
template <typename Value>
void write_rows(const Heads& heads, const Attention& attention, const Span& span, int64_t first, int64_t last) {
  constexpr int kV = kTogether<Value>;
  const int size = heads.head_size;
  for (int64_t i = first; i < last; i++) {
    Value* row = attention.qkv.as<Value>().row(i);
    const float *cosine = attention.cosine + i * size, *sine = attention.sine + i * size;
    for (int head = 0; head < heads.num_heads; head++)
      turn(row + head * size, size, heads.query_norm, heads.epsilon, cosine, sine);
    const int position = span.position + static_cast<int>(i) - span.row, token = position % kBlockTokens;
    const int left = span.row + span.num_tokens - static_cast<int>(i);  // of the span: another thread may write them
    const Block<Value> block(heads, attention.memory, attention.table[span.blocks + position / kBlockTokens]);
    for (int head = 0; head < heads.num_kv_heads; head++) {
      Value* key = row + (heads.num_heads + head) * size;
      const Value* value = key + heads.num_kv_heads * size;
      turn(key, size, heads.key_norm, heads.epsilon, cosine, sine);
      Value *keys = block.head(block.keys, heads, head), *values = block.head(block.values, heads, head);
      for (int e = 0; e < size; e++) keys[(e / kV * kBlockTokens + token) * kV + e % kV] = key[e];
      if (token == 0 && left < kBlockTokens) clear_values(values, size, left);
      for (int e = 0; e < size; e++) values[(token / kV * size + e) * kV + token % kV] = value[e];
    }
  }
}

// sum += the products of a lane's values with one word, which every lane has.
LORI_INLINE Floats multiply_add(Floats sum, const float* lanes, float word) {
  const Floats values = load(lanes), words = splat(word);
  return each<Floats>([&](int i) { return fused_multiply_add(values.part[i], words.part[i], sum.part[i]); });
}

LORI_INLINE Floats multiply_add(Floats sum, const uint16_t* lanes, uint32_t word) {
#if defined(__AVX512BF16__)
  const __m512i values = _mm512_loadu_si512(lanes);
  sum.part[0] =
      (Vector)_mm512_dpbf16_ps((__m512)sum.part[0], (__m512bh)values, (__m512bh)_mm512_set1_epi32(static_cast<int>(word)));
#else
  const float first = bits_of<float>(word << 16), second = bits_of<float>(word & 0xffff0000u);
  for (int i = 0; i < kParts; i++) {
    WordVector pairs;
    std::memcpy(&pairs, lanes + 2 * kWidth * i, sizeof(pairs));
    sum.part[i] += (Vector)(pairs << 16) * first;
    sum.part[i] += (Vector)(pairs & 0xffff0000u) * second;
  }
#endif
  return sum;
}

template <typename Value>
struct WordOf;
template <>
struct WordOf<float> {
  using Type = float;
};
template <>
struct WordOf<uint16_t> {
  using Type = uint32_t;
};

// Sums that stay in registers: of queries in a block of keys, and of rows and vectors in a block of values.
constexpr int kScoreRows = kWidth == 16 ? kMaxRows : kWidth == 8 ? 4 : 2;
constexpr int kWeighRows = kWidth == 16 ? 6 : kScoreRows;
constexpr int kWeighVectors = kWidth == 16 ? 4 : 1;

// scores[r][0..16] of kRows queries (E / V, kRows) with one block's keys, for the queries from kFirst on.
template <typename Value, int kRows, int kFirst = 0>
LORI_INLINE void score_block(const Value* keys, const Value* ahead, const typename WordOf<Value>::Type* queries, int words,
                             float* scores, int64_t stride) {
  constexpr int kCount = kRows - kFirst < kScoreRows ? kRows - kFirst : kScoreRows;
  Floats sums[kCount] = {};
  for (int e = 0; e < words; e++) {
    if (kFirst == 0) __builtin_prefetch(ahead + e * kBlockTokens * kTogether<Value>, 0, 2);
    for (int r = 0; r < kCount; r++)
      sums[r] = multiply_add(sums[r], keys + e * kBlockTokens * kTogether<Value>, queries[e * kRows + kFirst + r]);
  }
  for (int r = 0; r < kCount; r++) store(scores + (kFirst + r) * stride, sums[r]);
  if constexpr (kFirst + kCount < kRows) score_block<Value, kRows, kFirst + kCount>(keys, ahead, queries, words, scores, stride);
}

// The first block with a key that a token at `position` sees.
LORI_INLINE int first_block_of(const Heads& heads, int position) {
  return heads.window && position >= heads.window ? (position - heads.window + 1) / kBlockTokens : 0;
}

// The b-th block that the next piece reads, or its last: a place in memory to ask for.
template <typename Value>
LORI_INLINE Block<Value> next_block(const Heads& heads, const Attention& attention, const Piece& next, int b) {
  const Span& span = attention.spans[next.span];
  const int position = span.position + next.first_token, last = position / kBlockTokens;
  const int block = first_block_of(heads, position) + b;
  return {heads, attention.memory, attention.table[span.blocks + (block < last ? block : last)]};
}

// out[r][0 .. 16 kVectors] += the values of one block times their weights, for kRows queries.
template <typename Value, int kRows, int kVectors>
LORI_INLINE void weigh_blocks(const Heads& heads, const Attention& attention, const Piece& piece, const Piece& next,
                              const int32_t* table, int first_block, int num_blocks, const Value* weights, int64_t stride,
                              int column, float* out, int64_t out_stride) {
  constexpr int kV = kTogether<Value>;
  using Word = typename WordOf<Value>::Type;
  Floats sums[kRows][kVectors] = {};
  for (int b = 0; b < num_blocks; b++) {
    const Block<Value> block(heads, attention.memory, table[first_block + b]);
    const Value* values = block.head(block.values, heads, piece.kv_head) + column * kV;
    const Value* ahead = block.head(next_block<Value>(heads, attention, next, b).keys, heads, next.kv_head) + column * kV;
    for (int w = 0; w < kBlockTokens / kV; w++) {
      const Value* lanes = values + w * heads.head_size * kV;
      for (int v = 0; v < kVectors; v++) __builtin_prefetch(ahead + w * heads.head_size * kV + v * kLanes * kV, 0, 2);
      for (int r = 0; r < kRows; r++) {
        Word word;
        std::memcpy(&word, weights + r * stride + b * kBlockTokens + w * kV, sizeof(word));
        for (int v = 0; v < kVectors; v++) sums[r][v] = multiply_add(sums[r][v], lanes + v * kLanes * kV, word);
      }
    }
  }
  for (int r = 0; r < kRows; r++)
    for (int v = 0; v < kVectors; v++) store(out + r * out_stride + column + v * kLanes, sums[r][v]);
}

// One token's place among the keys: those it sees are first .. last.
struct Seen {
  int first, last;
};

// Turns a row's scores into weights that sum to 1, zero where it does not see, and stores them in the values' type.
template <typename Value>
void soften(float* scores, int first_key, int num_keys, const Seen& seen, float scale, float softcap, Value* weights) {
  Floats most = splat(-__builtin_inff());
  Ints key = count_from(first_key);
  for (int j = 0; j < num_keys; j += kLanes, key = key + kLanes) {
    Floats score = load(scores + j) * scale;
    if (softcap > 0) score = softcap * tanh_of(score / softcap);
    const Ints is_seen = (key >= seen.first) & (key < seen.last);
    score = select(is_seen, score, splat(-__builtin_inff()));
    store(scores + j, score);
    most = greater(most, score);
  }
  const float top = max_of(most);
  Floats total = {};
  for (int j = 0; j < num_keys; j += kLanes) {
    const Floats weight = exponential(load(scores + j) - top);
    store(scores + j, weight);
    total += weight;
  }
  const float share = 1.0f / sum_of(total);
  for (int j = 0; j < num_keys; j += kLanes) store(weights + j, load(scores + j) * share);
}

template <typename Value, int kRows>
void weigh(const Heads& heads, const Attention& attention, const Piece& piece, const Piece& next, const int32_t* table,
           int first_block, int num_blocks, const Value* weights, int64_t stride, float* out) {
  int column = 0;
  for (; column + kWeighVectors * kLanes <= heads.head_size; column += kWeighVectors * kLanes)
    weigh_blocks<Value, kRows, kWeighVectors>(heads, attention, piece, next, table, first_block, num_blocks, weights, stride,
                                              column, out, heads.head_size);
  for (; column < heads.head_size; column += kLanes)
    weigh_blocks<Value, kRows, 1>(heads, attention, piece, next, table, first_block, num_blocks, weights, stride, column, out,
                                  heads.head_size);
}

// In groups of about the same size.
template <typename Value, int kRows>
LORI_INLINE void weigh_in_groups(const Heads& heads, const Attention& attention, const Piece& piece, const Piece& next,
                                 const int32_t* table, int first_block, int num_blocks, const Value* weights, int64_t stride,
                                 float* out) {
  constexpr int kGroups = (kRows + kWeighRows - 1) / kWeighRows, kCount = (kRows + kGroups - 1) / kGroups;
  weigh<Value, kCount>(heads, attention, piece, next, table, first_block, num_blocks, weights, stride, out);
  if constexpr (kCount < kRows)
    weigh_in_groups<Value, kRows - kCount>(heads, attention, piece, next, table, first_block, num_blocks,
                                           weights + kCount * stride, stride, out + kCount * heads.head_size);
}

template <typename Value, int kRows>
void attend_rows(const Heads& heads, const Attention& attention, const Piece& piece, const Piece& next, int first_row,
                 float* scratch) {
  using Word = typename WordOf<Value>::Type;
  constexpr int kV = kTogether<Value>;
  const Span& span = attention.spans[piece.span];
  const int size = heads.head_size, group = heads.num_heads / heads.num_kv_heads, words = size / kV;
  const int32_t* table = attention.table + span.blocks;
  const int first_position = span.position + piece.first_token + first_row / group;
  const int last_position = span.position + piece.first_token + (first_row + kRows - 1) / group;
  const int first_block = first_block_of(heads, first_position);
  const int num_blocks = last_position / kBlockTokens + 1 - first_block, num_keys = num_blocks * kBlockTokens;
  float* scores = scratch;
  Value* weights = reinterpret_cast<Value*>(scratch + static_cast<int64_t>(kRows) * num_keys);
  Word queries[kRows * 512];
  Value* of_row[kRows];
  float out[kRows * 512];
  for (int r = 0; r < kRows; r++) {
    const int token = span.row + piece.first_token + (first_row + r) / group;
    const int head = piece.kv_head * group + (first_row + r) % group;
    const Value* query = attention.qkv.as<Value>().row(token) + head * size;
    of_row[r] = attention.out.as<Value>().row(token) + head * size;
    for (int e = 0; e < words; e++) std::memcpy(&queries[e * kRows + r], query + e * kV, sizeof(Word));
  }
  for (int b = 0; b < num_blocks; b++) {
    const Block<Value> block(heads, attention.memory, table[first_block + b]);
    score_block<Value, kRows>(block.head(block.keys, heads, piece.kv_head), block.head(block.values, heads, piece.kv_head),
                              queries, words, scores + b * kBlockTokens, num_keys);
  }
  for (int r = 0; r < kRows; r++) {
    const int position = span.position + piece.first_token + (first_row + r) / group;
    const Seen seen{heads.window ? position - heads.window + 1 : 0, position + 1};
    soften(scores + r * num_keys, first_block * kBlockTokens, num_keys, seen, heads.scale, heads.softcap, weights + r * num_keys);
  }
  weigh_in_groups<Value, kRows>(heads, attention, piece, next, table, first_block, num_blocks, weights, num_keys, out);
  for (int r = 0; r < kRows; r++)
    for (int e = 0; e < size; e += kLanes) store(of_row[r] + e, load(out + r * size + e));
}

template <typename Value>
void attend_piece(const Heads& heads, const Attention& attention, const Piece& piece, const Piece& next, float* scratch) {
  const int num_rows = piece.num_tokens * (heads.num_heads / heads.num_kv_heads);
  for (int row = 0; row < num_rows; row += kMaxRows) switch (num_rows - row < kMaxRows ? num_rows - row : kMaxRows) {
#define LORI_ROWS(n)                                                    \
  case n:                                                               \
    attend_rows<Value, n>(heads, attention, piece, next, row, scratch); \
    break;
      LORI_ROWS(1)
      LORI_ROWS(2)
      LORI_ROWS(3)
      LORI_ROWS(4) LORI_ROWS(5) LORI_ROWS(6) LORI_ROWS(7) LORI_ROWS(8) LORI_ROWS(9) LORI_ROWS(10) LORI_ROWS(11) LORI_ROWS(12)
#undef LORI_ROWS
    }
}

// Each piece asks for what the next one reads.
template <typename Value>
void attend_pieces(const Heads& heads, const Attention& attention, const Piece* pieces, int64_t first, int64_t last,
                   float* scratch) {
  for (int64_t i = first; i < last; i++)
    attend_piece<Value>(heads, attention, pieces[i], pieces[i + 1 < last ? i + 1 : i], scratch);
}

template <typename Value>
LayerFunctions functions() {
  return {norm_rows<Value>, gate_any<Value>, write_rows<Value>, attend_pieces<Value>};
}

inline LayerFunctions choose_layers(Dtype dtype) {
  return dtype == Dtype::kBfloat16 ? functions<uint16_t>() : functions<float>();
}

}  // namespace
}  // namespace lori
