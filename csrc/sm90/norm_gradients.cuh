// The gradients of q and k through their L2 norms in `gradients`.
#pragma once

#include <cute/arch/cluster_sm90.hpp>
#include <type_traits>

#include "sm90/gradients_parts.cuh"
#include "sm90/pair_gradients.cuh"
#include "tile/convert.cuh"
#include "tile/mma.cuh"
#include "tile/pipeline.cuh"

namespace gdn2 {

// The products y.dy of a lane's tokens over its two channels, and their sums over the eight lanes that have
// the same tokens: transposed, times ones. Of bfloat16 packed; for float16, which has not the range, in
// float32, and then as sums of two.
template <class Element>
struct TokenDots {
  static constexpr bool kIsPacked = kHasFloatRange<Element>;
  using Term = __nv_bfloat16;

  std::conditional_t<kIsPacked, std::uint32_t, float2> products[kHalfGroups];  // of a group's two tokens
  float sums[kHalfGroups / 2];  // of a pair of groups: token `row` of the first one, or of the second

  // Of channel `half`, from the first on, and two tokens of group i.
  __device__ void add(int i, int half, std::uint32_t y, float const* dy) {
    if constexpr (kIsPacked) {
      std::uint32_t const dy2 = pack<Element>(dy[0], dy[1]);
      products[i] =
          half == 0 ? multiply_pairs<Element>(y, dy2) : multiply_add_pairs<Element>(y, dy2, products[i]);
    } else {
      float2 const y2 = unpack<Element>(y);
      products[i].x = half == 0 ? y2.x * dy[0] : products[i].x + y2.x * dy[0];
      products[i].y = half == 0 ? y2.y * dy[1] : products[i].y + y2.y * dy[1];
    }
  }

  // Over the lanes, when all of a pair of groups is there.
  __device__ void sum_pair(int pair, GradientsPlace const& place) {
    int const i = 2 * pair;
    float acc[4] = {};
    if constexpr (kIsPacked) {
      multiply_by_ones(acc, products[i], products[i + 1]);
    } else {
      std::uint32_t const first = high(products[i]), second = high(products[i + 1]);
      multiply_by_ones(acc, first, second);
      multiply_by_ones(acc, high(rest(products[i], first)), high(rest(products[i + 1], second)));
    }
    sums[pair] = place.quad % 2 == 0 ? acc[0] : acc[2];
  }
  // Of token `row` of group `quad`.
  __device__ float sum(GradientsPlace const& place) const {
    static_assert(kHalfGroups == 4);
    return place.quad / 2 == 0 ? sums[0] : sums[1];
  }

 private:
  __device__ static std::uint32_t high(float2 x) { return pack<Term>(x.x, x.y); }
  __device__ static float2 rest(float2 x, std::uint32_t high) {
    float2 const high2 = unpack<Term>(high);
    return {x.x - high2.x, x.y - high2.y};
  }
  __device__ static void multiply_by_ones(float (&acc)[4], std::uint32_t first, std::uint32_t second) {
    mma_16x8x8<Term>(acc, {transpose(first), transpose(second)}, kBfloat16Ones);
  }
};

// With n the norm of a row x, y = x/n and dy: dx = dy/n - y (y.dy/n), which is dy/n - x (x.dy/n) / n^2. What
// dq and dk are here is dy/n.
template <class Cfg>
struct NormGradients {
  using Element = typename Cfg::Element;

  GradientsStorage& smem;
  GradientsWork const& work;

  // Whether the tile of q has rows x and not y: scale goes to dP and to the states' share of dq anyway, and
  // 1/n with it. Not float16, which has not the range.
  static constexpr bool kRawQueries = Cfg::kNormalize && kHasFloatRange<Element>;

  // Whether rows are taken by products with a diagonal matrix of minus their factors, as sums of two. (What
  // is not finite in a row goes to that channel of the other tokens of its group.) Not float16.
  static constexpr bool kHasDiagonals = kHasFloatRange<Element>;

  // Before a barrier of the CTA, by a thread that loads nothing.
  __device__ static void expect_dots(GradientsStorage& smem) {
    if (threadIdx.x == kThreads - 1) {
      smem.dots_full.init(1);
      cutlass::arch::fence_barrier_init();
      smem.dots_full.arrive_and_expect_tx(sizeof(smem.scratch().other_dots));
    }
  }

  // The CTA is done with its slices: dots of the CTA of the other channels may come to where they were. After
  // a barrier, before which all of them were read; so there is nothing to fence, and a fence would wait for
  // all stores to memory.
  __device__ static void announce_dots(bool has_other) {
    if (has_other) {
      cute::cluster_arrive_relaxed();
    }
  }

  // The products of a token of the half over the warp's channels, of q and of k, for this CTA and the one of
  // the other channels.
  __device__ void store_dots(GradientsPlace const& place, int token, float2 dots) const {
    auto& scratch = smem.scratch();
    __syncwarp();  // of_warps: all lanes have read level2
    scratch.of_warps[place.thread / kWarpThreads].dots[token] = dots;
    if (work.has_other_box()) {
      cute::cluster_wait();  // see announce_dots
      store_remote(&scratch.other_dots[place.warp][kHalfTokens * place.half_of_chunk + token], dots,
                   smem.dots_full, work.box ^ 1);
    }
  }

