#include "adapter_file.h"

#include <cmath>
#include <cstring>
#include <unordered_map>

#include "rice.h"

namespace lori {
namespace {

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // safetensors reads no longer one
constexpr int kInt8Max = 127;
constexpr int kSmallestNormal = 0x80;  // the bits of the smallest bf16 above 0 that is no subnormal

enum Part { kMask, kValues, kScales, kNumParts };
constexpr std::string_view kPartNames[kNumParts] = {".mask", ".values", ".scales"};

struct Span {
  const uint8_t* begin = nullptr;  // null: not there
  size_t num_bytes = 0;
};

// The tensors of one module.
struct Tensors {
  Span parts[kNumParts];
};

size_t value_bytes(ValueType type) { return type == ValueType::kFloat32 ? 4 : type == ValueType::kInt8 ? 1 : 2; }

std::string_view dtype_name(Part part, ValueType type) {
  if (part == kMask) return "U8";
  if (part == kScales || type == ValueType::kBfloat16) return "BF16";
  return type == ValueType::kFloat16 ? "F16" : type == ValueType::kFloat32 ? "F32" : "I8";
}

// Reads the header's text from left to right; each function returns false where something else stands there.
class Text {
 public:
  explicit Text(std::string_view text) : rest_(text) {}

  bool skip(std::string_view expected) {
    if (rest_.substr(0, expected.size()) != expected) return false;
    rest_.remove_prefix(expected.size());
    return true;
  }

  // What stands before the next quotation mark, in plain ASCII without an escape.
  bool word(std::string_view& out) {
    size_t length = 0;
    for (; length < rest_.size() && rest_[length] != '"'; length++)
      if (rest_[length] < ' ' || rest_[length] > '~' || rest_[length] == '\\') return false;
    out = rest_.substr(0, length);
    rest_.remove_prefix(length);
    return true;
  }

  bool number(size_t& out) {
    size_t length = 0;
    for (out = 0; length < rest_.size() && rest_[length] >= '0' && rest_[length] <= '9'; length++) {
      if (length == 15) return false;
      out = 10 * out + static_cast<size_t>(rest_[length] - '0');
    }
    const bool is_plain = length == 1 || (length > 1 && rest_[0] != '0');
    rest_.remove_prefix(length);
    return is_plain;
  }

  bool is_blank() const { return rest_.find_first_not_of(' ') == std::string_view::npos; }

 private:
  std::string_view rest_;
};

// One tensor's entry of the header.
struct Entry {
  std::string_view name, dtype;
  size_t length, begin, end;
};

bool read_entry(Text& text, Entry& entry) {
  return text.skip("\"") && text.word(entry.name) && text.skip("\":{\"dtype\":\"") && text.word(entry.dtype) &&
         text.skip("\",\"shape\":[") && text.number(entry.length) && text.skip("],\"data_offsets\":[") &&
         text.number(entry.begin) && text.skip(",") && text.number(entry.end) && text.skip("]}");
}

using Numbers = std::unordered_map<std::string_view, size_t>;  // of the modules, by name

// Finds the module and the part that a tensor is.
bool find_part(std::string_view name, const Numbers& numbers, size_t& module, Part& part) {
  for (part = kMask; part < kNumParts; part = static_cast<Part>(part + 1)) {
    const std::string_view suffix = kPartNames[part];
    if (name.size() < suffix.size() || name.substr(name.size() - suffix.size()) != suffix) continue;
    const auto found = numbers.find(name.substr(0, name.size() - suffix.size()));
    if (found == numbers.end()) return false;
    module = found->second;
    return true;
  }
  return false;
}

// Finds all tensors of all modules, each once, one after the other and nothing besides.
bool read_header(const uint8_t* file, size_t num_bytes, const std::vector<Module>& modules, ValueType type,
                 std::vector<Tensors>& tensors) {
  if (num_bytes < 8) return false;
  uint64_t header_bytes = 0;
  for (int i = 0; i < 8; i++) header_bytes |= static_cast<uint64_t>(file[i]) << (8 * i);
  if (header_bytes > kMaxHeaderBytes || header_bytes > num_bytes - 8) return false;
  const uint8_t* data = file + 8 + header_bytes;
  const size_t data_bytes = num_bytes - 8 - header_bytes;
  Numbers numbers(2 * modules.size());
  for (size_t i = 0; i < modules.size(); i++) numbers.emplace(modules[i].name, i);
  Text text(std::string_view(reinterpret_cast<const char*>(file) + 8, header_bytes));
  const size_t num_tensors = modules.size() * (type == ValueType::kInt8 ? 3 : 2);
  size_t next = 0;
  if (!text.skip("{")) return false;
  for (size_t i = 0; i < num_tensors; i++) {
    Entry entry;
    size_t module;
    Part part;
    if ((i && !text.skip(",")) || !read_entry(text, entry) || !find_part(entry.name, numbers, module, part)) return false;
    if (entry.dtype != dtype_name(part, type) || (part == kScales && type != ValueType::kInt8)) return false;
    const size_t width = part == kMask ? 1 : part == kScales ? 2 : value_bytes(type);
    if (entry.begin != next || entry.end < entry.begin || entry.end > data_bytes) return false;
    next = entry.end;
    Span& span = tensors[module].parts[part];
    if (span.begin || entry.length * width != entry.end - entry.begin) return false;
    span = {data + entry.begin, entry.end - entry.begin};
  }
  return text.skip("}") && text.is_blank() && next == data_bytes;
}

template <typename T>
T load_at(const uint8_t* begin, size_t i) {
  T value;
  std::memcpy(&value, begin + i * sizeof(T), sizeof(T));
  return value;
}

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

float from_bfloat16(uint16_t bits) { return from_bits(static_cast<uint32_t>(bits) << 16); }

float from_float16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, rest = bits & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | rest << 13);
  if (rest >= 0x0400) return from_bits(sign | ((rest << 13) + (112u << 23)));
  const float magnitude = static_cast<float>(rest) * 0x1p-24f;  // a subnormal, exactly
  return sign ? -magnitude : magnitude;
}

