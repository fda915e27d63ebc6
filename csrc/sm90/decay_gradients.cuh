// The gradient of the decay in `gradients`: sums over the chunk, and back through the decay gate.
#pragma once

#include <cmath>
#include <type_traits>

#include "sm90/gates.cuh"
#include "sm90/gradients_parts.cuh"
#include "tile/convert.cuh"

namespace gdn2 {

// A thread's pieces of the tiles of dg and of g [64 tokens, 64 channels], float32 in two boxes of 32 channels
// or, g, 16-bit in one: the same four channels of every kRows-th token.
template <class Element>
struct GatePieces {
  static constexpr int kPieces = kBoxColumns / 4, kRows = kThreads / kPieces, kCount = kChunk / kRows;
  static_assert(kRows % 8 == 0);  // so that the pieces lie in the same place of their rows

  int first_row, channel;
  std::uint8_t const *wide, *narrow;  // of g: float32 and 16-bit
  std::uint8_t const* dg;

  __device__ GatePieces(GradientsStorage& smem, int thread) {
    int const piece = thread % kPieces;
    auto const& boxes = smem.scratch().raw_g.boxes;
    first_row = thread / kPieces;
    channel = 4 * piece;
    wide = boxes[piece / 8] + swizzled_offset(first_row, piece % 8);
    narrow = boxes[0] + swizzled_offset(first_row, piece / 2) + piece % 2 * 8;
    dg = smem.dg.boxes[piece / 8] + swizzled_offset(first_row, piece % 8);
  }

  // Of token first_row + i * kRows.
  __device__ float4 read_dg(int i) const {
    return *reinterpret_cast<float4 const*>(dg + i * kRows * kBoxRowBytes);
  }
  __device__ float4 read_g(int i, bool is_wide) const {
    if (is_wide) {
      return *reinterpret_cast<float4 const*>(wide + i * kRows * kBoxRowBytes);
    }
    return unpack<Element>(*reinterpret_cast<uint2 const*>(narrow + i * kRows * kBoxRowBytes));
  }
};

template <class Cfg>
struct DecayGradients {
  using Element = typename Cfg::Element;

  GradientsStorage& smem;
  GradientsParams const& params;
  HalfAccumulators& dG;  // terms of the reads and pairs; those of the writes are in smem.dg_writes

  // Sums dG from the end of the half; behind a barrier add_other_half makes dg of it, in its tile: float32
  // where it goes through a gate, and else as g is.
  __device__ void sum_half() {
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
  }

  __device__ void add_other_half(GradientsPlace const& place) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const ch = place.channel(half);
      float const other = place.half_of_chunk == 0 ? smem.second_reads[ch] : smem.first_writes[ch];
#pragma unroll
      for (int i = 0; i < kHalfGroups; ++i) {
        dG[4 * i + 2 * half] += other;
        dG[4 * i + 2 * half + 1] += other;
      }
    }
    if (!Cfg::kIsGated && !is_wide()) {
      store_tile<Element>(smem.dg.boxes[0], dG, place);
      return;
    }
#pragma unroll
    for (int n = 0; n < 4 * kHalfGroups; ++n) {
      smem.dg.at(place.token(n / 4, n % 2), place.channel(n / 2 % 2)) = dG[n];
    }
  }

  __device__ bool is_wide() const { return !Cfg::kAny || params.gate_element == ElementType::kFloat32; }
};

// What a thread's pieces of dg add to dA_log where some of g are infinite. Rarely called and never inlined:
// code that is not in the way.
template <class Cfg>
__device__ __noinline__ float finite_sum(GradientsStorage& smem, GradientsParams const& params,
                                         bool is_wide) {
  GatePieces<typename Cfg::Element> const pieces(smem, static_cast<int>(threadIdx.x));
  float4 const bias = smem.gate.biases_log2(pieces.channel);
  DecayFunction<typename Cfg::Element, Cfg::kGate> const decay(params.gates, smem.gate.A_log);
  float sum = 0.f;
#pragma unroll 1
  for (int i = 0; pieces.first_row + i * pieces.kRows < smem.work.num_rows; ++i) {
    float4 const g = pieces.read_g(i, is_wide), dg = pieces.read_dg(i);
    sum += decay.finite_term(g.x, bias.x, dg.x) + decay.finite_term(g.y, bias.y, dg.y) +
           decay.finite_term(g.z, bias.z, dg.z) + decay.finite_term(g.w, bias.w, dg.w);
  }
  return sum;
}

// dg from its tile through the gate, and what it adds to dA_log and d_dt_bias. What a thread needs for that it
// reads before the barrier that the tile is behind.
template <class Cfg>
struct GateGradients {
  using Element = typename Cfg::Element;
  using Pieces = GatePieces<Element>;

  GradientsStorage& smem;
  GradientsParams const& params;
  int thread;
  Pieces pieces;
  DecayFunction<Element, Cfg::kGate> decay;
  float4 bias;
  int num_rows, first_channel, row_stride;
  std::int64_t first, tile;  // where the thread's first piece of dg begins; work.tile
  float dA_log = 0.f;        // sums over the thread's pieces
  float4 d_bias{};

