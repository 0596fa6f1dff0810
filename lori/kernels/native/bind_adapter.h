// The functions of the Python module that take an adapter whole.
#pragma once

#include <nanobind/nanobind.h>

namespace lori {

void bind_adapter(nanobind::module_& m);

}  // namespace lori
