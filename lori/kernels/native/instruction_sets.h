// The table of the instruction sets that this module is compiled for, and the functions of each, in files of their own.
#pragma once

#include <string>
#include <vector>

#include "layout.h"
#include "product.h"

namespace lori {

struct LayerFunctions;  // layers.h

struct InstructionSet {
  const char* name;
  Expand (*choose_expand)(const Operands&);
  LayerFunctions (*choose_layers)(Dtype);
  Multiply multiply;
};

// Those that this processor runs, the fastest first.
std::vector<const InstructionSet*> instruction_sets();

// Throws `std::invalid_argument` if this processor does not run it.
const InstructionSet& instruction_set(const std::string& name);

#define LORI_DECLARE(set)                                                                                               \
  Expand choose_##set(const Operands&);                                                                                 \
  LayerFunctions layers_##set(Dtype);                                                                                   \
  void multiply_##set(const Part&, const Tokens&, int first_row, int last_row, int first_panel, int last_panel, Ahead&, \
                      float* sums);
LORI_DECLARE(portable)
LORI_DECLARE(avx2)
LORI_DECLARE(avx512)
LORI_DECLARE(avx512_bf16)
#undef LORI_DECLARE
LayerFunctions layers_amx(Dtype);
void multiply_amx(const Part&, const Tokens&, int first_row, int last_row, int first_panel, int last_panel, Ahead&, float* sums);

}  // namespace lori
