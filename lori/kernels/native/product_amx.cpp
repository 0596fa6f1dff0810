// The product of product.h in AMX's tiles.
//
// A tile of weights, 32 inputs of 16 outputs, is 16 rows of a panel as it lies. An output's sum takes its inputs 32 at a time in
// ascending order; of these the even and the odd ones are added apart, as the instruction does, whatever the number of tokens.
#include "instruction_sets.h"
#include "product_loops.h"
#include "tiles.h"

namespace lori {
namespace {

constexpr int kTileTokens = kMaxTileRows;
constexpr int kLineBytes = 64;
constexpr int kTilesAhead = 4;  // a pass of two tiles reads lines all over its panels, so weights are asked for that far ahead
constexpr int kX = 4, kWeights = 7;                  // tiles, of tokens two; 0 .. 3 are sums
constexpr int kPanelTiles = kPanelOutputs / kLanes;  // as many as a pass over the inputs takes at most
constexpr int kMaxLines = 16;                        // of deltas that are asked for at a time

// The tokens of a block in groups of one size, at most 16; the last overlap where they must. A pass takes two of them.
struct Groups {
  int count, size, num_rows;
  explicit Groups(int num_rows)
      : count((num_rows + kTileTokens - 1) / kTileTokens), size((num_rows + count - 1) / count), num_rows(num_rows) {}
  LORI_INLINE int first(int group) const { return least(group * size, num_rows - size); }
  LORI_INLINE int num_pairs() const { return (count + 1) / 2; }
  // Tiles of weights in a pass: a whole panel for one group, and for two what leaves each tile loaded once. Where another program
  // runs on the same core, loads and products of tiles take turns.
  LORI_INLINE int num_tiles() const { return count == 1 ? kPanelTiles : 2; }
};

// Some inputs of a group of tokens, or of 16 outputs: those in whole tiles, and the last ones with zeros after them, in rows of
// 64 bytes.
struct Strip {
  const uint16_t* whole;
  const uint16_t* rest;  // null where there are none
  int64_t stride, step;  // from a tile's row to the next, in bytes; from a tile to the next, in values
};

// Sixteen outputs of a panel.
struct TileWeights {
  Strip strip;
  Panel panel;
  int output;  // of the panel
};

// What passes ask the memory for: with each tile of inputs `num_bytes` of the weights that are wanted next and `num_lines` of the
// deltas. After the part's end come the weights of the part that is multiplied next.
struct Following {
  const uint8_t *at, *end, *next;
  int64_t tile_bytes;  // of 16 outputs
  int num_bytes, num_lines;
  LORI_INLINE void ask_on() {
    const uint8_t* from = at < end ? at : next + (at - end);
    for (int byte = 0; byte < num_bytes; byte += kLineBytes) prefetch<kToL2>(from + byte);
    at += num_bytes;
  }
};

// `first` is what is read now, and `num_ahead` how far ahead it is asked for; both count weights.
Following following_of(const Part& part, const Groups& groups, int num_inputs, int64_t first, int64_t num_ahead, int num_lines) {
  const auto* begin = part.narrow ? reinterpret_cast<const uint8_t*>(part.narrow) : reinterpret_cast<const uint8_t*>(part.panels);
  const int weight_bytes = part.narrow ? sizeof(int8_t) : sizeof(uint16_t);
  const uint8_t* end = begin + weight_bytes * part_size(part.num_outputs, part.num_inputs);
  const auto* next = part.next ? static_cast<const uint8_t*>(part.next) : end;
  const int num_bytes = groups.num_tiles() * weight_bytes * kLanes * kTileInputs / groups.num_pairs();
  return {begin + weight_bytes * (first + num_ahead),
          end,
          next,
          int64_t{weight_bytes} * kLanes * num_inputs,
          (num_bytes + kLineBytes - 1) / kLineBytes * kLineBytes,
          num_lines};
}

// The tokens of a block, and the memory of a product.
struct TokenBlock {
  const Part& part;
  const Tokens& tokens;
  Ahead& ahead;
  const uint16_t* rest_of_x;
  float* sums;
  int first_row;
  Groups groups;

