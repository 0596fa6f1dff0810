// Arrays that are not a byte longer than they must be, and the count of what was checked, for the programs that run under the
// sanitizers.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "random_values.h"

namespace {

// Values in an array of just their bytes: whatever reads or writes one more is found.
template <typename Value>
struct Values {
  size_t size;
  std::unique_ptr<Value[]> at;
  explicit Values(size_t size) : size(size), at(new Value[size]) { std::memset(at.get(), 0xff, size * sizeof(Value)); }
  float get(size_t i) const {
    if constexpr (sizeof(Value) == 2)
      return widen(at[i]);
    else
      return at[i];
  }
  void set(size_t i, float value) {
    if constexpr (sizeof(Value) == 2)
      at[i] = narrow(value);
    else
      at[i] = value;
  }
  void fill(float scale = 1) {
    for (size_t i = 0; i < size; i++) set(i, scale * normal());
  }
  uint8_t* bytes() const { return reinterpret_cast<uint8_t*>(at.get()); }
};

template <typename Value>
constexpr double kRounding = sizeof(Value) == 2 ? 1.0 / 256 : 1.0 / 16777216;

int num_checked = 0;

void expect(bool is_right, const char* what, int a, int b, int c) {
  num_checked++;
  if (is_right) return;
  std::printf("wrong: %s %d %d %d\n", what, a, b, c);
  std::exit(1);
}

}  // namespace
