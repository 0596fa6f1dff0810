// Random numbers, and bfloat16 as its bits, for the programs that run under the sanitizers.
#pragma once
#include <cstdint>
#include <cstring>
#include <random>

namespace {

std::mt19937 generator(0);

int draw(int first, int last) { return std::uniform_int_distribution<int>(first, last)(generator); }
float normal() { return std::normal_distribution<float>()(generator); }

uint16_t narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float widen(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

}  // namespace
