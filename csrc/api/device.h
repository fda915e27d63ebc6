// What launches ask of the current device, and of a stream.
#pragma once

#include <vector>

#include "api/cuda_error.h"

namespace gdn2 {

// What the schedule of a call is chosen by.
struct Gpu {
  int num_sms;
  int memory_bandwidth;  // GB/s, by the memory's clock and bus
};

inline int attribute(cudaDeviceAttr what, int device) {
  int value = 0;
  throw_on_error(cudaDeviceGetAttribute(&value, what, device), "attribute of a device");
  return value;
}

inline int current_device() {
  int device = 0;
  throw_on_error(cudaGetDevice(&device), "current device");
  return device;
}

// All are asked once: the driver takes its time for a clock.
inline Gpu gpu(int device) {
  static std::vector<Gpu> const gpus = [] {
    int count = 0;
    throw_on_error(cudaGetDeviceCount(&count), "number of devices");
    std::vector<Gpu> all;
    for (int i = 0; i < count; ++i) {
      std::int64_t const clock = attribute(cudaDevAttrMemoryClockRate, i);  // kHz, two transfers in each
      std::int64_t const bits = attribute(cudaDevAttrGlobalMemoryBusWidth, i);
      all.push_back({.num_sms = attribute(cudaDevAttrMultiProcessorCount, i),
                     .memory_bandwidth = static_cast<int>(clock * 2 * bits / 8 / 1'000'000)});
    }
    return all;
  }();
  return gpus.at(device);
}

inline bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  throw_on_error(cudaStreamIsCapturing(stream, &status), "capture of a stream");
  return status != cudaStreamCaptureStatusNone;
}

inline int num_multiprocessors() {
  return gpu(current_device()).num_sms;
}

}  // namespace gdn2
