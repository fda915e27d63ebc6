// A ring of shared-memory stages between a producer, which fills them by TMA, and consumers, which read them.
//
// full[stage] flips when every byte of the stage has arrived; empty[stage] flips when every consumer has let
// go of it. And what else is counted on such barriers.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/arch/cluster_sm90.hpp>

#include "tile/arch.cuh"

namespace gdn2 {

using FullBarrier = cutlass::arch::ClusterTransactionBarrier;
using EmptyBarrier = cutlass::arch::ClusterBarrier;

// A place in a ring of kStages: which stage comes next, and the parity of the visit to it.
template <int kStages>
struct RingPosition {
  int stage = 0;
  std::uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <int kStages>
struct RingBarriers {
  FullBarrier full[kStages];
  EmptyBarrier empty[kStages];

  // By one thread, before the block's first barrier; fence_barrier_init must follow. A stage that the copy
  // engine fills has one producer arrival, begin_fill; one that warps fill has one for each of them, publish.
  __device__ void init(int num_producer_arrivals, int num_consumer_arrivals) {
    for (int stage = 0; stage < kStages; ++stage) {
      full[stage].init(num_producer_arrivals);
      empty[stage].init(num_consumer_arrivals);
    }
  }

  // Producer: waits until the consumers are done with the stage's last content (a fresh ring passes at once),
  // then announces how many bytes will arrive.
  __device__ FullBarrier& begin_fill(RingPosition<kStages> at, std::uint32_t bytes) {
    empty[at.stage].wait(at.parity ^ 1);
    full[at.stage].arrive_and_expect_tx(bytes);
    return full[at.stage];
  }

  // Producing warps: waits until the stage may be written.
  __device__ void wait_empty(RingPosition<kStages> at) { empty[at.stage].wait(at.parity ^ 1); }

  // Producing warps: the warp's ordinary stores to the stage are done; and the next one comes.
  __device__ void publish_at(RingPosition<kStages> at) { arrive_once_a_warp(full[at.stage]); }
  __device__ void publish(RingPosition<kStages>& at) {
    publish_at(at);
    at.advance();
  }

  // Consumers: waits until the stage is full.
  __device__ void wait_full(RingPosition<kStages> at) { full[at.stage].wait(at.parity); }

  // Consuming warps: the warp reads the stage no more; and the next one comes.
  __device__ void release_at(RingPosition<kStages> at) { arrive_once_a_warp(empty[at.stage]); }
  __device__ void release(RingPosition<kStages>& at) {
    release_at(at);
    at.advance();
  }

  // The same where two CTAs fill both of their stages at once: both are told.
  __device__ void release_to_pair(RingPosition<kStages>& at) {
    __syncwarp();
    if (threadIdx.x % kWarpThreads < 2) {
      empty[at.stage].arrive(threadIdx.x % kWarpThreads);
    }
    at.advance();
  }

 private:
  __device__ static void arrive_once_a_warp(EmptyBarrier& barrier) {
    __syncwarp();  // orders the accesses of all lanes before the arrival of one
    if (threadIdx.x % kWarpThreads == 0) {
      barrier.arrive();
    }
  }
};

// Before ordinary reads of what has come: the compiler leaves them behind the wait.
__device__ inline void wait_to_read(FullBarrier& full, std::uint32_t parity) {
  full.wait(parity);
  asm volatile("" ::: "memory");
}

// x to the same place of CTA `rank` of the cluster, whose barrier there counts the bytes that have come.
__device__ inline void store_remote(float2* place, float2 x, FullBarrier& full, int rank) {
  std::uint32_t const address = cute::set_block_rank(cute::cast_smem_ptr_to_uint(place), rank),
                      barrier = cute::set_block_rank(cute::cast_smem_ptr_to_uint(&full), rank);
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];\n" ::"r"(address),
      "f"(x.x), "f"(x.y), "r"(barrier)
      : "memory");
}

}  // namespace gdn2
