// The gradients of q, k and b in `gradients`, before and after the pair products.
#pragma once

#include "sm90/gates.cuh"
#include "sm90/gradients_parts.cuh"
#include "sm90/norm_gradients.cuh"
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
  // [16 channels, tokens]; start as dO S^T, dX S^T and R dS'^T transposed. The tiles have -dT and -E, and dE
  // is -dE: no sign has to be made.
  HalfAccumulators &dq, &dE, &dk;
  HalfAccumulators& dG;

  // Whether db finds the slope of b's sigmoid in the tile of b, which then holds sides, or makes the sigmoid
  // anew: float16 has not their range.
  static constexpr bool kKeepsSides = Cfg::kSigmoid && kHasFloatRange<Element>;

  static constexpr bool kRawQueries = NormGradients<Cfg>::kRawQueries;
  static constexpr bool kDividesQueries = Cfg::kNormalize && !kRawQueries;

  // By the warpgroup that has dP, before a barrier.
  __device__ void scale_dP(float (&dP)[4 * kGroups], GradientsPlace const& place) {
    float scales[2] = {params.scale, params.scale};
    if constexpr (kRawQueries) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const row = kWarpChannels * place.warp + place.row + 8 * half;
        scales[half] *= smem.inverse_norms[0][row];
        smem.scratch().query_scales[row] = scales[half];  // four lanes the same
      }
    }
