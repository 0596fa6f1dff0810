// Packs and expands random operands of odd sizes in arrays that are not a byte longer than they must be, and compares
// with a plain sum; says how many steps it checked. Compiled with the sanitizers by test_cpu_kernel.py, for one instruction set.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "pack.h"
#include "random_values.h"

namespace lori {
Expand choose_tested(const Operands&);  // what choose_portable and so on are compiled as
}

using namespace lori;

namespace {

// Values of one dtype in an array of just their bytes.
struct Values {
  Dtype dtype;
  size_t size;
  std::unique_ptr<uint8_t[]> bytes;

  Values(Dtype dtype, size_t size) : dtype(dtype), size(size), bytes(new uint8_t[size * width()]) {}
  size_t width() const { return dtype == Dtype::kBfloat16 ? 2 : 4; }
  float get(size_t i) const {
    if (dtype == Dtype::kBfloat16) return widen(reinterpret_cast<const uint16_t*>(bytes.get())[i]);
    return reinterpret_cast<const float*>(bytes.get())[i];
  }
  void set(size_t i, float value) {
    if (dtype == Dtype::kBfloat16)
      reinterpret_cast<uint16_t*>(bytes.get())[i] = narrow(value);
    else
      reinterpret_cast<float*>(bytes.get())[i] = value;
  }
};

bool check(Dtype dtype, int num_outputs, int rank, int num_slots, int num_bases, int num_tokens, float density) {
  std::vector<uint8_t> blocks;
  std::vector<int32_t> starts, basis_of;
  std::vector<std::vector<float>> dense, values_of;
  std::vector<std::vector<int32_t>> indices_of;
  for (int slot = 0; slot < num_slots; slot++) {
    std::vector<int32_t> indices;
    std::vector<float> values, b(static_cast<size_t>(num_outputs) * rank);
    for (int i = 0; i < num_outputs * rank; i++)
      if (std::uniform_real_distribution<float>()(generator) < density) {
        indices.push_back(i);
        values.push_back(widen(narrow(normal())));
        b[i] = values.back();
      }
    Values bits(dtype, values.size());
    for (size_t i = 0; i < values.size(); i++) bits.set(i, values[i]);
    std::unique_ptr<int32_t[]> kept(new int32_t[indices.size()]);
    std::copy(indices.begin(), indices.end(), kept.get());
    Packed packed;
    pack({kept.get(), bits.bytes.get(), indices.size(), num_outputs, rank}, dtype, rank <= 256 ? 1 : 2, packed);
    for (int32_t start : packed.starts) starts.push_back(start < 0 ? start : start + static_cast<int32_t>(blocks.size() / kUnit));
    blocks.insert(blocks.end(), packed.blocks.begin(), packed.blocks.end());
    basis_of.push_back(draw(0, num_bases - 1));
    dense.push_back(std::move(b));
    indices_of.push_back(std::move(indices));
    values_of.push_back(std::move(values));
  }
  std::unique_ptr<uint8_t[]> pool(new uint8_t[blocks.size()]);
  if (!blocks.empty()) std::memcpy(pool.get(), blocks.data(), blocks.size());
  const Operands operands{pool.get(), starts.data(), basis_of.data(), num_slots, num_outputs, rank, dtype};

  Values y(dtype, static_cast<size_t>(num_tokens) * num_outputs), s(dtype, static_cast<size_t>(num_tokens) * num_bases * rank);
  for (size_t i = 0; i < y.size; i++) y.set(i, normal());
  for (size_t i = 0; i < s.size; i++) s.set(i, normal());
  std::vector<Segment> segments;
  std::vector<int32_t> slots;
  std::vector<float> weights, expected, magnitude;
  for (size_t i = 0; i < y.size; i++) expected.push_back(y.get(i)), magnitude.push_back(std::fabs(y.get(i)));
  for (int token = 0, stop; token < num_tokens; token = stop) {
    stop = draw(token + 1, num_tokens);
    const int first = static_cast<int>(slots.size());
    for (int term = draw(0, 3); term > 0; term--) slots.push_back(draw(0, num_slots - 1)), weights.push_back(normal());
    if (static_cast<int>(slots.size()) > first) segments.push_back({token, stop, first, static_cast<int>(slots.size())});
    for (int t = token; t < stop; t++)
      for (size_t term = first; term < slots.size(); term++) {
        const std::vector<int32_t>& indices = indices_of[slots[term]];
        const size_t column = (static_cast<size_t>(t) * num_bases + basis_of[slots[term]]) * rank;
        for (size_t i = 0; i < indices.size(); i++) {
          const float product = weights[term] * values_of[slots[term]][i] * s.get(column + indices[i] % rank);
          const size_t at = static_cast<size_t>(t) * num_outputs + indices[i] / rank;
          expected[at] += product;
          magnitude[at] += std::fabs(product);
        }
      }
  }
  const Route route{segments.data(), slots.data(), weights.data(), static_cast<int>(segments.size())};
  const ptrdiff_t width = static_cast<ptrdiff_t>(y.width());
  const Step step{y.bytes.get(), s.bytes.get(), num_outputs * width, num_bases * rank * width};
  int64_t num_items = 0;
  for (const Segment& segment : segments) num_items += static_cast<int64_t>(segment.stop - segment.start) * operands.num_windows;
  const int64_t cut = num_items ? draw(0, static_cast<int>(num_items)) : 0;  // as two threads would have it
  const Expand expand = choose_tested(operands);
  expand(operands, route, step, 0, cut);
  expand(operands, route, step, cut, num_items);
  for (size_t i = 0; i < y.size; i++) {
    const float allowed = 1e-5f * magnitude[i] + (dtype == Dtype::kBfloat16 ? std::fabs(expected[i]) / 256 : 0) + 1e-30f;
    if (!(std::fabs(y.get(i) - expected[i]) <= allowed)) return false;
  }
  return true;
}

}  // namespace

int main() {
  int num_checked = 0;
  for (Dtype dtype : {Dtype::kBfloat16, Dtype::kFloat32})
    for (int rank : {1, 2, 7, 16, 31, 32, 33, 48, 64, 65, 256, 257})
      for (int num_outputs : {1, 15, 16, 17, 33, 40, 64, 100, 129, 255, 256, 257, 530})
        for (float density : {0.0f, 0.02f, 0.3f, 1.0f}) {
          if (!check(dtype, num_outputs, rank, draw(1, 3), draw(1, 2), draw(1, 5), density)) {
            std::printf("wrong: rank %d, %d outputs, density %g\n", rank, num_outputs, density);
            return 1;
          }
          num_checked++;
        }
  std::printf("checked %d\n", num_checked);
}
