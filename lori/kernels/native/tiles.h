// The eight tiles of AMX, each of up to 16 rows of up to 64 bytes. With LORI_EMULATED_TILES, for tests on any processor, in plain
// loops.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "layout.h"

#ifdef LORI_EMULATED_TILES
#include <cassert>
#else
#include <immintrin.h>
#endif

namespace lori {
namespace {

constexpr int kTiles = 8;
constexpr int kMaxTileRows = 16;
constexpr int kTileBytes = 64;   // of a row, at most
constexpr int kTileInputs = 32;  // bfloat16 of a row, at most

struct TileShape {
  int rows, row_bytes;
};

template <typename Run, int... kIndices>
LORI_INLINE void for_indices(std::integer_sequence<int, kIndices...>, Run run) {
  (run(std::integral_constant<int, kIndices>()), ...);
}

// Calls run(0) .. run(kCount - 1), each number as a type: the number of a tile is part of an instruction.
template <int kCount, typename Run>
LORI_INLINE void for_each_index(Run run) {
  for_indices(std::make_integer_sequence<int, kCount>(), run);
}
#define LORI_EACH(name) [&](auto name) __attribute__((always_inline))

// Has the compiler write what tiles are loaded from next: it does not know that these instructions read memory.
LORI_INLINE void written_to_memory() { __asm__ volatile("" ::: "memory"); }

#ifdef LORI_EMULATED_TILES

struct EmulatedTile {
  TileShape shape;
  uint8_t bytes[kMaxTileRows][kTileBytes];
};
thread_local EmulatedTile emulated[kTiles];

LORI_INLINE void configure_tiles(const TileShape (&shapes)[kTiles]) {
  for (int tile = 0; tile < kTiles; tile++) emulated[tile].shape = shapes[tile];
}
LORI_INLINE void release_tiles() {}
template <int kTile>
LORI_INLINE void zero_tile() {
  assert(emulated[kTile].shape.rows > 0);
  std::memset(emulated[kTile].bytes, 0, sizeof(emulated[kTile].bytes));
}
template <int kTile>
LORI_INLINE void load_tile(const void* at, int64_t stride) {
  assert(emulated[kTile].shape.rows > 0);
  for (int row = 0; row < emulated[kTile].shape.rows; row++)
    std::memcpy(emulated[kTile].bytes[row], static_cast<const uint8_t*>(at) + row * stride, emulated[kTile].shape.row_bytes);
}
template <int kTile>
LORI_INLINE void store_tile(void* at, int64_t stride) {
  assert(emulated[kTile].shape.rows > 0);
  for (int row = 0; row < emulated[kTile].shape.rows; row++)
    std::memcpy(static_cast<uint8_t*>(at) + row * stride, emulated[kTile].bytes[row], emulated[kTile].shape.row_bytes);
}
template <int kSum, int kLeft, int kRight>
LORI_INLINE void multiply_tiles() {
  const auto value = [](const uint8_t* at) {
    const uint32_t bits = static_cast<uint32_t>(at[0] | at[1] << 8) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
  };
  EmulatedTile &sums = emulated[kSum], &left = emulated[kLeft], &right = emulated[kRight];
  // A processor would stop here.
  assert(sums.shape.rows > 0 && left.shape.rows == sums.shape.rows && right.shape.row_bytes == sums.shape.row_bytes &&
         left.shape.row_bytes == 4 * right.shape.rows);
  for (int row = 0; row < sums.shape.rows; row++) {
    for (int column = 0; column < sums.shape.row_bytes / 4; column++) {
      float parts[2] = {}, sum;
      for (int i = 0; i < left.shape.row_bytes / 2; i++)
        parts[i % 2] += value(left.bytes[row] + 2 * i) * value(right.bytes[i / 2] + 4 * column + 2 * (i % 2));
      std::memcpy(&sum, sums.bytes[row] + 4 * column, 4);
      sum += parts[0] + parts[1];
      std::memcpy(sums.bytes[row] + 4 * column, &sum, 4);
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

LORI_INLINE void configure_tiles(const TileShape (&shapes)[kTiles]) {
  TileConfig config = {};
  config.palette = 1;
  for (int tile = 0; tile < kTiles; tile++) {
    config.row_bytes[tile] = static_cast<uint16_t>(shapes[tile].row_bytes);
    config.rows[tile] = static_cast<uint8_t>(shapes[tile].rows);
  }
  __asm__ volatile("" ::"r"(&config) : "memory");  // GCC before 12.4 takes the instruction to read 8 bytes of it
  _tile_loadconfig(&config);
}
LORI_INLINE void release_tiles() { _tile_release(); }

// The instructions have the numbers of their tiles in themselves.
template <int kTile>
LORI_INLINE void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
LORI_INLINE void load_tile(const void* at, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(stride), "i"(kTile));
}
template <int kTile>
LORI_INLINE void store_tile(void* at, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(at), "r"(stride), "i"(kTile) : "memory");
}
// Adds the products of two tiles to the sums: of bfloat16 in rows (R, 2 K) and in pairs of inputs (K, C, 2), to fp32 (R, C).
template <int kSum, int kLeft, int kRight>
LORI_INLINE void multiply_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}

#endif

}  // namespace
}  // namespace lori
