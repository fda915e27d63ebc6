// The gradients of q, k and b in `gradients`, before and after the pair products.
#pragma once

#include <cute/arch/cluster_sm90.hpp>
#include <type_traits>

#include "sm90/gates.cuh"
#include "sm90/gradients_parts.cuh"
#include "sm90/pair_gradients.cuh"
#include "tile/activation.cuh"
#include "tile/convert.cuh"
#include "tile/mma.cuh"

namespace gdn2 {

// What comes before and after the pair products, for one warp's 16 channels x 32 tokens.
template <class Cfg>
struct Channels {
  using Element = typename Cfg::Element;

  GradientsStorage& smem;
  GradientsParams const& params;
  GradientsWork const& work;
  // [16 channels, tokens]; start as dO S^T, dX S^T and R dS'^T transposed. The tiles have -dT and -E, and dE
  // is -dE: no sign has to be made.
  HalfAccumulators &dq, &dE, &dk;
  HalfAccumulators& dG;

  // Whether db finds the slope of b's sigmoid in the tile of b, which then holds sides, or makes the sigmoid
  // anew: float16 has not their range.
  static constexpr bool kKeepsSides = Cfg::kSigmoid && std::is_same_v<Element, __nv_bfloat16>;

  // Whether the tile of q has scale*q, where it is divided by its norm anyway. dP goes without scale then,
  // and dq until what the norm takes is taken from it. Not float16, which has not the range for any scale.
  static constexpr bool kScalesQueries = Cfg::kNormalize && std::is_same_v<Element, __nv_bfloat16>;

  // Of two neighbours x: sigmoid(x); and their sides, the smaller ones of sigmoid(x) and sigmoid(-x),
  // negative where it is the latter. The slope is side * (1 - side), near 0 and 1 to the precision of a side.
  __device__ static void sigmoid_and_side(std::uint32_t x, std::uint32_t& sigmoid, std::uint32_t& side) {
    float2 const x2 = unpack<Element>(x), e{exp2_approx(-kLog2E * x2.x), exp2_approx(-kLog2E * x2.y)},
                 s{reciprocal_approx(1.f + e.x), reciprocal_approx(1.f + e.y)};
    constexpr float kSmallest = 0x1p-120f;  // zero would have no sign
    std::uint32_t const is_negative = sign_masks(x);
    sigmoid = pack<Element>(s.x, s.y);
    side = (sigmoid & is_negative) |
           (pack<Element>(fmaf(-e.x, s.x, -kSmallest), fmaf(-e.y, s.y, -kSmallest)) & ~is_negative);
  }

  // A warp's pieces of q, k and b: a token a lane, its warp's channels.
  struct TokenPieces {
    uint4 q[2], k[2], b[2];
  };
  __device__ uint4& piece(std::uint8_t* tile, int token, int warp, int i) const {
    return *reinterpret_cast<uint4*>(tile + swizzled_offset(token, 2 * warp + i));
  }

