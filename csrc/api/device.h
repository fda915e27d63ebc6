// What launches ask of the current device.
#pragma once

#include "api/cuda_error.h"

namespace gdn2 {

inline int current_device() {
  int device = 0;
  throw_on_error(cudaGetDevice(&device), "current device");
  return device;
}

inline int num_multiprocessors(int device) {
  int count = 0;
  throw_on_error(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
  return count;
}

inline int num_multiprocessors() {
  return num_multiprocessors(current_device());
}

}  // namespace gdn2
