#include "expand_loops.h"
#include "instruction_sets.h"

namespace lori {
Expand choose_portable(const Operands& operands) { return choose(operands); }
}  // namespace lori
