// segment_states: the states at the borders of a sequence's segments, from their maps one after the other.
//
//     forwards   S of segment 1 = N of 0, then S' = M S + N: where segments 1, 2, .. start
//     reverse    dS of the end of the last but one = N of the last, then dS' = M^T dS + N: what segments end in
//
// M and S are sums of two bfloat16 in the products, and the product of the two smaller parts is left out: 2^-15 of M S.
// What is added up is float32. Infinity becomes NaN.
//
// Grid: one CTA for kColumns value columns of a sequence and value head.
// Roles: none. In the products a warp has 16 channels after, one of two halves of the channels before, and all columns; of
// the sums each of the two warps of the same channels has a half of the columns. M comes straight to the registers of a
// product's left operand, a segment ahead: 128 registers (K 128).
// Shared memory (K 128): S 10 KB, sums of the other half 8 KB.
#include "api/cuda_error.h"
#include "api/sequence_split.h"
#include "tile/convert.cuh"
#include "tile/launch_order.cuh"
#include "tile/mma.cuh"

namespace gdn2 {
namespace {

constexpr int kColumns = 16, kColumnTile = 8;  // of a CTA, of a product
constexpr int kRows = 16;                      // channels after, of a warp's products
constexpr int kBlock = 32;                     // channels before, of two products: eight of a thread
template <int kDimK>
constexpr int kWarps = kDimK / kRows * 2;
template <int kDimK>
constexpr int kBlocks = kDimK / 2 / kBlock;  // of a warp

template <int kDimK>
struct SharedStorage {
  // Larger and smaller parts [column, channel]. A row is longer, so that eight threads of a load have all banks.
  alignas(16) __nv_bfloat16 S[2][kColumns][kDimK + 32];
  float4 sums[kWarps<kDimK>][kWarpThreads];
};

// Two neighbours as two pairs of bfloat16 whose sum they are, but for the last bits.
struct Parts {
  std::uint32_t larger, smaller;

  __device__ Parts(float x, float y) : larger(pack<__nv_bfloat16>(x, y)) {
    float2 const rounded = unpack<__nv_bfloat16>(larger);
    smaller = pack<__nv_bfloat16>(x - rounded.x, y - rounded.y);
  }
};

// A thread's part of M or M^T, for its two channels after: 2*(lane/4) of the warp's and the next, which are the rows lane/4
// and lane/4 + 8 of the products; and of every block of channels before for the eight from 8*(lane%4), which are the
// products' steps in the order in which the right operand is read.
template <int kDimK>
using MapRows = float[kBlocks<kDimK>][2][8];

// From the first channel before and after that the thread has.
template <bool kReverse, int kDimK>
__device__ void load(MapRows<kDimK>& rows, float const* M) {
#pragma unroll
  for (int block = 0; block < kBlocks<kDimK>; ++block) {
    if constexpr (kReverse) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
          float4 const x = *reinterpret_cast<float4 const*>(M + row * kDimK + block * kBlock + i);
          rows[block][row][i] = x.x, rows[block][row][i + 1] = x.y;
          rows[block][row][i + 2] = x.z, rows[block][row][i + 3] = x.w;
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float2 const x = *reinterpret_cast<float2 const*>(M + (block * kBlock + i) * kDimK);
        rows[block][0][i] = x.x, rows[block][1][i] = x.y;
      }
    }
  }
}

// A thread's part of the left operand: [block, step of 16 channels before], as mma_16x8x16 wants it.
template <int kDimK>
struct LeftOperand {
  std::uint32_t larger[kBlocks<kDimK>][2][4], smaller[kBlocks<kDimK>][2][4];

  __device__ explicit LeftOperand(MapRows<kDimK> const& rows) {
#pragma unroll
    for (int block = 0; block < kBlocks<kDimK>; ++block) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        int const step = i / 4, row = i % 2, first = 4 * step + i % 4 / 2 * 2;
        Parts const parts(rows[block][row][first], rows[block][row][first + 1]);
        larger[block][step][i % 4] = parts.larger;
        smaller[block][step][i % 4] = parts.smaller;
      }
    }
  }
};

// sums = (M or M^T) S over the warp's half of the channels before, but for both smaller parts.
template <int kDimK>
__device__ void multiply(float (&sums)[kColumns / kColumnTile][4], LeftOperand<kDimK> const& left,
                         SharedStorage<kDimK> const& smem, int first_before) {
  int const lane = lane_index(), column = lane / 4, before = first_before + lane % 4 * 8;
#pragma unroll
  for (int tile = 0; tile < kColumns / kColumnTile; ++tile) {
    float large[4] = {}, small[4] = {};
#pragma unroll
    for (int block = 0; block < kBlocks<kDimK>; ++block) {
      auto const read = [&](int part) {
        return *reinterpret_cast<uint4 const*>(
            &smem.S[part][tile * kColumnTile + column][before + block * kBlock]);
      };
      uint4 const larger = read(0), smaller = read(1);
      mma_16x8x16<__nv_bfloat16>(large, left.larger[block][0], larger.x, larger.y);
      mma_16x8x16<__nv_bfloat16>(small, left.larger[block][0], smaller.x, smaller.y);
      mma_16x8x16<__nv_bfloat16>(large, left.larger[block][1], larger.z, larger.w);
      mma_16x8x16<__nv_bfloat16>(small, left.smaller[block][0], larger.x, larger.y);
      mma_16x8x16<__nv_bfloat16>(small, left.larger[block][1], smaller.z, smaller.w);
      mma_16x8x16<__nv_bfloat16>(small, left.smaller[block][1], larger.z, larger.w);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[tile][i] = large[i] + small[i];
    }
  }
}

