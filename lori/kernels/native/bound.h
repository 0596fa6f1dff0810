// The operands and the routes of Python, checked once and read at each call.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "instruction_sets.h"

namespace lori {

namespace nb = nanobind;

template <typename T, size_t kDims>
using Array = nb::ndarray<const T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;

// An array that Python owns from then on.
template <typename T>
using NewArray = nb::ndarray<nb::numpy, T, nb::ndim<1>>;

// Returns `values` as an array that owns them.
template <typename T>
NewArray<T> new_array(std::unique_ptr<std::vector<T>> values) {
  std::vector<T>* kept = values.release();
  const nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return NewArray<T>(kept->data(), {kept->size()}, owner);
}

// Returns `values` as an array that keeps their `owner` alive.
template <typename T>
NewArray<T> new_array(std::vector<T>& values, const nb::capsule& owner) {
  return NewArray<T>(values.data(), {values.size()}, owner);
}

Dtype parse_dtype(const std::string& name);

// The operands of one module. The arrays are those of the caller, kept alive and read at each call.
class BoundOperands {
 public:
  BoundOperands(Array<uint8_t, 1> pool, Array<int32_t, 2> starts, Array<int32_t, 1> basis_of, int num_outputs, int rank,
                const std::string& dtype, const std::string& instruction_set)
      : pool_(pool),
        starts_(starts),
        basis_of_(basis_of),
        operands_(pool.data(), starts.data(), basis_of.data(), static_cast<int>(starts.shape(0)), num_outputs, rank,
                  parse_dtype(dtype)) {
    if (rank < 1 || rank > kMaxRank)
      throw nb::value_error(("rank " + std::to_string(rank) + ", expected 1 to " + std::to_string(kMaxRank)).c_str());
    if (static_cast<int>(starts.shape(1)) != operands_.num_windows || basis_of.shape(0) != starts.shape(0))
      throw nb::value_error("starts and basis_of do not have the shapes of these slots and outputs");
    expand_ = lori::instruction_set(instruction_set).choose_expand(operands_);
  }
  const Operands& operands() const { return operands_; }
  Expand expand() const { return expand_; }

 private:
  Array<uint8_t, 1> pool_;
  Array<int32_t, 2> starts_;
  Array<int32_t, 1> basis_of_;
  Operands operands_;
  Expand expand_;
};

class BoundRoute {
 public:
  BoundRoute(Array<int32_t, 2> segments, Array<int32_t, 1> slots, Array<float, 1> weights, int num_tokens)
      : segments_(segments), slots_(slots), weights_(weights), num_tokens_(num_tokens) {
    int32_t last = 0;
    if (segments.shape(1) != 4 || slots.shape(0) != weights.shape(0))
      throw nb::value_error("segments (G, 4), slots (M,) and weights (M,) expected");
    route_ = {reinterpret_cast<const Segment*>(segments.data()), slots.data(), weights.data(),
              static_cast<int>(segments.shape(0)), static_cast<int>(slots.shape(0))};
    for (int i = 0; i < route_.num_segments; i++) {
      const Segment& segment = route_.segments[i];
      if (segment.start < last || segment.stop <= segment.start || segment.first_term < 0 ||
          segment.last_term <= segment.first_term || segment.last_term > static_cast<int64_t>(slots.shape(0)))
        throw nb::value_error("segments must ascend, not overlap and have terms");
      last = segment.stop;
      num_active_ += segment.stop - segment.start;
    }
    if (last > num_tokens) throw nb::value_error("a segment goes beyond the tokens");
    for (size_t i = 0; i < slots.shape(0); i++) {
      if (slots.data()[i] < 0) throw nb::value_error("a slot is negative");
      num_slots_ = std::max<int64_t>(num_slots_, static_cast<int64_t>(slots.data()[i]) + 1);
    }
  }
  const Route& route() const { return route_; }
  int num_tokens() const { return num_tokens_; }
  int64_t num_slots() const { return num_slots_; }  // at least so many must the operands have
  size_t num_terms() const { return slots_.shape(0); }
  int64_t num_active() const { return num_active_; }

 private:
  Array<int32_t, 2> segments_;
  Array<int32_t, 1> slots_;
  Array<float, 1> weights_;
  Route route_;
  int num_tokens_;
  int64_t num_slots_ = 0, num_active_ = 0;
};

}  // namespace lori