  LORI_INLINE float* partial(int group, const TileWeights& tile) const {
    return sums + int64_t{kTileTokens} * group * kPanelOutputs + tile.output;
  }
  LORI_INLINE Strip strip(int group, int first_input) const {
    const int row = groups.first(group);
    return {tokens.x + (first_row + row) * tokens.x_stride + first_input, rest_of_x + row * kTileInputs,
            int64_t{sizeof(uint16_t)} * tokens.x_stride, kTileInputs};
  }
  LORI_INLINE void finish_group(int group, const TileWeights& tile) const {
    float* from = partial(group, tile);
    uint16_t* y = tokens.y + (first_row + groups.first(group)) * tokens.y_stride + tile.panel.first_output;
    const Target to{part, tile.panel, y, tokens.y_stride, from};
    for (int row = 0; row < groups.size; row++) {
      Vector values[kParts];
      std::memcpy(values, from + row * kPanelOutputs, sizeof(values));
      finish(to, row, tile.output, values);
    }
  }
};

template <int kTile, bool kIsRest>
LORI_INLINE void load_strip(const Strip& strip, int i) {
  if constexpr (kIsRest)
    load_tile<kTile>(strip.rest, kLineBytes);
  else
    load_tile<kTile>(strip.whole + i * strip.step, strip.stride);
}

// Adds the products of one tile of inputs. Each tile is loaded once for all that it is multiplied with.
template <int kGroups, int kNumTiles, bool kIsRest>
LORI_INLINE void multiply_inputs(const Strip* x, const Strip* weights, int i) {
  static_assert(kGroups * kNumTiles <= kX);
  for_each_index<kGroups>(LORI_EACH(g) { load_strip<kX + g.value, kIsRest>(x[g.value], i); });
  for_each_index<kNumTiles>(LORI_EACH(t) {
    load_strip<kWeights, kIsRest>(weights[t.value], i);
    for_each_index<kGroups>(LORI_EACH(g) { multiply_tiles<g.value * kNumTiles + t.value, kX + g.value, kWeights>(); });
  });
}

// A pass over some inputs: kGroups groups of tokens with kNumTiles tiles of weights.
template <int kGroups, int kNumTiles>
void multiply_strips(const TokenBlock& block, int first_group, const TileWeights* tiles, int first_input, int num_whole,
                     Following following) {
  Strip x[kGroups], weights[kNumTiles];
  for (int g = 0; g < kGroups; g++) x[g] = block.strip(first_group + g, first_input);
  for (int t = 0; t < kNumTiles; t++) weights[t] = tiles[t].strip;
  constexpr int64_t kStride = sizeof(float) * kPanelOutputs;
  const auto partial = [&](int sum) { return block.partial(first_group + sum / kNumTiles, tiles[sum % kNumTiles]); };
  written_to_memory();
  for_each_index<kGroups * kNumTiles>(LORI_EACH(sum) {
    if (tiles[0].panel.is_first)
      zero_tile<sum.value>();
    else
      load_tile<sum.value>(partial(sum.value), kStride);
  });
  for (int i = 0; i < num_whole; i++) {
    following.ask_on();
    for (int line = 0; line < following.num_lines; line++) ask(block.ahead);
    multiply_inputs<kGroups, kNumTiles, false>(x, weights, i);
  }
  if (weights->rest) multiply_inputs<kGroups, kNumTiles, true>(x, weights, 0);
  for_each_index<kGroups * kNumTiles>(LORI_EACH(sum) { store_tile<sum.value>(partial(sum.value), kStride); });
  if (!tiles[0].panel.is_last) return;
  for (int g = 0; g < kGroups; g++)
    for (int t = 0; t < kNumTiles; t++) block.finish_group(first_group + g, tiles[t]);
}

// All tokens of a block with tiles of weights for the inputs from `first_input` on.
void multiply_tokens(const TokenBlock& block, const TileWeights* tiles, int num_tiles, int first_input, int num_inputs,
                     Following following) {
  const int num_whole = num_inputs / kTileInputs;
  for (int group = 0; group < block.groups.count; group += 2) {
    switch (10 * least(2, block.groups.count - group) + num_tiles) {
#define LORI_STRIPS(g, t)                                                          \
  case 10 * g + t:                                                                 \
    multiply_strips<g, t>(block, group, tiles, first_input, num_whole, following); \
    break;
      LORI_STRIPS(1, 1) LORI_STRIPS(1, 2) LORI_STRIPS(1, 3) LORI_STRIPS(2, 1) LORI_STRIPS(2, 2)
#undef LORI_STRIPS
    }
    following.at += int64_t{num_whole} * following.num_bytes;
  }
}

// The panels first_panel .. last_panel with some inputs, as many tiles at a time as a pass takes, of two panels where it must.
// `weights_of(panel)` are a panel's for these inputs.
template <typename WeightsOf>
void multiply_panels(const TokenBlock& block, int first_panel, int last_panel, int first_input, int num_inputs,
                     WeightsOf weights_of, Following following) {
  alignas(64) uint16_t rest[kPanelTiles][kTileInputs * kLanes];
  TileWeights tiles[kPanelTiles];
  const Part& part = block.part;
  const int num_rest = num_inputs % kTileInputs;
  int num_tiles = 0;
  for (int panel = first_panel; panel < last_panel; panel++) {
    const int outputs = part.panel_outputs(panel), first_output = panel * kPanelOutputs;
    for (int output = 0; output < outputs; output += kLanes) {
      const uint16_t* at = weights_of(panel) + 2 * output;
      TileWeights& tile = tiles[num_tiles];
      tile = {{at, nullptr, int64_t{2 * sizeof(uint16_t)} * outputs, int64_t{kTileInputs} * outputs},
              {first_output, least(part.num_outputs - first_output, outputs), first_input == 0,
               first_input + num_inputs == part.num_inputs},
              output};
      if (num_rest) {
        uint16_t* to = rest[num_tiles];
        std::memset(to, 0, sizeof(rest[0]));
        for (int pair = 0; pair < num_rest / 2; pair++)
          std::memcpy(to + 2 * kLanes * pair, at + int64_t{outputs} * (num_inputs - num_rest + 2 * pair), kLineBytes);
        tile.strip.rest = to;
      }
      num_tiles++;
      const bool is_last = output + kLanes >= outputs && (panel + 1 == last_panel || block.groups.num_tiles() == kPanelTiles);
      if (num_tiles < block.groups.num_tiles() && !is_last) continue;
      multiply_tokens(block, tiles, num_tiles, first_input, num_inputs, following);
      following.at += num_tiles * following.tile_bytes;
      num_tiles = 0;
    }
  }
}

// How many lines of the deltas are asked for with each tile of inputs, so that all are when the product ends.
int lines_ahead(const Ahead& ahead, const Groups& groups, int num_panels, int num_inputs) {
  int64_t num_bytes = ahead.end - ahead.at;
  for (const Ahead::Range* range = ahead.next; range != ahead.last; range++) num_bytes += range->end - range->begin;
  const int num_passes = (num_panels * kPanelTiles + groups.num_tiles() - 1) / groups.num_tiles() * groups.num_pairs();
  const int num_steps = num_passes * (num_inputs / kTileInputs), num_lines = static_cast<int>(num_bytes / kLineBytes);
  return num_steps ? least(kMaxLines, (num_lines + num_steps - 1) / num_steps) : 0;
}

}  // namespace

void multiply_amx(const Part& part, const Tokens& tokens, int first_row, int last_row, int first_panel, int last_panel,
                  Ahead& ahead, float* sums) {
  alignas(64) uint16_t rest[kRowBlock * kTileInputs], widened[kWidened * kPanelOutputs];
  const int num_inputs = part.num_inputs, num_rest = num_inputs % kTileInputs;
  for (int row = first_row; row < last_row; row += kRowBlock) {
    const TokenBlock block{part, tokens, ahead, rest, sums, row, Groups(least(last_row - row, kRowBlock))};
    const Groups& groups = block.groups;
    for (int r = 0; num_rest && r < groups.num_rows; r++) {
      uint16_t* to = rest + r * kTileInputs;
      std::memset(to, 0, sizeof(uint16_t) * kTileInputs);
      std::memcpy(to, tokens.x + (row + r) * tokens.x_stride + num_inputs - num_rest, sizeof(uint16_t) * num_rest);
    }
    const TileShape rows{groups.size, kTileBytes};
    configure_tiles({rows, rows, rows, rows, rows, rows, {}, {kMaxTileRows, kTileBytes}});
    const int num_lines = lines_ahead(ahead, groups, last_panel - first_panel, num_inputs);
    if (!part.narrow) {
      constexpr int kFar = kFarAhead / sizeof(uint16_t);
      const int num_ahead = groups.count == 1 ? kFar : kTilesAhead * kLanes * num_inputs + kFar / 2;
      multiply_panels(
          block, first_panel, last_panel, 0, num_inputs, [&](int panel) { return part.panels + part.panel_at(panel); },
          following_of(part, groups, num_inputs, part.panel_at(first_panel), num_ahead, num_lines));
      continue;
    }
    for (int panel = first_panel; panel < last_panel; panel++)
      for (int input = 0; input < num_inputs; input += kWidened) {
        const int count = least(kWidened, num_inputs - input), outputs = part.panel_outputs(panel), size = outputs * count;
        const int64_t first = part.panel_at(panel) + int64_t{outputs} * input;
        widen(part.narrow + first, size, widened);
        multiply_panels(
            block, panel, panel + 1, input, count, [&](int) { return widened; },
            following_of(part, groups, count, first, size, num_lines));
      }
  }
  release_tiles();
}

}  // namespace lori
