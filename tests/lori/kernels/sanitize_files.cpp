// Reads files of adapters, and the same with bytes that were changed or left out, and any bytes as a mask, from arrays that are
// not a byte longer than they must be; says how many files it checked. Compiled with the sanitizers by test_cpu_kernel.py.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "adapter_file.h"
#include "pack.h"
#include "random_values.h"
#include "rice.h"

using namespace lori;

namespace {

// The bits of a mask's code, a part after the other.
struct Bits {
  std::string bytes;
  int used = 8;  // of the last byte

  void put(int bit) {
    if (used == 8) bytes.push_back(0), used = 0;
    bytes.back() = static_cast<char>(bytes.back() | bit << used++);
  }
  void end_part() { used = 8; }
};

std::string encode(const std::vector<int64_t>& indices, int64_t num_entries) {
  const int64_t nnz = static_cast<int64_t>(indices.size());
  int k = 0;
  while (nnz && (20000 * nnz) << k < 4812 * (2 * num_entries - nnz)) k++;
  Bits bits;
  std::vector<int64_t> gaps;
  for (size_t i = 0; i < indices.size(); i++) gaps.push_back(indices[i] - (i ? indices[i - 1] : -1) - 1);
  for (int64_t gap : gaps) {
    for (int64_t zeros = gap >> k; zeros > 0; zeros--) bits.put(0);
    bits.put(1);
  }
  for (int bit = 0; bit < k; bit++) {
    bits.end_part();
    for (int64_t gap : gaps) bits.put(static_cast<int>(gap >> bit & 1));
  }
  return bits.bytes;
}

std::string entry(const std::string& name, const char* dtype, size_t length, size_t num_bytes, size_t& at) {
  const std::string begin = std::to_string(at), end = std::to_string(at += num_bytes);
  return (at == num_bytes ? "" : ",") + ("\"" + name + "\":{\"dtype\":\"") + dtype + "\",\"shape\":[" + std::to_string(length) +
         "],\"data_offsets\":[" + begin + "," + end + "]}";
}

// A file of int8 values: all that a reader of files has.
std::string make_file(const std::vector<Module>& modules, float density) {
  std::string header = "{", data;
  size_t at = 0;
  for (const Module& module : modules) {
    std::string values, scales;
    std::vector<int64_t> indices;
    for (int row = 0; row < module.num_outputs; row++) {
      bool has_value = false;
      for (int column = 0; column < module.rank; column++)
        if (std::uniform_real_distribution<float>()(generator) < density) {
          indices.push_back(static_cast<int64_t>(row) * module.rank + column);
          values.push_back(static_cast<char>(has_value ? draw(-127, 127) : 127));
          has_value = true;
        }
      scales += has_value ? std::string("\x80\x3f", 2) : std::string(2, '\0');  // 1 and 0
    }
    const std::string mask = encode(indices, static_cast<int64_t>(module.num_outputs) * module.rank), name(module.name);
    if (mask.empty()) return "";  // the entry below would take it for the first
    header += entry(name + ".mask", "U8", mask.size(), mask.size(), at);
    header += entry(name + ".values", "I8", values.size(), values.size(), at);
    header += entry(name + ".scales", "BF16", module.num_outputs, scales.size(), at);
    data += mask + values + scales;
  }
  header += "}";
  std::string size(8, '\0');
  for (int i = 0; i < 8; i++) size[i] = static_cast<char>(header.size() >> (8 * i));
  return size + header + data;
}

bool read_file(const std::string& file, const std::vector<Module>& modules, ValueType type) {
  std::unique_ptr<uint8_t[]> bytes(new uint8_t[file.size()]);
  std::copy(file.begin(), file.end(), bytes.get());
  Packed packed;
  std::vector<int64_t> ends;
  return pack_file(bytes.get(), file.size(), modules, type, packed, ends);
}

// Whether a file is read, and the same file with changes is read or refused without reading or writing beside an array.
bool check_file(Dtype dtype, int num_outputs, int rank, float density) {
  const std::vector<Module> modules = {{"a", num_outputs, rank, dtype, rank <= 256 ? 1 : 2, 1.0f},
                                       {"b.c", 2 * num_outputs, rank, dtype, rank <= 256 ? 1 : 2, 0.5f}};
  const std::string file = make_file(modules, density);
  if (file.empty()) return true;
  if (!read_file(file, modules, ValueType::kInt8)) return false;
  for (int i = 0; i < 8; i++) {
    std::string changed = file;
    for (int byte = draw(1, 3); byte > 0; byte--)
      changed[draw(0, 1) ? draw(0, static_cast<int>(file.size()) - 1)
                         : file.size() - 1 - draw(0, static_cast<int>(file.size()) / 3)] ^= static_cast<char>(1 << draw(0, 7));
    if (i % 4 == 0) changed.resize(draw(0, static_cast<int>(file.size())));
    read_file(changed, modules, i % 8 ? ValueType::kInt8 : ValueType::kBfloat16);
  }
  return true;
}

// Whether any bytes are a mask or are refused; what is a mask must lie in it.
bool check_any_code() {
  const size_t num_bytes = static_cast<size_t>(draw(0, 40));
  const int64_t num_entries = draw(1, 3000), nnz = draw(0, 300);
  std::unique_ptr<uint8_t[]> code(new uint8_t[num_bytes]);
  const int density = draw(1, 8);  // of the bits that are 1, in eighths
  for (size_t i = 0; i < num_bytes; i++) {
    code[i] = 0;
    for (int bit = 0; bit < 8; bit++) code[i] |= static_cast<uint8_t>((draw(1, 8) <= density) << bit);
  }
  std::unique_ptr<int32_t[]> indices(new int32_t[nnz]);
  std::vector<uint8_t> scratch;
  if (!decode_mask(code.get(), num_bytes, num_entries, nnz, indices.get(), scratch)) return true;
  for (int64_t i = 0; i < nnz; i++)
    if (indices[i] >= num_entries || (i ? indices[i] <= indices[i - 1] : indices[i] < 0)) return false;
  return true;
}

}  // namespace

int main() {
  int num_checked = 0;
  for (Dtype dtype : {Dtype::kBfloat16, Dtype::kFloat32})
    for (int rank : {1, 2, 7, 16, 31, 32, 33, 48, 64, 65, 256, 257})
      for (int num_outputs : {1, 15, 16, 17, 33, 40, 64, 100, 129, 255, 256, 257, 530})
        for (float density : {0.02f, 0.3f, 1.0f}) {
          if (!check_file(dtype, num_outputs, rank, density)) {
            std::printf("a sound file was refused: rank %d, %d outputs, density %g\n", rank, num_outputs, density);
            return 1;
          }
          num_checked++;
        }
  for (int i = 0; i < 5000; i++)
    if (!check_any_code()) {
      std::printf("a mask's code gave indices outside of it\n");
      return 1;
    }
  std::printf("checked %d\n", num_checked);
}