  // Behind a barrier, in steps, between which something else hides what each waits for. First the sums of the
  // warp's rows over the channels of this CTA, a lane a token: of q and of k.
  __device__ float2 sum_dots(GradientsPlace const& place) const {
    auto const* const of_warps = &smem.scratch().of_warps[kWarpgroupWarps * place.half_of_chunk];
    return sum_over_warps([&](int warp) { return of_warps[warp].dots[place.lane]; });
  }

  // Then what times the warp's rows is taken: y.dy/n, or x.dy/n over n^2 where they are x.
  __device__ void make_factors(float2 sums, GradientsPlace const& place, bool has_other) const {
    auto& scratch = smem.scratch();
    if (has_other) {
      wait_to_read(smem.dots_full, 0);
      int const token = kHalfTokens * place.half_of_chunk + place.lane;
      float2 const other = sum_over_warps([&](int warp) { return scratch.other_dots[warp][token]; });
      sums = {sums.x + other.x, sums.y + other.y};
    }
    if constexpr (kRawQueries) {
      float const inverse = smem.inverse_norms[0][kHalfTokens * place.half_of_chunk + place.lane];
      sums.x *= inverse * inverse;
    }
    store_factors(sums, place);
  }

  // The warp's rows of q and k.
  struct Rows {
    GroupPair q[2], k[2];
  };
  __device__ Rows rows(GradientsPlace const& place) const {
    static_assert(kHalfGroups == 4);
    std::uint32_t const q = lane_address(place, smem.tokens().q), k = lane_address(place, smem.tokens().k);
    return {{{q, 0}, {q, 2}}, {{k, 0}, {k, 2}}};
  }

  __device__ void take_shares(Rows const& rows, HalfAccumulators& dq, HalfAccumulators& dk,
                              GradientsPlace const& place) const {
    auto const& of_warp = smem.scratch().norm_factors[warp_anew()];
    __syncwarp();
    if constexpr (kHasDiagonals) {
      int const entry = place.row / 2 == place.quad ? place.row : kGroup;
#pragma unroll
      for (int i = 0; i < kHalfGroups; ++i) {
        uint4 const x = of_warp.diagonal[i][entry];
        int const m = i % 2 * 2;
        std::uint32_t const q[2] = {rows.q[i / 2].pairs[m], rows.q[i / 2].pairs[m + 1]},
                            k[2] = {rows.k[i / 2].pairs[m], rows.k[i / 2].pairs[m + 1]};
        mma_16x8x8<Element>(group_of(dq, i), q, x.x);
        mma_16x8x8<Element>(group_of(dk, i), k, x.z);
        mma_16x8x8<Element>(group_of(dq, i), q, x.y);
        mma_16x8x8<Element>(group_of(dk, i), k, x.w);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kHalfGroups; ++i) {
        // Of two tokens: of q and of k, then of the next one.
        float4 const both = *reinterpret_cast<float4 const*>(&of_warp.factors[kGroup * i + 2 * place.quad]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int const n = 4 * i + 2 * half, in_pair = 2 * (i % 2) + half;
          float2 const q2 = unpack<Element>(rows.q[i / 2].pairs[in_pair]),
                       k2 = unpack<Element>(rows.k[i / 2].pairs[in_pair]);
          dq[n] -= q2.x * both.x;
          dq[n + 1] -= q2.y * both.z;
          dk[n] -= k2.x * both.y;
          dk[n + 1] -= k2.y * both.w;
        }
      }
    }
  }

 private:
  // of_warp(w): what a warp has of the lane's token.
  template <class F>
  __device__ static float2 sum_over_warps(F of_warp) {
    static_assert(kChannels / kWarpChannels == 4);
    float2 const a = of_warp(0), b = of_warp(1), c = of_warp(2), d = of_warp(3);
    return {(a.x + b.x) + (c.x + d.x), (a.y + b.y) + (c.y + d.y)};
  }

  __device__ void store_factors(float2 factors, GradientsPlace const& place) const {
    auto& of_warp = smem.scratch().norm_factors[warp_anew()];
    if constexpr (kHasDiagonals) {
      PairFactor<Element> const q(-factors.x), k(-factors.y);
      // Of two neighbours the half that the token has.
      std::uint32_t const own = place.lane % 2 == 0 ? 0x0000ffffu : 0xffff0000u;
      of_warp.diagonal[place.lane / kGroup][place.lane % kGroup] = {q.high & own, q.low & own, k.high & own,
                                                                    k.low & own};
      if (place.lane < kHalfGroups) {
        of_warp.diagonal[place.lane][kGroup] = uint4{};
      }
    } else {
      of_warp.factors[place.lane] = factors;
    }
  }
};

}  // namespace gdn2
