// Flags in global memory by which a kernel tells another one, running beside it, that something has been
// written.
#pragma once

#include <cstdint>

#include "tile/arch.cuh"

namespace gdn2 {

// By all threads of a CTA, which meet before one of them lets the next kernel start: that one sees zeros.
__device__ inline void clear_flags(std::uint32_t* flags, int number) {
  for (int i = static_cast<int>(threadIdx.x); i < number; i += static_cast<int>(blockDim.x)) {
    flags[i] = 0;
  }
  __threadfence();
}

// What this thread has written or, by way of a barrier, has seen written comes before the flag.
__device__ inline void publish_ready(std::uint32_t* flag) {
  asm volatile("fence.acq_rel.gpu;\n\tst.release.gpu.global.u32 [%0], 1;\n" ::"l"(flag) : "memory");
}

// Returns when the flag is set. What was written before it may then be read, by this thread and by the copies
// it issues.
__device__ inline void wait_ready(std::uint32_t const* flag) {
  std::uint32_t ready;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(ready) : "l"(flag) : "memory");
  } while (ready == 0);
  asm volatile("fence.proxy.async.global;\n" ::: "memory");
}

}  // namespace gdn2