// Says whether int8 values and their scales are what lori.sparse.quantize gives, see `is_canonical` there.
bool is_canonical(const Module& module, const Tensors& tensors, const int32_t* indices, size_t nnz) {
  const uint8_t *values = tensors.parts[kValues].begin, *scales = tensors.parts[kScales].begin;
  size_t next = 0;
  for (int row = 0; row < module.num_outputs; row++) {
    bool has_value = false, has_peak = false;
    const int64_t stop = static_cast<int64_t>(row + 1) * module.rank;
    for (; next < nnz && indices[next] < stop; next++) {
      const int value = static_cast<int8_t>(values[next]);
      if (value < -kInt8Max) return false;
      has_value |= value != 0;
      has_peak |= value == kInt8Max || value == -kInt8Max;
    }
    const int bits = load_at<int16_t>(scales, row);
    const bool has_scale = bits >= kSmallestNormal;
    if (has_value != has_peak || has_peak != has_scale || has_scale != (bits != 0)) return false;
  }
  return true;
}

// Writes the values of one module times its scale in its operands' dtype. `value_at` gives those of the file in fp32. Returns
// false where one is not finite before that.
template <typename ValueAt>
bool convert(const Module& module, size_t nnz, const ValueAt& value_at, std::vector<uint8_t>& out) {
  bool is_finite = true;
  out.resize(nnz * (module.dtype == Dtype::kBfloat16 ? 2 : 4));
  for (size_t i = 0; i < nnz; i++) {
    const float value = value_at(i), scaled = value * module.scale;
    is_finite &= std::isfinite(value);
    if (module.dtype == Dtype::kBfloat16) {
      const uint16_t bits = to_bfloat16(scaled);
      std::memcpy(out.data() + 2 * i, &bits, 2);
    } else {
      std::memcpy(out.data() + 4 * i, &scaled, 4);
    }
  }
  return is_finite;
}

bool are_finite_bfloat16(const uint8_t* values, size_t nnz) {
  uint32_t is_any_not = 0;
  for (size_t i = 0; i < nnz; i++) is_any_not |= (load_at<uint16_t>(values, i) & 0x7f80u) == 0x7f80u;
  return !is_any_not;
}

// Room that the modules share.
struct Scratch {
  std::vector<int32_t> indices;
  std::vector<uint8_t> remainders, values;
};

// Points `out` at the values of one module as its operands have them. Returns false where they are not sound.
bool read_values(const Module& module, const Tensors& tensors, size_t nnz, ValueType type, Scratch& scratch,
                 const uint8_t*& out) {
  const uint8_t *values = tensors.parts[kValues].begin, *scales = tensors.parts[kScales].begin;
  if (type == ValueType::kBfloat16 && module.dtype == Dtype::kBfloat16 && module.scale == 1.0f) {
    out = values;
    return are_finite_bfloat16(values, nnz);
  }
  bool is_sound = true;
  if (type == ValueType::kBfloat16) {
    is_sound = convert(module, nnz, [=](size_t i) { return from_bfloat16(load_at<uint16_t>(values, i)); }, scratch.values);
  } else if (type == ValueType::kFloat16) {
    is_sound = convert(module, nnz, [=](size_t i) { return from_float16(load_at<uint16_t>(values, i)); }, scratch.values);
  } else if (type == ValueType::kFloat32) {
    is_sound = convert(module, nnz, [=](size_t i) { return load_at<float>(values, i); }, scratch.values);
  } else {
    const int32_t* indices = scratch.indices.data();
    const auto value_at = [=](size_t i) {
      return static_cast<float>(static_cast<int8_t>(values[i])) *
             from_bfloat16(load_at<uint16_t>(scales, indices[i] / module.rank));
    };
    is_sound = tensors.parts[kScales].num_bytes == 2 * static_cast<size_t>(module.num_outputs) &&
               is_canonical(module, tensors, indices, nnz) && convert(module, nnz, value_at, scratch.values);
  }
  out = scratch.values.data();
  return is_sound;
}

}  // namespace

bool pack_file(const uint8_t* file, size_t num_bytes, const std::vector<Module>& modules, ValueType value_type, Packed& packed,
               std::vector<int64_t>& ends) {
  std::vector<Tensors> tensors(modules.size());
  if (!read_header(file, num_bytes, modules, value_type, tensors)) return false;
  packed.blocks.reserve(2 * num_bytes);
  Scratch scratch;
  for (size_t i = 0; i < modules.size(); i++) {
    const Module& module = modules[i];
    const Span mask = tensors[i].parts[kMask];
    const size_t nnz = tensors[i].parts[kValues].num_bytes / value_bytes(value_type);
    const int64_t num_entries = static_cast<int64_t>(module.num_outputs) * module.rank;
    if (static_cast<int64_t>(nnz) > num_entries) return false;
    scratch.indices.resize(nnz);
    if (!decode_mask(mask.begin, mask.num_bytes, num_entries, nnz, scratch.indices.data(), scratch.remainders)) return false;
    const uint8_t* values;
    if (!read_values(module, tensors[i], nnz, value_type, scratch, values)) return false;
    pack({scratch.indices.data(), values, nnz, module.num_outputs, module.rank}, module.dtype, module.column_bytes, packed);
    ends.push_back(static_cast<int64_t>(packed.blocks.size() / kUnit));
  }
  return true;
}

}  // namespace lori
