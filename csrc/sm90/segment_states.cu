// segment_states: the states at the borders of a sequence's segments, from their maps one after the other, in float32.
//
//     forwards   S of segment 1 = N of 0, then S' = M S + N: where segments 1, 2, .. start
//     reverse    dS of the end of the last but one = N of the last, then dS' = M^T dS + N: what segments end in
//
// Grid: one CTA for kColumns value columns of a sequence and value head.
// Roles: none. In the products a thread has one channel of all columns and a quarter of the channels before; its own are
// two columns of the channel. Rows of M are copied two segments ahead.
// Shared memory (K 128): M 2 x 66 KB, S 4 KB, parts of the products 16 KB.
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
constexpr int kParts = 4;                       // of the channels before, in a product
constexpr int kOwnColumns = kColumns / kParts;  // of a thread
template <int kDimK>
constexpr int kThreads = kParts * kDimK;

template <int kDimK>
struct SharedStorage {
  // [channel before, channel after]; a row is longer, so that neighbouring threads may read along rows.
  alignas(128) float M[kStages][kDimK][kDimK + 4];
  float S[kDimK][kColumns];
  float parts[kParts][kDimK][kColumns];
  FullBarrier full[kStages];
};

// S = M S of the thread's own columns, or M^T S. By all threads; on return everybody has read M.
template <bool kReverse, int kDimK>
__device__ void multiply(float (&S)[kOwnColumns], SharedStorage<kDimK>& smem, int stage,
                         std::uint32_t parity) {
  int const channel = threadIdx.x % kDimK, part = threadIdx.x / kDimK;
  auto const& M = smem.M[stage];
  *reinterpret_cast<float2*>(&smem.S[channel][part * kOwnColumns]) = float2{S[0], S[1]};
  __syncthreads();
  smem.full[stage].wait(parity);
  float sums[kColumns] = {};
#pragma unroll 4
  for (int other = part * (kDimK / kParts); other < (part + 1) * (kDimK / kParts); other += 4) {
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
        sums[i] = fmaf(m[j], smem.S[other + j][i], sums[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kColumns; i += 4) {
    *reinterpret_cast<float4*>(&smem.parts[part][channel][i]) =
        float4{sums[i], sums[i + 1], sums[i + 2], sums[i + 3]};
  }
  __syncthreads();
  S[0] = S[1] = 0.f;
#pragma unroll
  for (int other = 0; other < kParts; ++other) {
    float2 const sum = *reinterpret_cast<float2 const*>(&smem.parts[other][channel][part * kOwnColumns]);
    S[0] += sum.x;
    S[1] += sum.y;
  }
}

template <int kDimK, bool kReverse>
__global__ void __launch_bounds__(kThreads<kDimK>)
    segment_states_kernel(__grid_constant__ SegmentStatesParams const params) {
  extern __shared__ __align__(128) std::uint8_t smem_bytes[];
  auto& smem = *reinterpret_cast<SharedStorage<kDimK>*>(smem_bytes);
  CallShape const& shape = params.shape;
  constexpr int kRowBytes = kDimK * sizeof(float);
  int const num_rows = params.num_segments - 1, channel = threadIdx.x % kDimK;
  int const sequence = blockIdx.x / shape.num_value_heads, value_head = blockIdx.x % shape.num_value_heads;
  int const gate_head = value_head / (shape.num_value_heads / shape.num_gate_heads);
  int const own_column = blockIdx.y * kColumns + threadIdx.x / kDimK * kOwnColumns;
  std::int64_t const first_row = static_cast<std::int64_t>(sequence) * num_rows;
  // Of a step: the row of N and of the states, and the segment whose M leads there.
  auto const row_of = [&](int step) { return kReverse ? num_rows - 1 - step : step; };
  auto const load = [&](int step) {
    FullBarrier& full = smem.full[step % kStages];
    int const segment = kReverse ? row_of(step) + 1 : row_of(step);
    std::int64_t const map = (first_row + segment) * shape.num_gate_heads + gate_head;
    if (threadIdx.x >= kDimK) {
      return;
    }
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

  if (threadIdx.x == 0) {
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
  float S[kOwnColumns] = {};
  for (int step = 0; step < num_rows; ++step) {
    float N[kOwnColumns];
#pragma unroll
    for (int i = 0; i < kOwnColumns; ++i) {
      N[i] = own_column + i < shape.dim_v ? params.N[place(step, own_column + i)] : 0.f;
    }
    if (step > 0) {
      multiply<kReverse>(S, smem, step % kStages, (step - 1) / kStages % 2);
      if (step + kStages < num_rows) {
        load(step + kStages);
      }
    }
#pragma unroll
    for (int i = 0; i < kOwnColumns; ++i) {
      S[i] += N[i];
      if (own_column + i < shape.dim_v) {
        params.states[place(step, own_column + i)] = S[i];
      }
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
  config.blockDim = dim3(kThreads<kDimK>);
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
