// segment_states: the states at the borders of a sequence's segments, from their maps one after the other.
//
//     forwards   S of segment 1 = N of 0, then S' = M S + N: where segments 1, 2, .. start
//     reverse    dS of the end of the last but one = N of the last, then dS' = M^T dS + N: what segments end in
//
// M and S are sums of two bfloat16 in the products, and the product of the two smaller parts is left out:
// with what rounding them loses, 2^-15 of M S. What is added up is float32. Infinity becomes NaN.
//
// Grid: one CTA for kColumns value columns of a sequence and value head.
// Roles: one thread asks for M, two segments ahead. In the products a warp has 16 channels after, one of two
// halves of the channels before, and all columns; of the sums each of the two warps of the same channels has
// a half of the columns.
// Shared memory (K 128): two stages of M 128 KB, S 9 KB, sums of the other half 8 KB.
#include <cutlass/arch/barrier.h>

#include "api/sequence_split.h"
#include "tile/convert.cuh"
#include "tile/launch.h"
#include "tile/launch_order.cuh"
#include "tile/mma.cuh"
#include "tile/pipeline.cuh"
#include "tile/tma.cuh"

namespace gdn2 {
namespace {

constexpr int kColumns = 16, kColumnTile = 8;  // of a CTA, of a product
constexpr int kRows = 16;                      // channels after, of a warp's products
constexpr int kStep = 16;                      // channels before, of a product: four of a thread
constexpr int kStages = 2;

template <int kDimK_, bool kReverse_>
struct Config {
  static constexpr int kDimK = kDimK_;
  static constexpr bool kReverse = kReverse_;
  static constexpr int kRowWarps = kDimK / kRows, kWarps = 2 * kRowWarps;
  static constexpr int kSteps = kDimK / 2 / kStep;  // of a warp
};

template <class Cfg>
struct SharedStorage {
  alignas(16) float M[kStages][Cfg::kDimK * Cfg::kDimK];  // as place_in_map has it
  // Larger and smaller parts [column, channel]. A row is longer, so that the threads of a load have banks of
  // their own.
  alignas(16) __nv_bfloat16 S[2][kColumns][Cfg::kDimK + 16];
  float4 sums[Cfg::kWarps][kWarpThreads];
  FullBarrier full[kStages];
};

// Two neighbours as two pairs of bfloat16 whose sum they are, but for the last bits.
struct Parts {
  std::uint32_t larger, smaller;

  __device__ Parts(float x, float y) : larger(pack<__nv_bfloat16>(x, y)) {
    float2 const rounded = unpack<__nv_bfloat16>(larger);
    smaller = pack<__nv_bfloat16>(x - rounded.x, y - rounded.y);
  }
};

// A thread's part of the left operand, M or M^T: [step], as mma_16x8x16 wants it. The thread has two channels
// after, 2*(lane/4) of the warp's and the next, which are the rows lane/4 and lane/4 + 8 of the product; and
// of the 16 channels before of every step the four from 4*(lane%4), which are the product's steps in the
// order in which S is read.
template <class Cfg>
struct LeftOperand {
  std::uint32_t larger[Cfg::kSteps][4], smaller[Cfg::kSteps][4];

