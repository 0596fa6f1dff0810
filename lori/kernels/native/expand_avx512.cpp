#include "expand_avx512.h"

#include "instruction_sets.h"

namespace lori {
Expand choose_avx512(const Operands& operands) { return choose(operands); }
}  // namespace lori
