// The layers of layers_loops.h, with attention in AMX's tiles.
//
// A tile of keys, 32 values of 16 tokens, and one of values, 16 values of 16 tokens, are rows of a block as it lies. A row's
// score and what it attends to take their sums in the order of values and blocks, whatever rows are computed with it.
#include "instruction_sets.h"
#include "layers_loops.h"
#include "tiles.h"

namespace lori {
namespace {

constexpr int kColumns = 4 * kLanes;  // of the values that are weighed at a time, a tile for each 16
constexpr int kRowTile = 4, kHalfRow = 5, kBlockTile = 6, kHalfBlock = 7;  // 0 .. 3 are sums

// Tiles of `num_rows` queries: sums, 32 values, 16 values; a block's 32 values, and 16.
void configure_attention(int num_rows) {
  const TileShape whole{num_rows, kTileBytes}, half{num_rows, kTileBytes / 2};
  configure_tiles({whole, whole, whole, whole, whole, half, {kMaxTileRows, kTileBytes}, {kMaxTileRows / 2, kTileBytes}});
}

// The scores of the queries (num_rows, E) with the keys of a block.
LORI_INLINE void score_tiles(const uint16_t* queries, const uint16_t* keys, const uint16_t* ahead, int size, float* scores,
                             int64_t stride) {
  zero_tile<0>();
  for (int e = 0; e < size; e += kTileInputs) {
    for (int line = 0; line < kTileInputs / 2; line++) __builtin_prefetch(ahead + e * kBlockTokens + line * kTileInputs, 0, 2);
    if (e + kTileInputs <= size) {
      load_tile<kRowTile>(queries + e, sizeof(uint16_t) * size);
      load_tile<kBlockTile>(keys + e * kBlockTokens, kTileBytes);
      multiply_tiles<0, kRowTile, kBlockTile>();
    } else {
      load_tile<kHalfRow>(queries + e, sizeof(uint16_t) * size);
      load_tile<kHalfBlock>(keys + e * kBlockTokens, kTileBytes);
      multiply_tiles<0, kHalfRow, kHalfBlock>();
    }
  }
  store_tile<0>(scores, sizeof(float) * stride);
}

// out (rows, E), from `column` on: the values of kCount tiles of 16 columns times their weights.
template <int kCount>
void weigh_tiles(const Heads& heads, const Attention& attention, const Piece& piece, const Piece& next, const int32_t* table,
                 int first_block, int num_blocks, const uint16_t* weights, int64_t stride, int column, float* out) {
  const int64_t row_bytes = int64_t{2} * sizeof(uint16_t) * heads.head_size;
  for_each_index<kCount>(LORI_EACH(tile) { zero_tile<tile.value>(); });
  for (int b = 0; b < num_blocks; b++) {
    const Block<uint16_t> block(heads, attention.memory, table[first_block + b]);
    const uint16_t* values = block.head(block.values, heads, piece.kv_head) + 2 * column;
    const uint16_t* ahead = block.head(next_block<uint16_t>(heads, attention, next, b).values, heads, next.kv_head) + 2 * column;
    for (int pair = 0; pair < kBlockTokens / 2; pair++)
      for (int c = 0; c < kCount; c++) __builtin_prefetch(ahead + 2 * pair * heads.head_size + 2 * kLanes * c, 0, 2);
    load_tile<kHalfRow>(weights + b * kBlockTokens, sizeof(uint16_t) * stride);
    for_each_index<kCount>(LORI_EACH(tile) {
      load_tile<kHalfBlock>(values + 2 * kLanes * tile.value, row_bytes);
      multiply_tiles<tile.value, kHalfRow, kHalfBlock>();
    });
  }
  for_each_index<kCount>(
      LORI_EACH(tile) { store_tile<tile.value>(out + column + kLanes * tile.value, sizeof(float) * heads.head_size); });
}

void attend_tile_rows(const Heads& heads, const Attention& attention, const Piece& piece, const Piece& next, int first_row,
                      int num_rows, float* scratch) {
  const Span& span = attention.spans[piece.span];
  const int size = heads.head_size, group = heads.num_heads / heads.num_kv_heads;
  const int32_t* table = attention.table + span.blocks;
  const auto token_of = [&](int row) { return piece.first_token + (first_row + row) / group; };
  const int first_block = first_block_of(heads, span.position + token_of(0));
  const int num_blocks = (span.position + token_of(num_rows - 1)) / kBlockTokens + 1 - first_block;
  const int num_keys = num_blocks * kBlockTokens;
  float* scores = scratch;
  auto* weights = reinterpret_cast<uint16_t*>(scratch + int64_t{num_rows} * num_keys);
  alignas(64) uint16_t queries[kMaxRows * 512];
  alignas(64) float out[kMaxRows * 512];
  uint16_t* out_rows[kMaxRows];
  for (int r = 0; r < num_rows; r++) {
    const int token = span.row + token_of(r), head = piece.kv_head * group + (first_row + r) % group;
    out_rows[r] = attention.out.as<uint16_t>().row(token) + head * size;
    std::memcpy(queries + r * size, attention.qkv.as<uint16_t>().row(token) + head * size, sizeof(uint16_t) * size);
  }
  written_to_memory();
  for (int b = 0; b < num_blocks; b++) {
    const Block<uint16_t> block(heads, attention.memory, table[first_block + b]);
    const uint16_t* ahead = block.head(next_block<uint16_t>(heads, attention, next, b).keys, heads, next.kv_head);
    score_tiles(queries, block.head(block.keys, heads, piece.kv_head), ahead, size, scores + b * kBlockTokens, num_keys);
  }
  for (int r = 0; r < num_rows; r++) {
    const int position = span.position + token_of(r);
    const Seen seen{heads.window ? position - heads.window + 1 : 0, position + 1};
    soften(scores + r * num_keys, first_block * kBlockTokens, num_keys, seen, heads.scale, heads.softcap, weights + r * num_keys);
  }
  written_to_memory();
  for (int column = 0; column < size; column += kColumns) switch ((size - column) / kLanes) {
#define LORI_COLUMNS(n)                                                                                            \
  case n:                                                                                                          \
    weigh_tiles<n>(heads, attention, piece, next, table, first_block, num_blocks, weights, num_keys, column, out); \
    break;
      LORI_COLUMNS(1)
      LORI_COLUMNS(2)
      LORI_COLUMNS(3)
#undef LORI_COLUMNS
          default : weigh_tiles<4>(heads, attention, piece, next, table, first_block, num_blocks, weights, num_keys, column, out);
    }
  for (int r = 0; r < num_rows; r++)
    for (int e = 0; e < size; e += kLanes) store(out_rows[r] + e, load(out + r * size + e));
}

void attend_in_tiles(const Heads& heads, const Attention& attention, const Piece* pieces, int64_t first, int64_t last,
                     float* scratch) {
  int configured = 0;
  for (int64_t i = first; i < last; i++) {
    const int num_rows = pieces[i].num_tokens * (heads.num_heads / heads.num_kv_heads);
    for (int row = 0; row < num_rows; row += kMaxRows) {
      const int count = num_rows - row < kMaxRows ? num_rows - row : kMaxRows;
      if (count != configured) configure_attention(configured = count);
      attend_tile_rows(heads, attention, pieces[i], pieces[i + 1 < last ? i + 1 : i], row, count, scratch);
    }
  }
  release_tiles();
}

}  // namespace

LayerFunctions layers_amx(Dtype dtype) {
  LayerFunctions functions = choose_layers(dtype);
  if (dtype == Dtype::kBfloat16) functions.attend = attend_in_tiles;
  return functions;
}

}  // namespace lori
