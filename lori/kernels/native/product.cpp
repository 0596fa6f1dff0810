#include "product.h"

namespace lori {

template <typename Weight>
void pack_part(const Weight* weight, int num_outputs, int num_inputs, Weight* panels) {
  const Part part{nullptr, nullptr, num_outputs, num_inputs};
  for (int panel = 0; panel < part.num_panels(); panel++) {
    const int outputs = part.panel_outputs(panel);
    Weight* to = panels + part.panel_at(panel);
    for (int output = 0; output < outputs; output++) {
      const int64_t row = int64_t{panel} * kPanelOutputs + output;
      for (int input = 0; input < num_inputs; input++)
        to[(int64_t{input / 2} * outputs + output) * 2 + input % 2] = row < num_outputs ? weight[row * num_inputs + input] : 0;
    }
  }
}

template void pack_part(const uint16_t*, int, int, uint16_t*);
template void pack_part(const int8_t*, int, int, int8_t*);

}  // namespace lori
