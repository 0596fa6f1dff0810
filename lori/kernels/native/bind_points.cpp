#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "bindings.h"
#include "bound.h"

namespace lori {
namespace {

constexpr int kDimensions = 96;  // known to the compiler, which unrolls the product
constexpr float kMaxQueryInteger = 32767;

// Points p: integers (G, kDimensions), and of each point its scale, -|p|^2 / 2, and its group.
struct Points {
  const int8_t* integers;
  const float* scales;
  const float* constants;
  const int32_t* groups;
  const bool* are_allowed;
  int64_t count;
};

struct Scored {
  float score;  // p^T x - |p|^2 / 2
  int64_t index;
  int32_t group;
};

// The points with the greatest scores: at most `max_count`, and at most `max_per_group` of a group.
class TopPoints {
 public:
  TopPoints(size_t max_count, size_t max_per_group) : max_count_(max_count), max_per_group_(max_per_group) {
    entries_.reserve(max_count);
  }

  // The score that a further point must exceed.
  float threshold() const { return threshold_; }

  void add(const Scored& candidate) {
    size_t num_of_group = 0;
    Scored* lowest_of_group = nullptr;
    for (Scored& entry : entries_) {
      if (entry.group != candidate.group) continue;
      num_of_group++;
      if (!lowest_of_group || entry.score < lowest_of_group->score) lowest_of_group = &entry;
    }
    if (num_of_group == max_per_group_) {
      if (candidate.score > lowest_of_group->score) *lowest_of_group = candidate;
    } else if (entries_.size() < max_count_) {
      entries_.push_back(candidate);
    } else {
      *lowest() = candidate;
    }
    if (entries_.size() == max_count_) threshold_ = lowest()->score;
  }

  std::vector<int64_t> indices() const {
    std::vector<int64_t> indices(entries_.size());
    std::transform(entries_.begin(), entries_.end(), indices.begin(), [](const Scored& entry) { return entry.index; });
    return indices;
  }

 private:
  std::vector<Scored>::iterator lowest() {
    return std::min_element(entries_.begin(), entries_.end(), [](const Scored& a, const Scored& b) { return a.score < b.score; });
  }

  size_t max_count_, max_per_group_;
  std::vector<Scored> entries_;
  float threshold_ = -std::numeric_limits<float>::infinity();
};

// Returns the indices of the allowed points nearest to the query, in any order: at most `max_per_group` of each group.
std::vector<int64_t> nearest(const Points& points, const float* query, size_t count, size_t max_per_group) {
  float greatest = std::numeric_limits<float>::min();
  for (int i = 0; i < kDimensions; i++) greatest = std::max(greatest, std::abs(query[i]));
  int16_t integers[kDimensions];
  for (int i = 0; i < kDimensions; i++) integers[i] = static_cast<int16_t>(std::lrint(query[i] / greatest * kMaxQueryInteger));
  const float query_scale = greatest / kMaxQueryInteger;
  TopPoints top(count, max_per_group);
  for (int64_t point = 0; point < points.count; point++) {
    int32_t sum = 0;  // at most 96 * 127 * 32767
    const int8_t* entries = points.integers + point * kDimensions;
    for (int i = 0; i < kDimensions; i++) sum += static_cast<int16_t>(entries[i]) * integers[i];
    const float score = query_scale * points.scales[point] * static_cast<float>(sum) + points.constants[point];
    if (score > top.threshold() && points.are_allowed[point]) top.add({score, point, points.groups[point]});
  }
  return top.indices();
}

NewArray<int64_t> nearest_array(const Array<int8_t, 2>& points, const Array<float, 1>& scales, const Array<float, 1>& constants,
                                const Array<int32_t, 1>& groups, const Array<bool, 1>& allowed, const Array<float, 1>& query,
                                int64_t count, int64_t max_per_group) {
  const size_t num_points = points.shape(0);
  if (points.shape(1) != kDimensions || query.shape(0) != kDimensions) throw nb::value_error("96 dimensions expected");
  if (scales.shape(0) != num_points || constants.shape(0) != num_points || groups.shape(0) != num_points ||
      allowed.shape(0) != num_points)
    throw nb::value_error("a scale, a constant and a group for each point expected, and whether it is allowed");
  if (count < 1 || max_per_group < 1) throw nb::value_error("counts of at least 1 expected");
  auto indices = std::make_unique<std::vector<int64_t>>();
  {
    const nb::gil_scoped_release release;
    const Points all{points.data(), scales.data(),  constants.data(),
                     groups.data(), allowed.data(), static_cast<int64_t>(num_points)};
    *indices = nearest(all, query.data(), std::min(static_cast<size_t>(count), num_points), static_cast<size_t>(max_per_group));
  }
  return new_array(std::move(indices));
}

}  // namespace

void bind_points(nb::module_& m) {
  m.def("nearest", &nearest_array, nb::arg("points"), nb::arg("scales"), nb::arg("constants"), nb::arg("groups"),
        nb::arg("allowed"), nb::arg("query"), nb::arg("count"), nb::arg("max_per_group"),
        "The indices, in any order, of the allowed points with the greatest scale * p^T x + constant, at most max_per_group of\n"
        "each group. None whose score is NaN.");
}

}  // namespace lori
