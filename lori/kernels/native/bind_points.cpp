#include <nanobind/stl/optional.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "bindings.h"
#include "bound.h"

namespace lori {
namespace {

constexpr int kDimensions = 96;  // known to the compiler, which unrolls the product
constexpr float kMaxInteger = 32767;

// Points: integers (G, kDimensions), the scale of each dimension, and -|p|^2 / 2 of each point.
struct Points {
  const int8_t* integers;
  const float* scales;
  const float* constants;
  int64_t count;
};

using Scored = std::pair<float, int64_t>;

// Returns the indices of the points nearest to the query, those with the greatest p^T x - |p|^2 / 2, in any order.
std::vector<int64_t> nearest(const Points& points, const float* query, const bool* allowed, size_t count) {
  float scaled[kDimensions], greatest = std::numeric_limits<float>::min();
  for (int i = 0; i < kDimensions; i++) {
    scaled[i] = query[i] * points.scales[i];
    greatest = std::max(greatest, std::abs(scaled[i]));
  }
  int16_t integers[kDimensions];
  for (int i = 0; i < kDimensions; i++) integers[i] = static_cast<int16_t>(std::lrint(scaled[i] / greatest * kMaxInteger));
  const float scale = greatest / kMaxInteger;
  std::vector<Scored> best;  // a heap, the farthest on top
  best.reserve(count + 1);
  float least = -std::numeric_limits<float>::infinity();
  for (int64_t point = 0; point < points.count; point++) {
    int32_t sum = 0;  // at most 96 * 127 * 32767
    const int8_t* entries = points.integers + point * kDimensions;
    for (int i = 0; i < kDimensions; i++) sum += static_cast<int16_t>(entries[i]) * integers[i];
    const float score = scale * static_cast<float>(sum) + points.constants[point];
    if (!(score > least) || (allowed && !allowed[point])) continue;
    best.emplace_back(score, point);
    std::push_heap(best.begin(), best.end(), std::greater<>());
    if (best.size() > count) {
      std::pop_heap(best.begin(), best.end(), std::greater<>());
      best.pop_back();
    }
    if (best.size() == count) least = best.front().first;
  }
  std::vector<int64_t> indices(best.size());
  std::transform(best.begin(), best.end(), indices.begin(), [](const Scored& one) { return one.second; });
  return indices;
}

NewArray<int64_t> nearest_array(const Array<int8_t, 2>& points, const Array<float, 1>& scales, const Array<float, 1>& constants,
                                const Array<float, 1>& query, const std::optional<Array<bool, 1>>& allowed, int64_t count) {
  const size_t num_points = points.shape(0);
  if (points.shape(1) != kDimensions || scales.shape(0) != kDimensions || query.shape(0) != kDimensions)
    throw nb::value_error("96 dimensions expected");
  if (constants.shape(0) != num_points || (allowed && allowed->shape(0) != num_points))
    throw nb::value_error("a constant for each point expected, and whether it is allowed");
  if (count < 1) throw nb::value_error("a count of at least 1 expected");
  auto indices = std::make_unique<std::vector<int64_t>>();
  {
    const nb::gil_scoped_release release;
    const Points all{points.data(), scales.data(), constants.data(), static_cast<int64_t>(num_points)};
    *indices = nearest(all, query.data(), allowed ? allowed->data() : nullptr, std::min(static_cast<size_t>(count), num_points));
  }
  std::vector<int64_t>* kept = indices.release();
  const nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<int64_t>*>(p); });
  return new_array(*kept, owner);
}

}  // namespace

void bind_points(nb::module_& m) {
  m.def("nearest", &nearest_array, nb::arg("points"), nb::arg("scales"), nb::arg("constants"), nb::arg("query"),
        nb::arg("allowed").none(), nb::arg("count"),
        "The indices of the allowed points with the greatest p^T x + constant, in any order: NaN is never among them.");
}

}  // namespace lori
