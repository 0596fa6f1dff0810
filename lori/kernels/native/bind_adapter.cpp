#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <tuple>

#include "adapter_file.h"
#include "bindings.h"
#include "bound.h"
#include "rice.h"

namespace lori {
namespace {

constexpr int64_t kMaxEntries = int64_t{1} << 26;  // of one B; lori.rice.MAX_ENTRIES

std::optional<NewArray<int32_t>> decode_mask_array(const Array<uint8_t, 1>& code, int64_t num_entries, int64_t nnz) {
  if (num_entries < 0 || num_entries > kMaxEntries || nnz < 0) throw nb::value_error("entries out of range");
  if (nnz > num_entries) return std::nullopt;
  auto indices = std::make_unique<std::vector<int32_t>>(nnz);
  bool is_sound;
  {
    const nb::gil_scoped_release release;
    std::vector<uint8_t> scratch;
    is_sound = decode_mask(code.data(), code.shape(0), num_entries, nnz, indices->data(), scratch);
  }
  if (!is_sound) return std::nullopt;
  return new_array(std::move(indices));
}

// What is known of a module before its file is read, as a row of a table.
struct ModuleRow {
  int64_t num_outputs, rank, is_float32, column_bytes;
};

// Where the B of one module goes, as a row of a table: which blocks and windows of the adapter's, in units and windows; the pool
// and where in it, in units; and what the slot has in the operands' other arrays. Addresses are those of arrays that the caller
// holds.
struct PutRow {
  int64_t first_unit, num_units, first_window, num_windows, pool, pool_units, place, starts, basis_of;

  bool fits(size_t num_bytes, size_t num_starts) const {
    return first_unit >= 0 && num_units >= 0 && first_window >= 0 && num_windows >= 0 && place >= 0 &&
           first_unit + num_units <= static_cast<int64_t>(num_bytes / kUnit) &&
           first_window + num_windows <= static_cast<int64_t>(num_starts) && place + num_units <= pool_units;
  }
};

// Returns the rows of a table of int64 with as many columns as a row has fields.
template <typename Row>
const Row* rows_of(const Array<int64_t, 2>& table) {
  if (table.shape(1) * sizeof(int64_t) != sizeof(Row)) throw nb::value_error("a table of other columns expected");
  return reinterpret_cast<const Row*>(table.data());
}

ValueType parse_value_type(const std::string& name) {
  if (name == "bfloat16") return ValueType::kBfloat16;
  if (name == "float16") return ValueType::kFloat16;
  if (name == "float32") return ValueType::kFloat32;
  if (name == "int8") return ValueType::kInt8;
  throw nb::value_error(("values " + name + ", expected bfloat16, float16, float32 or int8").c_str());
}

// The names stand in `names`, a newline after each.
std::vector<Module> modules_of(std::string_view names, const Array<int64_t, 2>& table, const Array<float, 1>& scales) {
  const ModuleRow* rows = rows_of<ModuleRow>(table);
  if (scales.shape(0) != table.shape(0)) throw nb::value_error("as many scales as modules expected");
  std::vector<Module> modules;
  for (size_t i = 0; i < table.shape(0); i++) {
    const auto [num_outputs, rank, is_float32, column_bytes] = rows[i];
    const size_t length = names.find('\n');
    if (length == std::string_view::npos) throw nb::value_error("as many names as modules expected");
    if (rank < 1 || rank > (column_bytes == 1 ? 256 : kMaxRank)) throw nb::value_error("rank out of range");
    if (num_outputs < 1 || num_outputs > kMaxEntries / rank) throw nb::value_error("outputs out of range");
    modules.push_back({names.substr(0, length), static_cast<int>(num_outputs), static_cast<int>(rank),
                       is_float32 ? Dtype::kFloat32 : Dtype::kBfloat16, column_bytes == 1 ? 1 : 2, scales.data()[i]});
    names.remove_prefix(length + 1);
  }
  return modules;
}

struct PackedFile {
  Packed packed;
  std::vector<int64_t> ends;
};

using PackedArrays = std::tuple<NewArray<uint8_t>, NewArray<int32_t>, NewArray<int64_t>>;  // blocks, starts, ends

std::optional<PackedArrays> pack_file_arrays(const nb::bytes& file, const std::string& names, const Array<int64_t, 2>& table,
                                             const Array<float, 1>& scales, const std::string& value_type) {
  const std::vector<Module> modules = modules_of(names, table, scales);
  const ValueType type = parse_value_type(value_type);
  const auto* content = reinterpret_cast<const uint8_t*>(file.c_str());
  const size_t num_bytes = file.size();
  auto packed = std::make_unique<PackedFile>();
  bool is_sound;
  {
    const nb::gil_scoped_release release;
    is_sound = pack_file(content, num_bytes, modules, type, packed->packed, packed->ends);
  }
  if (!is_sound) return std::nullopt;
  PackedFile* kept = packed.release();
  const nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<PackedFile*>(p); });
  return PackedArrays(new_array(kept->packed.blocks, owner), new_array(kept->packed.starts, owner), new_array(kept->ends, owner));
}

// Copies the blocks of each module into its pool, and sets where its windows begin there.
void put_adapter(const Array<uint8_t, 1>& blocks, const Array<int32_t, 1>& starts, const Array<int64_t, 2>& table, int basis) {
  const PutRow* rows = rows_of<PutRow>(table);
  const size_t num_rows = table.shape(0);
  for (size_t i = 0; i < num_rows; i++)
    if (!rows[i].fits(blocks.shape(0), starts.shape(0))) throw nb::value_error("blocks or windows that are not there");
  const uint8_t* from = blocks.data();
  const int32_t* begins = starts.data();
  const nb::gil_scoped_release release;
  for (size_t i = 0; i < num_rows; i++) {
    const PutRow& row = rows[i];
    auto* pool = reinterpret_cast<uint8_t*>(row.pool) + row.place * kUnit;
    if (row.num_units) std::memcpy(pool, from + row.first_unit * kUnit, row.num_units * kUnit);
    for (int64_t window = 0; window < row.num_windows; window++) {
      const int32_t begin = begins[row.first_window + window];
      reinterpret_cast<int32_t*>(row.starts)[window] = begin < 0 ? -1 : begin + static_cast<int32_t>(row.place);
    }
    *reinterpret_cast<int32_t*>(row.basis_of) = basis;
  }
}

}  // namespace

void bind_adapter(nb::module_& m) {
  m.def("decode_mask", &decode_mask_array, nb::arg("code"), nb::arg("num_entries"), nb::arg("nnz"),
        "The indices of a mask; None where the code is not one of such a mask.");
  m.def("pack_file", &pack_file_arrays, nb::arg("file"), nb::arg("names"), nb::arg("modules"), nb::arg("scales"),
        nb::arg("value_type"), "None where the file is not one that lori.weights writes, or not sound.");
  m.def("put_adapter", &put_adapter, nb::arg("blocks"), nb::arg("starts"), nb::arg("rows"), nb::arg("basis"));
}

}  // namespace lori
