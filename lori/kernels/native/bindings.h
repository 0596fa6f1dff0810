// What each file of bindings adds to the module.
#pragma once

#include <nanobind/nanobind.h>

namespace lori {

void bind_adapter(nanobind::module_& m);  // what takes an adapter whole
void bind_gaussians(nanobind::module_& m);
void bind_layers(nanobind::module_& m);
void bind_points(nanobind::module_& m);
void bind_product(nanobind::module_& m);
void bind_stack(nanobind::module_& m);  // after those above

}  // namespace lori