template <int kDimK, bool kReverse>
__global__ void __launch_bounds__(kWarps<kDimK>* kWarpThreads)
    segment_states_kernel(__grid_constant__ SegmentStatesParams const params) {
  __shared__ SharedStorage<kDimK> smem;
  constexpr int kRowWarps = kDimK / kRows;
  CallShape const& shape = params.shape;
  int const num_rows = params.num_segments - 1;
  int const sequence = blockIdx.x / shape.num_value_heads, value_head = blockIdx.x % shape.num_value_heads;
  int const gate_head = value_head / (shape.num_value_heads / shape.num_gate_heads);
  int const lane = lane_index(), warp = threadIdx.x / kWarpThreads;
  int const half = warp / kRowWarps, first_before = half * (kDimK / 2);
  int const channel = warp % kRowWarps * kRows + lane / 4 * 2;  // and the next, of the sums
  int const column = half * kColumnTile + lane % 4 * 2;  // and the next, of the sums that the thread keeps
  int const value = blockIdx.y * kColumns + column;
  std::int64_t const first_row = static_cast<std::int64_t>(sequence) * num_rows;
  // Of a step: the row of N and of the states, and the segment whose M leads there.
  auto const row_of = [&](int step) { return kReverse ? num_rows - 1 - step : step; };
  auto const map_of = [&](int step) {
    int const segment = kReverse ? row_of(step) + 1 : row_of(step), before = first_before + lane % 4 * 8;
    std::int64_t const map = (first_row + segment) * shape.num_gate_heads + gate_head;
    return params.M + map * kDimK * kDimK + (kReverse ? channel * kDimK + before : before * kDimK + channel);
  };
  // Of the thread's two channels and column `value + i` of N and of the states.
  auto const place = [&](int step, int i) {
    return (((first_row + row_of(step)) * shape.num_value_heads + value_head) * shape.dim_v + value + i) *
               kDimK +
           channel;
  };

  let_next_kernel_start();     // what the walks touch before their wait is older than prepare
  wait_for_earlier_kernels();  // the maps
  MapRows<kDimK> rows;
  if (num_rows > 1) {
    load<kReverse, kDimK>(rows, map_of(1));
  }
  for (int step = 0; step < num_rows; ++step) {
    float2 S[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      S[i] = value + i < shape.dim_v ? *reinterpret_cast<float2 const*>(params.N + place(step, i))
                                     : float2{0.f, 0.f};
    }
    if (step > 0) {
      LeftOperand<kDimK> const left(rows);
      if (step + 1 < num_rows) {
        load<kReverse, kDimK>(rows, map_of(step + 1));
      }
      __syncthreads();  // S is there
      float sums[kColumns / kColumnTile][4];
      multiply(sums, left, smem, first_before);
      float const(&others)[4] = sums[1 - half];
      smem.sums[warp][lane] = {others[0], others[1], others[2], others[3]};
      __syncthreads();
      float4 const other = smem.sums[(warp + kRowWarps) % kWarps<kDimK>][lane];
      float const(&own)[4] = sums[half];
      S[0].x += own[0] + other.x, S[1].x += own[1] + other.y;
      S[0].y += own[2] + other.z, S[1].y += own[3] + other.w;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (value + i < shape.dim_v) {
        *reinterpret_cast<float2*>(params.states + place(step, i)) = S[i];
      }
      Parts const parts(S[i].x, S[i].y);
      *reinterpret_cast<std::uint32_t*>(&smem.S[0][column + i][channel]) = parts.larger;
      *reinterpret_cast<std::uint32_t*>(&smem.S[1][column + i][channel]) = parts.smaller;
    }
  }
}

template <int kDimK, bool kReverse>
void launch(SegmentStatesParams const& params, cudaStream_t stream) {
  CallShape const& shape = params.shape;
  cudaLaunchAttribute overlap = overlapping_launch();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.num_sequences * shape.num_value_heads, (shape.dim_v + kColumns - 1) / kColumns);
  config.blockDim = dim3(kWarps<kDimK> * kWarpThreads);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  throw_on_error(cudaLaunchKernelEx(&config, segment_states_kernel<kDimK, kReverse>, params),
                 "segment_states: launch");
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
