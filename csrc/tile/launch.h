// How kernels are launched.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "api/device.h"

namespace gdn2 {

struct Launch {
  char const* name;  // an error begins with it
  dim3 grid;
  unsigned num_threads;  // of a CTA
  int shared_bytes = 0;  // of dynamic shared memory
  cudaStream_t stream;
  dim3 cluster = {1, 1, 1};
  // It may begin before the kernel before it on the stream has ended (programmatic dependent launch): see
  // tile/launch_order.cuh.
  bool overlaps = false;
};

// The driver is asked for dynamic shared memory once a kernel and device.
template <auto kKernel>
void allow_shared_memory(Launch const& how) {
  static std::atomic<std::uint64_t> devices{0};
  std::uint64_t const device = std::uint64_t{1} << current_device() % 64;
  if ((devices.load(std::memory_order_relaxed) & device) == 0) {
    throw_on_error(
        cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared_bytes),
        how.name);
    devices.fetch_or(device, std::memory_order_relaxed);
  }
}

template <auto kKernel, class... Arguments>
void launch_kernel(Launch const& how, Arguments const&... arguments) {
  if (how.shared_bytes > 0) {
    allow_shared_memory<kKernel>(how);
  }
  cudaLaunchAttribute attributes[2];
  unsigned number = 0;
  if (how.cluster.x * how.cluster.y > 1) {
    attributes[number].id = cudaLaunchAttributeClusterDimension;
    attributes[number++].val.clusterDim = {how.cluster.x, how.cluster.y, 1};
  }
  if (how.overlaps) {
    attributes[number].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[number++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = dim3(how.num_threads);
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = how.stream;
  config.attrs = attributes;
  config.numAttrs = number;
  throw_on_error(cudaLaunchKernelEx(&config, kKernel, arguments...), how.name);
}

}  // namespace gdn2
