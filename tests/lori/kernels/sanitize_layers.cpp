// Norms, gates and attention on random values of many sizes, in arrays that are not a byte longer than they must be, compared
// with plain sums in double; says how many it checked. Compiled with the sanitizers by test_native_sanitizers.py, for one
// instruction set.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

#include "exact_arrays.h"
#include "layers.h"

namespace lori {
LayerFunctions layers_tested(Dtype);  // what layers_portable and so on are compiled as
}

using namespace lori;

namespace {

template <typename Value>
Matrix matrix(const Values<Value>& values, int64_t stride) {
  return {values.bytes(), stride};
}

template <typename Value>
void check_norm(const LayerFunctions& functions, int num_rows, int size, bool is_added) {
  Values<Value> stream(num_rows * size), added(num_rows * size), out(num_rows * size), before(num_rows * size);
  Values<float> weight(size);
  stream.fill();
  added.fill();
  weight.fill();
  std::memcpy(before.bytes(), stream.bytes(), sizeof(Value) * stream.size);
  const Matrix to_add{is_added ? added.bytes() : nullptr, size};
  const Norm norm{matrix(stream, size), to_add, matrix(out, size), weight.at.get(), size, 1e-5f};
  const int cut = draw(0, num_rows);
  functions.norm(norm, cut, num_rows);
  functions.norm(norm, 0, cut);
  bool is_right = true;
  for (int row = 0; row < num_rows; row++) {
    double squares = 0;
    for (int i = row * size; i < (row + 1) * size; i++) {
      const double x = before.get(i) + (is_added ? double{added.get(i)} : 0.0);
      is_right &= std::fabs(stream.get(i) - x) <= kRounding<Value> * std::fabs(x);
      squares += double{stream.get(i)} * stream.get(i);
    }
    for (int i = 0; i < size; i++) {
      const double exact = stream.get(row * size + i) / std::sqrt(squares / size + 1e-5) * weight.get(i);
      is_right &= std::fabs(out.get(row * size + i) - exact) <= (kRounding<Value> + 2e-6) * std::fabs(exact);
    }
  }
  expect(is_right, "norm", num_rows, size, is_added);
}

double activated(Activation activation, double x) {
  if (activation == Activation::kSilu) return x / (1 + std::exp(-x));
  if (activation == Activation::kGelu) return 0.5 * x * std::erfc(-x * std::sqrt(0.5));
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
}

template <typename Value>
void check_gate(const LayerFunctions& functions, int num_rows, int size, Activation activation) {
  Values<Value> x(2 * num_rows * size), out(num_rows * size);
  x.fill(num_rows % 2 ? 3.0f : 1e10f);
  const Gate gate{matrix(x, 2 * size), matrix(out, size), size, activation};
  const int cut = draw(0, num_rows);
  functions.gate(gate, cut, num_rows);
  functions.gate(gate, 0, cut);
  bool is_right = true;
  for (int row = 0; row < num_rows; row++)
    for (int i = 0; i < size; i++) {
      const double gated = x.get(2 * row * size + i), up = x.get((2 * row + 1) * size + i);
      const double exact = activated(activation, gated) * up;
      const double allowed = kRounding<Value> * std::fabs(exact) + 1e-6 * std::fabs(gated * up) + 1e-37;
      is_right &= std::fabs(out.get(row * size + i) - exact) <= allowed;
    }
  expect(is_right, "gate", num_rows, size, static_cast<int>(activation));
}

// A sequence: what was written of it, rounded and turned, (L, G, E) each.
struct Story {
  std::vector<int32_t> blocks;
  std::vector<double> keys, values;
  int length = 0;
};

struct Sizes {
  int num_heads, num_kv_heads, head_size, window;
  float softcap;
  bool has_norms;
};

template <typename Value>
class Checked {
 public:
  Checked(const LayerFunctions& functions, const Sizes& sizes)
      : functions_(functions),
        sizes_(sizes),
        query_norm_(sizes.head_size),
        key_norm_(sizes.head_size),
        memory_(int64_t{kBlocks} * 2 * sizes.num_kv_heads * sizes.head_size * kBlockTokens) {
    query_norm_.fill();
    key_norm_.fill();
    heads_ = {sizes.num_heads,
              sizes.num_kv_heads,
              sizes.head_size,
              1 / std::sqrt(static_cast<float>(sizes.head_size)),
              0.5f,
              sizes.window,
              sizes.softcap,
              sizes.has_norms ? query_norm_.at.get() : nullptr,
              sizes.has_norms ? key_norm_.at.get() : nullptr};
    expect(static_cast<int64_t>(memory_.size * sizeof(Value)) ==
               kBlocks * block_bytes(heads_, sizeof(Value) == 2 ? Dtype::kBfloat16 : Dtype::kFloat32),
           "memory", sizes.num_heads, sizes.num_kv_heads, sizes.head_size);
    for (int i = 0; i < kBlocks; i++) free_.push_back(i);
    std::shuffle(free_.begin(), free_.end(), generator);
  }

