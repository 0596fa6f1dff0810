// The product of product.h as loops over vectors. Included by each instruction set's file, see walk.h.
//
// An output's sum takes its inputs in ascending order, whatever the number of tokens, the tile, the piece and the thread: it
// does not depend on what else is computed. With bfloat16 instructions two inputs are multiplied and added at a time. Without
// them a product of two bfloat16 is exact in fp32, so it is the same whether the compiler fuses it with the sum or not.
#pragma once

#include "product.h"
#include "vectors.h"

namespace lori {
namespace {

constexpr int kFarAhead = 8192;  // bytes: how far ahead weights are asked for where one tile of tokens reads them

constexpr int kToL2 = 2, kToL1 = 3;  // localities of __builtin_prefetch: to L2 alone, or to L1 too

template <int kLocality>
LORI_INLINE void prefetch(const uint8_t* at) {
  __builtin_prefetch(at, 0, kLocality);
}

LORI_INLINE void ask(Ahead& ahead) {
  if (ahead.at >= ahead.end) {
    if (ahead.next == ahead.last) return;
    ahead.at = ahead.next->begin;
    ahead.end = ahead.next->end;
    ahead.next++;
  }
  prefetch<kToL2>(ahead.at);
  ahead.at += 64;
}

// The weights of kWidth outputs for two inputs, in bfloat16, which has every number of int8 exactly.
LORI_INLINE WordVector load_weights(const uint16_t* at) {
  WordVector words;
  std::memcpy(&words, at, sizeof(words));
  return words;
}

LORI_INLINE WordVector load_weights(const int8_t* at) {
  HalfVector pairs;
  std::memcpy(&pairs, at, sizeof(pairs));
  const SignedVector both = __builtin_convertvector(pairs, SignedVector);
  const auto wide = [](SignedVector value) { return bits_of<WordVector>(__builtin_convertvector(value, Vector)); };
  return wide((both << 24) >> 24) >> 16 | (wide((both << 16) >> 24) & 0xffff0000u);
}

// Makes `count` weights, a multiple of 2 kWidth, bfloat16.
void widen(const int8_t* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; i += 2 * kWidth) {
    const WordVector words = load_weights(from + i);
    std::memcpy(to + i, &words, sizeof(words));
  }
}

#if defined(__AVX512BF16__)
constexpr bool kHasDot = true;
using Input = uint16_t;
using Lanes = WordVector;
using Inputs = __m512bh;

LORI_INLINE Lanes to_lanes(WordVector words) { return words; }
LORI_INLINE Inputs load_inputs(const uint16_t* x) {
  int word;
  std::memcpy(&word, x, sizeof(word));
  return (__m512bh)_mm512_set1_epi32(word);
}
LORI_INLINE Vector multiply_add(Vector sum, const Lanes& lanes, const Inputs& x) {
  return bits_of<Vector>(_mm512_dpbf16_ps(bits_of<__m512>(sum), (__m512bh)bits_of<__m512i>(lanes), x));
}
#else
constexpr bool kHasDot = false;
using Input = float;
struct Lanes {
  Vector first, second;
};
struct Inputs {
  float first, second;
};

LORI_INLINE Lanes to_lanes(WordVector words) { return {bits_of<Vector>(words << 16), bits_of<Vector>(words & 0xffff0000u)}; }
LORI_INLINE Inputs load_inputs(const float* x) { return {x[0], x[1]}; }
LORI_INLINE Vector multiply_add(Vector sum, const Lanes& lanes, const Inputs& x) {
  sum = lanes.first * x.first + sum;
  return lanes.second * x.second + sum;
}
#endif

constexpr int kMaxPiece = kHasDot ? kMaxInputs : 1024;  // inputs of a tile that are made fp32 at a time

template <typename Weight>
struct Tile {
  const Input* x;
  const Weight* weights;
  const uint8_t* following;  // weights that are wanted next
  int64_t x_stride;
  int num_pairs, step;  // pairs of inputs; bytes of `following` for each
};

// The parts kFirst .. kFirst + kCount of a panel of kOutputs, for some of a tile's rows. Only one of those asks for what follows.
template <int kLocality, int kOutputs, int kFirst, int kCount, int kRows, typename Weight>
LORI_INLINE void multiply_parts(const Tile<Weight>& tile, int first_row, Ahead& ahead, Vector (&sums)[kRows][kCount]) {
  constexpr int kBytes = 4 * kWidth;  // of a part's weights for two inputs, in bfloat16
  const Weight* weights = tile.weights + 2 * kWidth * kFirst;
  const Input* x = tile.x + first_row * tile.x_stride;
  const uint8_t* following = tile.following;
  const bool asks = first_row == 0;
  for (int pair = 0; pair < tile.num_pairs; pair++, weights += 2 * kOutputs, following += tile.step) {
    if (asks) {
      for (int byte = (kBytes * kFirst + 63) / 64 * 64; byte < kBytes * (kFirst + kCount); byte += 64)
        if (byte < tile.step) prefetch<kLocality>(following + byte);
      if (kFirst == 0) ask(ahead);
    }
    if constexpr (kRows == 1) {
      const Inputs inputs = load_inputs(x + 2 * pair);
      for (int p = 0; p < kCount; p++)
        sums[0][p] = multiply_add(sums[0][p], to_lanes(load_weights(weights + 2 * kWidth * p)), inputs);
    } else {
      Lanes lanes[kCount];
      for (int p = 0; p < kCount; p++) lanes[p] = to_lanes(load_weights(weights + 2 * kWidth * p));
      for (int r = 0; r < kRows; r++) {
        const Inputs inputs = load_inputs(x + r * tile.x_stride + 2 * pair);
        for (int p = 0; p < kCount; p++) sums[r][p] = multiply_add(sums[r][p], lanes[p], inputs);
      }
    }
  }
}

struct Panel {
  int first_output, num_outputs;  // those that are real
  bool is_first, is_last;         // of the pieces of its inputs
};

// Where a tile's sums go: to y, or to `partial` where more inputs follow.
struct Target {
  const Part& part;
  const Panel& panel;
  uint16_t* y;
  int64_t y_stride;
  float* partial;
};

LORI_INLINE Floats load_some(const float* at, int count) {
  if (count >= kLanes) return load(at);
  Floats values = {};
  std::memcpy(&values, at, sizeof(float) * count);
  return values;
}

// The sums of 16 outputs, from `output` of the panel on.
LORI_INLINE void finish(const Target& to, int row, int output, const Vector* sums) {
  Floats value;
  std::memcpy(&value, sums, sizeof(value));
  if (!to.panel.is_last) return store(to.partial + row * kPanelOutputs + output, value);
  const int left = to.panel.num_outputs - output, at = to.panel.first_output + output;
  if (to.part.scales) value = value * load_some(to.part.scales + at, left);
  if (to.part.bias) value = value + load_some(to.part.bias + at, left);
  uint16_t* y = to.y + row * to.y_stride + output;
  if (left >= kLanes) return store(y, value);
  uint16_t values[kLanes];
  store(values, value);
  std::memcpy(y, values, sizeof(uint16_t) * left);
}

template <int kLocality, int kOutputs, int kFirst, int kCount, int kRows, typename Weight>
LORI_INLINE void multiply_some(const Tile<Weight>& tile, int first_row, Ahead& ahead, const Target& to) {
  Vector sums[kRows][kCount] = {};
  if (!to.panel.is_first)
    for (int r = 0; r < kRows; r++)
      std::memcpy(sums[r], to.partial + (first_row + r) * kPanelOutputs + kFirst * kWidth, sizeof(sums[r]));
  multiply_parts<kLocality, kOutputs, kFirst, kCount, kRows>(tile, first_row, ahead, sums);
  for (int r = 0; r < kRows; r++)
    for (int p = 0; p < kCount; p += kParts) finish(to, first_row + r, (kFirst + p) * kWidth, sums[r] + p);
}

// Rows and parts whose sums stay in registers: with 32 of them 8 rows of 48 outputs, with 16 four rows of 16.
constexpr int kRowsTogether = kWidth == 16 ? kTileRows : kWidth == 8 ? 4 : 2;
template <int kVectors, int kRows>
constexpr int kPartsTogether = kWidth == 16 || (kWidth == 8 && kRows == 1) ? kVectors * kParts : kParts;

template <int kLocality, int kVectors, int kRows, int kFirst, typename Weight>
LORI_INLINE void multiply_rows(const Tile<Weight>& tile, int first_row, Ahead& ahead, const Target& to) {
  constexpr int kCount = kPartsTogether<kVectors, kRows>;
  multiply_some<kLocality, kVectors * kLanes, kFirst, kCount, kRows>(tile, first_row, ahead, to);
  if constexpr (kFirst + kCount < kVectors * kParts)
    multiply_rows<kLocality, kVectors, kRows, kFirst + kCount>(tile, first_row, ahead, to);
}

template <int kLocality, int kVectors, typename Weight>
void multiply_any(int num_rows, const Tile<Weight>& tile, Ahead& ahead, const Target& to) {
  for (int row = 0; row < num_rows; row += kRowsTogether) switch (least(num_rows - row, kRowsTogether)) {
#define LORI_ROWS(n)                                                                                  \
  case n:                                                                                             \
    if constexpr (n <= kRowsTogether) multiply_rows<kLocality, kVectors, n, 0>(tile, row, ahead, to); \
    break;
      LORI_ROWS(1) LORI_ROWS(2) LORI_ROWS(3) LORI_ROWS(4) LORI_ROWS(5) LORI_ROWS(6) LORI_ROWS(7) LORI_ROWS(8)
#undef LORI_ROWS
    }
}

template <int kLocality, typename Weight>
LORI_INLINE void multiply_tile(int outputs, int num_rows, const Tile<Weight>& tile, Ahead& ahead, const Target& to) {
  if (outputs == 48)
    multiply_any<kLocality, 3>(num_rows, tile, ahead, to);
  else if (outputs == 32)
    multiply_any<kLocality, 2>(num_rows, tile, ahead, to);
  else
    multiply_any<kLocality, 1>(num_rows, tile, ahead, to);
}

// Tokens first_row .. first_row + num_rows with a piece of a panel.
struct Piece {
  int first_row, num_rows, first_input, num_inputs, outputs;
};

// A tile's rows as the loops read them: fp32 where no instruction takes bfloat16.
struct TileInputs {
#if defined(__AVX512BF16__)
  LORI_INLINE const uint16_t* read(const uint16_t* x, int64_t stride, int, int) {
    this->stride = stride;
    return x;
  }
#else
  alignas(64) float values[kTileRows * kMaxPiece];
  LORI_INLINE const float* read(const uint16_t* x, int64_t x_stride, int num_rows, int num_inputs) {
    stride = kMaxPiece;
    for (int r = 0; r < num_rows; r++) {
      const uint16_t* row = x + r * x_stride;
      float* to = values + r * kMaxPiece;
      int i = 0;
      for (; i + kLanes <= num_inputs; i += kLanes) store(to + i, load(row + i));
      for (; i < num_inputs; i++) to[i] = bits_of<float>(static_cast<uint32_t>(row[i]) << 16);
    }
    return values;
  }
#endif
  int64_t stride;
};

// In tiles of about the same size: a tile of few tokens would leave the units idle. Two are of one size, and overlap where they
// must: of two sizes in turn each would wait for its weights. `source` is where the weights lie, of which those that follow are
// asked for: what `weights` was made from, or itself.
template <typename Weight, typename Source>
void multiply_piece(const Part& part, const Panel& panel, const Piece& piece, const Weight* weights, const Source* source,
                    const Tokens& tokens, Ahead& ahead, float* sums, TileInputs& inputs) {
  const int num_tiles = (piece.num_rows + kTileRows - 1) / kTileRows, outputs = piece.outputs;
  const int size = piece.num_rows / num_tiles, num_larger = piece.num_rows % num_tiles;
  const int64_t num_bytes = int64_t{sizeof(Source)} * outputs * piece.num_inputs;
  const uint8_t* begin = reinterpret_cast<const uint8_t*>(source);
  int next = 0;
  for (int i = 0; i < num_tiles; i++) {
    const int rows = num_tiles == 2 ? size + num_larger : size + (i < num_larger);
    const int row = piece.first_row + least(next, piece.num_rows - rows);
    next += rows;
    const Input* x = inputs.read(tokens.x + row * tokens.x_stride + piece.first_input, tokens.x_stride, rows, piece.num_inputs);
    const Target to{part, panel, tokens.y + row * tokens.y_stride + panel.first_output, tokens.y_stride,
                    sums + static_cast<int64_t>(next - rows) * kPanelOutputs};
    const int step = static_cast<int>(2 * int{sizeof(Source)} * outputs / num_tiles);
    const uint8_t* following = num_tiles == 1 ? begin + kFarAhead : begin + num_bytes + num_bytes * i / num_tiles;
    const Tile<Weight> tile{x, weights, following, inputs.stride, piece.num_inputs / 2, step};
    if (num_tiles == 1)  // each weight is read once, and L1 would be slower
      multiply_tile<kToL2>(outputs, rows, tile, ahead, to);
    else
      multiply_tile<kToL1>(outputs, rows, tile, ahead, to);
  }
}

// All tokens of a block with one panel. Its weights in int8 are widened where they are used, or once for several tiles.
void multiply_panel(const Part& part, const Tokens& tokens, int first_row, int num_rows, int panel, Ahead& ahead, float* sums) {
  alignas(64) uint16_t widened[kWidened * kPanelOutputs];
  TileInputs inputs;
  const int outputs = part.panel_outputs(panel);
  const int first_output = panel * kPanelOutputs, left = part.num_outputs - first_output;
  const bool is_widened = part.narrow && num_rows > kTileRows;
  const int most = is_widened ? kWidened : kMaxPiece;
  for (int input = 0; input < part.num_inputs; input += most) {
    const int num_inputs = least(most, part.num_inputs - input);
    const int64_t at = part.panel_at(panel) + int64_t{outputs} * input;
    const Panel of{first_output, least(left, outputs), input == 0, input + num_inputs == part.num_inputs};
    const Piece piece{first_row, num_rows, input, num_inputs, outputs};
    if (!part.narrow) {
      multiply_piece(part, of, piece, part.panels + at, part.panels + at, tokens, ahead, sums, inputs);
    } else if (!is_widened) {
      multiply_piece(part, of, piece, part.narrow + at, part.narrow + at, tokens, ahead, sums, inputs);
    } else {
      widen(part.narrow + at, int64_t{outputs} * num_inputs, widened);
      multiply_piece(part, of, piece, static_cast<const uint16_t*>(widened), part.narrow + at, tokens, ahead, sums, inputs);
    }
  }
}

[[maybe_unused]] void multiply_all(const Part& part, const Tokens& tokens, int first_row, int last_row, int first_panel,
                                   int last_panel, Ahead& ahead, float* sums) {
  for (int row = first_row; row < last_row; row += kRowBlock) {
    const int num_rows = least(last_row - row, kRowBlock);
    for (int panel = first_panel; panel < last_panel; panel++) multiply_panel(part, tokens, row, num_rows, panel, ahead, sums);
  }
}

}  // namespace
}  // namespace lori
