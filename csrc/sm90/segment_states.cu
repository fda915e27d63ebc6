// segment_states: where the segments of a sequence start, from their maps one after the other: S' = M S + N, in float32.
//
// Grid: one CTA for kColumns value columns of a sequence and value head.
// Roles: none. A thread owns a channel of the columns; M comes by bulk copies, two segments ahead.
// Shared memory (K 128): M 2 x 64 KB, S 2 x 4 KB.
#include <cutlass/arch/barrier.h>

#include "api/cuda_error.h"
#include "api/sequence_split.h"
#include "tile/launch_order.cuh"
#include "tile/pipeline.cuh"
#include "tile/tma.cuh"

namespace gdn2 {
namespace {

constexpr int kColumns = 8;
constexpr int kStages = 2;

template <int kDimK>
struct SharedStorage {
  alignas(128) float M[kStages][kDimK][kDimK];  // [channel before, channel after]
  float S[2][kDimK][kColumns];                  // in turn: one barrier a segment orders writes and reads
  FullBarrier full[kStages];
};

// S = M S of the columns; one barrier a segment.
template <int kDimK>
__device__ void multiply(float (&S)[kColumns], SharedStorage<kDimK>& smem, int segment, int channel) {
  auto& state = smem.S[segment % 2];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    state[channel][i] = S[i];
    S[i] = 0.f;
  }
  __syncthreads();
  smem.full[segment % kStages].wait((segment - 1) / kStages % 2);
  auto const& M = smem.M[segment % kStages];
#pragma unroll 16
  for (int before = 0; before < kDimK; ++before) {
    float const m = M[before][channel];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      S[i] = fmaf(m, state[before][i], S[i]);
    }
  }
}

template <int kDimK>
__global__ void __launch_bounds__(kDimK)
    segment_states_kernel(__grid_constant__ SegmentStatesParams const params) {
  extern __shared__ __align__(128) std::uint8_t smem_bytes[];
  auto& smem = *reinterpret_cast<SharedStorage<kDimK>*>(smem_bytes);
  CallShape const& shape = params.shape;
  constexpr int kMapBytes = kDimK * kDimK * sizeof(float);
  int const num_maps = params.num_segments - 1, channel = threadIdx.x;
  int const sequence = blockIdx.x / shape.num_value_heads, value_head = blockIdx.x % shape.num_value_heads;
  int const gate_head = value_head / (shape.num_value_heads / shape.num_gate_heads);
  int const first_column = blockIdx.y * kColumns;
  std::int64_t const first_row = static_cast<std::int64_t>(sequence) * num_maps;
  auto const load = [&](int segment) {
    FullBarrier& full = smem.full[segment % kStages];
    full.arrive_and_expect_tx(kMapBytes);
    bulk_load(smem.M[segment % kStages],
              params.M + ((first_row + segment) * shape.num_gate_heads + gate_head) * kDimK * kDimK,
              kMapBytes, full);
  };
  // Of value column v of the maps and states of a segment, and this thread's channel.
  auto const place = [&](int segment, int v) {
    return (((first_row + segment) * shape.num_value_heads + value_head) * shape.dim_v + v) * kDimK + channel;
  };

  wait_for_earlier_kernels();  // segment_maps
  if (threadIdx.x == 0) {
    for (FullBarrier& full : smem.full) {
      full.init(1);
    }
    cutlass::arch::fence_barrier_init();
    for (int segment = 1; segment < min(1 + kStages, num_maps); ++segment) {
      load(segment);
    }
  }
  float S[kColumns] = {};
  for (int segment = 0; segment < num_maps; ++segment) {
    float N[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      N[i] = first_column + i < shape.dim_v ? params.N[place(segment, first_column + i)] : 0.f;
    }
    if (segment > 0) {  // the first one's N is its last state
      multiply(S, smem, segment, channel);
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      S[i] += N[i];
      if (first_column + i < shape.dim_v) {
        params.states[place(segment, first_column + i)] = S[i];
      }
    }
    if (segment > 0 && segment + kStages < num_maps) {
      __syncthreads();  // everybody has read the map
      if (threadIdx.x == 0) {
        load(segment + kStages);
      }
    }
  }
}

template <int kDimK>
void launch(SegmentStatesParams const& params, cudaStream_t stream) {
  CallShape const& shape = params.shape;
  auto const kernel = segment_states_kernel<kDimK>;
  constexpr int kSmemBytes = sizeof(SharedStorage<kDimK>);
  throw_on_error(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes),
                 "segment_states: shared memory");
  cudaLaunchAttribute overlap = overlapping_launch();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.num_sequences * shape.num_value_heads, (shape.dim_v + kColumns - 1) / kColumns);
  config.blockDim = dim3(kDimK);
  config.dynamicSmemBytes = kSmemBytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  throw_on_error(cudaLaunchKernelEx(&config, kernel, params), "segment_states: launch");
}

}  // namespace

void run_segment_states(SegmentStatesParams const& params, cudaStream_t stream) {
  params.shape.dim_k > 64 ? launch<128>(params, stream) : launch<64>(params, stream);
}

}  // namespace gdn2
