#include "rice.h"

#include <array>
#include <cstring>

namespace lori {
namespace {

// Each bit of a byte as the lowest bit of a byte of its own, the lowest first.
constexpr std::array<uint64_t, 256> make_spread() {
  std::array<uint64_t, 256> spread{};
  for (uint64_t byte = 0; byte < 256; byte++)
    for (int bit = 0; bit < 8; bit++) spread[byte] |= (byte >> bit & 1) << (8 * bit);
  return spread;
}
constexpr std::array<uint64_t, 256> kSpread = make_spread();

int parameter(int64_t num_entries, int64_t nnz) {
  int k = 0;
  while (nnz && (20000 * nnz) << k < 4812 * (2 * num_entries - nnz)) k++;
  return k;
}

uint64_t load_word(const uint8_t* bytes, size_t num_bytes) {
  uint64_t word = 0;
  for (size_t i = 0; i < num_bytes; i++) word |= static_cast<uint64_t>(bytes[i]) << (8 * i);
  return word;
}

// Calls `on_word` with each 64 bits of `bytes` and the number of the first, zeros after the last.
template <typename OnWord>
void for_each_word(const uint8_t* bytes, size_t num_bytes, const OnWord& on_word) {
  size_t at = 0;
  for (; at + 8 <= num_bytes; at += 8) on_word(load_word(bytes + at, 8), static_cast<int64_t>(8 * at));
  if (at < num_bytes) on_word(load_word(bytes + at, num_bytes - at), static_cast<int64_t>(8 * at));
}

// Remainders of at most 8 bits, a byte each, up to a multiple of 8.
void spread_planes(const uint8_t* planes, size_t plane_bytes, int k, uint8_t* remainders) {
  for (size_t i = 0; i < plane_bytes; i++) {
    uint64_t eight = 0;
    for (int bit = 0; bit < k; bit++) eight |= kSpread[planes[bit * plane_bytes + i]] << bit;
    for (int j = 0; j < 8; j++) remainders[8 * i + j] = static_cast<uint8_t>(eight >> (8 * j));
  }
}

// Writes the indices; `remainder` gives that of an entry. Returns one past the last bit of the unary part.
template <typename Remainder>
int64_t write_indices(const uint8_t* unary, size_t num_bytes, int k, const Remainder& remainder, int32_t* indices) {
  int64_t entry = 0, sum = 0, end = 0;  // sum: of the remainders so far
  for_each_word(unary, num_bytes, [&](uint64_t word, int64_t first) {
    for (; word; word &= word - 1, entry++) {
      end = first + __builtin_ctzll(word);
      sum += remainder(entry);
      indices[entry] = static_cast<int32_t>(((end - entry) << k) + entry + sum);
    }
  });
  return end + 1;
}

}  // namespace

bool decode_mask(const uint8_t* code, size_t num_bytes, int64_t num_entries, int64_t nnz, int32_t* indices,
                 std::vector<uint8_t>& scratch) {
  if (nnz > num_entries) return false;
  const int k = parameter(num_entries, nnz);
  const size_t plane_bytes = static_cast<size_t>(nnz + 7) / 8;
  if (num_bytes < k * plane_bytes) return false;
  const size_t cut = num_bytes - k * plane_bytes;
  if (static_cast<int64_t>(cut) > ((num_entries >> k) + nnz + 7) / 8) return false;
  int64_t num_ones = 0;
  for_each_word(code, cut, [&](uint64_t word, int64_t) { num_ones += __builtin_popcountll(word); });
  if (num_ones != nnz) return false;
  if (!nnz) return cut == 0;
  const uint8_t* planes = code + cut;
  for (int bit = 0; nnz % 8 && bit < k; bit++)
    if (planes[(bit + 1) * plane_bytes - 1] >> (nnz % 8)) return false;  // bits past the last entry
  int64_t end;
  if (k == 0) {
    end = write_indices(code, cut, k, [](int64_t) { return 0; }, indices);
  } else if (k <= 8) {
    scratch.resize(8 * plane_bytes);
    spread_planes(planes, plane_bytes, k, scratch.data());
    const uint8_t* remainders = scratch.data();
    end = write_indices(code, cut, k, [=](int64_t entry) { return remainders[entry]; }, indices);
  } else {
    const auto remainder = [=](int64_t entry) {
      int64_t out = 0;
      for (int bit = 0; bit < k; bit++)
        out |= static_cast<int64_t>(planes[bit * plane_bytes + entry / 8] >> (entry % 8) & 1) << bit;
      return out;
    };
    end = write_indices(code, cut, k, remainder, indices);
  }
  // The unary part holds no more zeros than a mask of so many entries has, so that no index wrapped around.
  return end - nnz <= num_entries >> k && indices[nnz - 1] < num_entries && cut == static_cast<size_t>(end + 7) / 8;
}

}  // namespace lori
