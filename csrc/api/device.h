// What launches ask of the current device.
#pragma once

#include "api/cuda_error.h"

namespace gdn2 {

inline int num_multiprocessors() {
  int device = 0, count = 0;
  throw_on_error(cudaGetDevice(&device), "current device");
  throw_on_error(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
  return count;
}

}  // namespace gdn2
