// plan: where the packed sequences and their chunks lie, from offsets that stay on the device.
//
// Sequence n owns the chunk slots cu_seqlens[n] / 64 + n and following: disjoint without a prefix sum over
// lengths, at the cost of at most one empty slot a sequence. Offsets count up to the first that is out of
// order or out of range; sequences from there on are malformed: they own no slots.
//
// The order of the sequences: by numbers of chunks, longest first, as a counting sort; which of equally long
// ones comes first is left open, and no result depends on it.
//
// Grid: one CTA, a thread a sequence, then a thread a slot.
#include <cub/block/block_scan.cuh>

#include "api/chunk_forward.h"
#include "tile/arch.cuh"
#include "tile/launch.h"

namespace gdn2 {
namespace {

constexpr int kThreads = 1024;

// Sequences of one length share a place in the count: 0 is for the longest ones.
__device__ int length_class(int num_tokens) {
  int const chunks = (max(num_tokens, 0) + kChunk - 1) / kChunk;
  return kThreads - 1 - min(chunks, kThreads - 1);
}

// By all threads, once the spans are written.
__device__ void order_sequences(PlanParams const& params) {
  using Scan = cub::BlockScan<int, kThreads>;
  __shared__ typename Scan::TempStorage scan;
  __shared__ int next_place[kThreads];
  next_place[threadIdx.x] = 0;
  __syncthreads();
  for (int n = threadIdx.x; n < params.num_sequences; n += kThreads) {
    atomicAdd(&next_place[length_class(params.plan.spans[n].num_tokens)], 1);
  }
  __syncthreads();
  int place = next_place[threadIdx.x];
  Scan(scan).ExclusiveSum(place, place);
  next_place[threadIdx.x] = place;
  __syncthreads();
  for (int n = threadIdx.x; n < params.num_sequences; n += kThreads) {
    int const place = atomicAdd(&next_place[length_class(params.plan.spans[n].num_tokens)], 1);
    params.plan.sequences[place] = n;
  }
}

template <class Offset>
__global__ void __launch_bounds__(kThreads) plan_kernel(PlanParams const params) {
  auto const* const cu_seqlens = static_cast<Offset const*>(params.cu_seqlens);
  int const num_sequences = params.num_sequences;
  __shared__ int first_malformed;
  if (threadIdx.x == 0) {
    first_malformed = cu_seqlens[0] == 0 ? num_sequences : 0;
  }
  __syncthreads();
  for (int n = threadIdx.x; n < num_sequences; n += kThreads) {
    Offset const begin = cu_seqlens[n], end = cu_seqlens[n + 1];
    if (begin < 0 || end < begin || end > params.seqlen) {
      atomicMin(&first_malformed, n);
    }
  }
  __syncthreads();

  int const num_good = first_malformed;
  int const good_end = num_good == 0 ? 0 : static_cast<int>(cu_seqlens[num_good]);
  for (int n = threadIdx.x; n < num_sequences; n += kThreads) {
    SequenceSpan span{good_end, -1, 0};
    if (n < num_good) {
      int const begin = static_cast<int>(cu_seqlens[n]);
      span = {begin, static_cast<int>(cu_seqlens[n + 1]) - begin, begin / kChunk + n};
    }
    params.plan.spans[n] = span;  // read by the same thread
  }
  order_sequences(params);
  for (int slot = threadIdx.x; slot < params.num_slots; slot += kThreads) {
    // The last sequence whose first slot is not behind this one.
    int low = 0, high = num_good;
    while (low < high) {
      int const middle = (low + high) / 2;
      bool const behind = static_cast<int>(cu_seqlens[middle]) / kChunk + middle > slot;
      (behind ? high : low) = behind ? middle : middle + 1;
    }
    ChunkSlot at{0, 0};
    if (low > 0) {
      int const n = low - 1;
      int const begin = static_cast<int>(cu_seqlens[n]), end = static_cast<int>(cu_seqlens[n + 1]);
      int const first = begin + (slot - begin / kChunk - n) * kChunk;
      if (first < end) {
        at = {first, min(kChunk, end - first)};
      }
    }
    params.plan.slots[slot] = at;
  }
}

}  // namespace

void run_plan(PlanParams const& params, cudaStream_t stream) {
  Launch const how{.name = "plan", .grid = dim3(1), .num_threads = kThreads, .stream = stream};
  params.offsets_are_64_bit ? launch_kernel<plan_kernel<std::int64_t>>(how, params)
                            : launch_kernel<plan_kernel<std::int32_t>>(how, params);
}

}  // namespace gdn2
