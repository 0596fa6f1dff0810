// Products on random values of many sizes, in arrays that are not a byte longer than they must be, compared with plain sums in
// double; says how many it checked. Compiled with the sanitizers by test_native_sanitizers.py, for one instruction set.
#include <cmath>
#include <cstdio>
#include <type_traits>

#include "exact_arrays.h"
#include "product.h"

namespace lori {
std::remove_pointer_t<Multiply> multiply_tested;  // what the product of the instruction set is compiled as
}

using namespace lori;

namespace {

// A product whose rows are apart, in three calls, as threads share it.
template <typename Weight>
void check_product(int num_rows, int num_outputs, int num_inputs, bool has_bias) {
  constexpr bool kIsNarrow = sizeof(Weight) == 1;
  Values<Weight> weight(static_cast<size_t>(num_outputs) * num_inputs), panels(part_size(num_outputs, num_inputs));
  Values<float> bias(num_outputs), scales(num_outputs);
  weight.fill(kIsNarrow ? 20 : 1);
  bias.fill();
  scales.fill();
  pack_part(weight.at.get(), num_outputs, num_inputs, panels.at.get());
  const int x_gap = draw(0, 3), y_gap = draw(0, 3);
  const int64_t x_stride = num_inputs + x_gap, y_stride = num_outputs + y_gap;
  Values<uint16_t> x((num_rows - 1) * x_stride + num_inputs), y((num_rows - 1) * y_stride + num_outputs);
  for (int row = 0; row < num_rows; row++)
    for (int i = 0; i < num_inputs; i++) x.set(row * x_stride + i, normal());
  Part part{nullptr, has_bias ? bias.at.get() : nullptr, num_outputs, num_inputs};
  if constexpr (kIsNarrow)
    part.narrow = panels.at.get(), part.scales = scales.at.get();
  else
    part.panels = panels.at.get();
  const Tokens tokens{x.at.get(), y.at.get(), x_stride, y_stride};
  Values<float> sums(kRowBlock * kPanelOutputs);
  Values<uint16_t> wanted(draw(1, 500)), other(1);
  const Ahead::Range ranges[] = {
      {wanted.bytes(), wanted.bytes() + 2 * wanted.size}, {other.bytes(), other.bytes()}, {other.bytes(), other.bytes() + 2}};
  Ahead ahead(ranges, ranges + draw(0, 3));
  const int row = draw(0, num_rows), panel = draw(0, part.num_panels());
  multiply_tested(part, tokens, row, num_rows, 0, panel, ahead, sums.at.get());
  multiply_tested(part, tokens, 0, row, 0, panel, ahead, sums.at.get());
  multiply_tested(part, tokens, 0, num_rows, panel, part.num_panels(), ahead, sums.at.get());
  bool is_right = true;
  for (int r = 0; r < num_rows; r++) {
    for (int o = 0; o < num_outputs; o++) {
      double exact = has_bias ? bias.get(o) : 0, magnitude = std::fabs(exact);
      for (int i = 0; i < num_inputs; i++) {
        const double scale = kIsNarrow ? scales.get(o) : 1;
        const double product = scale * x.get(r * x_stride + i) * weight.get(static_cast<size_t>(o) * num_inputs + i);
        exact += product;
        magnitude += std::fabs(product);
      }
      is_right &= std::fabs(y.get(r * y_stride + o) - exact) <= std::fabs(exact) / 256 + 1e-5 * magnitude;
    }
    for (int gap = num_outputs; gap < y_stride && r + 1 < num_rows; gap++) is_right &= y.at[r * y_stride + gap] == 0xffff;
  }
  expect(is_right, kIsNarrow ? "product in int8" : "product", num_rows, num_outputs, num_inputs);
}

template <typename Weight>
void check_products() {
  for (int num_outputs = 1; num_outputs <= 100; num_outputs++)
    for (int num_rows = 1; num_rows <= 17; num_rows++)
      check_product<Weight>(num_rows, num_outputs, 2 * draw(1, 12), (num_rows + num_outputs) % 2);
  for (int num_outputs : {1, 16, 31, 48, 49, 80, 97, 100}) check_product<Weight>(257, num_outputs, 2 * draw(1, 12), num_outputs % 2);
  for (int num_inputs : {254, 258, 4094, 4096, 4098, 8192, 8194})
    for (int num_rows : {1, 9}) check_product<Weight>(num_rows, 65, num_inputs, true);
  for (int num_inputs : {30, 258, 514})
    for (int num_rows : {33, 35, 49, 250}) check_product<Weight>(num_rows, 65, num_inputs, num_rows % 2);
}

}  // namespace

int main() {
  check_products<uint16_t>();
  check_products<int8_t>();
  std::printf("checked %d\n", num_checked);
}
