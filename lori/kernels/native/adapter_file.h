// An adapter's weights file, `adapter_model.safetensors`, into the run-time layout of all its modules, in one go.
//
// It reads what lori.weights writes, and nothing else: a file of another order or form, and every file that is not sound, is left
// to lori.format, which says what is wrong with it. lori/weights.py says which tensors there are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "pack.h"

namespace lori {

enum class ValueType { kBfloat16, kFloat16, kFloat32, kInt8 };

// What is known of a module before its file is read.
struct Module {
  std::string_view name;
  int num_outputs, rank;  // of its B
  Dtype dtype;            // of its operands
  int column_bytes;
  float scale;  // B is packed times this
};

// Appends the B of every module to `packed`, in order, and to `ends` (modules,) where the blocks of each end, in units. Returns
// false where the file is not of the form above, or not sound: `packed` and `ends` may hold anything then.
bool pack_file(const uint8_t* file, size_t num_bytes, const std::vector<Module>& modules, ValueType value_type, Packed& packed,
               std::vector<int64_t>& ends);

}  // namespace lori
