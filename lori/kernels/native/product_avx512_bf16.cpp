#include <immintrin.h>

#include <algorithm>

#include "product.h"

namespace lori {
namespace {

constexpr int kFarAhead = 8192;  // bytes of weights, where each is used once

LORI_INLINE void ask(Ahead& ahead) {
  if (ahead.at >= ahead.end) {
    if (ahead.next == ahead.last) return;
    ahead.at = ahead.next->begin;
    ahead.end = ahead.next->end;
    ahead.next++;
  }
  _mm_prefetch(reinterpret_cast<const char*>(ahead.at), _MM_HINT_T1);
  ahead.at += 64;
}

// 32 weights in bfloat16, which has every number of int8 exactly.
LORI_INLINE __m512i load_weights(const uint16_t* at) { return _mm512_loadu_si512(at); }
LORI_INLINE __m512i load_weights(const int8_t* at) {
  const auto half = [at](int i) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at) + i)));
  };
  return (__m512i)_mm512_cvtne2ps_pbh(half(1), half(0));
}

// Makes `count` weights, a multiple of 32, bfloat16.
void widen(const int8_t* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; i += 32) _mm512_storeu_si512(to + i, load_weights(from + i));
}

template <typename Weight>
struct Tile {
  const uint16_t* x;
  const Weight* weights;
  const uint8_t* following;  // weights that are wanted next
  int64_t x_stride;
  int num_pairs, step;  // pairs of inputs; bytes of `following` for each
};

template <int kRows, int kVectors, typename Weight>
LORI_INLINE void multiply_tile(const Tile<Weight>& tile, Ahead& ahead, __m512 (&sums)[kRows][kVectors]) {
  const Weight* weights = tile.weights;
  const uint8_t* following = tile.following;
  for (int pair = 0; pair < tile.num_pairs; pair++, weights += kVectors * 32, following += tile.step) {
    __m512i lanes[kVectors];
    for (int v = 0; v < kVectors; v++) lanes[v] = load_weights(weights + 32 * v);
    for (int line = 0; line < kVectors; line++)
      if (64 * line < tile.step) _mm_prefetch(reinterpret_cast<const char*>(following) + 64 * line, _MM_HINT_T1);
    ask(ahead);
    for (int r = 0; r < kRows; r++) {
      int word;
      __builtin_memcpy(&word, tile.x + r * tile.x_stride + 2 * pair, 4);
      const __m512i x = _mm512_set1_epi32(word);
      for (int v = 0; v < kVectors; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], (__m512bh)x, (__m512bh)lanes[v]);
    }
  }
}

struct Panel {
  int first_output, num_outputs;  // those that are real
  bool is_first, is_last;         // of the pieces of its inputs
};

template <int kRows, int kVectors, typename Weight>
void multiply_rows(const Part& part, const Panel& panel, const Tile<Weight>& tile, Ahead& ahead, uint16_t* y, int64_t y_stride,
                   float* partial) {
  __m512 sums[kRows][kVectors];
  for (int r = 0; r < kRows; r++)
    for (int v = 0; v < kVectors; v++)
      sums[r][v] = panel.is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(partial + r * kPanelOutputs + v * kLanes);
  multiply_tile(tile, ahead, sums);
  for (int v = 0; v < kVectors; v++) {
    const int left = panel.num_outputs - v * kLanes;
    const __mmask16 real = left >= kLanes ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    const __m512 bias =
        part.bias ? _mm512_maskz_loadu_ps(real, part.bias + panel.first_output + v * kLanes) : _mm512_setzero_ps();
    const __m512 scale =
        part.scales ? _mm512_maskz_loadu_ps(real, part.scales + panel.first_output + v * kLanes) : _mm512_set1_ps(1.0f);
    for (int r = 0; r < kRows; r++) {
      if (panel.is_last)
        _mm256_mask_storeu_epi16(y + r * y_stride + v * kLanes, real,
                                 (__m256i)_mm512_cvtneps_pbh(_mm512_fmadd_ps(sums[r][v], scale, bias)));
      else
        _mm512_storeu_ps(partial + r * kPanelOutputs + v * kLanes, sums[r][v]);
    }
  }
}

template <int kVectors, typename Weight>
void multiply_any(int num_rows, const Part& part, const Panel& panel, const Tile<Weight>& tile, Ahead& ahead, uint16_t* y,
                  int64_t y_stride, float* partial) {
  switch (num_rows) {
#define LORI_ROWS(n) \
  case n:            \
    return multiply_rows<n, kVectors>(part, panel, tile, ahead, y, y_stride, partial);
    LORI_ROWS(1) LORI_ROWS(2) LORI_ROWS(3) LORI_ROWS(4) LORI_ROWS(5) LORI_ROWS(6) LORI_ROWS(7) LORI_ROWS(8)
#undef LORI_ROWS
  }
}

