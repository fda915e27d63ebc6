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
  static constexpr int kPieces = kBoxColumns / 4, kRows = kThreads / kPieces;
  static_assert(kRows % 8 == 0);  // so that the pieces lie in the same place of their rows

  int first_row, channel, num_pieces;  // of the chunk's own rows
  std::uint8_t const *wide, *narrow;   // of g: float32 and 16-bit
  std::uint8_t const* dg;

  // By some threads of a warp, or all.
  __device__ explicit GatePieces(GradientsStorage& smem) {
    int const thread = static_cast<int>(threadIdx.x), piece = thread % kPieces;
    auto const& boxes = smem.scratch().raw_g.boxes;
    first_row = thread / kPieces;
    channel = 4 * piece;
    num_pieces = (smem.work.num_rows - first_row + kRows - 1) / kRows;
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

// What a thread's pieces of dg add to dA_log, where the quick sum is not exact. Rarely called and never
// inlined: code that is not in the way.
template <class Cfg>
__device__ __noinline__ float exact_sum(GradientsStorage& smem, GradientsParams const& params) {
  GatePieces<typename Cfg::Element> const pieces(smem);
  float4 const bias = smem.gate.biases_log2(pieces.channel);
  DecayFunction<typename Cfg::Element, Cfg::kGate> const decay(params.gates, smem.gate.A_log);
  float sum = 0.f;
#pragma unroll 1
  for (int i = 0; i < pieces.num_pieces; ++i) {
    float4 const g = pieces.read_g(i, params.gate_element == ElementType::kFloat32), dg = pieces.read_dg(i);
    sum += decay.exact_term(g.x, bias.x, dg.x) + decay.exact_term(g.y, bias.y, dg.y) +
           decay.exact_term(g.z, bias.z, dg.z) + decay.exact_term(g.w, bias.w, dg.w);
  }
  return sum;
}

template <class Cfg>
struct DecayGradients {
  using Element = typename Cfg::Element;
  using Pieces = GatePieces<Element>;

  GradientsStorage& smem;
  GradientsParams const& params;
  GradientsWork const& work;
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

  __device__ void add_other_half() {
    GradientsPlace const place;
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
      store_tile<Element>(smem.dg.boxes[0], dG);
      return;
    }
#pragma unroll
    for (int n = 0; n < 4 * kHalfGroups; ++n) {
      smem.dg.at(place.token(n / 4, n % 2), place.channel(n / 2 % 2)) = dG[n];
    }
  }

  __device__ bool is_wide() const { return !Cfg::kAny || params.gate_element == ElementType::kFloat32; }

  // dg from its tile, through the gate.
  __device__ void store(Pieces const& pieces) {
    static_assert(Cfg::kIsGated);
    CallShape const& shape = params.shape;
    bool const has_whole_pieces =
        params.dg != nullptr && shape.dim_k % 4 == 0 && shape.dim_k - work.first_channel >= kChannels;
    if (!has_whole_pieces) {
      store_pieces<false>(pieces, is_wide());
    } else if (is_wide()) {
      store_pieces<true>(pieces, std::true_type{});
    } else {
      store_pieces<true>(pieces, std::false_type{});
    }
  }

 private:
  // kWhole: dg is asked for, and all pieces are whole; is_wide, whether g and dg are float32, is a constant
  // then. So nothing is asked for every piece.
  template <bool kWhole, class Bool>
  __device__ void store_pieces(Pieces const& pieces, Bool is_wide) {
    DecayFunction<Element, Cfg::kGate> const decay(params.gates, smem.gate.A_log);
    float4 bias = smem.gate.biases_log2(pieces.channel), d_bias{};
    bias = {decay.shifted(bias.x), decay.shifted(bias.y), decay.shifted(bias.z), decay.shifted(bias.w)};
    typename DecayFunction<Element, Cfg::kGate>::Sum dA_log;
    for_each_piece<kWhole>(pieces, is_wide, [&](int i, float4 dg) -> float4 {
      float4 const g = pieces.read_g(i, is_wide);
      dg = {decay.backward(g.x, bias.x, dg.x, dA_log), decay.backward(g.y, bias.y, dg.y, dA_log),
            decay.backward(g.z, bias.z, dg.z, dA_log), decay.backward(g.w, bias.w, dg.w, dA_log)};
      d_bias = {d_bias.x + dg.x, d_bias.y + dg.y, d_bias.z + dg.z, d_bias.w + dg.w};
      return dg;
    });
    if (params.dA_log_of_slots != nullptr || params.d_dt_bias_of_slots != nullptr) {
      if (!dA_log.is_exact()) {
        dA_log.all = exact_sum<Cfg>(smem, params);
      }
      store_sums(pieces, decay, dA_log.all, d_bias);
    }
  }

  // Stores function(i, dg) of the thread's pieces of dg, the i-th one of token first_row + i * kRows.
  template <bool kWhole, class Bool, class Function>
  __device__ void for_each_piece(Pieces const& pieces, Bool is_wide, Function function) {
    CallShape const& shape = params.shape;
    int const count = shape.dim_k - work.first_channel - pieces.channel;
    int const row_stride = shape.num_gate_heads * shape.dim_k;
    std::int64_t const step = static_cast<std::int64_t>(Pieces::kRows) * row_stride;
    std::int64_t at =
        work.first_dg + static_cast<std::int64_t>(pieces.first_row) * row_stride + pieces.channel;
#pragma unroll 1
    for (int i = 0; i < pieces.num_pieces; ++i, at += step) {
      float4 const x = function(i, pieces.read_dg(i));
      if (kWhole || params.dg != nullptr) {
        store(at, is_wide, x, kWhole ? 4 : count, kWhole || shape.dim_k % 4 == 0);
      }
    }
  }

  // Four neighbouring channels of dg, of which `count` or fewer exist.
  __device__ void store(std::int64_t at, bool is_wide, float4 dg, int count, bool aligned) const {
    if (is_wide) {
      store_piece(static_cast<float*>(params.dg) + at, dg, count, aligned);
    } else {
      uint2 const pairs{pack<Element>(dg.x, dg.y), pack<Element>(dg.z, dg.w)};
      store_piece(static_cast<Element*>(params.dg) + at, pairs, count, aligned);
    }
  }

  // Sums over tokens, of what every thread has of its own; those of dA_log over channels too.
  template <class Decay>
  __device__ void store_sums(Pieces const& pieces, Decay const& decay, float dA_log, float4 d_bias) {
    auto& of_threads = smem.scratch().sums;
    static_assert(sizeof(of_threads.d_dt_bias) == sizeof(float) * Pieces::kRows * kChannels);
    of_threads.dA_log[threadIdx.x] = dA_log;
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
    if (int const channel = work.first_channel + threadIdx.x;
        params.d_dt_bias_of_slots != nullptr && threadIdx.x < kChannels && channel < params.shape.dim_k) {
      params.d_dt_bias_of_slots[work.tile * params.shape.dim_k + channel] =
          sum_of([&](int i) { return of_threads.d_dt_bias[i][threadIdx.x]; },
                 std::integral_constant<int, Pieces::kRows>{});
    }
    if (params.dA_log_of_slots != nullptr && threadIdx.x >= kThreads - kWarpThreads) {
      int const lane = static_cast<int>(threadIdx.x % kWarpThreads);
      float const sum =
          sum_over_warp(sum_of([&](int i) { return of_threads.dA_log[i * kWarpThreads + lane]; },
                               std::integral_constant<int, kThreads / kWarpThreads>{}));
      if (lane == 0) {
        params.dA_log_of_slots[work.tile * work.num_boxes + work.box] = decay.dA_log(sum);
      }
    }
  }
};

}  // namespace gdn2
