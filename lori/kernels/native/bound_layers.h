// The functions of layers.h with what they are bound to. Arrays are given by address; who calls has checked shapes, and keeps
// them alive.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bound.h"
#include "layers.h"

namespace lori {

inline Matrix matrix(uintptr_t at, int64_t stride) { return {reinterpret_cast<uint8_t*>(at), stride}; }

inline int num_parts(int64_t count, int num_threads, int64_t least) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(num_threads, count / least)));
}

// Calls run(first, last, number) with shares of `count`, on as many threads as are worth it.
template <typename Run>
void share(int64_t count, int num_threads, int64_t least, Run run) {
  const int parts = num_parts(count, num_threads, least);
  if (parts == 1) return run(0, count, 0);
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (int part = 0; part < parts; part++) run(count * part / parts, count * (part + 1) / parts, part);
}

// The spans of a step and their blocks of 16 tokens, and how the work is divided. Copied: a step's own.
class BoundSpans {
 public:
  BoundSpans(Array<int32_t, 2> spans, Array<int32_t, 1> table, int num_heads, int num_kv_heads)
      : spans_(spans.shape(0)),
        table_(table.data(), table.data() + table.shape(0)),
        num_heads_(num_heads),
        num_kv_heads_(num_kv_heads) {
    if (spans.shape(1) != 4 || num_kv_heads < 1 || num_heads % num_kv_heads)
      throw nb::value_error("spans (S, 4) and heads that are a multiple of the key-value heads expected");
    const int at_once = std::max(1, kMaxRows / (num_heads / num_kv_heads));
    int32_t row = 0;
    for (size_t i = 0; i < spans_.size(); i++) {
      const int32_t* of = spans.data() + 4 * i;
      const Span span = spans_[i] = {of[0], of[1], of[2], of[3]};
      const int64_t last = int64_t{span.position} + span.num_tokens - 1;
      if (span.row != row || span.num_tokens < 1 || span.position < 0 || span.blocks < 0 ||
          span.blocks + last / kBlockTokens >= static_cast<int64_t>(table_.size()))
        throw nb::value_error("spans must follow one another, and their blocks lie in the table");
      row += span.num_tokens;
      last_position_ = std::max(last_position_, static_cast<int>(last));
      for (int kv_head = 0; kv_head < num_kv_heads; kv_head++)
        for (int32_t token = 0; token < span.num_tokens; token += at_once)
          pieces_.push_back({static_cast<int32_t>(i), token, std::min(at_once, span.num_tokens - token), kv_head});
    }
    num_tokens_ = row;
    for (const int32_t block : table_) {
      if (block < 0) throw nb::value_error("a block is negative");
      last_block_ = std::max(last_block_, block);
    }
  }
  const std::vector<Span>& spans() const { return spans_; }
  const std::vector<Piece>& pieces() const { return pieces_; }
  const int32_t* table() const { return table_.data(); }
  int num_tokens() const { return num_tokens_; }
  int last_position() const { return last_position_; }
  // Throws unless the spans are of such heads, and their blocks lie in a memory of `num_blocks`.
  void check(const Heads& heads, int64_t num_blocks) const {
    if (heads.num_heads != num_heads_ || heads.num_kv_heads != num_kv_heads_ || last_block_ >= num_blocks)
      throw nb::value_error("the spans are of another memory");
  }

 private:
  std::vector<Span> spans_;
  std::vector<int32_t> table_;
  std::vector<Piece> pieces_;
  int num_heads_, num_kv_heads_, num_tokens_ = 0, last_position_ = 0, last_block_ = 0;
};

class BoundHeads {
 public:
  BoundHeads(int num_heads, int num_kv_heads, int head_size, float scale, int window, float softcap, float epsilon,
             std::optional<Array<float, 1>> query_norm, std::optional<Array<float, 1>> key_norm)
      : query_norm_(query_norm), key_norm_(key_norm) {
    if (head_size < kLanes || head_size > 512 || head_size % kLanes || num_kv_heads < 1 || num_heads % num_kv_heads)
      throw nb::value_error("heads of 16 to 512 values, in 16s, a multiple of the key-value heads expected");
    for (const auto& norm : {query_norm, key_norm})
      if (norm && static_cast<int>(norm->shape(0)) != head_size) throw nb::value_error("a norm is not of a head's size");
    heads_ = {num_heads,
              num_kv_heads,
              head_size,
              scale,
              epsilon,
              window,
              softcap,
              query_norm ? query_norm->data() : nullptr,
              key_norm ? key_norm->data() : nullptr};
  }
  const Heads& heads() const { return heads_; }

 private:
  std::optional<Array<float, 1>> query_norm_, key_norm_;
  Heads heads_;
};

class BoundLayers {
 public:
  BoundLayers(const std::string& instruction_set, const std::string& dtype)
      : dtype_(parse_dtype(dtype)), functions_(lori::instruction_set(instruction_set).choose_layers(dtype_)) {}

  void norm(const Norm& norm, int64_t num_rows, int num_threads) const {
    share(num_rows, num_threads, 64, [&](int64_t first, int64_t last, int) { functions_.norm(norm, first, last); });
  }

  void gate(const Gate& gate, int64_t num_rows, int num_threads) const {
    share(num_rows, num_threads, 16, [&](int64_t first, int64_t last, int) { functions_.gate(gate, first, last); });
  }

  // `attention` is of these spans, which have been checked.
  void attend(const Heads& heads, const Attention& attention, const BoundSpans& spans, int num_threads) const {
    share(spans.num_tokens(), num_threads, 16,
          [&](int64_t first, int64_t last, int) { write(heads, attention, spans, first, last); });
    const auto& pieces = spans.pieces();
    const auto count = static_cast<int64_t>(pieces.size());
    const int64_t size = scratch_size(spans.last_position());
    // Here an error can be told. Not cleared: all of it is written before it is read.
    const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(size * num_parts(count, num_threads, 4))]);
    share(count, num_threads, 4, [&](int64_t first, int64_t last, int number) {
      functions_.attend(heads, attention, pieces.data(), first, last, scratch.get() + size * number);
    });
  }

  Dtype dtype() const { return dtype_; }

 private:
  void write(const Heads& heads, const Attention& attention, const BoundSpans& spans, int64_t first, int64_t last) const {
    for (const Span& span : spans.spans()) {
      const int64_t begin = std::max<int64_t>(first, span.row), end = std::min<int64_t>(last, span.row + span.num_tokens);
      if (begin < end) functions_.write(heads, attention, span, begin, end);
    }
  }

  Dtype dtype_;
  LayerFunctions functions_;
};

}  // namespace lori
