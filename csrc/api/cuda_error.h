// Failed CUDA calls as C++ exceptions, which pybind11 hands to Python as RuntimeError.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace gdn2 {

// `what` says what was tried: "tile_product: launch".
inline void throw_on_error(cudaError_t status, char const* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + ": " +
                             cudaGetErrorString(status));
  }
}

}  // namespace gdn2
