// Included first by all device code: refuses architectures that silently lack Hopper's matrix instructions.
#pragma once

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "gdn2_ext needs the architecture 90a: plain sm_90 compiles, and silently contains no wgmma"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace gdn2 {

constexpr int kWarpThreads = 32;
constexpr int kWarpgroupThreads = 128;
constexpr int kWarpgroupWarps = kWarpgroupThreads / kWarpThreads;

// A value that all lanes of a warp have, known to ptxas as such: branches on it need no care for divergence.
__device__ inline int uniform(int x) {
  return __shfl_sync(0xffffffff, x, 0);
}

// threadIdx.x, asked for anew every time: what ptxas knows to be the same it keeps, with what follows from
// it, in registers that there may not be.
__device__ inline unsigned thread_anew() {
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

__device__ inline float sum_over_warp(float x) {
#pragma unroll
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(0xffffffff, x, distance);
  }
  return x;
}

// The index of this thread's warpgroup in the block, uniform.
__device__ inline int warpgroup_index() {
  return uniform(static_cast<int>(threadIdx.x / kWarpgroupThreads));
}

// One thread of a converged warp; the same one at every call.
__device__ inline bool elect_one() {
  std::uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

template <int kRegisters>
__device__ inline void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

}  // namespace gdn2