  __device__ LeftOperand(float const* M, int after, int before) {
#pragma unroll
    for (int step = 0; step < Cfg::kSteps; ++step) {
      float rows[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (Cfg::kReverse) {
          if (i < 2) {
            int const place = place_in_map(before + step * kStep, after + i, Cfg::kDimK);
            auto const x = *reinterpret_cast<float4 const*>(M + place);
            rows[i][0] = x.x, rows[i][1] = x.y, rows[i][2] = x.z, rows[i][3] = x.w;
          }
        } else {
          int const place = place_in_map(after, before + step * kStep + i, Cfg::kDimK);
          auto const x = *reinterpret_cast<float2 const*>(M + place);
          rows[0][i] = x.x, rows[1][i] = x.y;
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Parts const parts(rows[i % 2][i / 2 * 2], rows[i % 2][i / 2 * 2 + 1]);
        larger[step][i] = parts.larger;
        smaller[step][i] = parts.smaller;
      }
    }
  }
};

// sums = (M or M^T) S over the warp's half of the channels before, but for both smaller parts.
template <class Cfg>
__device__ void multiply(float (&sums)[kColumns / kColumnTile][4], LeftOperand<Cfg> const& left,
                         SharedStorage<Cfg> const& smem, int before) {
  int const column = lane_index() / 4;
#pragma unroll
  for (int tile = 0; tile < kColumns / kColumnTile; ++tile) {
    float large[4] = {}, small[2][4] = {};
#pragma unroll
    for (int step = 0; step < Cfg::kSteps; ++step) {
      auto const read = [&](int part) {
        return *reinterpret_cast<uint2 const*>(
            &smem.S[part][tile * kColumnTile + column][before + step * kStep]);
      };
      uint2 const larger = read(0), smaller = read(1);
      mma_16x8x16<__nv_bfloat16>(large, left.larger[step], larger.x, larger.y);
      mma_16x8x16<__nv_bfloat16>(small[0], left.larger[step], smaller.x, smaller.y);
      mma_16x8x16<__nv_bfloat16>(small[1], left.smaller[step], larger.x, larger.y);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[tile][i] = large[i] + (small[0][i] + small[1][i]);
    }
  }
}

template <class Cfg>
__global__ void __launch_bounds__(Cfg::kWarps* kWarpThreads)
    segment_states_kernel(__grid_constant__ SegmentStatesParams const params) {
  extern __shared__ std::uint8_t smem_bytes[];
  auto& smem = *reinterpret_cast<SharedStorage<Cfg>*>(smem_bytes);
  constexpr int kDimK = Cfg::kDimK;
  CallShape const& shape = params.shape;
  int const num_rows = params.num_segments - 1;
  int const sequence = blockIdx.x / shape.num_value_heads, value_head = blockIdx.x % shape.num_value_heads;
  int const gate_head = value_head / (shape.num_value_heads / shape.num_gate_heads);
  int const lane = lane_index(), warp = threadIdx.x / kWarpThreads;
  int const half = warp / Cfg::kRowWarps;
  int const before = half * (kDimK / 2) + lane % 4 * 4;  // and the next three, of the left operand
  int const channel = warp % Cfg::kRowWarps * kRows + lane / 4 * 2;  // and the next, of the sums
  int const column = half * kColumnTile + lane % 4 * 2;  // and the next, of the sums that the thread keeps
  int const value = blockIdx.y * kColumns + column;
  std::int64_t const first_row = static_cast<std::int64_t>(sequence) * num_rows;
  // Of a step: the row of N and of the states, and the map of the segment that leads there, by the first
  // thread.
  auto const row_of = [&](int step) { return Cfg::kReverse ? num_rows - 1 - step : step; };
  auto const load_map = [&](int step) {
    if (threadIdx.x != 0 || step >= num_rows) {
      return;
    }
    int const segment = Cfg::kReverse ? row_of(step) + 1 : row_of(step), stage = step % kStages;
    std::int64_t const first_map = static_cast<std::int64_t>(sequence) * (num_rows - 1);  // of segment 1
    std::int64_t const map = (first_map + segment - 1) * shape.num_gate_heads + gate_head;
    smem.full[stage].arrive_and_expect_tx(sizeof(smem.M[stage]));
    bulk_load(smem.M[stage], params.M + map * kDimK * kDimK, sizeof(smem.M[stage]), smem.full[stage]);
  };
  // Of the thread's two channels and column `value + i` of N and of the states.
  auto const place = [&](int step, int i) {
    return (((first_row + row_of(step)) * shape.num_value_heads + value_head) * shape.dim_v + value + i) *
               kDimK +
           channel;
  };
  auto const read_N = [&](float2(&N)[2], int step) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      N[i] = step < num_rows && value + i < shape.dim_v
                 ? *reinterpret_cast<float2 const*>(params.N + place(step, i))
                 : float2{0.f, 0.f};
    }
  };

  if (threadIdx.x == 0) {
    for (FullBarrier& full : smem.full) {
      full.init(1);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();             // the barriers are there
  let_next_kernel_start();     // what the walks touch before their wait is older than prepare
  wait_for_earlier_kernels();  // the maps
  for (int step = 1; step <= kStages; ++step) {
    load_map(step);
  }
  float2 N[2];
  read_N(N, 0);
  for (int step = 0; step < num_rows; ++step) {
    float2 S[2] = {N[0], N[1]};
    read_N(N, step + 1);
    if (step > 0) {
      int const stage = step % kStages;
      smem.full[stage].wait((step - 1) / kStages % 2);
      LeftOperand<Cfg> const left(smem.M[stage], channel, before);
      __syncthreads();  // S is there, and M has been read
      load_map(step + kStages);
      float sums[kColumns / kColumnTile][4];
      multiply(sums, left, smem, before);
      float4 const of_tile[2] = {{sums[0][0], sums[0][1], sums[0][2], sums[0][3]},
                                 {sums[1][0], sums[1][1], sums[1][2], sums[1][3]}};
      smem.sums[warp][lane] = half == 0 ? of_tile[1] : of_tile[0];
      __syncthreads();  // the sums are there, and S has been read by all
      float4 const own = half == 0 ? of_tile[0] : of_tile[1],
                   other = smem.sums[(warp + Cfg::kRowWarps) % Cfg::kWarps][lane];
      S[0].x += own.x + other.x, S[1].x += own.y + other.y;
      S[0].y += own.z + other.z, S[1].y += own.w + other.w;
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

template <class Cfg>
void launch(SegmentStatesParams const& params, cudaStream_t stream) {
  CallShape const& shape = params.shape;
  constexpr int kSmemBytes = sizeof(SharedStorage<Cfg>);
  static_assert(kSmemBytes <= 227 * 1024);
  launch_kernel<segment_states_kernel<Cfg>>(
      {.name = "segment_states",
       .grid = dim3(shape.num_sequences * shape.num_value_heads, (shape.dim_v + kColumns - 1) / kColumns),
       .num_threads = Cfg::kWarps * kWarpThreads,
       .shared_bytes = kSmemBytes,
       .stream = stream,
       .overlaps = true},
      params);
}

template <bool kReverse>
void dispatch(SegmentStatesParams const& params, cudaStream_t stream) {
  params.shape.dim_k > 64 ? launch<Config<128, kReverse>>(params, stream)
                          : launch<Config<64, kReverse>>(params, stream);
}

}  // namespace

void run_segment_states(SegmentStatesParams const& params, cudaStream_t stream) {
  params.reverse ? dispatch<true>(params, stream) : dispatch<false>(params, stream);
}

}  // namespace gdn2