  // One step of num_tokens[i] tokens of the i-th sequence.
  void step(const std::vector<int>& num_tokens) {
    std::vector<Span> spans;
    std::vector<int32_t> table;
    int row = 0;
    for (size_t i = 0; i < num_tokens.size(); i++) {
      if (stories_.size() <= i) stories_.emplace_back();
      Story& story = stories_[i];
      while (static_cast<int>(story.blocks.size()) * kBlockTokens < story.length + num_tokens[i]) {
        story.blocks.push_back(free_.back());
        free_.pop_back();
      }
      spans.push_back({row, num_tokens[i], story.length, static_cast<int32_t>(table.size())});
      table.insert(table.end(), story.blocks.begin(), story.blocks.end());
      row += num_tokens[i];
    }
    run(spans, table, row);
  }

 private:
  static constexpr int kBlocks = 12;

  void run(const std::vector<Span>& spans, const std::vector<int32_t>& table, int num_tokens) {
    const int size = sizes_.head_size, width = (sizes_.num_heads + 2 * sizes_.num_kv_heads) * size;
    Values<Value> qkv(static_cast<size_t>(num_tokens) * width), out(static_cast<size_t>(num_tokens) * sizes_.num_heads * size);
    Values<float> cosine(num_tokens * size), sine(num_tokens * size);
    Values<int32_t> exact_table(table.size());
    std::copy(table.begin(), table.end(), exact_table.at.get());
    qkv.fill();
    for (size_t i = 0; i < cosine.size; i++) {
      const float angle = normal();
      cosine.set(i, std::cos(angle)), sine.set(i, std::sin(angle));
    }
    remember(spans, qkv, cosine, sine);
    const Attention attention{
        matrix(qkv, width),  matrix(out, sizes_.num_heads * size), cosine.at.get(), sine.at.get(), memory_.bytes(), spans.data(),
        exact_table.at.get()};
    write(attention, spans, num_tokens);
    attend(attention, spans);
    check(spans, out);
  }

  // Shares of rows, as threads have them, may be written in any order.
  void write(const Attention& attention, const std::vector<Span>& spans, int num_tokens) {
    const int cut = draw(0, num_tokens);
    for (const auto& [first, last] : {std::pair<int, int>{cut, num_tokens}, {0, cut}})
      for (const Span& span : spans) {
        const int begin = std::max(first, span.row), end = std::min(last, span.row + span.num_tokens);
        if (begin < end) functions_.write(heads_, attention, span, begin, end);
      }
  }

  void attend(const Attention& attention, const std::vector<Span>& spans) {
    std::vector<Piece> pieces;
    const int at_once = std::max(1, kMaxRows / (sizes_.num_heads / sizes_.num_kv_heads));
    int last = 0;
    for (size_t i = 0; i < spans.size(); i++) {
      last = std::max(last, spans[i].position + spans[i].num_tokens - 1);
      for (int token = 0; token < spans[i].num_tokens; token += at_once)
        for (int head = 0; head < sizes_.num_kv_heads; head++)
          pieces.push_back({static_cast<int32_t>(i), token, std::min(at_once, spans[i].num_tokens - token), head});
    }
    Values<float> scratch(scratch_size(last));
    const auto cut = draw(0, static_cast<int>(pieces.size()));
    functions_.attend(heads_, attention, pieces.data(), cut, static_cast<int64_t>(pieces.size()), scratch.at.get());
    functions_.attend(heads_, attention, pieces.data(), 0, cut, scratch.at.get());
  }

  std::vector<double> turned(const Values<Value>& qkv, size_t at, const float* norm, const float* cosine,
                             const float* sine) const {
    const int size = sizes_.head_size, half = size / 2;
    std::vector<double> x(size), y(size);
    double squares = 0;
    for (int i = 0; i < size; i++) x[i] = qkv.get(at + i), squares += x[i] * x[i];
    if (norm)
      for (int i = 0; i < size; i++) x[i] *= norm[i] / std::sqrt(squares / size + 0.5);
    for (int i = 0; i < size; i++) {
      y[i] = x[i] * cosine[i] + (i < half ? -x[i + half] : x[i - half]) * sine[i];
      if (sizeof(Value) == 2) y[i] = widen(narrow(static_cast<float>(y[i])));
    }
    return y;
  }

