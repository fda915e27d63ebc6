// The gradient of the decay in `gradients`: sums over the chunk, and back through the decay gate.
#pragma once

#include "sm90/gate_tiles.cuh"
#include "sm90/gradients_parts.cuh"
#include "tile/convert.cuh"

namespace gdn2 {

template <class Cfg>
struct DecayGradients {
  GradientsStorage& smem;
  GradientsParams const& params;
  GradientsWork const& work;
  HalfAccumulators& dG;  // terms of the reads and pairs; those of the writes are in smem.dg_writes

  // dG becomes dg: summed from the end of the half, and over the other half.
  __device__ void finish() {
    GradientsPlace const place;
    float later[2] = {0.f, 0.f};
#pragma unroll
    for (int i = kHalfGroups - 1; i >= 0; --i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const n = 4 * i + 2 * half;
        float all;
        float const both = dG[n] + dG[n + 1];
        float const after = later[half] + exclusive_sum<false>(both, all);
        later[half] += all;
        dG[n] = after + both + smem.dg_writes[n][place.thread];
        dG[n + 1] = after + dG[n + 1] + smem.dg_writes[n + 1][place.thread];
      }
    }
    bool const first = place.half_of_chunk == 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!first && place.quad == 0) {
        smem.second_reads[place.channel(half)] = later[half];
      }
    }
    __syncthreads();  // also: dg_writes and the scratch stage are free
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const ch = place.channel(half);
      float const other = first ? smem.second_reads[ch] : smem.first_writes[ch];
#pragma unroll
      for (int i = 0; i < kHalfGroups; ++i) {
        smem.dg_at(place.token(i, 0), ch) = dG[4 * i + 2 * half] + other;
        smem.dg_at(place.token(i, 1), ch) = dG[4 * i + 2 * half + 1] + other;
      }
    }
  }

  // dg from its tile, through the gate where there is one: raw_gates are what the gate was given. A thread
  // has four channels of every few tokens.
  __device__ void store(GradientsStorage::Tokens& raw_gates) {
    Pieces const pieces(raw_gates.g, threadIdx.x);
    auto const store_plainly = [&] { for_each_piece(pieces, [](int, float4 dg) { return dg; }); };
    if constexpr (!Cfg::kFused) {
      store_plainly();
      return;
    }
    GateChannels const channels = smem.gate_channels(pieces.channel);
    float4 const bias4 = channels.bias_log2;
    float dA_log[4] = {}, d_bias[4] = {};
    with_decay_function(params.gates, channels.A_log, [&](auto decay) {
      if constexpr (!decay.kIsGate) {
        store_plainly();
      } else {
        for_each_piece(pieces, [&](int i, float4 dg) -> float4 {
          float4 const g = pieces.read(i, params.gate_element);
          dg = {decay.backward(g.x, bias4.x, dg.x, dA_log[0]), decay.backward(g.y, bias4.y, dg.y, dA_log[1]),
                decay.backward(g.z, bias4.z, dg.z, dA_log[2]), decay.backward(g.w, bias4.w, dg.w, dA_log[3])};
          d_bias[0] += dg.x;
          d_bias[1] += dg.y;
          d_bias[2] += dg.z;
          d_bias[3] += dg.w;
          return dg;
        });
#pragma unroll
        for (float& sum : dA_log) {
          sum = decay.dA_log(sum);
        }
      }
    });
    if (params.dA_log_of_slots != nullptr || params.d_dt_bias_of_slots != nullptr) {
      store_sums(pieces, dA_log, d_bias);
    }
  }

 private:
  using Element = typename Cfg::Element;
  using Pieces = GatePieces<Element, kChannels, kThreads>;

  // Stores function(i, dg) of the thread's pieces of dg, the i-th one of token first_row + i * kRows.
  template <class Function>
  __device__ void for_each_piece(Pieces const& pieces, Function function) {
    constexpr int kRows = Pieces::kRows;
    static_assert(kRows % 8 == 0);  // so that dg_at permutes them alike
    CallShape const& shape = params.shape;
    int const count = shape.dim_k - work.first_channel - pieces.channel;
    std::int64_t const row_stride = static_cast<std::int64_t>(shape.num_gate_heads) * shape.dim_k;
    std::int64_t at = (work.token(shape) + pieces.first_row) * row_stride +
                      static_cast<std::int64_t>(work.gate_head) * shape.dim_k + work.first_channel +
                      pieces.channel;
    float const* dg = &smem.dg_at(pieces.first_row, pieces.channel);
    int const num_pieces = (uniform(work.num_rows) - pieces.first_row + kRows - 1) / kRows;
#pragma unroll 1
    for (int i = 0; i < num_pieces; ++i, dg += kRows * kChannels, at += kRows * row_stride) {
      float4 const x = function(i, *reinterpret_cast<float4 const*>(dg));
      if (params.dg != nullptr) {
        store(at, x, count);
      }
    }
  }

  // Four neighbouring channels of dg, of which `count` or fewer exist.
  __device__ void store(std::int64_t at, float4 dg, int count) const {
    bool const aligned = params.shape.dim_k % 4 == 0;
    if (Cfg::kFused && params.gate_element != ElementType::kFloat32) {
      uint2 const pairs{pack<Element>(dg.x, dg.y), pack<Element>(dg.z, dg.w)};
      store_piece(static_cast<Element*>(params.dg) + at, pairs, count, aligned);
    } else {
      store_piece(static_cast<float*>(params.dg) + at, dg, count, aligned);
    }
  }

  // Sums over tokens: over a thread's, a warp's, and all; those of dA_log over channels too.
  __device__ void store_sums(Pieces const& pieces, float const (&dA_log)[4], float const (&d_bias)[4]) {
    auto* const of_warps = smem.scratch().sums;  // [warp][channel]: dA_log, d_dt_bias
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float2 sum{dA_log[c], d_bias[c]};
#pragma unroll
      for (int lane = Pieces::kPieces; lane < kWarpThreads; lane *= 2) {
        sum.x += __shfl_xor_sync(0xffffffff, sum.x, lane);
        sum.y += __shfl_xor_sync(0xffffffff, sum.y, lane);
      }
      of_warps[threadIdx.x / kWarpThreads][pieces.channel + c] = sum;  // the lanes of a channel have the same
    }
    __syncthreads();
    if (threadIdx.x >= kWarpThreads) {
      return;
    }
    float of_A_log = 0.f;
#pragma unroll 1
    for (int ch = threadIdx.x; ch < kChannels; ch += kWarpThreads) {
      float2 all{0.f, 0.f};
#pragma unroll
      for (int warp = 0; warp < kThreads / kWarpThreads; ++warp) {
        all = {all.x + of_warps[warp][ch].x, all.y + of_warps[warp][ch].y};
      }
      int const channel = work.first_channel + ch;
      if (channel < params.shape.dim_k) {
        of_A_log += all.x;
        if (params.d_dt_bias_of_slots != nullptr) {
          params.d_dt_bias_of_slots[work.tile * params.shape.dim_k + channel] = all.y;
        }
      }
    }
#pragma unroll
    for (int lane = kWarpThreads / 2; lane > 0; lane /= 2) {
      of_A_log += __shfl_xor_sync(0xffffffff, of_A_log, lane);
    }
    if (params.dA_log_of_slots != nullptr && threadIdx.x == 0) {
      params.dA_log_of_slots[work.tile * work.num_boxes + work.box] = of_A_log;
    }
  }
};

}  // namespace gdn2
