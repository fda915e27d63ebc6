// Flags in global memory by which a kernel tells another one, running beside it, that something has been
// written.
#pragma once

#include <cstdint>

#include "tile/arch.cuh"

namespace gdn2 {

// By all threads of a CTA, which meet before one of them lets the next kernel start: that one sees zeros.
__device__ inline void clear_flags(std::uint64_t* flags, int number) {
  for (int i = static_cast<int>(threadIdx.x); i < number; i += static_cast<int>(blockDim.x)) {
    flags[i] = 0;
  }
  __threadfence();
}

__device__ inline void store_release(std::uint32_t* flag, std::uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;\n" ::"l"(flag), "r"(value) : "memory");
}
__device__ inline void store_release(std::uint64_t* flag, std::uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;\n" ::"l"(flag), "l"(value) : "memory");
}
__device__ inline std::uint32_t load_acquire(std::uint32_t const* flag) {
  std::uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(value) : "l"(flag) : "memory");
  return value;
}
__device__ inline std::uint64_t load_acquire(std::uint64_t const* flag) {
  std::uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];\n" : "=l"(value) : "l"(flag) : "memory");
  return value;
}

// A flag is set where it has the value that the launch gives it. What this thread has written or, by way of a
// barrier, has seen written comes before.
template <class Flag>
__device__ void publish_ready(Flag* flag, Flag set) {
  asm volatile("fence.acq_rel.gpu;\n" ::: "memory");
  store_release(flag, set);
}

// Returns when the flag is set. What was written before it may then be read, by this thread and by the copies
// it issues.
template <class Flag>
__device__ void wait_ready(Flag const* flag, Flag set) {
  while (load_acquire(flag) != set) {
  }
  asm volatile("fence.proxy.async.global;\n" ::: "memory");
}

}  // namespace gdn2
