#include "instruction_sets.h"
#include "product_loops.h"

namespace lori {
void multiply_avx512_bf16(const Part& part, const Tokens& tokens, int first_row, int last_row, int first_panel, int last_panel,
                          Ahead& ahead, float* sums) {
  multiply_all(part, tokens, first_row, last_row, first_panel, last_panel, ahead, sums);
}
}  // namespace lori
