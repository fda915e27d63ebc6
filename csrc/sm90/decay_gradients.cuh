// The gradient of the decay in `gradients`: sums over the chunk, and back through the decay gate.
#pragma once

#include "sm90/gate_tiles.cuh"
#include "sm90/gradients_parts.cuh"
#include "sm90/pair_gradients.cuh"
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
        int const n = 4 * i + 2 * half;
        dG[n] += other;
        dG[n + 1] += other;
        smem.dg_at(place.token(i, 0), ch) = dG[n];
        smem.dg_at(place.token(i, 1), ch) = dG[n + 1];
      }
    }
    if (Cfg::kFused && params.dA_log_of_slots != nullptr && params.gates.decay_gate == DecayGate::kSoftplus) {
      sum_decays();
    }
  }

  // dg from its tile, through the gate where there is one. A thread has four channels of every few tokens.
  __device__ void store() {
    Pieces const pieces(smem.scratch().raw_g, threadIdx.x);
    auto const store_plainly = [&] { for_each_piece(pieces, [](int, float4 dg) { return dg; }); };
    if constexpr (!Cfg::kFused) {
      store_plainly();
      return;
    }
    with_decay_function(params.gates, smem.gate.A_log, [&](auto decay) {
      if constexpr (!decay.kIsGate) {
        store_plainly();
      } else {
        float4 const bias = smem.gate.bias_of(pieces.channel);
        float dA_log = 0.f;
        float4 d_bias{};
        for_each_piece(pieces, [&](int i, float4 dg) -> float4 {
          float4 const g = pieces.read(i, params.gate_element);
          dg = {decay.backward(g.x, bias.x, dg.x, dA_log), decay.backward(g.y, bias.y, dg.y, dA_log),
                decay.backward(g.z, bias.z, dg.z, dA_log), decay.backward(g.w, bias.w, dg.w, dA_log)};
          d_bias = {d_bias.x + dg.x, d_bias.y + dg.y, d_bias.z + dg.z, d_bias.w + dg.w};
          return dg;
        });
        if (!decay.kSumsDecays && params.dA_log_of_slots != nullptr) {
          keep_sum(dA_log);
        }
        if (params.dA_log_of_slots != nullptr || params.d_dt_bias_of_slots != nullptr) {
          store_sums(pieces, decay, d_bias);
        }
      }
    });
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

  // A thread's share of what dA_log is made of, to the warp's.
  __device__ void keep_sum(float sum) {
#pragma unroll
    for (int lane = kWarpThreads / 2; lane > 0; lane /= 2) {
      sum += __shfl_xor_sync(0xffffffff, sum, lane);
    }
    if (threadIdx.x % kWarpThreads == 0) {
      smem.scratch().sums.dA_log[threadIdx.x / kWarpThreads] = sum;
    }
  }

  // The sum of dg * log2(alpha), where alpha still is. Of a decay without end the smallest number stands for
  // alpha: its dg is zero but for rounding.
  __device__ void sum_decays() {
    GradientsPlace const place;
    LaneReader const lane(smem);
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < 4 * kHalfGroups; ++n) {
      sum = fmaf(dG[n], log2_approx(fmaxf(lane.alpha(n / 4, n / 2 % 2, n % 2), kSmallest)), sum);
    }
    keep_sum(sum);
  }
  static constexpr float kSmallest = 1.17549435e-38f;

  // Sums over tokens: of d_dt_bias over a thread's, a warp's, and all.
  template <class Decay>
  __device__ void store_sums(Pieces const& pieces, Decay const& decay, float4 d_bias) {
    auto& of_warps = smem.scratch().sums;
    static_assert(kWarpThreads == 2 * Pieces::kPieces);  // two tokens a warp
    auto const both = [](float x) { return x + __shfl_xor_sync(0xffffffff, x, Pieces::kPieces); };
    // The lanes of a channel have the same.
    *reinterpret_cast<float4*>(&of_warps.d_dt_bias[threadIdx.x / kWarpThreads][pieces.channel]) = {
        both(d_bias.x), both(d_bias.y), both(d_bias.z), both(d_bias.w)};
    __syncthreads();
    if (int const channel = work.first_channel + threadIdx.x;
        params.d_dt_bias_of_slots != nullptr && threadIdx.x < kChannels && channel < params.shape.dim_k) {
      float sum = 0.f;
#pragma unroll
      for (auto const& of_warp : of_warps.d_dt_bias) {
        sum += of_warp[threadIdx.x];
      }
      params.d_dt_bias_of_slots[work.tile * params.shape.dim_k + channel] = sum;
    }
    if (params.dA_log_of_slots != nullptr && threadIdx.x == kThreads - 1) {
      float sum = 0.f;
#pragma unroll
      for (float const of_warp : of_warps.dA_log) {
        sum += of_warp;
      }
      params.dA_log_of_slots[work.tile * work.num_boxes + work.box] = decay.dA_log(sum);
    }
  }
};

}  // namespace gdn2
