// What a decoder layer does beside its products: norms, the gate of its MLP, and attention over paged keys and values.
//
// Shapes: T tokens, D inputs, H heads, G key-value heads, E head size (a multiple of 16), V = 2 values a word in bfloat16, 1 in
// fp32.
#pragma once

#include "layout.h"

namespace lori {

// A matrix of which rows are apart; strides count values.
template <typename Value>
struct Rows {
  Value* at;
  int64_t stride;
  LORI_INLINE Value* row(int64_t i) const { return at + i * stride; }
};

struct Matrix {
  uint8_t* at;
  int64_t stride;  // in values
  template <typename Value>
  LORI_INLINE Rows<Value> as() const {
    return {reinterpret_cast<Value*>(at), stride};
  }
};

// Normalises the rows first .. last: out = x / rms(x) * weight, where x is `stream`, to which `added` (may be null) is added
// before.
struct Norm {
  Matrix stream, added, out;
  const float* weight;  // (D,)
  int64_t size;
  float epsilon;
};

enum class Activation { kSilu, kGeluTanh, kGelu };

// out = activation(x[:, :size]) * x[:, size:]
struct Gate {
  Matrix x, out;
  int64_t size;
  Activation activation;
};

struct Heads {
  int num_heads, num_kv_heads, head_size;
  float scale, epsilon;
  int window;               // keys that a token sees, itself included; 0: all
  float softcap;            // 0: none
  const float* query_norm;  // (E,) or null
  const float* key_norm;
};

// Tokens row .. row + num_tokens of a step, at the positions from `position` on, of a sequence whose keys lie in `blocks`.
struct Span {
  int32_t row, num_tokens, position, blocks;  // `blocks` counts into the table
};

// A layer's keys and values in blocks of 16 tokens. Keys (G, E / V, 16, V): a lane is a token. Values (G, 16 / V, E, V): a lane
// is a value. A block's first token clears the values of the others: a weight of zero would not hide what is not finite.
struct Attention {
  Matrix qkv;           // (T, (H + 2 G) E); queries and keys are turned in place
  Matrix out;           // (T, H E)
  const float* cosine;  // (T, E) each
  const float* sine;
  uint8_t* memory;
  const Span* spans;
  const int32_t* table;
};

// Tokens of a span that are attended with together, for one key-value head.
struct Piece {
  int32_t span, first_token, num_tokens, kv_head;
};

// The functions of one instruction set, for one dtype. `first` and `last` count rows; those of `attend` count
// pieces.
struct LayerFunctions {
  void (*norm)(const Norm&, int64_t first, int64_t last);
  void (*gate)(const Gate&, int64_t first, int64_t last);
  void (*write)(const Heads&, const Attention&, const Span&, int64_t first, int64_t last);
  void (*attend)(const Heads&, const Attention&, const Piece* pieces, int64_t first, int64_t last, float* scratch);
};

LayerFunctions layers_portable(Dtype);
LayerFunctions layers_avx2(Dtype);
LayerFunctions layers_avx512(Dtype);
LayerFunctions layers_avx512_bf16(Dtype);

constexpr int kBlockTokens = 16;
constexpr int kMaxRows = 12;  // queries that are attended with together

// Floats of scratch that `attend` needs for a piece whose last token is at `position`.
LORI_INLINE int64_t scratch_size(int position) { return int64_t{2} * kMaxRows * (position / kBlockTokens + 1) * kBlockTokens; }

// Bytes of a layer's block: keys and values.
LORI_INLINE int64_t block_bytes(const Heads& heads, Dtype dtype) {
  return int64_t{2} * heads.num_kv_heads * heads.head_size * kBlockTokens * (dtype == Dtype::kBfloat16 ? 2 : 4);
}

}  // namespace lori
