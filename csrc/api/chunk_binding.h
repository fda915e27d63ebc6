// What Python calls for the chunk forward and backward.
#pragma once

#include <pybind11/pybind11.h>

namespace gdn2 {

void add_chunk_functions(pybind11::module_& module);

}  // namespace gdn2