  void remember(const std::vector<Span>& spans, const Values<Value>& qkv, const Values<float>& cosine,
                const Values<float>& sine) {
    const int size = sizes_.head_size, width = (sizes_.num_heads + 2 * sizes_.num_kv_heads) * size;
    queries_.clear();
    for (size_t i = 0; i < spans.size(); i++)
      for (int row = spans[i].row; row < spans[i].row + spans[i].num_tokens; row++, stories_[i].length++) {
        const size_t at = static_cast<size_t>(row) * width;
        const float *c = cosine.at.get() + row * size, *s = sine.at.get() + row * size;
        for (int head = 0; head < sizes_.num_heads; head++)
          for (double x : turned(qkv, at + head * size, heads_.query_norm, c, s)) queries_.push_back(x);
        for (int head = 0; head < sizes_.num_kv_heads; head++) {
          const size_t key = at + (sizes_.num_heads + head) * size;
          for (double x : turned(qkv, key, heads_.key_norm, c, s)) stories_[i].keys.push_back(x);
          for (int e = 0; e < size; e++) stories_[i].values.push_back(qkv.get(key + sizes_.num_kv_heads * size + e));
        }
      }
  }

  void check(const std::vector<Span>& spans, const Values<Value>& out) {
    for (size_t i = 0; i < spans.size(); i++)
      for (int token = 0; token < spans[i].num_tokens; token++)
        for (int head = 0; head < sizes_.num_heads; head++)
          check_head(stories_[i], spans[i].position + token, head, (spans[i].row + token) * sizes_.num_heads + head, out);
  }

  void check_head(const Story& story, int position, int head, int64_t row, const Values<Value>& out) {
    const int size = sizes_.head_size, kv_head = head / (sizes_.num_heads / sizes_.num_kv_heads);
    const int first = sizes_.window ? std::max(0, position - sizes_.window + 1) : 0;
    std::vector<double> weights;
    double total = 0;
    for (int key = first; key <= position; key++) {
      double score = 0;
      for (int e = 0; e < size; e++)
        score += queries_[row * size + e] * story.keys[(static_cast<size_t>(key) * sizes_.num_kv_heads + kv_head) * size + e];
      score *= heads_.scale;
      if (sizes_.softcap > 0) score = sizes_.softcap * std::tanh(score / sizes_.softcap);
      weights.push_back(std::exp(score));
      total += weights.back();
    }
    bool is_right = true;
    for (int e = 0; e < size; e++) {
      double exact = 0, magnitude = 0;
      for (int key = first; key <= position; key++) {
        const double product =
            weights[key - first] / total * story.values[(static_cast<size_t>(key) * sizes_.num_kv_heads + kv_head) * size + e];
        exact += product;
        magnitude += std::fabs(product);
      }
      // Weights and what comes out are rounded; a turned key may be rounded the other way.
      is_right &= std::fabs(out.get(row * size + e) - exact) <= (sizeof(Value) == 2 ? 3 * kRounding<Value> : 1e-5) * magnitude;
    }
    expect(is_right, "attention", sizes_.num_heads, size, position);
  }

  const LayerFunctions& functions_;
  const Sizes sizes_;
  Heads heads_;
  Values<float> query_norm_, key_norm_;
  Values<Value> memory_;  // NaN to begin with
  std::vector<int32_t> free_;
  std::vector<Story> stories_;
  std::vector<double> queries_;
};

template <typename Value>
void check_layers(const LayerFunctions& functions) {
  for (int size : {16, 48, 80})
    for (int num_rows : {1, 2, 5}) {
      for (bool is_added : {false, true}) check_norm<Value>(functions, num_rows, size, is_added);
      for (Activation activation : {Activation::kSilu, Activation::kGeluTanh, Activation::kGelu})
        check_gate<Value>(functions, num_rows, size, activation);
    }
  for (int head_size : {16, 48, 80, 128, 512})
    for (int group : {1, 2, 3, 5, 7, 8, 12, 13, 16}) {
      const int num_kv_heads = draw(1, 2), windows[] = {0, 0, 1, 8, 17};
      const Sizes sizes{group * num_kv_heads,     num_kv_heads,   head_size, windows[draw(0, 4)],
                        draw(0, 2) ? 0.0f : 5.0f, draw(0, 1) == 1};
      Checked<Value> checked(functions, sizes);
      checked.step({draw(17, 30)});
      checked.step({1, draw(1, 20)});
      checked.step({draw(1, 13), 1, 1});
      checked.step({1, 1, 15, draw(1, 17)});
    }
}

}  // namespace

int main() {
  check_layers<uint16_t>(layers_tested(Dtype::kBfloat16));
  check_layers<float>(layers_tested(Dtype::kFloat32));
  std::printf("checked %d\n", num_checked);
}
