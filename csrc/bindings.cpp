// gdn2_ext._C. Nothing here knows torch, so that the module works with every version of it: tensors come
// through DLPack's C interface, or as addresses, shapes and strides (api/python_tensors.h).
#include <cuda_runtime_api.h>
#include <cutlass/version.h>
#include <pybind11/pybind11.h>

#include <string>

#include "api/chunk_binding.h"
#include "api/recurrent_binding.h"
#include "api/tile_product.h"

namespace py = pybind11;
using namespace pybind11::literals;

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Kernels of gdn2_ext for sm_90a. Internal: call the functions of gdn2_ext.";
  m.attr("arch") = "sm_90a";
  m.attr("cuda_runtime_version") = CUDART_VERSION;
  m.attr("cutlass_version") = std::to_string(CUTLASS_MAJOR) + "." + std::to_string(CUTLASS_MINOR) + "." +
                              std::to_string(CUTLASS_PATCH);

  m.def("tile_product", &gdn2::tile_product, "a"_a, "b"_a, "c"_a, "rows"_a, "depth"_a, "b_is_mn_major"_a,
        "stream"_a, py::call_guard<py::gil_scoped_release>(),
        R"(C = A B, or C = A B^T, on the current device.

a             address of A [rows, depth] bf16
b             address of B bf16: [depth, 128] where b_is_mn_major (C = A B), else [128, depth] (C = A B^T)
c             address of C [rows, 128] float32, written
rows, depth   multiples of 64
stream        cudaStream_t as an integer

Tensors are row-major and contiguous, addresses aligned to 16 bytes. ValueError names a bad argument,
RuntimeError the CUDA error of a failed launch.)");

  gdn2::add_chunk_functions(m);
  gdn2::add_recurrent_forward(m);
}
