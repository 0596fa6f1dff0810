#include "product.h"

namespace lori {

void pack_part(const uint16_t* weight, int num_outputs, int num_inputs, uint16_t* panels) {
  const Part part{panels, nullptr, num_outputs, num_inputs};
  for (int panel = 0; panel < part.num_panels(); panel++) {
    const int outputs = part.panel_outputs(panel);
    uint16_t* to = panels + int64_t{panel} * kPanelOutputs * num_inputs;
    for (int output = 0; output < outputs; output++) {
      const int64_t row = int64_t{panel} * kPanelOutputs + output;
      for (int input = 0; input < num_inputs; input++)
        to[(int64_t{input / 2} * outputs + output) * 2 + input % 2] = row < num_outputs ? weight[row * num_inputs + input] : 0;
    }
  }
}

}  // namespace lori
