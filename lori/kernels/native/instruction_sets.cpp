#include "instruction_sets.h"

#include <stdexcept>

#include "layers.h"

namespace lori {
namespace {

struct Row {
  InstructionSet set;
  bool is_supported;  // by this processor
};

#define LORI_ROW(set, is_supported) {{#set, choose_##set, layers_##set, multiply_##set}, is_supported}

const std::vector<Row>& table() {
#if defined(LORI_AVX512)
  static const bool has_512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  static const std::vector<Row> rows = {
#if defined(LORI_AVX512) && defined(LORI_AVX512_BF16)
      // VBMI for planes of bytes (planes_avx512.h); of all that have the others one generation of servers lacks it.
      LORI_ROW(avx512_bf16, has_512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi")),
#endif
#if defined(LORI_AVX512)
      LORI_ROW(avx512, has_512),
#endif
#if defined(LORI_AVX2)
      LORI_ROW(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")),
#endif
      LORI_ROW(portable, true),
  };
  return rows;
}

}  // namespace

std::vector<const InstructionSet*> instruction_sets() {
  std::vector<const InstructionSet*> sets;
  for (const Row& row : table())
    if (row.is_supported) sets.push_back(&row.set);
  return sets;
}

const InstructionSet& instruction_set(const std::string& name) {
  for (const InstructionSet* set : instruction_sets())
    if (set->name == name) return *set;
  throw std::invalid_argument("this processor does not run " + name);
}

}  // namespace lori
