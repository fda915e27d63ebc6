// The chunk forward and backward of plain tensors in one call of Python's each: a short call takes the GPU
// ten microseconds, and Python takes longer to look at shapes and to make tensors.
#pragma once

#include <pybind11/pybind11.h>

namespace gdn2 {

PyObject* chunk_forward_at_once(PyObject*, PyObject* const* arguments, Py_ssize_t number);
PyObject* chunk_backward_at_once(PyObject*, PyObject* const* arguments, Py_ssize_t number);

}  // namespace gdn2
