#pragma once

#include <pybind11/pybind11.h>

namespace pydefect {

void bind_metrics(pybind11::module_& module);

}  // namespace pydefect
