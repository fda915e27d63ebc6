// What Python calls for a decoding step.
#pragma once

#include <pybind11/pybind11.h>

namespace gdn2 {

void add_recurrent_forward(pybind11::module_& module);

}  // namespace gdn2
