// The product of product.h in AMX's tiles.
//
// A tile of weights, 32 inputs of 16 outputs, is 16 rows of a panel as it lies. An output's sum takes its inputs 32 at a time in
// ascending order; of these the even and the odd ones are added apart, as the instruction does, whatever the number of tokens.
#include <type_traits>

#include "instruction_sets.h"
#include "product_loops.h"
#include "tiles.h"

namespace lori {
namespace {

constexpr int kLineBytes = 64;

// The tokens of a block in groups of one size, at most 16; the last overlap where they must.
struct Groups {
  int count, size, num_rows;
  explicit Groups(int num_rows)
      : count((num_rows + kTileTokens - 1) / kTileTokens), size((num_rows + count - 1) / count), num_rows(num_rows) {}
  LORI_INLINE int first(int group) const { return least(group * size, num_rows - size); }
};

// A piece of a panel's inputs: those in whole tiles, and the last ones, with zeros after them.
struct Weights {
  const uint16_t* whole;
  const uint16_t* rest;      // null where there are none
  int num_whole;             // tiles
  const uint8_t* following;  // what is wanted next where the weights came from, or null
  int value_bytes;           // there
};

// The x of a group likewise; the rows of the rest lie kTileInputs apart.
struct GroupInputs {
  const uint16_t* whole;
  const uint16_t* rest;
  int64_t stride;
};

template <int kFirst, int kVectors>
LORI_INLINE void multiply_group(const uint16_t* x, int64_t x_stride, const uint16_t* weights) {
  constexpr int64_t kStride = 4 * kLanes * kVectors;  // bytes from two inputs to the next
  load_tile<kX>(x, 2 * x_stride);
  load_tile<kWeights>(weights, kStride);
  multiply_tiles<kFirst>();
  if constexpr (kVectors > 1) {
    load_tile<kWeights>(weights + 2 * kLanes, kStride);
    multiply_tiles<kFirst + 1>();
  }
  if constexpr (kVectors > 2) {
    load_tile<kWeights>(weights + 4 * kLanes, kStride);
    multiply_tiles<kFirst + 2>();
  }
}

// Calls run(tile) for the sums of a group.
template <int kFirst, int kVectors, typename Run>
LORI_INLINE void each_tile(Run run) {
  run(std::integral_constant<int, kFirst>(), 0);
  if constexpr (kVectors > 1) run(std::integral_constant<int, kFirst + 1>(), 1);
  if constexpr (kVectors > 2) run(std::integral_constant<int, kFirst + 2>(), 2);
}

template <int kFirst, int kVectors>
LORI_INLINE void begin_group(bool is_first, const float* partial) {
  each_tile<kFirst, kVectors>([&](auto tile, int v) __attribute__((always_inline)) {
    if (is_first)
      zero_tile<tile.value>();
    else
      load_tile<tile.value>(partial + v * kLanes, sizeof(float) * kPanelOutputs);
  });
}

template <int kFirst, int kVectors>
LORI_INLINE void end_group(const Target& to, int size) {
  each_tile<kFirst, kVectors>([&](auto tile, int v) __attribute__((always_inline)) {
    store_tile<tile.value>(to.partial + v * kLanes, sizeof(float) * kPanelOutputs);
  });
  if (!to.panel.is_last) return;
  for (int row = 0; row < size; row++)
    for (int v = 0; v < kVectors; v++) {
      Vector sums[kParts];
      std::memcpy(sums, to.partial + row * kPanelOutputs + v * kLanes, sizeof(sums));
      finish(to, row, v * kLanes, sums);
    }
}

// One or two groups with a piece of a panel.
template <int kVectors>
void multiply_groups(int num_groups, int size, const GroupInputs* x, const Weights& weights, Ahead& ahead, const Target* to) {
  constexpr int kTileWeights = kTileInputs * kLanes * kVectors;
  written_to_memory();
  begin_group<0, kVectors>(to[0].panel.is_first, to[0].partial);
  if (num_groups == 2) begin_group<3, kVectors>(to[1].panel.is_first, to[1].partial);
  for (int i = 0; i < weights.num_whole; i++) {
    const uint16_t* at = weights.whole + i * kTileWeights;
    if (weights.following)
      for (int byte = 0; byte < weights.value_bytes * kTileWeights; byte += kLineBytes)
        prefetch(weights.following + i * weights.value_bytes * kTileWeights + byte);
    for (int line = 0; line < 4; line++) ask(ahead);
    multiply_group<0, kVectors>(x[0].whole + i * kTileInputs, x[0].stride, at);
    if (num_groups == 2) multiply_group<3, kVectors>(x[1].whole + i * kTileInputs, x[1].stride, at);
  }
  if (weights.rest) {
    multiply_group<0, kVectors>(x[0].rest, kTileInputs, weights.rest);
    if (num_groups == 2) multiply_group<3, kVectors>(x[1].rest, kTileInputs, weights.rest);
  }
  end_group<0, kVectors>(to[0], size);
  if (num_groups == 2) end_group<3, kVectors>(to[1], size);
}

// All tokens of a block with one panel. Weights in int8 are made bfloat16 some inputs at a time.
void multiply_tiled_panel(const Part& part, const Tokens& tokens, int first_row, const Groups& groups, int panel,
                          const uint16_t* rest_of_x, Ahead& ahead, float* sums) {
  alignas(64) uint16_t widened[kWidened * kPanelOutputs];
  alignas(64) uint16_t rest[kTileInputs * kPanelOutputs];
  const int outputs = part.panel_outputs(panel), first_output = panel * kPanelOutputs;
  const int most = part.narrow ? kWidened : part.num_inputs;
  for (int input = 0; input < part.num_inputs; input += most) {
    const int num_inputs = least(most, part.num_inputs - input), num_rest = num_inputs % kTileInputs;
    const int64_t at = part.panel_at(panel) + int64_t{outputs} * input;
    if (part.narrow) widen(part.narrow + at, int64_t{outputs} * num_inputs, widened);
    Weights weights{part.narrow ? widened : part.panels + at, nullptr, num_inputs / kTileInputs, nullptr, part.narrow ? 1 : 2};
    if (groups.count <= 2)
      weights.following = part.narrow ? reinterpret_cast<const uint8_t*>(part.narrow + at) + outputs * num_inputs
                                      : reinterpret_cast<const uint8_t*>(weights.whole) + kFarAhead;
    if (num_rest) {
      std::memset(rest, 0, sizeof(rest));
      std::memcpy(rest, weights.whole + int64_t{outputs} * (num_inputs - num_rest), sizeof(uint16_t) * outputs * num_rest);
      weights.rest = rest;
    }
    const Panel of{first_output, least(part.num_outputs - first_output, outputs), input == 0,
                   input + num_inputs == part.num_inputs};
    for (int group = 0; group < groups.count; group += 2) {
      const int num_groups = least(2, groups.count - group);
      GroupInputs x[2];
      const auto target = [&](int number) {
        const int row = groups.first(group + number);
        x[number] = {tokens.x + (first_row + row) * tokens.x_stride + input, rest_of_x + row * kTileInputs, tokens.x_stride};
        return Target{part, of, tokens.y + (first_row + row) * tokens.y_stride + first_output, tokens.y_stride,
                      sums + int64_t{kTileTokens} * (group + number) * kPanelOutputs};
      };
      const Target to[] = {target(0), target(num_groups - 1)};
      if (outputs == 48)
        multiply_groups<3>(num_groups, groups.size, x, weights, ahead, to);
      else if (outputs == 32)
        multiply_groups<2>(num_groups, groups.size, x, weights, ahead, to);
      else
        multiply_groups<1>(num_groups, groups.size, x, weights, ahead, to);
    }
  }
}

}  // namespace

void multiply_amx(const Part& part, const Tokens& tokens, int first_row, int last_row, int first_panel, int last_panel,
                  Ahead& ahead, float* sums) {
  alignas(64) uint16_t rest[kRowBlock * kTileInputs];
  const int num_rest = part.num_inputs % kTileInputs;
  for (int row = first_row; row < last_row; row += kRowBlock) {
    const Groups groups(least(last_row - row, kRowBlock));
    if (num_rest)
      for (int r = 0; r < groups.num_rows; r++) {
        uint16_t* to = rest + r * kTileInputs;
        std::memset(to, 0, sizeof(uint16_t) * kTileInputs);
        std::memcpy(to, tokens.x + (row + r) * tokens.x_stride + part.num_inputs - num_rest, sizeof(uint16_t) * num_rest);
      }
    configure_tiles(groups.size);
    for (int panel = first_panel; panel < last_panel; panel++)
      multiply_tiled_panel(part, tokens, row, groups, panel, rest, ahead, sums);
  }
  release_tiles();
}

}  // namespace lori
