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

struct Tile {
  const uint16_t *x, *weights;
  const uint8_t* following;  // weights that are wanted next
  int64_t x_stride;
  int num_pairs, step;  // pairs of inputs; bytes of `following` for each
};

template <int kRows, int kVectors>
LORI_INLINE void multiply_tile(const Tile& tile, Ahead& ahead, __m512 (&sums)[kRows][kVectors]) {
  const uint16_t* weights = tile.weights;
  const uint8_t* following = tile.following;
  for (int pair = 0; pair < tile.num_pairs; pair++, weights += kVectors * 32, following += tile.step) {
    __m512i lanes[kVectors];
    for (int v = 0; v < kVectors; v++) lanes[v] = _mm512_loadu_si512(weights + 32 * v);
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

template <int kRows, int kVectors>
void multiply_rows(const Part& part, const Panel& panel, const Tile& tile, Ahead& ahead, uint16_t* y, int64_t y_stride,
                   float* partial) {
  __m512 sums[kRows][kVectors];
  for (int r = 0; r < kRows; r++)
    for (int v = 0; v < kVectors; v++)
      sums[r][v] = panel.is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(partial + r * kPanelOutputs + v * kLanes);
  multiply_tile<kRows, kVectors>(tile, ahead, sums);
  for (int v = 0; v < kVectors; v++) {
    const int left = panel.num_outputs - v * kLanes;
    const __mmask16 real = left >= kLanes ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    const __m512 bias =
        part.bias ? _mm512_maskz_loadu_ps(real, part.bias + panel.first_output + v * kLanes) : _mm512_setzero_ps();
    for (int r = 0; r < kRows; r++) {
      if (panel.is_last)
        _mm256_mask_storeu_epi16(y + r * y_stride + v * kLanes, real,
                                 (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(sums[r][v], bias)));
      else
        _mm512_storeu_ps(partial + r * kPanelOutputs + v * kLanes, sums[r][v]);
    }
  }
}

template <int kVectors>
void multiply_any(int num_rows, const Part& part, const Panel& panel, const Tile& tile, Ahead& ahead, uint16_t* y,
                  int64_t y_stride, float* partial) {
  switch (num_rows) {
#define LORI_ROWS(n) \
  case n:            \
    return multiply_rows<n, kVectors>(part, panel, tile, ahead, y, y_stride, partial);
    LORI_ROWS(1) LORI_ROWS(2) LORI_ROWS(3) LORI_ROWS(4) LORI_ROWS(5) LORI_ROWS(6) LORI_ROWS(7) LORI_ROWS(8)
#undef LORI_ROWS
  }
}

// All tokens of a block with one panel, in tiles of about the same size: a tile of few would leave the units idle. Two are of one
// size, and overlap where they must: of two sizes in turn each would wait for its weights.
void multiply_panel(const Part& part, const Tokens& tokens, int first_row, int num_rows, int panel, Ahead& ahead, float* sums) {
  const int outputs = part.panel_outputs(panel), num_tiles = (num_rows + kTileRows - 1) / kTileRows;
  const int size = num_rows / num_tiles, num_larger = num_rows % num_tiles;
  const int first_output = panel * kPanelOutputs, left = part.num_outputs - first_output;
  for (int input = 0; input < part.num_inputs; input += kMaxInputs) {
    const int num_inputs = part.num_inputs - input < kMaxInputs ? part.num_inputs - input : kMaxInputs;
    const uint16_t* weights = part.panel(panel) + int64_t{outputs} * input;
    const int64_t num_bytes = int64_t{2} * outputs * num_inputs;
    const Panel of{first_output, left < outputs ? left : outputs, input == 0, input + num_inputs == part.num_inputs};
    int next = 0;
    for (int i = 0; i < num_tiles; i++) {
      const int rows = num_tiles == 2 ? size + num_larger : size + (i < num_larger);
      const int row = first_row + std::min(next, num_rows - rows);
      next += rows;
      const uint8_t* begin = reinterpret_cast<const uint8_t*>(weights);
      Tile tile{tokens.x + row * tokens.x_stride + input,
                weights,
                begin + num_bytes + num_bytes * i / num_tiles,
                tokens.x_stride,
                num_inputs / 2,
                static_cast<int>(4 * outputs / num_tiles)};
      if (num_tiles == 1) tile.following = begin + kFarAhead;
      uint16_t* y = tokens.y + row * tokens.y_stride + first_output;
      float* partial = sums + static_cast<int64_t>(next - rows) * kPanelOutputs;
      if (outputs == 48)
        multiply_any<3>(rows, part, of, tile, ahead, y, tokens.y_stride, partial);
      else if (outputs == 32)
        multiply_any<2>(rows, part, of, tile, ahead, y, tokens.y_stride, partial);
      else
        multiply_any<1>(rows, part, of, tile, ahead, y, tokens.y_stride, partial);
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
