#include "expand_avx2.h"

#include "instruction_sets.h"

namespace lori {
Expand choose_avx2(const Operands& operands) { return choose(operands); }
}  // namespace lori
