#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "bindings.h"
#include "bound.h"

namespace lori {
namespace {

constexpr int kDimensions = 96;  // known to the compiler, which unrolls the product
constexpr float kMaxQueryInteger = 32767;

// Points p: integers (G, kDimensions), and of each point its scale and -|p|^2 / 2.
struct Points {
  const int8_t* integers;
  const float* scales;
  const float* constants;
  const bool* are_allowed;
  int64_t count;
};

using Scored = std::pair<float, int64_t>;

// Returns the indices of the allowed points nearest to the query, those with the greatest p^T x - |p|^2 / 2, in any order.
std::vector<int64_t> nearest(const Points& points, const float* query, size_t count) {
  float greatest = std::numeric_limits<float>::min();
  for (int i = 0; i < kDimensions; i++) greatest = std::max(greatest, std::abs(query[i]));
  int16_t integers[kDimensions];
  for (int i = 0; i < kDimensions; i++) integers[i] = static_cast<int16_t>(std::lrint(query[i] / greatest * kMaxQueryInteger));
  const float query_scale = greatest / kMaxQueryInteger;
  std::vector<Scored> best;  // a heap, the farthest on top
  best.reserve(count + 1);
  float least = -std::numeric_limits<float>::infinity();
  for (int64_t point = 0; point < points.count; point++) {
    int32_t sum = 0;  // at most 96 * 127 * 32767
    const int8_t* entries = points.integers + point * kDimensions;
    for (int i = 0; i < kDimensions; i++) sum += static_cast<int16_t>(entries[i]) * integers[i];
    const float score = query_scale * points.scales[point] * static_cast<float>(sum) + points.constants[point];
    if (!(score > least) || !points.are_allowed[point]) continue;
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
                                const Array<bool, 1>& allowed, const Array<float, 1>& query, int64_t count) {
  const size_t num_points = points.shape(0);
  if (points.shape(1) != kDimensions || query.shape(0) != kDimensions) throw nb::value_error("96 dimensions expected");
  if (scales.shape(0) != num_points || constants.shape(0) != num_points || allowed.shape(0) != num_points)
    throw nb::value_error("a scale and a constant for each point expected, and whether it is allowed");
  if (count < 1) throw nb::value_error("a count of at least 1 expected");
  auto indices = std::make_unique<std::vector<int64_t>>();
  {
    const nb::gil_scoped_release release;
    const Points all{points.data(), scales.data(), constants.data(), allowed.data(), static_cast<int64_t>(num_points)};
    *indices = nearest(all, query.data(), std::min(static_cast<size_t>(count), num_points));
  }
  return new_array(std::move(indices));
}

}  // namespace

void bind_points(nb::module_& m) {
  m.def("nearest", &nearest_array, nb::arg("points"), nb::arg("scales"), nb::arg("constants"), nb::arg("allowed"),
        nb::arg("query"), nb::arg("count"),
        "The indices, in any order, of the allowed points with the greatest scale * p^T x + constant. None whose score is NaN.");
}

}  // namespace lori