  // q, k and -E = -b*k, through the sigmoid of b, to the scratch tile, as the products read them: normalised.
  __device__ void prepare_tiles(TokenPieces& x, int t, int warp) {
    auto& tokens = smem.tokens();
    auto& scratch = smem.scratch();
    PairFactor<Element> of_q{}, of_k{};
    if constexpr (Cfg::kNormalize) {
      of_q = PairFactor<Element>((kScalesQueries ? params.scale : 1.f) * smem.inverse_norms[0][t]);
      of_k = PairFactor<Element>(smem.inverse_norms[1][t]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (Cfg::kNormalize) {
        piece(tokens.q, t, warp, i) = multiply_pairs(x.q[i], of_q);
        piece(tokens.k, t, warp, i) = x.k[i] = multiply_pairs(x.k[i], of_k);
      }
      uint4& b = x.b[i];
      if constexpr (kKeepsSides) {
        uint4 sides;
        sigmoid_and_side(b.x, b.x, sides.x);
        sigmoid_and_side(b.y, b.y, sides.y);
        sigmoid_and_side(b.z, b.z, sides.z);
        sigmoid_and_side(b.w, b.w, sides.w);
        piece(tokens.b, t, warp, i) = sides;
        std::uint32_t const scales = pack<Element>(-params.gates.erase_scale, -params.gates.erase_scale);
        b = multiply_pairs<Element>(b, uint4{scales, scales, scales, scales});
      } else if constexpr (Cfg::kSigmoid) {
        b = negative_pairs(
            uint4{activate_erase<Element>(params.gates, b.x), activate_erase<Element>(params.gates, b.y),
                  activate_erase<Element>(params.gates, b.z), activate_erase<Element>(params.gates, b.w)});
      } else {
        b = negative_pairs(b);
      }
      piece(scratch.E, t, warp, i) = multiply_pairs<Element>(b, x.k[i]);
    }
  }

  // g of a group's tokens and the lane's two channels, as it came: `channel` and the one eight before or
  // behind it in a warp's 16.
  __device__ void read_g(float (&g)[2][kGroup], int first_token, int channel) const {
    auto const read = [&](auto value) {
      GateLane<decltype(value)> const lane(smem.tokens().g, first_token, channel);
#pragma unroll
      for (int t = 0; t < kGroup; ++t) {
        g[0][t] = static_cast<float>(lane.at(0, t, 0));
        g[1][t] = static_cast<float>(lane.at(0, t, 1));
      }
    };
    if (!Cfg::kAny || params.gate_element == ElementType::kFloat32) {
      read(float{});
    } else {
      read(Element{});
    }
  }

  // What the pair products read, of the tokens that have come: q, k and E; the decays inside groups, a warp a
  // group and a lane two channels of it, and over them. Both warpgroups read all decays: ends with the CTA's
  // barrier.
  __device__ void prepare_tokens() {
    auto& tokens = smem.tokens();
    auto& scratch = smem.scratch();
    GradientsPlace const place;
    int const group = place.thread / kWarpThreads, own_rows = uniform(smem.work.num_rows);
    // Which of a lane's two channels, eight apart, comes first alternates, so that a warp reads g from all
    // banks.
    int const of_lane = place.lane / 8, first_half = (of_lane ^ of_lane / 2) & 1;
    int const halves[2] = {first_half, first_half ^ 1};
    int const first_channel = kWarpChannels * of_lane + place.lane % 8;
    int const channels[2] = {first_channel + 8 * halves[0], first_channel + 8 * halves[1]};
    int const first_thread = kWarpThreads * of_lane + 4 * (place.lane % 8);
    auto const store = [&](float (&of_threads)[kWarpgroupThreads], float x0, float x1, float x2, float x3) {
      *reinterpret_cast<float4*>(&of_threads[first_thread]) = {x0, x1, x2, x3};
    };
    auto const level2 = [&](int half) -> float2& {
      auto& of_warp = scratch.of_warps[kWarpgroupWarps * (group / kHalfGroups) + of_lane];
      return *reinterpret_cast<float2*>(
          &of_warp.level2[2 * (group % kHalfGroups) + half][2 * (place.lane % 8)]);
    };
    // All is read before anything is written, or each read would wait for a write; and what waits for special
    // functions is in one run of instructions.
    float x[2][kGroup];
    read_g(x, kGroup * group, channels[0]);
    int const t = kHalfTokens * place.half_of_chunk + place.lane;
    TokenPieces pieces{};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (Cfg::kNormalize) {
        pieces.q[i] = piece(tokens.q, t, place.warp, i);
      }
      pieces.k[i] = piece(tokens.k, t, place.warp, i);
      pieces.b[i] = piece(tokens.b, t, place.warp, i);
    }
    DecayFunction<Element, Cfg::kGate> const decay(params.gates, Cfg::kIsGated ? smem.gate.A_log : 0.f);
    float bias[2] = {0.f, 0.f};
    if constexpr (Cfg::kIsGated) {
      bias[0] = kLog2E * smem.gate.bias[channels[0]];
      bias[1] = kLog2E * smem.gate.bias[channels[1]];
    }
    prepare_tiles(pieces, t, place.warp);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        x[i][j] = decay.activation(x[i][j], bias[i]);
      }
    }
    float alpha[2][kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      alpha[0][j] = decay.alpha(x[0][j]);
      alpha[1][j] = decay.alpha(x[1][j]);
    }
    if (own_rows < kChunk) {  // rows that are not the chunk's own, whatever lies there
      if (t >= own_rows) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          piece(tokens.q, t, place.warp, i) = piece(tokens.k, t, place.warp, i) =
              piece(scratch.E, t, place.warp, i) = uint4{};
        }
      }
      int const rows_of_group = own_rows - kGroup * group;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (j >= rows_of_group) {
          x[0][j] = x[1][j] = 0.f;
          alpha[0][j] = alpha[1][j] = 1.f;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float const(&a)[kGroup] = alpha[i];
      int const row = 2 * group + halves[i];
      float const a34 = a[3] * a[4], a56 = a[5] * a[6];
      float const F1 = a[1] * a[2], F2 = F1 * a34, F3 = F2 * a56;
      float const B2 = a[6] * a[7], B1 = a[4] * a[5] * B2, B0 = a[2] * a[3] * B1;
      store(smem.alpha1[row], a[1], a[3], a[5], a[7]);
      store(smem.level4[row], a[2] * a34, a[4], 1.f, a56);
      store(scratch.F[row], 1.f, F1, F2, F3);
      store(scratch.B[row], B0, B1, B2, 1.f);
      level2(halves[i]) = {a[2], a[6]};
      scratch.groups[group][channels[i]] = {a[0], F3 * a[7]};
    }
    __syncthreads();  // and all of g has been read
    if constexpr (Cfg::kIsGated) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float const(&y)[kGroup] = x[i];
        store(smem.tokens().activations[0][2 * group + halves[i]], y[0], y[2], y[4], y[6]);
        store(smem.tokens().activations[1][2 * group + halves[i]], y[1], y[3], y[5], y[7]);
      }
    }
    make_places();
    __syncthreads();
  }

  // The decays over groups of those inside them. A thread a channel and direction. All is read before
  // anything is written, or each read would wait for a write.
  __device__ void make_places() {
    auto& scratch = smem.scratch();
    int const ch = threadIdx.x % kChannels;
    bool const forwards = threadIdx.x < kChannels;
    if (forwards || threadIdx.x >= kThreads - kChannels) {
      GroupDecay groups[kGroups];
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        groups[j] = scratch.groups[j][ch];
      }
      float product = 1.f;
      if (forwards) {
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
          product *= groups[j].first;
          scratch.places[j][ch].before = product;
          product *= groups[j].rest;
        }
      } else {
#pragma unroll
        for (int j = kGroups - 1; j >= 0; --j) {
          scratch.places[j][ch].after = product;
          product *= groups[j].first * groups[j].rest;
        }
      }
    }
  }

  // Of group i; `written` gets its writes to S'. The chunk's last write goes through no decay: it would be
  // taken from itself, and leave its rounding where all others are small.
  __device__ void finish_group(PairGradients<Element>& pairs, int i, float (&written)[2]) {
    int const last = pairs.num_rows - 1 - pairs.place.token(0, 0);  // from the lane's first token on
    GroupTokens const q(pairs.q_lane, i), k(pairs.k_lane, i), E(pairs.E_lane, i);
    float const alpha1[2] = {pairs.alpha1(i, 0), pairs.alpha1(i, 1)};
    float const scale = kScalesQueries ? 1.f : params.scale;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const n = 4 * i + 2 * half;
      float2 const q2 = unpack<Element>(q.pairs[half]), k2 = unpack<Element>(k.pairs[half]),
                   E2 = unpack<Element>(E.pairs[half]);
      GroupPlace const group = pairs.group_place(i, half);
      float const gamma0 = group.before * pairs.F(i, half), gamma1 = gamma0 * alpha1[half];
      float const tail1 = group.after * pairs.B(i, half), tail0 = tail1 * alpha1[half];
      dq[n] *= scale * gamma0;
      dq[n + 1] *= scale * gamma1;
      dE[n] *= gamma0;
      dE[n + 1] *= gamma1;
      dk[n] *= tail0;
      dk[n + 1] *= tail1;
      dG[n] = q2.x * dq[n] + E2.x * dE[n];
      dG[n + 1] = q2.y * dq[n + 1] + E2.y * dE[n + 1];
      if (last != kGroup * i) {
        dG[n] -= k2.x * dk[n];
        written[half] += k2.x * dk[n];
      }
      if (last != kGroup * i + 1) {
        dG[n + 1] -= k2.y * dk[n + 1];
        written[half] += k2.y * dk[n + 1];
      }
    }
    pairs.inner_pairs(i, alpha1, q, k, E);
  }

  // The products with S and dS' become their shares of dq, dE and dk, and of dG, which is summed from the
  // end: reads of S by tokens r >= i, the state that is carried through, and all writes to S' of the half
  // less those by tokens s >= i. Group by group, with the pairs inside it, which have the same q, k and E.
  // Groups without tokens among others have zeros for them: one run of instructions for all.
  __device__ void finish_state_products(PairGradients<Element>& pairs) {
    GradientsPlace const& place = pairs.place;
    float written[2] = {0.f, 0.f};
#pragma unroll
    for (float& x : dG) {
      x = 0.f;
    }
    if (!pairs.has_no_tokens(0)) {
#pragma unroll
      for (int i = 0; i < kHalfGroups; ++i) {
        finish_group(pairs, i, written);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      constexpr int kLast = kHalfGroups - 1;
      float at_end = sum_over_quad(written[half]);
      if (place.half_of_chunk == 1) {
        float const gamma_last = pairs.group_place(kLast, half).before * pairs.group_decay(kLast, half).rest;
        at_end += gamma_last * smem.scratch().S_dS[place.channel(half)];
      } else if (place.quad == 0) {
        smem.scratch().first_writes[place.channel(half)] = at_end;
      }
      if (place.quad == 3) {
        dG[4 * kLast + 2 * half + 1] += at_end;
      }
    }
  }

  // One instruction, where of a condition ptxas makes two.
  __device__ static float one_if_negative(float x) {
    float y;
    asm("set.lt.f32.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
    return y;
  }

  // dE becomes db, and dk takes its share; through the sigmoid of b where there is one. k and b: two tokens.
  __device__ void finish_erase(int n, float2 k, float2 b) {
    float2 slope{1.f, 1.f};
    if constexpr (kKeepsSides) {
      float2 const side{fabsf(b.x), fabsf(b.y)};
      slope = {fmaf(-side.x, side.x, side.x), fmaf(-side.y, side.y, side.y)};
      b = {b.x + one_if_negative(b.x), b.y + one_if_negative(b.y)};
    } else if constexpr (Cfg::kSigmoid) {
      b = sigmoid(b);
      slope = {fmaf(-b.x, b.x, b.x), fmaf(-b.y, b.y, b.y)};
    }
    dk[n] -= b.x * dE[n];
    dk[n + 1] -= b.y * dE[n + 1];
    dE[n] *= -k.x * slope.x;
    dE[n + 1] *= -k.y * slope.y;
  }

  // For all tokens, from the last groups to the first, `between` two of them: what has nothing to do with it,
  // and hides what it waits for. Where there are norms, dq and dk over those of their rows, and the products
  // of these with the normalised rows, which go to both CTAs of the rows and arrive during something else.
  //
  // What rows that are not the chunk's own make of their b, whatever lies there, stays in them.
  template <class Between>
  __device__ void finish_erase_and_dots(Between between) {
    auto& tokens = smem.tokens();
    GradientsPlace const place;
    if (Cfg::kSigmoid && params.gates.erase_scale != 1.f) {
#pragma unroll
      for (float& x : dE) {
        x *= params.gates.erase_scale;
      }
    }
    auto const* const inverse_norms =
        reinterpret_cast<float2 const*>(&smem.inverse_norms[0][place.token(0, 0)]);
    float dots[2][2 * kHalfGroups];  // [of q, of k][2*i + c]
#pragma unroll
    for (int pair = kHalfGroups / 2 - 1; pair >= 0; --pair) {
      between(pair, place);
      GroupPair const k(lane_address(place, tokens.k), 2 * pair), b(lane_address(place, tokens.b), 2 * pair);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        int const i = 2 * pair + m / 2, half = m % 2, n = 4 * i + 2 * half;
        float2 const k2 = unpack<Element>(k.pairs[m]);
        finish_erase(n, k2, unpack<Element>(b.pairs[m]));
        if constexpr (Cfg::kNormalize) {
          divide_and_multiply(&dots[1][2 * i], half, k2, &dk[n], inverse_norms[kChunk / 2 + i * kGroup / 2]);
        }
      }
      if constexpr (Cfg::kNormalize) {
        GroupPair const q(lane_address(place, tokens.q), 2 * pair);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          int const i = 2 * pair + m / 2, half = m % 2;
          divide_and_multiply(&dots[0][2 * i], half, unpack<Element>(q.pairs[m]), &dq[4 * i + 2 * half],
                              inverse_norms[i * kGroup / 2]);
        }
      }
    }
    if constexpr (Cfg::kNormalize) {
      // Over the lanes that have the same tokens. A lane stores those of one: of row `row` of group `quad`.
      float const of_q = sum_over_rows(dots[0], place), of_k = sum_over_rows(dots[1], place);
      store_dots(place, kGroup * place.quad + place.row, {of_q, of_k});
    }
  }

  // Of two tokens: dy over the norms of their rows, and its products with the rows y, over the lane's
  // channels: `half` 0 begins the sums.
  __device__ static void divide_and_multiply(float* sums, int half, float2 y, float* dy,
                                             float2 inverse_norms) {
    dy[0] *= inverse_norms.x;
    dy[1] *= inverse_norms.y;
    sums[0] = half == 0 ? y.x * dy[0] : sums[0] + y.x * dy[0];
    sums[1] = half == 0 ? y.y * dy[1] : sums[1] + y.y * dy[1];
  }

  // of_warp(w): what a warp has of the lane's token.
  template <class F>
  __device__ static float2 sum_over_warps(F of_warp) {
    static_assert(kChannels / kWarpChannels == 4);
    float2 const a = of_warp(0), b = of_warp(1), c = of_warp(2), d = of_warp(3);
    return {(a.x + b.x) + (c.x + d.x), (a.y + b.y) + (c.y + d.y)};
  }

  // The CTA is done with its slices: dots of the CTA of the other channels may come to where they were. After
  // a barrier, before which all of them were read; so there is nothing to fence, and a fence would wait for
  // all stores to memory.
  __device__ static void announce_dots(bool has_other) {
    if (has_other) {
      cute::cluster_arrive_relaxed();
    }
  }

  // Of token `row` of group `quad`, the sum of x[2*group + c] over the eight lanes that have it: transposed,
  // times ones. Rounded to bfloat16, which has the range; for float16 to a sum of two.
  __device__ static float sum_over_rows(float const (&x)[2 * kHalfGroups], GradientsPlace const& place) {
    using Term = __nv_bfloat16;
    constexpr int kTerms = std::is_same_v<Element, __half> ? 2 : 1;
    constexpr std::uint32_t kOnes = 0x3f803f80;
    float sums[kHalfGroups];
#pragma unroll
    for (int i = 0; i < kHalfGroups; i += 2) {
      float2 low{x[2 * i], x[2 * i + 1]}, high{x[2 * i + 2], x[2 * i + 3]};
      float acc[4] = {};
#pragma unroll
      for (int term = 0; term < kTerms; ++term) {
        std::uint32_t const of_low = pack<Term>(low.x, low.y), of_high = pack<Term>(high.x, high.y);
        mma_16x8x8<Term>(acc, {transpose(of_low), transpose(of_high)}, kOnes);
        float2 const low_term = unpack<Term>(of_low), high_term = unpack<Term>(of_high);
        low = {low.x - low_term.x, low.y - low_term.y};
        high = {high.x - high_term.x, high.y - high_term.y};
      }
      sums[i] = acc[0];
      sums[i + 1] = acc[2];
    }
    float const low = place.quad % 2 == 0 ? sums[0] : sums[1], high = place.quad % 2 == 0 ? sums[2] : sums[3];
    return place.quad / 2 == 0 ? low : high;
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

  // Through the norms, behind a barrier: with y the normalised row and n its norm, dx = dy/n - y (y.dy/n). In
  // steps, between which something else hides what each waits for. First the sums of the warp's rows over
  // the channels of this CTA, a lane a token: of q and of k.
  __device__ float2 sum_dots(GradientsPlace const& place) const {
    auto const* const of_warps = &smem.scratch().of_warps[kWarpgroupWarps * place.half_of_chunk];
    return sum_over_warps([&](int warp) { return of_warps[warp].dots[place.lane]; });
  }

  static constexpr float kSmallestScale = 0x1p-120f;  // of which there is 1 / scale

  // The factors of the warp's rows.
  __device__ void make_norm_factors(float2 sums, GradientsPlace const& place, bool has_other) {
    auto& scratch = smem.scratch();
    if (has_other) {
      wait_to_read(smem.dots_full, 0);
      int const token = kHalfTokens * place.half_of_chunk + place.lane;
      float2 const other = sum_over_warps([&](int warp) { return scratch.other_dots[warp][token]; });
      sums = {sums.x + other.x, sums.y + other.y};
    }
    if constexpr (kScalesQueries) {  // the rows have it, and what is taken has it once
      sums.x *= fabsf(params.scale) > kSmallestScale ? 1.f / params.scale : 0.f;
    }
    scratch.norm_factors[place.thread / kWarpThreads][place.lane] = sums;
  }

  // The warp's normalised rows of q and k.
  struct Rows {
    GroupPair q[2], k[2];
  };
  __device__ Rows rows(GradientsPlace const& place) const {
    static_assert(kHalfGroups == 4);
    std::uint32_t const q = lane_address(place, smem.tokens().q), k = lane_address(place, smem.tokens().k);
    return {{{q, 0}, {q, 2}}, {{k, 0}, {k, 2}}};
  }

  __device__ void finish_norm_gradients(Rows const& rows, GradientsPlace const& place) {
    auto const& factors = smem.scratch().norm_factors[place.thread / kWarpThreads];
    float const scale = kScalesQueries ? params.scale : 1.f;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kHalfGroups; ++i) {
      // Of two tokens: of q and of k, then of the next one.
      float4 const both = *reinterpret_cast<float4 const*>(&factors[kGroup * i + 2 * place.quad]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const n = 4 * i + 2 * half, in_pair = 2 * (i % 2) + half;
        float2 const q2 = unpack<Element>(rows.q[i / 2].pairs[in_pair]),
                     k2 = unpack<Element>(rows.k[i / 2].pairs[in_pair]);
        dq[n] = scale * dq[n] - q2.x * both.x;
        dq[n + 1] = scale * dq[n + 1] - q2.y * both.z;
        dk[n] -= k2.x * both.y;
        dk[n + 1] -= k2.y * both.w;
      }
    }
  }

  // dq or dk for every gate head, float32 [batch, seqlen, num_gate_heads, dim_k].
  __device__ void store_partial(void* out, HalfAccumulators const& acc, GradientsPlace const& place) const {
    int const num_rows = uniform(smem.work.num_rows);
    if (out == nullptr) {
      return;
    }
    CallShape const& shape = params.shape;
    std::int64_t const first_row = work.token(shape) * shape.num_gate_heads + work.gate_head;
    float* const base = static_cast<float*>(out) + first_row * shape.dim_k + work.first_channel;
    int const row_stride = shape.num_gate_heads * shape.dim_k;  // from token to token
#pragma unroll
    for (int n = 0; n < 4 * kHalfGroups; ++n) {
      int const t = place.token(n / 4, n % 2), ch = place.channel(n / 2 % 2);
      if (t < num_rows && work.first_channel + ch < shape.dim_k) {
        base[t * row_stride + ch] = acc[n];
      }
    }
  }
};

}  // namespace gdn2
