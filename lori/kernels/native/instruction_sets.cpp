#include "instruction_sets.h"

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <stdexcept>

#include "layers.h"

namespace lori {
namespace {

struct Row {
  InstructionSet set;
  bool is_supported;  // by this processor
};

#define LORI_ROW(set, is_supported) {{#set, choose_##set, layers_##set, multiply_##set}, is_supported}

#if defined(LORI_AMX)
// Asks Linux, which keeps the tiles' registers of a process only if it is asked. It may refuse.
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

const std::vector<Row>& table() {
#if defined(LORI_AVX512)
  static const bool has_512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
#if defined(LORI_AVX512_BF16)
  // VBMI for planes of bytes (planes_avx512.h); of all that have the others one generation of servers lacks it.
  static const bool has_bf16 = has_512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
#endif
  static const std::vector<Row> rows = {
#if defined(LORI_AMX) && defined(LORI_AVX512_BF16)
      {{"amx", choose_avx512_bf16, layers_amx, multiply_amx},
       has_bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && may_use_tiles()},
#endif
#if defined(LORI_AVX512_BF16)
      LORI_ROW(avx512_bf16, has_bf16),
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