  __device__ GateGradients(GradientsStorage& smem_, GradientsParams const& params_, int thread_)
      : smem(smem_),
        params(params_),
        thread(thread_),
        pieces(smem_, thread_),
        decay(params_.gates, smem_.gate.A_log),
        bias(smem_.gate.biases_log2(pieces.channel)),
        num_rows(smem_.work.num_rows),
        first_channel(smem_.work.first_channel),
        row_stride(params_.shape.num_gate_heads * params_.shape.dim_k),
        first(smem_.work.first_dg + static_cast<std::int64_t>(pieces.first_row) * row_stride +
              pieces.channel),
        tile(smem_.work.tile) {}

  // Of a whole chunk, with has_whole_dg: nothing is asked for every piece, and all are read at once.
  // `meanwhile` comes before the sums.
  template <class Meanwhile>
  __device__ void store_whole(bool is_wide, Meanwhile meanwhile) {
    if (is_wide) {
      store_pieces<true>();
    } else {
      store_pieces<false>();
    }
    meanwhile();
    store_sums(is_wide);
  }

  // Of any other. Rarely called and never inlined.
  __device__ static __noinline__ void store_some(GradientsStorage& smem, GradientsParams const& params,
                                                 bool is_wide) {
    GateGradients gate(smem, params, static_cast<int>(threadIdx.x));
    CallShape const& shape = params.shape;
    int const count = shape.dim_k - gate.first_channel - gate.pieces.channel;
#pragma unroll 1
    for (int i = 0; gate.pieces.first_row + i * Pieces::kRows < gate.num_rows; ++i) {
      float4 const dg = gate.backward(gate.pieces.read_g(i, is_wide), gate.pieces.read_dg(i));
      if (params.dg != nullptr) {
        gate.store(i, is_wide, dg, count, shape.dim_k % 4 == 0);
      }
    }
    gate.store_sums(is_wide);
  }

 private:
  template <bool kWide>
  __device__ void store_pieces() {
    float4 dg[Pieces::kCount], g[Pieces::kCount];
#pragma unroll
    for (int i = 0; i < Pieces::kCount; ++i) {
      dg[i] = pieces.read_dg(i);
      g[i] = pieces.read_g(i, kWide);
    }
#pragma unroll
    for (int i = 0; i < Pieces::kCount; ++i) {
      store(i, kWide, backward(g[i], dg[i]), 4, true);
    }
  }

  __device__ float4 backward(float4 g, float4 dg) {
    dg = {decay.backward(g.x, bias.x, dg.x, dA_log), decay.backward(g.y, bias.y, dg.y, dA_log),
          decay.backward(g.z, bias.z, dg.z, dA_log), decay.backward(g.w, bias.w, dg.w, dA_log)};
    d_bias = {d_bias.x + dg.x, d_bias.y + dg.y, d_bias.z + dg.z, d_bias.w + dg.w};
    return dg;
  }

  // Of the i-th piece, four neighbouring channels of dg of which `count` or fewer exist.
  __device__ void store(int i, bool is_wide, float4 dg, int count, bool aligned) const {
    std::int64_t const at = first + static_cast<std::int64_t>(i * Pieces::kRows) * row_stride;
    if (is_wide) {
      store_piece(static_cast<float*>(params.dg) + at, dg, count, aligned);
    } else {
      uint2 const pairs{pack<Element>(dg.x, dg.y), pack<Element>(dg.z, dg.w)};
      store_piece(static_cast<Element*>(params.dg) + at, pairs, count, aligned);
    }
  }

  // Sums over tokens, of what every thread has of its own; those of dA_log over channels too.
  __device__ void store_sums(bool is_wide) {
    if (params.dA_log_of_slots == nullptr && params.d_dt_bias_of_slots == nullptr) {
      return;
    }
    if (!isfinite(dA_log)) {
      dA_log = finite_sum<Cfg>(smem, params, is_wide);
    }
    auto& of_threads = smem.scratch().sums;
    static_assert(sizeof(of_threads.d_dt_bias) == sizeof(float) * Pieces::kRows * kChannels);
    of_threads.dA_log[thread] = dA_log;
    *reinterpret_cast<float4*>(&of_threads.d_dt_bias[pieces.first_row][pieces.channel]) = d_bias;
    __syncthreads();
    auto const sum_of = [](auto part, auto count) {
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        sum += part(i);
      }
      return sum;
    };
    if (int const channel = first_channel + thread;
        params.d_dt_bias_of_slots != nullptr && thread < kChannels && channel < params.shape.dim_k) {
      params.d_dt_bias_of_slots[tile * params.shape.dim_k + channel] =
          sum_of([&](int i) { return of_threads.d_dt_bias[i][thread]; },
                 std::integral_constant<int, Pieces::kRows>{});
    }
    if (params.dA_log_of_slots != nullptr && thread >= kThreads - kWarpThreads) {
      int const lane = thread % kWarpThreads;
      float const sum =
          sum_over_warp(sum_of([&](int i) { return of_threads.dA_log[i * kWarpThreads + lane]; },
                               std::integral_constant<int, kThreads / kWarpThreads>{}));
      if (lane == 0) {
        params.dA_log_of_slots[tile * smem.work.num_boxes + smem.work.box] = decay.dA_log(sum);
      }
    }
  }
};

}  // namespace gdn2
