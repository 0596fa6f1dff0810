#include <nanobind/stl/vector.h>

#include <memory>
#include <vector>

#include "bindings.h"
#include "bound.h"

namespace lori {
namespace {

// Gaussians as `lori.gaussians` describes them. The arrays are those of the caller, kept alive and read at each call.
class BoundGaussians {
 public:
  BoundGaussians(Array<float, 2> means, Array<int8_t, 3> axes, Array<float, 2> scales, Array<float, 1> variances,
                 Array<double, 1> log_determinants)
      : means_(means), axes_(axes), scales_(scales), variances_(variances), log_determinants_(log_determinants) {
    const size_t count = means.shape(0);
    if (axes.shape(0) != count || axes.shape(2) != means.shape(1) || scales.shape(0) != count ||
        scales.shape(1) != axes.shape(1) || variances.shape(0) != count || log_determinants.shape(0) != count)
      throw nb::value_error("the arrays do not have the shapes of the same Gaussians");
  }
  size_t count() const { return means_.shape(0); }
  size_t num_features() const { return means_.shape(1); }

  // `difference` has room for the features.
  double log_likelihood(size_t index, const double* z, float* difference) const {
    const size_t num_features = means_.shape(1), num_axes = axes_.shape(1);
    const float* mean = means_.data() + index * num_features;
    double distance = 0;
    for (size_t i = 0; i < num_features; i++) {
      const double entry = z[i] - mean[i];
      distance += entry * entry;
      difference[i] = static_cast<float>(entry);
    }
    const int8_t* axis = axes_.data() + index * num_axes * num_features;
    for (size_t i = 0; i < num_axes; i++, axis += num_features) {
      const double projection = dot(axis, difference, num_features) * scales_.data()[index * num_axes + i];
      distance -= projection * projection;
    }
    return -0.5 * (distance / variances_.data()[index] + log_determinants_.data()[index]);
  }

 private:
  static float dot(const int8_t* a, const float* b, size_t count) {
    constexpr size_t kLanes = 16;  // sums that the compiler may keep in vectors
    float sums[kLanes] = {}, sum = 0;
    size_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      for (size_t lane = 0; lane < kLanes; lane++) sums[lane] += static_cast<float>(a[i + lane]) * b[i + lane];
    for (; i < count; i++) sum += static_cast<float>(a[i]) * b[i];
    for (const float lane : sums) sum += lane;
    return sum;
  }

  Array<float, 2> means_;
  Array<int8_t, 3> axes_;
  Array<float, 2> scales_;
  Array<float, 1> variances_;
  Array<double, 1> log_determinants_;
};

NewArray<double> log_likelihoods(const std::vector<const BoundGaussians*>& gaussians, const std::vector<size_t>& indices,
                                 const Array<double, 1>& z) {
  if (gaussians.size() != indices.size()) throw nb::value_error("an index for each component expected");
  for (size_t i = 0; i < gaussians.size(); i++) {
    if (!gaussians[i] || indices[i] >= gaussians[i]->count()) throw nb::value_error("a component that does not exist");
    if (gaussians[i]->num_features() != z.shape(0)) throw nb::value_error("a component with another number of features");
  }
  auto result = std::make_unique<std::vector<double>>(gaussians.size());
  {
    const nb::gil_scoped_release release;
    std::vector<float> difference(z.shape(0));
    for (size_t i = 0; i < gaussians.size(); i++)
      (*result)[i] = gaussians[i]->log_likelihood(indices[i], z.data(), difference.data());
  }
  return new_array(std::move(result));
}

}  // namespace

void bind_gaussians(nb::module_& m) {
  nb::class_<BoundGaussians>(m, "Gaussians")
      .def(nb::init<Array<float, 2>, Array<int8_t, 3>, Array<float, 2>, Array<float, 1>, Array<double, 1>>(), nb::arg("means"),
           nb::arg("axes"), nb::arg("scales"), nb::arg("variances"), nb::arg("log_determinants"));
  m.def("log_likelihoods", &log_likelihoods, nb::arg("gaussians"), nb::arg("indices"), nb::arg("z"),
        "The log-likelihood of z under each component: the Gaussian of this index of these Gaussians.");
}

}  // namespace lori
