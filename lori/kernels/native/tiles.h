// The eight tiles of AMX, all of up to 16 rows of 64 bytes. With LORI_EMULATED_TILES, for tests on any processor, in plain loops.
#pragma once

#include <cstdint>
#include <cstring>

#include "layout.h"

#ifndef LORI_EMULATED_TILES
#include <immintrin.h>
#endif

namespace lori {
namespace {

constexpr int kTileTokens = 16;      // rows of a tile
constexpr int kTileInputs = 32;      // bfloat16 of a row
constexpr int kX = 6, kWeights = 7;  // tiles; 0 .. 5 are sums

// Has the compiler write what tiles are loaded from next: it does not know that these instructions read memory.
LORI_INLINE void written_to_memory() { __asm__ volatile("" ::: "memory"); }

#ifdef LORI_EMULATED_TILES

struct EmulatedTile {
  uint8_t bytes[kTileTokens][64];
};
thread_local EmulatedTile emulated[8];
thread_local int emulated_rows[8];

LORI_INLINE void configure_tiles(int num_tokens) {
  for (int tile = 0; tile < 8; tile++) emulated_rows[tile] = tile == kWeights ? kTileTokens : num_tokens;
}
LORI_INLINE void release_tiles() {}
template <int kTile>
LORI_INLINE void zero_tile() {
  std::memset(emulated[kTile].bytes, 0, sizeof(EmulatedTile));
}
template <int kTile>
LORI_INLINE void load_tile(const void* at, int64_t stride) {
  for (int row = 0; row < emulated_rows[kTile]; row++)
    std::memcpy(emulated[kTile].bytes[row], static_cast<const uint8_t*>(at) + row * stride, 64);
}
template <int kTile>
LORI_INLINE void store_tile(void* at, int64_t stride) {
  for (int row = 0; row < emulated_rows[kTile]; row++)
    std::memcpy(static_cast<uint8_t*>(at) + row * stride, emulated[kTile].bytes[row], 64);
}
template <int kTile>
LORI_INLINE void multiply_tiles() {
  const auto value = [](const uint8_t* at) {
    const uint32_t bits = static_cast<uint32_t>(at[0] | at[1] << 8) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
  };
  for (int row = 0; row < emulated_rows[kTile]; row++) {
    for (int output = 0; output < 16; output++) {
      float sums[2] = {}, sum;
      for (int i = 0; i < kTileInputs; i++)
        sums[i % 2] += value(emulated[kX].bytes[row] + 2 * i) * value(emulated[kWeights].bytes[i / 2] + 4 * output + 2 * (i % 2));
      uint8_t* at = emulated[kTile].bytes[row] + 4 * output;
      std::memcpy(&sum, at, 4);
      sum += sums[0] + sums[1];
      std::memcpy(at, &sum, 4);
    }
  }
}

#else

// As the processor reads it.
struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

// All tiles but the weights' have a row for each of `num_tokens`.
LORI_INLINE void configure_tiles(int num_tokens) {
  TileConfig config = {};
  config.palette = 1;
  for (int tile = 0; tile < 8; tile++) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = static_cast<uint8_t>(tile == kWeights ? kTileTokens : num_tokens);
  }
  __asm__ volatile("" ::"r"(&config) : "memory");  // GCC before 12.4 takes the instruction to read 8 bytes of it
  _tile_loadconfig(&config);
}
LORI_INLINE void release_tiles() { _tile_release(); }

// The instructions have the numbers of their tiles in themselves.
#define LORI_BY_TILE(instruction)           \
  if constexpr (kTile == 0) instruction(0); \
  if constexpr (kTile == 1) instruction(1); \
  if constexpr (kTile == 2) instruction(2); \
  if constexpr (kTile == 3) instruction(3); \
  if constexpr (kTile == 4) instruction(4); \
  if constexpr (kTile == 5) instruction(5); \
  if constexpr (kTile == 6) instruction(6); \
  if constexpr (kTile == 7) instruction(7);
#define LORI_LOAD(tile) _tile_loadd(tile, at, stride)
#define LORI_STORE(tile) _tile_stored(tile, at, stride)
#define LORI_MULTIPLY(tile) _tile_dpbf16ps(tile, 6, 7)

template <int kTile>
LORI_INLINE void zero_tile() {
  LORI_BY_TILE(_tile_zero)
}
template <int kTile>
LORI_INLINE void load_tile(const void* at, int64_t stride) {
  LORI_BY_TILE(LORI_LOAD)
}
template <int kTile>
LORI_INLINE void store_tile(void* at, int64_t stride) {
  LORI_BY_TILE(LORI_STORE)
}
// Adds to the sums of kTile the products of the tile kX with the tile kWeights.
template <int kTile>
LORI_INLINE void multiply_tiles() {
  static_assert(kX == 6 && kWeights == 7);
  LORI_BY_TILE(LORI_MULTIPLY)
}
#undef LORI_BY_TILE
#undef LORI_LOAD
#undef LORI_STORE
#undef LORI_MULTIPLY

#endif

}  // namespace
}  // namespace lori
