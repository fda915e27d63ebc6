// The gradients of q, k and b in `gradients`, before and after the pair products.
#pragma once

#include <cute/arch/cluster_sm90.hpp>
#include <type_traits>

#include "sm90/gates.cuh"
#include "sm90/gradients_parts.cuh"
#include "sm90/pair_gradients.cuh"
#include "tile/activation.cuh"
#include "tile/convert.cuh"

namespace gdn2 {

// What comes before and after the pair products, for one warp's 16 channels x 32 tokens.
template <class Cfg>
struct Channels {
  using Element = typename Cfg::Element;

  GradientsStorage& smem;
  GradientsParams const& params;
  GradientsWork const& work;
  HalfAccumulators &dq, &dE, &dk;  // [16 channels, tokens]; start as dO S^T, dX S^T and R dS'^T transposed
  HalfAccumulators& dG;

  // The warp's pieces of q, k and E as the products read them: normalised, rows that are not the chunk's own
  // zero whatever lies there; E = b*k, through the sigmoid of b, to the scratch tile.
  __device__ void prepare_tiles() {
    int const num_rows = uniform(smem.work.num_rows);
    auto& tokens = smem.tokens();
    auto& scratch = smem.scratch();
    GradientsPlace const place;
    int const t = kHalfTokens * place.half_of_chunk + place.lane;
    auto const at = [&](std::uint8_t* tile, int i) {
      return reinterpret_cast<uint4*>(tile + swizzled_offset(t, 2 * place.warp + i));
    };
    // All is read before anything is written, or each read would wait for a write.
    uint4 q[2], k[2], b[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (Cfg::kNormalize) {
        q[i] = *at(tokens.q, i);
      }
      k[i] = *at(tokens.k, i);
      b[i] = *at(tokens.b, i);
    }
    if (t >= num_rows) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        *at(tokens.q, i) = *at(tokens.k, i) = *at(scratch.E, i) = uint4{};
      }
      return;
    }
    PairFactor<Element> of_q{}, of_k{};
    if constexpr (Cfg::kNormalize) {
      of_q = PairFactor<Element>(smem.inverse_norms[0][t]);
      of_k = PairFactor<Element>(smem.inverse_norms[1][t]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (Cfg::kNormalize) {
        *at(tokens.q, i) = multiply_pairs(q[i], of_q);
        *at(tokens.k, i) = k[i] = multiply_pairs(k[i], of_k);
      }
      if constexpr (Cfg::kSigmoid) {
        b[i] = {activate_erase<Element>(params.gates, b[i].x), activate_erase<Element>(params.gates, b[i].y),
                activate_erase<Element>(params.gates, b[i].z), activate_erase<Element>(params.gates, b[i].w)};
      }
      *at(scratch.E, i) = multiply_pairs<Element>(b[i], k[i]);
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

  // The decays inside groups, a warp a group and a lane two channels of it, and over them. Both warpgroups
  // read all of them: ends with the CTA's barrier.
  __device__ void prepare_decays() {
    auto& scratch = smem.scratch();
    GradientsPlace const place;
    int const group = place.thread / kWarpThreads, num_rows = uniform(smem.work.num_rows) - kGroup * group;
    // Which of a lane's two channels, eight apart, comes first alternates, so that a warp reads g from all banks.
    int const warp = place.lane / 8, first_half = (warp ^ warp / 2) & 1;
    int const halves[2] = {first_half, first_half ^ 1};
    int const first_channel = kWarpChannels * warp + place.lane % 8;
    int const channels[2] = {first_channel + 8 * halves[0], first_channel + 8 * halves[1]};
    int const first_thread = kWarpThreads * warp + 4 * (place.lane % 8);
    auto const store = [&](float (&of_threads)[kWarpgroupThreads], float x0, float x1, float x2, float x3) {
      *reinterpret_cast<float4*>(&of_threads[first_thread]) = {x0, x1, x2, x3};
    };
    float x[2][kGroup];
    read_g(x, kGroup * group, channels[0]);
    DecayFunction<Element, Cfg::kGate> const decay(params.gates, Cfg::kIsGated ? smem.gate.A_log : 0.f);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float const bias = Cfg::kIsGated ? kLog2E * smem.gate.bias[channels[i]] : 0.f;
#pragma unroll
      for (int t = 0; t < kGroup; ++t) {
        x[i][t] = decay.activation(x[i][t], bias);
      }
    }
    float alpha[2][kGroup];
#pragma unroll
    for (int t = 0; t < kGroup; ++t) {
      alpha[0][t] = decay.alpha(x[0][t]);
      alpha[1][t] = decay.alpha(x[1][t]);
    }
    if (num_rows < kGroup) {
#pragma unroll
      for (int t = 0; t < kGroup; ++t) {
        if (t >= num_rows) {
          x[0][t] = x[1][t] = 0.f;
          alpha[0][t] = alpha[1][t] = 1.f;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float const(&a)[kGroup] = alpha[i];
      int const row = 2 * group + halves[i];
      store(smem.alpha[0][row], a[0], a[2], a[4], a[6]);
      store(smem.alpha[1][row], a[1], a[3], a[5], a[7]);
      float const F1 = a[1] * a[2], F2 = F1 * (a[3] * a[4]), F3 = F2 * (a[5] * a[6]);
      float const B2 = a[6] * a[7], B1 = a[4] * a[5] * B2, B0 = a[2] * a[3] * B1;
      store(scratch.F[row], 1.f, F1, F2, F3);
      store(scratch.B[row], B0, B1, B2, 1.f);
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
    // A thread a channel and direction. All is read before anything is written, or each read would wait for a
    // write.
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
    __syncthreads();
  }

  // The products with S and dS' become their shares of dq, dE and dk, and of dG, which is summed from the
  // end: reads of S by tokens r >= i, the state that is carried through, and all writes to S' of the half
  // less those by tokens s >= i. The chunk's last write goes through no decay: it would be taken from itself,
  // and leave its rounding where all others are small. Group by group, with the pairs inside it, which have
  // the same q, k and E.
  __device__ void finish_state_products(PairGradients<Element>& pairs) {
    GradientsPlace const& place = pairs.place;
    float written[2] = {0.f, 0.f};
    int const last = pairs.num_rows - 1 - place.token(0, 0);
#pragma unroll
    for (float& x : dG) {
      x = 0.f;
    }
#pragma unroll
    for (int i = 0; i < kHalfGroups; ++i) {
      if (pairs.has_no_tokens(i)) {
        break;
      }
      GroupTokens const q(pairs.q_lane, i), k(pairs.k_lane, i), E(pairs.E_lane, i);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const n = 4 * i + 2 * half;
        float2 const q2 = unpack<Element>(q.pairs[half]), k2 = unpack<Element>(k.pairs[half]),
                     E2 = unpack<Element>(E.pairs[half]);
        GroupPlace const group = pairs.group_place(i, half);
        float const alpha1 = pairs.alpha1(i, half);
        float const gamma0 = group.before * pairs.F(i, half), gamma1 = gamma0 * alpha1;
        float const tail1 = group.after * pairs.B(i, half), tail0 = tail1 * alpha1;
        dq[n] *= params.scale * gamma0;
        dq[n + 1] *= params.scale * gamma1;
        dE[n] *= -gamma0;
        dE[n + 1] *= -gamma1;
        dk[n] *= tail0;
        dk[n + 1] *= tail1;
        float2 const writes{last == kGroup * i ? 0.f : k2.x, last == kGroup * i + 1 ? 0.f : k2.y};
        dG[n] = q2.x * dq[n] + E2.x * dE[n] - writes.x * dk[n];
        dG[n + 1] = q2.y * dq[n + 1] + E2.y * dE[n + 1] - writes.y * dk[n + 1];
        written[half] += writes.x * dk[n];
        written[half] += writes.y * dk[n + 1];
      }
      pairs.inner_pairs(i, q, k, E);
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

  // dE becomes db, and dk takes its share; through the sigmoid of b where there is one. Where there are
  // norms, the products of rows with their gradients are made beside it, which go to both CTAs of the row and
  // arrive during something else.
  __device__ void finish_erase_and_dots() {
    if (!Cfg::kNormalize && params.dk == nullptr && params.db == nullptr) {
      return;
    }
    auto& tokens = smem.tokens();
    GradientsPlace const place;
    float const erase_scale = params.gates.erase_scale;
    bool const has_other = work.has_other_box();
    int const other = work.box ^ 1;
    float dots[2][2 * kHalfGroups];  // [of q, of k][2*i + c]
#pragma unroll
    for (int pair = 0; pair < kHalfGroups / 2; ++pair) {
      GroupPair const k(lane_address(place, tokens.k), 2 * pair), b(lane_address(place, tokens.b), 2 * pair);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        int const i = 2 * pair + m / 2, half = m % 2, n = 4 * i + 2 * half;
        float2 const k2 = unpack<Element>(k.pairs[m]);
        float2 b2 = unpack<Element>(b.pairs[m]), slope{1.f, 1.f};
        if constexpr (Cfg::kSigmoid) {
          float2 const s = sigmoid(b2);
          b2 = {erase_scale * s.x, erase_scale * s.y};
          slope = {fmaf(-b2.x, s.x, b2.x), fmaf(-b2.y, s.y, b2.y)};
        }
        dk[n] += b2.x * dE[n];
        dk[n + 1] += b2.y * dE[n + 1];
        dE[n] *= k2.x * slope.x;
        dE[n + 1] *= k2.y * slope.y;
        if constexpr (Cfg::kNormalize) {
          add_products(&dots[1][2 * i], half, k2, &dk[n]);
        }
      }
      if constexpr (Cfg::kNormalize) {
        GroupPair const q(lane_address(place, tokens.q), 2 * pair);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          int const i = 2 * pair + m / 2, half = m % 2;
          add_products(&dots[0][2 * i], half, unpack<Element>(q.pairs[m]), &dq[4 * i + 2 * half]);
        }
      }
    }
    if constexpr (Cfg::kNormalize) {
      // Over the lanes that have the same tokens. A lane stores those of one: of row `row` of group `quad`.
      float const of_q = sum_over_rows(dots[0], place), of_k = sum_over_rows(dots[1], place);
      store_dots(place.warp, kGroup * place.group(place.quad) + place.row, {of_q, of_k}, has_other, other);
    }
  }

  // What the warps have of the lane's token of its half.
  using DotsOfWarps = float2[kChannels / kWarpChannels][kChunk];
  __device__ static float2 sum_over_warps(DotsOfWarps const& dots, GradientsPlace const& place) {
    int const token = kHalfTokens * place.half_of_chunk + place.lane;
    static_assert(kChannels / kWarpChannels == 4);
    float2 const a = dots[0][token], b = dots[1][token], c = dots[2][token], d = dots[3][token];
    return {(a.x + b.x) + (c.x + d.x), (a.y + b.y) + (c.y + d.y)};
  }

  // Of two tokens, over the lane's channels: `half` 0 begins the sums.
  __device__ static void add_products(float* sums, int half, float2 y, float const* dy) {
    sums[0] = half == 0 ? y.x * dy[0] : sums[0] + y.x * dy[0];
    sums[1] = half == 0 ? y.y * dy[1] : sums[1] + y.y * dy[1];
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

  // The products of a token's rows of q and k over the warp's channels, for this CTA and the one of the other
  // channels.
  __device__ void store_dots(int warp, int token, float2 dots, bool has_other, int other) const {
    auto& scratch = smem.scratch();
    scratch.dots_of_warp[warp][token] = dots;
    if (has_other) {
      cute::cluster_wait();  // see announce_dots
      store_remote(&scratch.other_dots[warp][token], dots, smem.dots_full, other);
    }
  }

  // Through the norms, behind a barrier: with y the normalised row and n its norm, dx = (dy - y (y.dy)) / n.
  // In steps, between which something else hides what each waits for. First the sums of the warp's rows over
  // the channels of this CTA, a lane a token: of q and of k.
  __device__ float2 sum_dots(GradientsPlace const& place) const {
    return sum_over_warps(smem.scratch().dots_of_warp, place);
  }

  // The factors of the warp's rows.
  __device__ void make_norm_factors(float2 sums, GradientsPlace const& place, bool has_other) {
    auto& scratch = smem.scratch();
    int const token = kHalfTokens * place.half_of_chunk + place.lane;
    float2 const inverse{smem.inverse_norms[0][token], smem.inverse_norms[1][token]};
    if (has_other) {
      wait_to_read(smem.dots_full, 0);
      float2 const other = sum_over_warps(scratch.other_dots, place);
      sums = {sums.x + other.x, sums.y + other.y};
    }
    scratch.norm_factors[place.thread / kWarpThreads][place.lane] = {inverse.x, sums.x * inverse.x, inverse.y,
                                                                     sums.y * inverse.y};
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
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kHalfGroups; ++i) {
      int const t = kGroup * i + 2 * place.quad;  // of the half
      float4 const factors0 = factors[t], factors1 = factors[t + 1];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const n = 4 * i + 2 * half;
        int const in_pair = 2 * (i % 2) + half;
        float2 const q2 = unpack<Element>(rows.q[i / 2].pairs[in_pair]),
                     k2 = unpack<Element>(rows.k[i / 2].pairs[in_pair]);
        dq[n] = dq[n] * factors0.x - q2.x * factors0.y;
        dq[n + 1] = dq[n + 1] * factors1.x - q2.y * factors1.y;
        dk[n] = dk[n] * factors0.z - k2.x * factors0.w;
        dk[n + 1] = dk[n + 1] * factors1.z - k2.y * factors1.w;
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