#pragma unroll
    for (int n = 0; n < 4 * kGroups; ++n) {
      dP[n] *= scales[n / 2 % 2];
    }
  }

  // Of two neighbours x: sigmoid(x); and their sides, the smaller ones of sigmoid(x) and sigmoid(-x),
  // negative where it is the latter. The slope is side * (1 - side), near 0 and 1 to the precision of a side.
  __device__ static void sigmoid_and_side(std::uint32_t x, std::uint32_t& sigmoid, std::uint32_t& side) {
    float2 const x2 = unpack<Element>(x), e{exp2_approx(-kLog2E * x2.x), exp2_approx(-kLog2E * x2.y)},
                 s{reciprocal_approx(1.f + e.x), reciprocal_approx(1.f + e.y)};
    std::uint32_t const is_negative = sign_masks(x);
    sigmoid = pack<Element>(s.x, s.y);
    side = (sigmoid & is_negative) | (pack<Element>(-e.x * s.x, -e.y * s.y) & ~is_negative);
  }

  // A warp's pieces of q, k and b: a token a lane, its warp's channels.
  struct TokenPieces {
    uint4 q[2], k[2], b[2];
  };
  __device__ uint4& piece(std::uint8_t* tile, int token, int warp, int i) const {
    return *reinterpret_cast<uint4*>(tile + swizzled_offset(token, 2 * warp + i));
  }

  // q, k and -E = -b*k, through the sigmoid of b, to the scratch tile, as the products read them: over their
  // norms, but for kRawQueries.
  __device__ void prepare_tiles(TokenPieces& x, int t, int warp) {
    auto& tokens = smem.tokens();
    auto& scratch = smem.scratch();
    PairFactor<Element> of_q{}, of_k{};
    if constexpr (kDividesQueries) {
      of_q = PairFactor<Element>(smem.inverse_norms[0][t]);
    }
    if constexpr (Cfg::kNormalize) {
      of_k = PairFactor<Element>(smem.inverse_norms[1][t]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (kDividesQueries) {
        piece(tokens.q, t, warp, i) = multiply_pairs(x.q[i], of_q);
      }
      if constexpr (Cfg::kNormalize) {
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

  // Where a thread has decays inside a group, a warp a group and a lane two channels, eight apart. Which of
  // them comes first alternates, so that a warp reads g from all banks.
  struct DecayPlace {
    int group, warp, in_half;  // of the channels of a warp in_half and eight further
    int halves[2], channels[2];

    __device__ explicit DecayPlace(GradientsPlace const& place)
        : group(place.thread / kWarpThreads), warp(place.lane / 8), in_half(place.lane % 8) {
      halves[0] = (warp ^ warp / 2) & 1;
      halves[1] = halves[0] ^ 1;
      int const first = kWarpChannels * warp + in_half;
      channels[0] = first + 8 * halves[0];
      channels[1] = first + 8 * halves[1];
    }

    // To the four lanes that have the channel's tokens, two each.
    __device__ void store(float (&of_threads)[kWarpgroupThreads], float x0, float x1, float x2,
                          float x3) const {
      *reinterpret_cast<float4*>(&of_threads[kWarpThreads * warp + 4 * in_half]) = {x0, x1, x2, x3};
    }
  };

  // What the pair products read, of the tokens that have come: q, k and E; the decays inside groups and over
  // them. Both warpgroups read all decays: ends with the CTA's barrier.
  __device__ void prepare_tokens() {
    auto& tokens = smem.tokens();
    GradientsPlace const place;
    DecayPlace const at(place);
    int const own_rows = uniform(smem.work.num_rows);
    // All is read before anything is written, or each read would wait for a write; and what waits for special
    // functions is in one run of instructions.
    float x[2][kGroup];
    read_g(x, kGroup * at.group, at.channels[0]);
    int const t = kHalfTokens * place.half_of_chunk + place.lane;
    TokenPieces pieces{};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (kDividesQueries) {
        pieces.q[i] = piece(tokens.q, t, place.warp, i);
      }
      pieces.k[i] = piece(tokens.k, t, place.warp, i);
      pieces.b[i] = piece(tokens.b, t, place.warp, i);
    }
    DecayFunction<Element, Cfg::kGate> const decay(params.gates, Cfg::kIsGated ? smem.gate.A_log : 0.f);
    float bias[2] = {0.f, 0.f};
    if constexpr (Cfg::kIsGated) {
      bias[0] = kLog2E * smem.gate.bias[at.channels[0]];
      bias[1] = kLog2E * smem.gate.bias[at.channels[1]];
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
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        alpha[i][j] = decay.alpha(x[i][j]);
      }
    }
    if (own_rows < kChunk) {  // rows that are not the chunk's own, whatever lies there
      if (t >= own_rows) {
        clear_pieces(t, place.warp);
      }
      int const rows_of_group = own_rows - kGroup * at.group;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (j >= rows_of_group) {
          x[0][j] = x[1][j] = 0.f;
          alpha[0][j] = alpha[1][j] = 1.f;
        }
      }
    }
    store_decays(alpha, at);
    __syncthreads();  // the decays over groups are there, and all of g has been read
    make_places();
    if constexpr (Cfg::kIsGated) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float const(&y)[kGroup] = x[i];
        int const row = 2 * at.group + at.halves[i];
        at.store(tokens.activations[0][row], y[0], y[2], y[4], y[6]);
        at.store(tokens.activations[1][row], y[1], y[3], y[5], y[7]);
      }
    }
    __syncthreads();
  }

  __device__ void clear_pieces(int t, int warp) {
    auto& tokens = smem.tokens();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      piece(tokens.q, t, warp, i) = piece(tokens.k, t, warp, i) = piece(smem.scratch().E, t, warp, i) =
          uint4{};
    }
  }

  // The decays inside a group, products of alpha, where the lanes of the products read them.
  __device__ void store_decays(float const (&alpha)[2][kGroup], DecayPlace const& at) {
    auto& scratch = smem.scratch();
    auto& of_warp = scratch.of_warps[kWarpgroupWarps * (at.group / kHalfGroups) + at.warp];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float const(&a)[kGroup] = alpha[i];
      int const row = 2 * at.group + at.halves[i];
      float const a34 = a[3] * a[4], a56 = a[5] * a[6];
      float const F1 = a[1] * a[2], F2 = F1 * a34, F3 = F2 * a56;
      float const B2 = a[6] * a[7], B1 = a[4] * a[5] * B2, B0 = a[2] * a[3] * B1;
      at.store(smem.alpha1[row], a[1], a[3], a[5], a[7]);
      at.store(smem.level4[row], a[2] * a34, a[4], 1.f, a56);
      at.store(scratch.F[row], 1.f, F1, F2, F3);
      at.store(scratch.B[row], B0, B1, B2, 1.f);
      float* const level2 = of_warp.level2[2 * (at.group % kHalfGroups) + at.halves[i]];
      *reinterpret_cast<float2*>(&level2[2 * at.in_half]) = {a[2], a[6]};
      scratch.groups[at.group][at.channels[i]] = {a[0], F3 * a[7]};
    }
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
    float2 scales{params.scale, params.scale};
    if constexpr (kRawQueries) {
      scales = *reinterpret_cast<float2 const*>(&smem.scratch().query_scales[pairs.place.token(i, 0)]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const n = 4 * i + 2 * half;
      float2 const q2 = unpack<Element>(q.pairs[half]), k2 = unpack<Element>(k.pairs[half]),
                   E2 = unpack<Element>(E.pairs[half]);
      GroupPlace const group = pairs.group_place(i, half);
      float const gamma0 = group.before * pairs.F(i, half), gamma1 = gamma0 * alpha1[half];
      float const tail1 = group.after * pairs.B(i, half), tail0 = tail1 * alpha1[half];
      dq[n] *= scales.x * gamma0;
      dq[n + 1] *= scales.y * gamma1;
      dE[n] *= gamma0;
      dE[n + 1] *= gamma1;
      dG[n] = q2.x * dq[n] + E2.x * dE[n];
      dG[n + 1] = q2.y * dq[n + 1] + E2.y * dE[n + 1];
      dk[n] *= tail0;
      dk[n + 1] *= tail1;
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

  // dE becomes db, and dk takes its share; through the sigmoid of b where there is one. Two tokens. dE is -dE
  // before, and b may be sides: sigmoid(b) = b, or 1 + b where that is negative, and its slope |b| - b*b.
  __device__ void finish_erase(int n, std::uint32_t k, std::uint32_t b) {
    float2 b2, db_per_dE;
    if constexpr (kKeepsSides) {
      std::uint32_t const minus_slope = multiply_add_pairs<Element>(b, b, b | kSignsOfPair),
                          ones = sign_masks(b) & kBfloat16Ones;
      db_per_dE = unpack<Element>(multiply_pairs<Element>(k, minus_slope));
      b2 = unpack<Element>(add_pairs<Element>(b, ones));
    } else {
      float2 const k2 = unpack<Element>(k);
      b2 = unpack<Element>(b);
      db_per_dE = {-k2.x, -k2.y};
      if constexpr (Cfg::kSigmoid) {
        b2 = sigmoid(b2);
        db_per_dE = {-k2.x * fmaf(-b2.x, b2.x, b2.x), -k2.y * fmaf(-b2.y, b2.y, b2.y)};
      }
    }
    dk[n] -= b2.x * dE[n];
    dk[n + 1] -= b2.y * dE[n + 1];
    dE[n] *= db_per_dE.x;
    dE[n + 1] *= db_per_dE.y;
  }

  // For all tokens, from the last groups to the first, `between` what is made of their k and of their q: what
  // has nothing to do with it, and hides what it waits for. Where there are norms, dq and dk over those of
  // their rows (kRawQueries: dq is already), and the products of these with the rows, which go to both CTAs
  // of the rows and arrive during something else.
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
    TokenDots<Element> of_q, of_k;
#pragma unroll
    for (int pair = kHalfGroups / 2 - 1; pair >= 0; --pair) {
      GroupPair const k(lane_address(place, tokens.k), 2 * pair), b(lane_address(place, tokens.b), 2 * pair);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        int const i = 2 * pair + m / 2, n = 4 * i + 2 * (m % 2);
        finish_erase(n, k.pairs[m], b.pairs[m]);
      }
      if constexpr (Cfg::kNormalize) {
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          int const i = 2 * pair + m / 2, n = 4 * i + 2 * (m % 2);
          multiply(&dk[n], inverse_norms[kChunk / 2 + i * kGroup / 2]);
          of_k.add(i, m % 2, k.pairs[m], &dk[n]);
        }
      }
      between(pair, place);
      if constexpr (Cfg::kNormalize) {
        GroupPair const q(lane_address(place, tokens.q), 2 * pair);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          int const i = 2 * pair + m / 2, n = 4 * i + 2 * (m % 2);
          if constexpr (kDividesQueries) {
            multiply(&dq[n], inverse_norms[i * kGroup / 2]);
          }
          of_q.add(i, m % 2, q.pairs[m], &dq[n]);
        }
        of_k.sum_pair(pair, place);
        of_q.sum_pair(pair, place);
      }
    }
    if constexpr (Cfg::kNormalize) {
      // A lane stores those of one token: of row `row` of group `quad`.
      NormGradients<Cfg> const norms{smem, work};
      norms.store_dots(place, kGroup * place.quad + place.row, {of_q.sum(place), of_k.sum(place)});
    }
  }

  __device__ static void multiply(float* x, float2 factors) {
    x[0] *= factors.x;
    x[1] *= factors.y;
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
