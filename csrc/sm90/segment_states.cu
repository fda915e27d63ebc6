// segment_states: the states at the borders of a sequence's segments, from their maps one after the other, in float32.
//
//     forwards   S of segment 1 = N of 0, then S' = M S + N: where segments 1, 2, .. start
//     reverse    dS of the end of the last but one = N of the last, then dS' = M^T dS + N: what segments end in
//
// Grid: one CTA for kColumns value columns of a sequence and value head.
// Roles: none. A thread owns a channel of the columns, and copies a row of M, two segments ahead.
// Shared memory (K 128): M 2 x 66 KB, S 2 x 4 KB.
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
  // [channel before, channel after]; a row is longer, so that neighbouring threads may read along rows.
  alignas(128) float M[kStages][kDimK][kDimK + 4];
  float S[2][kDimK][kColumns];  // in turn: one barrier a step orders writes and reads
  FullBarrier full[kStages];
};

// S = M S of the columns, or M^T S. By all threads, with one barrier.
template <bool kReverse, int kDimK>
__device__ void multiply(float (&S)[kColumns], float const (&M)[kDimK][kDimK + 4], FullBarrier& full,
                         std::uint32_t parity, float (&state)[kDimK][kColumns]) {
  int const channel = threadIdx.x;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    state[channel][i] = S[i];
    S[i] = 0.f;
  }
  __syncthreads();
  full.wait(parity);
#pragma unroll 4
  for (int other = 0; other < kDimK; other += 4) {
    float m[4];
    if constexpr (kReverse) {
      float4 const m4 = *reinterpret_cast<float4 const*>(&M[channel][other]);
      m[0] = m4.x, m[1] = m4.y, m[2] = m4.z, m[3] = m4.w;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        m[j] = M[other + j][channel];
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        S[i] = fmaf(m[j], state[other + j][i], S[i]);
      }
    }
  }
}

template <int kDimK, bool kReverse>
__global__ void __launch_bounds__(kDimK)
    segment_states_kernel(__grid_constant__ SegmentStatesParams const params) {
  extern __shared__ __align__(128) std::uint8_t smem_bytes[];
  auto& smem = *reinterpret_cast<SharedStorage<kDimK>*>(smem_bytes);
  CallShape const& shape = params.shape;
  constexpr int kRowBytes = kDimK * sizeof(float);
  int const num_rows = params.num_segments - 1, channel = threadIdx.x;
  int const sequence = blockIdx.x / shape.num_value_heads, value_head = blockIdx.x % shape.num_value_heads;
  int const gate_head = value_head / (shape.num_value_heads / shape.num_gate_heads);
  int const first_column = blockIdx.y * kColumns;
  std::int64_t const first_row = static_cast<std::int64_t>(sequence) * num_rows;
  // Of a step: the row of N and of the states, and the segment whose M leads there.
  auto const row_of = [&](int step) { return kReverse ? num_rows - 1 - step : step; };
  auto const load = [&](int step) {
    FullBarrier& full = smem.full[step % kStages];
    int const segment = kReverse ? row_of(step) + 1 : row_of(step);
    std::int64_t const map = (first_row + segment) * shape.num_gate_heads + gate_head;
    if (channel == 0) {
      full.arrive_and_expect_tx(kDimK * kRowBytes);
    }
    bulk_load(smem.M[step % kStages][channel], params.M + (map * kDimK + channel) * kDimK, kRowBytes, full);
  };
  // Of value column v of N and of the states, and this thread's channel.
  auto const place = [&](int step, int v) {
    return (((first_row + row_of(step)) * shape.num_value_heads + value_head) * shape.dim_v + v) * kDimK +
           channel;
  };

  if (channel == 0) {
    for (FullBarrier& full : smem.full) {
      full.init(1);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  wait_for_earlier_kernels();  // the maps
  for (int step = 1; step < min(1 + kStages, num_rows); ++step) {
    load(step);
  }
  float S[kColumns] = {};
  for (int step = 0; step < num_rows; ++step) {
    float N[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      N[i] = first_column + i < shape.dim_v ? params.N[place(step, first_column + i)] : 0.f;
    }
    int const stage = step % kStages;
    if (step > 0) {
      multiply<kReverse>(S, smem.M[stage], smem.full[stage], (step - 1) / kStages % 2, smem.S[step % 2]);
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      S[i] += N[i];
      if (first_column + i < shape.dim_v) {
        params.states[place(step, first_column + i)] = S[i];
      }
    }
    if (step > 0 && step + kStages < num_rows) {
      __syncthreads();  // everybody has read the map
      load(step + kStages);
    }
  }
}

template <int kDimK, bool kReverse>
void launch(SegmentStatesParams const& params, cudaStream_t stream) {
  CallShape const& shape = params.shape;
  auto const kernel = segment_states_kernel<kDimK, kReverse>;
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
  if (params.reverse) {
    params.shape.dim_k > 64 ? launch<128, true>(params, stream) : launch<64, true>(params, stream);
  } else {
    params.shape.dim_k > 64 ? launch<128, false>(params, stream) : launch<64, false>(params, stream);
  }
}

}  // namespace gdn2