// Tokens first_row .. first_row + num_rows with a piece of a panel.
struct Piece {
  int first_row, num_rows, first_input, num_inputs, outputs;
};

// In tiles of about the same size: a tile of few tokens would leave the units idle. Two are of one size, and overlap where they
// must: of two sizes in turn each would wait for its weights. `source` is where the weights lie, of which those that follow are
// asked for: what `weights` was made from, or itself.
template <typename Weight, typename Source>
void multiply_piece(const Part& part, const Panel& panel, const Piece& piece, const Weight* weights, const Source* source,
                    const Tokens& tokens, Ahead& ahead, float* sums) {
  const int num_tiles = (piece.num_rows + kTileRows - 1) / kTileRows, outputs = piece.outputs;
  const int size = piece.num_rows / num_tiles, num_larger = piece.num_rows % num_tiles;
  const int64_t num_bytes = int64_t{sizeof(Source)} * outputs * piece.num_inputs;
  const uint8_t* begin = reinterpret_cast<const uint8_t*>(source);
  int next = 0;
  for (int i = 0; i < num_tiles; i++) {
    const int rows = num_tiles == 2 ? size + num_larger : size + (i < num_larger);
    const int row = piece.first_row + std::min(next, piece.num_rows - rows);
    next += rows;
    const Tile<Weight> tile{tokens.x + row * tokens.x_stride + piece.first_input,
                            weights,
                            num_tiles == 1 ? begin + kFarAhead : begin + num_bytes + num_bytes * i / num_tiles,
                            tokens.x_stride,
                            piece.num_inputs / 2,
                            static_cast<int>(2 * int{sizeof(Source)} * outputs / num_tiles)};
    uint16_t* y = tokens.y + row * tokens.y_stride + panel.first_output;
    float* partial = sums + static_cast<int64_t>(next - rows) * kPanelOutputs;
    if (outputs == 48)
      multiply_any<3>(rows, part, panel, tile, ahead, y, tokens.y_stride, partial);
    else if (outputs == 32)
      multiply_any<2>(rows, part, panel, tile, ahead, y, tokens.y_stride, partial);
    else
      multiply_any<1>(rows, part, panel, tile, ahead, y, tokens.y_stride, partial);
  }
}

// All tokens of a block with one panel. Its weights in int8 are widened where they are used, or once for several tiles.
void multiply_panel(const Part& part, const Tokens& tokens, int first_row, int num_rows, int panel, Ahead& ahead, float* sums) {
  alignas(64) uint16_t widened[kWidened * kPanelOutputs];
  const int outputs = part.panel_outputs(panel);
  const int first_output = panel * kPanelOutputs, left = part.num_outputs - first_output;
  const bool is_widened = part.narrow && num_rows > kTileRows;
  const int most = is_widened ? kWidened : kMaxInputs;
  for (int input = 0; input < part.num_inputs; input += most) {
    const int num_inputs = std::min(most, part.num_inputs - input);
    const int64_t at = part.panel_at(panel) + int64_t{outputs} * input;
    const Panel of{first_output, std::min(left, outputs), input == 0, input + num_inputs == part.num_inputs};
    const Piece piece{first_row, num_rows, input, num_inputs, outputs};
    if (!part.narrow) {
      multiply_piece(part, of, piece, part.panels + at, part.panels + at, tokens, ahead, sums);
    } else if (!is_widened) {
      multiply_piece(part, of, piece, part.narrow + at, part.narrow + at, tokens, ahead, sums);
    } else {
      widen(part.narrow + at, int64_t{outputs} * num_inputs, widened);
      multiply_piece(part, of, piece, static_cast<const uint16_t*>(widened), part.narrow + at, tokens, ahead, sums);
    }
  }
}

}  // namespace

void multiply_avx512_bf16(const Part& part, const Tokens& tokens, int first_row, int last_row, int first_panel, int last_panel,
                          Ahead& ahead, float* sums) {
  for (int row = first_row; row < last_row; row += kRowBlock) {
    const int num_rows = last_row - row < kRowBlock ? last_row - row : kRowBlock;
    for (int panel = first_panel; panel < last_panel; panel++) multiply_panel(part, tokens, row, num_rows, panel, ahead, sums);
  }
}

}  // namespace lori
