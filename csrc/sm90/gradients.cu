// gradients: every gradient of a chunk, from the states and residuals that the scans left. All chunks at once.
//
//     dP = tril(dO R^T)      dT = -tril(dX R^T, -1)      dv = w*dX      dw = v*dX
//     dq = scale [ pairs(dP).x + gamma * (dO S^T) ]
//     dE =         pairs(dT).x - gamma * (dX S^T)                          db = k*dE
//     dk_ = scale pairs(dP).y + pairs(dT).y + exp(G[C-1]-G) * (R dS'^T)    dk = dk_ + b*dE
//     dg[i]: sums of q*dq and E*dE over the reads at tokens r >= i, less k*dk_ of the writes that they are paired with;
//     k*dk_ of the writes to S' over tokens s < i; and gamma[C-1] * rowsum(S*dS')
//
// where pairs(M).x[r] = sum_s M[r,s] k[s] exp(G[r]-G[s]) and pairs(M).y[s] = sum_r M[r,s] x[r] exp(G[r]-G[s]), split by
// halves as in prepare: exp(G[r]-G[s]) = D[r] U[s], both products of alpha, in [0, 1].
//
// Grid: one CTA for a chunk slot, gate head and 64 channels, channels fastest; 256 threads, two CTAs an SM. Where the L2
// norm asks for sums over 128 channels, the CTAs of both halves are a cluster.
// Roles: two warpgroups, half of the tokens each. Products by wgmma over the value heads of the group and slices of 64
// value columns: one warpgroup dP and the other dT, tokens on the rows; each for its tokens dO S^T, dX S^T and R dS'^T
// transposed, channels on the rows: 80 accumulators a thread. Then each warp has 16 channels x 32 tokens for itself,
// and the pair products of pair_gradients.cuh add to the accumulators where they are.
// Shared memory: two stages of 40 KB (S, dS', dO, R, dX of a slice; after the last slice q, k, b, g; decays in the
// other), dP and dT 16 KB, terms of dg 16.5 KB: 112.5 KB.
//
//     slice 0 | slice 1 | .. | dP, dT out | decays | gamma, tail | pairs | sums, norms, out
#include <cooperative_groups.h>
#include <cutlass/arch/barrier.h>

#include "api/chunk_backward.h"
#include "api/cuda_error.h"
#include "sm90/gradients_parts.cuh"
#include "sm90/pair_gradients.cuh"
#include "sm90/token_map.h"
#include "tile/activation.cuh"
#include "tile/convert.cuh"
#include "tile/launch_order.cuh"
#include "tile/wgmma.cuh"

namespace gdn2 {
namespace {

template <class Element_, bool kFused_>
struct Config {
  using Element = Element_;
  static constexpr bool kFused = kFused_;  // norms, gates, sigmoids or a 16-bit g may be asked for
};

struct TensorMaps {
  CUtensorMap q, k, b, g, dO;
  CUtensorMap dq, dk, db;
};

// A slice: 64 columns of one of the value heads.
struct SliceIndex {
  int value_head, slice;
  std::int64_t tile;  // among the tiles of all slots, value heads and slices

  __device__ SliceIndex(CallShape const& shape, GradientsWork const& work, int index)
      : value_head(work.gate_head * work.heads_per_gate + index / work.num_slices),
        slice(index % work.num_slices) {
    tile =
        (static_cast<std::int64_t>(work.slot) * shape.num_value_heads + value_head) * work.num_slices + slice;
  }
};

// ---- loads, by one thread ----------------------------------------------------------------------------------

__device__ void bulk_load(void* smem, void const* tiles, std::int64_t tile, FullBarrier& full) {
  cute::SM90_BULK_COPY_G2S::copy(static_cast<std::uint8_t const*>(tiles) + tile * kBoxBytes,
                                 reinterpret_cast<std::uint64_t*>(&full), smem, kBoxBytes);
}

__device__ void load_slice(GradientsStorage& smem, int stage, GradientsParams const& params,
                           TensorMaps const& maps, GradientsWork const& work, int index) {
  SliceIndex const at(params.shape, work, index);
  auto& slice = smem.stages[stage].slice;
  FullBarrier& full = smem.full[stage];
  full.arrive_and_expect_tx(sizeof(slice));
  tma_load(maps.dO, full, slice.dO, at.slice * kColumns, at.value_head, work.first_token, work.batch);
  bulk_load(slice.R, params.tiles.R, at.tile, full);
  bulk_load(slice.dX, params.tiles.dX, at.tile, full);
  bulk_load(slice.S, params.tiles.S, at.tile * work.num_boxes + work.box, full);
  bulk_load(slice.dS, params.tiles.dS, at.tile * work.num_boxes + work.box, full);
}

__device__ void load_tokens(GradientsStorage& smem, int stage, TensorMaps const& maps,
                            GradientsWork const& work, ElementType gate_element) {
  bool const wide = gate_element == ElementType::kFloat32;
  auto& tokens = smem.stages[stage].tokens;
  FullBarrier& full = smem.full[stage];
  full.arrive_and_expect_tx((wide ? 5 : 4) * kBoxBytes);
  int const channel = work.first_channel, token = work.first_token;
  for (int box = 0; box < (wide ? 2 : 1); ++box) {
    tma_load(maps.g, full, tokens.g[box], channel + box * kChannels / 2, work.gate_head, token, work.batch);
  }
  tma_load(maps.q, full, tokens.q, channel, work.head, token, work.batch);
  tma_load(maps.k, full, tokens.k, channel, work.head, token, work.batch);
  tma_load(maps.b, full, tokens.b, channel, work.gate_head, token, work.batch);
}

// ---- slices: products over value columns -------------------------------------------------------------------

// acc[4*j + 2*half + c]: row 16*warp + lane/4 + 8*half, column 8*j + 2*(lane%4) + c.
struct Products {
  float dM[4 * kGroups];              // [tokens, tokens]: dP in the first warpgroup, -dT in the second
  HalfAccumulators S_dO, S_dX, dS_R;  // [channels, tokens of the half]: S dO^T, S dX^T, dS' R^T
  float S_dS[2][4] = {};              // second warpgroup: [16 channels, 8 of them] S dS'^T, for its diagonal
};

template <class Element>
__device__ void multiply_slice(Products& x, GradientsStorage::Slice const& slice, GradientsPlace const& place,
                               bool accumulate) {
  int const half_rows = place.half_of_chunk * kHalfTokens * kBoxRowBytes >> 4;
  auto const S = shared_descriptor<Major::MN>(slice.S), dS = shared_descriptor<Major::MN>(slice.dS);
  auto const dO = shared_descriptor<Major::K>(slice.dO), R = shared_descriptor<Major::K>(slice.R),
             dX = shared_descriptor<Major::K>(slice.dX);
  auto const left = place.half_of_chunk == 0 ? dO : dX;
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kColumns / 16; ++step) {
    int const along_row = step * 32 >> 4, along_column = step * 16 * kBoxRowBytes >> 4;
    bool const add = accumulate || step > 0;
    wgmma_shared<Element>(x.dM, left + along_row, R + along_row, add);
    wgmma_shared<Element, Major::MN>(x.S_dO, S + along_column, dO + half_rows + along_row, add);
    wgmma_shared<Element, Major::MN>(x.S_dX, S + along_column, dX + half_rows + along_row, add);
    wgmma_shared<Element, Major::MN>(x.dS_R, dS + along_column, R + half_rows + along_row, add);
  }
  wgmma_commit();
  wgmma_wait<0>();
  if (place.half_of_chunk == 1) {
#pragma unroll
    for (int step = 0; step < kColumns / 16; ++step) {
      std::uint32_t s[4], ds[4];
      load_matrices_transposed(s, slice.S, 16 * step, 2 * place.warp);
      load_matrices_transposed(ds, slice.dS, 16 * step, 2 * place.warp);
      std::uint32_t const a[4] = {s[0], s[2], s[1], s[3]};
      mma_16x8x16<Element>(x.S_dS[0], a, ds[0], ds[1]);
      mma_16x8x16<Element>(x.S_dS[1], a, ds[2], ds[3]);
    }
  }
}

// rowsum(S*dS') of the lane's channel `half`: the diagonal, row lane/4 and column 2*(lane%4) + c of the half's eight.
__device__ float S_dS_rowsum(Products const& x, GradientsPlace const& place, int half) {
  return from_quad_lane(place.row % 2 ? x.S_dS[half][2 * half + 1] : x.S_dS[half][2 * half], place.row / 2);
}

// Rows of dO that are not the chunk's own become zero, whatever lies there.
__device__ void clear_foreign_rows(std::uint8_t* tile, int num_rows) {
  for (int i = num_rows * 8 + threadIdx.x; i < kChunk * 8; i += kThreads) {
    *reinterpret_cast<uint4*>(tile + i * 16) = uint4{};
  }
  cutlass::arch::fence_view_async_shared();  // before wgmma reads them
  __syncthreads();
}

// Eight neighbouring elements of a row of which `count` exist.
template <class Element>
__device__ uint4 load_piece(Element const* row, int count) {
  if (count >= 8) {
    return __ldg(reinterpret_cast<uint4 const*>(row));
  }
  uint4 piece{};
  auto* const x = reinterpret_cast<Element*>(&piece);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) {
      x[i] = row[i];
    }
  }
  return piece;
}

template <class Element>
__device__ void store_piece(Element* row, uint4 piece, int count, bool aligned) {
  if (count >= 8 && aligned) {
    *reinterpret_cast<uint4*>(row) = piece;
    return;
  }
  auto const* const x = reinterpret_cast<Element const*>(&piece);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) {
      row[i] = x[i];
    }
  }
}

// dv = w*dX and dw = v*dX of a slice, and through the sigmoid of w: a thread has pieces of 8 columns.
template <class Cfg>
struct ValueGradients {
  using Element = typename Cfg::Element;
  static constexpr int kRowStep = kThreads / 8, kRows = kChunk / kRowStep;

  GradientsParams const& params;
  GradientsWork const& work;
  SliceIndex at;
  int piece, column, count;  // `count` or fewer of the 8 columns exist

  __device__ ValueGradients(GradientsParams const& params_, GradientsWork const& work_, int index)
      : params(params_), work(work_), at(params_.shape, work_, index), piece(threadIdx.x % 8) {
    column = at.slice * kColumns + 8 * piece;
    count = params.shape.dim_v - column;
  }

  __device__ int row(int i) const { return threadIdx.x / 8 + kRowStep * i; }
  __device__ bool is_mine(int i) const { return row(i) < work.num_rows && count > 0; }
  __device__ Element const* row_of(TokenTensor const& x, int i) const {
    return static_cast<Element const*>(x.data) + work.batch * x.stride_batch +
           (work.first_token + row(i)) * x.stride_token + at.value_head * x.stride_head + column;
  }

  // Before the slice is waited for: v and w on their way to L2.
  __device__ void prefetch() const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (is_mine(i)) {
        asm volatile("prefetch.global.L2 [%0];\n" ::"l"(row_of(params.v, i)));
        asm volatile("prefetch.global.L2 [%0];\n" ::"l"(row_of(params.w, i)));
      }
    }
  }

  __device__ void store(std::uint8_t const* dX_tile) const {
    CallShape const& shape = params.shape;
#pragma unroll 1  // both at once cost registers that the products have
    for (int i = 0; i < kRows; ++i) {
      if (!is_mine(i)) {
        break;
      }
      uint4 const v8 = load_piece(row_of(params.v, i), count), w8 = load_piece(row_of(params.w, i), count);
      uint4 const dX8 = *reinterpret_cast<uint4 const*>(dX_tile + swizzled_offset(row(i), piece));
      std::uint32_t const v[4] = {v8.x, v8.y, v8.z, v8.w}, w[4] = {w8.x, w8.y, w8.z, w8.w},
                          dX[4] = {dX8.x, dX8.y, dX8.z, dX8.w};
      std::uint32_t dv[4], dw[4];
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        float2 const v2 = unpack<Element>(v[p]), dX2 = unpack<Element>(dX[p]);
        float2 w2 = unpack<Element>(w[p]), dw2{v2.x * dX2.x, v2.y * dX2.y};
        if (Cfg::kFused && params.gates.use_gate_sigmoid) {
          w2 = {sigmoid(w2.x), sigmoid(w2.y)};
          dw2 = {dw2.x * w2.x * (1.f - w2.x), dw2.y * w2.y * (1.f - w2.y)};
        }
        dv[p] = pack<Element>(w2.x * dX2.x, w2.y * dX2.y);
        dw[p] = pack<Element>(dw2.x, dw2.y);
      }
      std::int64_t const token_head = (work.token(shape) + row(i)) * shape.num_value_heads + at.value_head;
      std::int64_t const place = token_head * shape.dim_v + column;
      bool const aligned = shape.dim_v % 8 == 0;
      if (params.dv != nullptr) {
        store_piece(static_cast<Element*>(params.dv) + place, uint4{dv[0], dv[1], dv[2], dv[3]}, count,
                    aligned);
      }
      if (params.dw != nullptr) {
        store_piece(static_cast<Element*>(params.dw) + place, uint4{dw[0], dw[1], dw[2], dw[3]}, count,
                    aligned);
      }
    }
  }
};

// The rounded matrix to its tile [rows r][columns s].
template <class Element>
__device__ void store_matrix(std::uint8_t* tile, float const (&acc)[4 * kGroups], float factor,
                             GradientsPlace const& place) {
#pragma unroll
  for (int i = 0; i < 2 * kGroups; ++i) {
    int const row = 16 * place.warp + place.row + 8 * (i % 2);
    *reinterpret_cast<std::uint32_t*>(tile + swizzled_offset(row, i / 2) + place.quad * 4) =
        pack<Element>(factor * acc[2 * i], factor * acc[2 * i + 1]);
  }
}

// ---- the warp's channels -----------------------------------------------------------------------------------

// Bias and rate of the decay gate of the CTA's channels, to where they cost no registers.
__device__ void load_gate_parameters(GradientsStorage& smem, GradientsParams const& params) {
  GateParams const& gates = params.gates;
  int const head = smem.work.head, channel = smem.work.first_channel + threadIdx.x;
  if (threadIdx.x < kChannels) {
    bool const has_bias = gates.dt_bias != nullptr && channel < params.shape.dim_k;
    smem.gate_bias[threadIdx.x] =
        has_bias ? gates.dt_bias[static_cast<std::int64_t>(head) * params.shape.dim_k + channel] : 0.f;
  }
  if (threadIdx.x == 0) {
    smem.gate_rate = gates.A_log != nullptr ? __expf(gates.A_log[head]) : 1.f;
  }
}

// g of a raw projection.
__device__ float decay_gate(GradientsStorage const& smem, GateParams const& gates, float raw, int channel) {
  if (gates.decay_gate == DecayGate::kNone) {
    return raw;
  }
  float const u = raw + smem.gate_bias[channel], rate = smem.gate_rate;
  return gates.decay_gate == DecayGate::kSoftplus ? -rate * softplus(u)
                                                  : gates.lower_bound * sigmoid(rate * u);
}

// Gradient of the raw projection, and what dg adds to dA_log; zero where nothing moves any more.
__device__ float decay_gate_backward(GradientsStorage const& smem, GateParams const& gates, float raw,
                                     int channel, float dg, float& dA_log) {
  float const u = raw + smem.gate_bias[channel], rate = smem.gate_rate;
  if (gates.decay_gate == DecayGate::kSoftplus) {
    float const g = -rate * softplus(u);
    dA_log = isinf(g) ? 0.f : dg * g;
    return -rate * sigmoid(u) * dg;
  }
  float const s = sigmoid(rate * u);
  float const slope = gates.lower_bound * s * (1.f - s) * dg;
  dA_log = slope == 0.f ? 0.f : slope * rate * u;
  return rate * slope;
}

// What comes before and after the pair products, for one warp's 16 channels x 32 tokens.
template <class Cfg>
struct Channels {
  using Element = typename Cfg::Element;

  GradientsStorage& smem;
  GradientsParams const& params;
  GradientsWork const& work;
  HalfAccumulators &dq, &dE, &dk;  // [16 channels, tokens]; start as dO S^T, dX S^T and R dS'^T transposed
  HalfAccumulators& dG;

  // g as it was given, of the lane's tokens of group i of the half, from its tile.
  __device__ float raw_gate(GradientsPlace const& place, int i, int half, int c) const {
    auto& tokens = smem.tokens();
    if (Cfg::kFused && params.gate_element != ElementType::kFloat32) {
      int const ch = place.channel(half);
      auto const* const at =
          tokens.g[0] + swizzled_offset(place.token(i, c), ch / 8) + ch % 8 * sizeof(Element);
      return static_cast<float>(*reinterpret_cast<Element const*>(at));
    }
    int const t = place.token(i, c), ch = place.channel(half);
    return *reinterpret_cast<float const*>(tokens.g[ch / 32] + swizzled_offset(t, ch % 32 / 4) + ch % 4 * 4);
  }

  // The same from global memory: its tile has become alpha.
  __device__ float reload_raw_gate(GradientsPlace const& place, int i, int half, int c) const {
    std::int64_t const at = work.batch * params.g.stride_batch +
                            (work.first_token + place.token(i, c)) * params.g.stride_token +
                            work.gate_head * params.g.stride_head + work.first_channel + place.channel(half);
    return params.gate_element == ElementType::kFloat32
               ? static_cast<float const*>(params.g.data)[at]
               : static_cast<float>(static_cast<Element const*>(params.g.data)[at]);
  }

  // The warp's pieces of q, k and E as the products read them: normalised, rows that are not the chunk's own zero
  // whatever lies there; E = b*k to the scratch tile.
  __device__ void prepare_tiles() {
    int const num_rows = uniform(smem.work.num_rows);
    auto& tokens = smem.tokens();
    auto& scratch = smem.scratch();
    GradientsPlace const place;
    bool const normalize = Cfg::kFused && params.gates.use_qk_l2norm;
    bool const use_sigmoid = Cfg::kFused && params.gates.use_gate_sigmoid;
    float const* const norms = normalize ? params.row_norms + work.tile * 2 * kChunk : nullptr;
    int const t = kHalfTokens * place.half_of_chunk + lane_index();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int const piece = 2 * place.warp + i;
      auto const at = [&](std::uint8_t* tile) {
        return reinterpret_cast<uint4*>(tile + swizzled_offset(t, piece));
      };
      if (t >= num_rows) {
        *at(tokens.q) = *at(tokens.k) = *at(scratch.E) = uint4{};
        continue;
      }
      uint4 k8 = *at(tokens.k), b8 = *at(tokens.b), E8;
      auto* const k = reinterpret_cast<std::uint32_t*>(&k8);
      auto* const b = reinterpret_cast<std::uint32_t*>(&b8);
      auto* const E = reinterpret_cast<std::uint32_t*>(&E8);
      if (normalize) {
        uint4 q8 = *at(tokens.q);
        auto* const q = reinterpret_cast<std::uint32_t*>(&q8);
        float const q_norm = norms[t], k_norm = norms[kChunk + t];
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          float2 const q2 = unpack<Element>(q[p]), k2 = unpack<Element>(k[p]);
          q[p] = pack<Element>(q2.x * q_norm, q2.y * q_norm);
          k[p] = pack<Element>(k2.x * k_norm, k2.y * k_norm);
        }
        *at(tokens.q) = q8;
        *at(tokens.k) = k8;
      }
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        if (use_sigmoid) {
          float2 const b2 = unpack<Element>(b[p]), k2 = unpack<Element>(k[p]);
          float const erase_scale = params.gates.erase_scale;
          E[p] = pack<Element>(erase_scale * sigmoid(b2.x) * k2.x, erase_scale * sigmoid(b2.y) * k2.y);
        } else {
          E[p] = multiply_pairs<Element>(b[p], k[p]);
        }
      }
      *at(scratch.E) = E8;
    }
  }

  // The decays inside groups, and over them. Both warpgroups read all of them: ends with the CTA's barrier.
  __device__ void prepare_decays() {
    int const num_rows = uniform(smem.work.num_rows);
    auto& tokens = smem.tokens();
    auto& scratch = smem.scratch();
    GradientsPlace const place;
    int const thread = place.thread % kWarpgroupThreads;
    float alpha[4 * kHalfGroups];
#pragma unroll
    for (int n = 0; n < 4 * kHalfGroups; ++n) {
      int const i = n / 4, half = n / 2 % 2, c = n % 2;
      float const raw = raw_gate(place, i, half, c);
      float const g = Cfg::kFused ? decay_gate(smem, params.gates, raw, place.channel(half)) : raw;
      alpha[n] = place.token(i, c) < num_rows ? exp2_approx(kLog2E * g) : 1.f;
    }
    __syncthreads();  // all of g has been read
#pragma unroll
    for (int n = 0; n < 2 * kHalfGroups; ++n) {
      int const i = n / 2, half = n % 2, j = place.group(i), ch = place.channel(half);
      float const a0 = alpha[2 * n], a1 = alpha[2 * n + 1];
      tokens.alpha[0][2 * j + half][thread] = a0;
      tokens.alpha[1][2 * j + half][thread] = a1;
      LaneDecay const lane = scan_lane_decays(a0, a1);
      scratch.F[2 * j + half][thread] = lane.F;
      scratch.B[2 * j + half][thread] = lane.B;
      if (place.quad == 0) {
        scratch.groups[j][ch].first = a0;
      }
      if (place.quad == 3) {
        scratch.groups[j][ch].rest = lane.F * a1;
      }
    }
    __syncthreads();
    // A thread a channel and direction. All is read before anything is written, or each read would wait for a write.
    int const ch = threadIdx.x % kChannels;
    bool const forwards = threadIdx.x < kChannels;
    if (forwards || threadIdx.x >= kThreads - kChannels) {
      GroupDecay groups[kGroups];
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        groups[j] = scratch.groups[j][ch];
      }
      float x = 1.f;
      if (forwards) {
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
          x *= groups[j].first;
          scratch.places[j][ch].before = x;
          x *= groups[j].rest;
        }
      } else {
#pragma unroll
        for (int j = kGroups - 1; j >= 0; --j) {
          scratch.places[j][ch].after = x;
          x *= groups[j].first * groups[j].rest;
        }
      }
    }
    __syncthreads();
  }

  // The products with S and dS' become their shares of dq, dE and dk, and of dg: reads of S by tokens r >= i and the
  // state that is carried through in dG, to be summed from the end; writes to S' by tokens s < i summed here.
  __device__ void finish_state_products(float const (&rowsums)[2]) {
    LaneReader const lane(smem);
    GradientsPlace const& place = lane.place;
    float written[2] = {0.f, 0.f};
#pragma unroll
    for (float& x : dG) {
      x = 0.f;
    }
#pragma unroll
    for (int i = 0; i < kHalfGroups; ++i) {
      if (lane.has_no_tokens(i)) {
        break;
      }
      GroupTokens const q(lane.q_lane, i), k(lane.k_lane, i), E(lane.E_lane, i);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const n = 4 * i + 2 * half;
        float2 const q2 = unpack<Element>(q.pairs[half]), k2 = unpack<Element>(k.pairs[half]),
                     E2 = unpack<Element>(E.pairs[half]);
        GroupPlace const group = lane.group_place(i, half);
        float const alpha1 = lane.alpha(i, half, 1);
        float const gamma0 = group.before * lane.F(i, half), gamma1 = gamma0 * alpha1;
        float const tail1 = group.after * lane.B(i, half), tail0 = tail1 * alpha1;
        dq[n] *= params.scale * gamma0;
        dq[n + 1] *= params.scale * gamma1;
        dE[n] *= -gamma0;
        dE[n + 1] *= -gamma1;
        dk[n] *= tail0;
        dk[n + 1] *= tail1;
        dG[n] = q2.x * dq[n] + E2.x * dE[n];
        dG[n + 1] = q2.y * dq[n + 1] + E2.y * dE[n + 1];
        float const write0 = k2.x * dk[n], write1 = k2.y * dk[n + 1];
        float all;
        float const before = written[half] + exclusive_sum<true>(write0 + write1, all);
        smem.dg_writes[n][place.thread] = before;
        smem.dg_writes[n + 1][place.thread] = before + write0;
        written[half] += all;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const ch = place.channel(half);
      if (place.half_of_chunk == 0) {
        if (place.quad == 0) {
          smem.first_writes[ch] = written[half];
        }
        continue;
      }
      constexpr int kLast = kHalfGroups - 1;
      float const gamma_last = lane.group_place(kLast, half).before * lane.group_decay(kLast, half).rest;
      float const carried = gamma_last * rowsums[half];
      if (place.quad == 3) {
        dG[4 * (kHalfGroups - 1) + 2 * half + 1] += carried;
      }
    }
  }

  // ---- outputs -----------------------------------------------------------------------------------------------

  // dG becomes dg: summed from the end of the half, and over the other half.
  __device__ void finish_decay_gradients() {
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
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const ch = place.channel(half);
      float const other = first ? smem.second_reads[ch] : smem.first_writes[ch];
#pragma unroll
      for (int i = 0; i < kHalfGroups; ++i) {
        dG[4 * i + 2 * half] += other;
        dG[4 * i + 2 * half + 1] += other;
      }
    }
  }

  // dg, through the gate where there is one.
  __device__ void store_decay_gradients() {
    int const num_rows = uniform(smem.work.num_rows);
    GradientsPlace const place;
    CallShape const& shape = params.shape;
    float dA_log[2] = {0.f, 0.f}, d_bias[2] = {0.f, 0.f};
    std::int64_t const first_row = work.token(shape) * shape.num_gate_heads + work.gate_head;
    std::int64_t const first = first_row * shape.dim_k + work.first_channel;
    int const row_stride = shape.num_gate_heads * shape.dim_k;  // from token to token
#pragma unroll
    for (int n = 0; n < 4 * kHalfGroups; ++n) {
      int const i = n / 4, half = n / 2 % 2, c = n % 2, t = place.token(i, c), ch = place.channel(half);
      if (t >= num_rows || work.first_channel + ch >= shape.dim_k) {
        continue;
      }
      float dg = dG[n];
      if (Cfg::kFused && params.gates.decay_gate != DecayGate::kNone) {
        float of_A_log;
        dg = decay_gate_backward(smem, params.gates, reload_raw_gate(place, i, half, c), ch, dg, of_A_log);
        dA_log[half] += of_A_log;
        d_bias[half] += dg;
      }
      if (params.dg != nullptr) {
        if (Cfg::kFused && params.gate_element != ElementType::kFloat32) {
          (static_cast<Element*>(params.dg) + first)[t * row_stride + ch] = round_to<Element>(dg);
        } else {
          (static_cast<float*>(params.dg) + first)[t * row_stride + ch] = dg;
        }
      }
    }
    if constexpr (Cfg::kFused) {
      store_sums(place, dA_log, d_bias);
    }
  }

  // Sums over tokens, to [num_slots, num_gate_heads, dim_k]: over the lanes of a channel, then both warpgroups.
  __device__ void store_sums(GradientsPlace const& place, float const (&dA_log)[2],
                             float const (&d_bias)[2]) {
    if (params.dA_log == nullptr && params.d_dt_bias == nullptr) {
      return;
    }
    // What the exchange of the other terms of dg has left free.
    __syncthreads();
    float all[2][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      exclusive_sum<true>(dA_log[half], all[0][half]);
      exclusive_sum<true>(d_bias[half], all[1][half]);
      if (place.half_of_chunk == 1 && place.quad == 0) {
        smem.first_writes[place.channel(half)] = all[0][half];
        smem.second_reads[place.channel(half)] = all[1][half];
      }
    }
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const ch = place.channel(half);
      if (place.half_of_chunk == 0 && place.quad == 0 && work.first_channel + ch < params.shape.dim_k) {
        std::int64_t const at = work.tile * params.shape.dim_k + work.first_channel + ch;
        if (params.dA_log != nullptr) {
          params.dA_log[at] = all[0][half] + smem.first_writes[ch];
        }
        if (params.d_dt_bias != nullptr) {
          params.d_dt_bias[at] = all[1][half] + smem.second_reads[ch];
        }
      }
    }
  }

  // dE becomes db, and dk takes its share; through the sigmoid of b where there is one.
  __device__ void finish_erase_gradients() {
    auto& tokens = smem.tokens();
    GradientsPlace const place;
    float const erase_scale = params.gates.erase_scale;
    bool const use_sigmoid = Cfg::kFused && params.gates.use_gate_sigmoid;
#pragma unroll
    for (int pair = 0; pair < kHalfGroups / 2; ++pair) {
      GroupPair const k(lane_address(place, tokens.k), 2 * pair), b(lane_address(place, tokens.b), 2 * pair);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        int const i = 2 * pair + m / 2, half = m % 2, n = 4 * i + 2 * half;
        float2 const k2 = unpack<Element>(k.at(i, half));
        float2 b2 = unpack<Element>(b.at(i, half));
        float2 slope{1.f, 1.f};
        if (use_sigmoid) {
          float2 const s{sigmoid(b2.x), sigmoid(b2.y)};
          b2 = {erase_scale * s.x, erase_scale * s.y};
          slope = {b2.x * (1.f - s.x), b2.y * (1.f - s.y)};
        }
        dk[n] += b2.x * dE[n];
        dk[n + 1] += b2.y * dE[n + 1];
        dE[n] *= k2.x * slope.x;
        dE[n + 1] *= k2.y * slope.y;
      }
    }
  }

  // x[i] + x[kKeep + i] of two lanes, one the lower and one the upper half of the sums.
  template <int kKeep>
  __device__ static void halve_sums(float (&x)[2 * kHalfGroups], bool upper, int lane_distance) {
#pragma unroll
    for (int i = 0; i < kKeep; ++i) {
      float const low = x[i], high = x[kKeep + i];
      x[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffff, upper ? low : high, lane_distance);
    }
  }

  // Through the norms: with y the normalised row and n its norm, dx = (dy - y (y.dy)) / n. The sums over channels go
  // over lanes, warps, and the CTA of the other channels.
  __device__ void finish_norm_gradients() {
    auto& tokens = smem.tokens();
    GradientsPlace const place;
    float dots[2][2 * kHalfGroups];  // [of q, of k][2*i + c]
#pragma unroll
    for (int pair = 0; pair < kHalfGroups / 2; ++pair) {
      GroupPair const q(lane_address(place, tokens.q), 2 * pair), k(lane_address(place, tokens.k), 2 * pair);
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        int const i = 2 * pair + g;
        float2 const q0 = unpack<Element>(q.at(i, 0)), q1 = unpack<Element>(q.at(i, 1));
        float2 const k0 = unpack<Element>(k.at(i, 0)), k1 = unpack<Element>(k.at(i, 1));
        dots[0][2 * i] = q0.x * dq[4 * i] + q1.x * dq[4 * i + 2];
        dots[0][2 * i + 1] = q0.y * dq[4 * i + 1] + q1.y * dq[4 * i + 3];
        dots[1][2 * i] = k0.x * dk[4 * i] + k1.x * dk[4 * i + 2];
        dots[1][2 * i + 1] = k0.y * dk[4 * i + 1] + k1.y * dk[4 * i + 3];
      }
    }
    __syncthreads();  // every warp is done with dP and dT
    // Each step halves the tokens that a lane has sums of: at the end one of q's and one of k's, index row.
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      halve_sums<4>(dots[which], place.row & 4, 16);
      halve_sums<2>(dots[which], place.row & 2, 8);
      halve_sums<1>(dots[which], place.row & 1, 4);
    }
    *reinterpret_cast<float2*>(smem.dots.of_warp[place.warp][place.token(place.row / 2, place.row % 2)]) =
        float2{dots[0][0], dots[1][0]};
    auto const cluster = cooperative_groups::this_cluster();
    cluster.sync();
    if (threadIdx.x < 2 * kChunk) {
      int const t = threadIdx.x / 2, which = threadIdx.x % 2;
      float sum = 0.f;
      for (int box = 0; box < work.num_boxes; ++box) {
        auto const& of_box = *cluster.map_shared_rank(&smem.dots, box);
        for (auto const& of_warp : of_box.of_warp) {
          sum += of_warp[t][which];
        }
      }
      smem.dots.all[t][which] = sum;
    }
    cluster.sync();  // all of them are there, and nobody reads the other CTA's memory any more
    float const* const norms = params.row_norms + work.tile * 2 * kChunk;
#pragma unroll
    for (int pair = 0; pair < kHalfGroups / 2; ++pair) {
      GroupPair const q(lane_address(place, tokens.q), 2 * pair), k(lane_address(place, tokens.k), 2 * pair);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        int const i = 2 * pair + m / 2, half = m % 2, n = 4 * i + 2 * half;
        float2 const q2 = unpack<Element>(q.at(i, half)), k2 = unpack<Element>(k.at(i, half));
        int const t = place.token(i, 0);
        float2 const dots0 = *reinterpret_cast<float2 const*>(smem.dots.all[t]);
        float2 const dots1 = *reinterpret_cast<float2 const*>(smem.dots.all[t + 1]);
        dq[n] = (dq[n] - q2.x * dots0.x) * norms[t];
        dq[n + 1] = (dq[n + 1] - q2.y * dots1.x) * norms[t + 1];
        dk[n] = (dk[n] - k2.x * dots0.y) * norms[kChunk + t];
        dk[n + 1] = (dk[n + 1] - k2.y * dots1.y) * norms[kChunk + t + 1];
      }
    }
  }

  // The rounded gradient over the warp's part of the tile of its input.
  __device__ void store_tile(std::uint8_t* tile, HalfAccumulators const& acc) const {
    GradientsPlace const place;
#pragma unroll
    for (int pair = 0; pair < kHalfGroups / 2; ++pair) {
      std::uint32_t r[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        int const n = 4 * (2 * pair + m % 2) + 2 * (m / 2);
        r[m] = pack<Element>(acc[n], acc[n + 1]);
      }
      store_matrices_transposed(r, tile, kGroup * place.group(2 * pair), 2 * place.warp);
    }
  }

  // dq or dk for every gate head, float32 [batch, seqlen, num_gate_heads, dim_k].
  __device__ void store_partial(void* out, HalfAccumulators const& acc) const {
    int const num_rows = uniform(smem.work.num_rows);
    GradientsPlace const place;
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

// The chunk's own rows of a gradient [batch, seqlen, heads, dim_k], from its tile.
template <class Element>
__device__ void store_rows(void* out, CUtensorMap const& map, std::uint8_t const* tile,
                           CallShape const& shape, GradientsWork const& work, int head, int heads) {
  if (out == nullptr) {
    return;
  }
  if (work.num_rows == kChunk && shape.dim_k % 8 == 0) {
    if (threadIdx.x == 0) {
      cute::SM90_TMA_STORE::copy(&map, tile, work.first_channel, head, work.first_token, work.batch);
    }
    return;
  }
  // A tail must not touch the next sequence's rows, and a copy needs rows of whole 16 bytes.
  int const piece = threadIdx.x % 8, channel = work.first_channel + 8 * piece, count = shape.dim_k - channel;
  for (int row = threadIdx.x / 8; row < work.num_rows && count > 0; row += kThreads / 8) {
    std::int64_t const token = static_cast<std::int64_t>(work.batch) * shape.seqlen + work.first_token + row;
    store_piece(static_cast<Element*>(out) + (token * heads + head) * shape.dim_k + channel,
                *reinterpret_cast<uint4 const*>(tile + swizzled_offset(row, piece)), count,
                shape.dim_k % 8 == 0);
  }
}

// ---- rows that no sequence owns, behind the last well-formed one: NaN ----------------------------------------

template <class Value>
__device__ void poison(void* out, std::int64_t first, std::int64_t count) {
  if (out == nullptr) {
    return;
  }
  for (std::int64_t i = threadIdx.x; i < count; i += kThreads) {
    static_cast<Value*>(out)[first + i] = static_cast<Value>(__int_as_float(0x7fffffff));
  }
}

template <class Cfg>
__device__ void poison_unowned_rows(GradientsParams const& params) {
  using Element = typename Cfg::Element;
  CallShape const& shape = params.shape;
  SequenceSpan const last = params.plan.spans[shape.num_sequences - 1];
  std::int64_t const first = last.first_token + max(last.num_tokens, 0);
  for (std::int64_t row = first + blockIdx.x; row < shape.seqlen; row += gridDim.x) {
    auto const of_keys = [&](void* out, int heads, bool wide) {
      std::int64_t const width = static_cast<std::int64_t>(heads) * shape.dim_k;
      wide ? poison<float>(out, row * width, width) : poison<Element>(out, row * width, width);
    };
    bool const partial = shape.num_gate_heads != shape.num_heads;
    of_keys(params.dq, shape.num_gate_heads, partial);
    of_keys(params.dk, shape.num_gate_heads, partial);
    of_keys(params.db, shape.num_gate_heads, false);
    of_keys(params.dg, shape.num_gate_heads, params.gate_element == ElementType::kFloat32);
    std::int64_t const width = static_cast<std::int64_t>(shape.num_value_heads) * shape.dim_v;
    poison<Element>(params.dv, row * width, width);
    poison<Element>(params.dw, row * width, width);
  }
}

// A slot without tokens adds nothing to dA_log and d_dt_bias.
__device__ void store_no_sums(GradientsParams const& params, GradientsWork const& work) {
  int const channel = work.first_channel + threadIdx.x;
  for (float* const sums : {params.dA_log, params.d_dt_bias}) {
    if (sums != nullptr && threadIdx.x < kChannels && channel < params.shape.dim_k) {
      sums[work.tile * params.shape.dim_k + channel] = 0.f;
    }
  }
}

// ---- kernel ------------------------------------------------------------------------------------------------

template <class Cfg>
__global__ void __launch_bounds__(kThreads, 2)
    gradients_kernel(__grid_constant__ GradientsParams const params,
                     __grid_constant__ TensorMaps const maps) {
  using Element = typename Cfg::Element;
  extern __shared__ std::uint8_t smem_bytes[];
  auto& smem = *reinterpret_cast<GradientsStorage*>(smem_bytes);
  wait_for_earlier_kernels();  // scan_backward
  if (threadIdx.x == 0) {
    smem.work = GradientsWork(params);
  }
  __syncthreads();
  GradientsWork const& work = smem.work;  // where it costs no registers
  int const num_rows = uniform(work.num_rows);
  if (params.plan.spans != nullptr) {
    poison_unowned_rows<Cfg>(params);
  }
  if (num_rows == 0) {  // a slot without a chunk
    store_no_sums(params, work);
    return;
  }
  int const num_slices = work.heads_per_gate * work.num_slices;
  auto const load = [&](int index) {
    int const stage = (num_slices - index) % kStages;
    if (index < num_slices) {
      load_slice(smem, stage, params, maps, work, index);
    } else if (index == num_slices) {
      load_tokens(smem, stage, maps, work, params.gate_element);
    }
  };
  if (threadIdx.x == 0) {
    for (FullBarrier& full : smem.full) {
      full.init(1);
    }
    cutlass::arch::fence_barrier_init();
    load(0);
    load(1);
  }
  __syncthreads();

  if constexpr (Cfg::kFused) {
    load_gate_parameters(smem, params);  // read behind the barriers of the slices
  }

  GradientsPlace const place;
  Products products;
  for (int index = 0; index < num_slices; ++index) {
    int const stage = (num_slices - index) % kStages;
    auto& slice = smem.stages[stage].slice;
    bool const has_values = index % work.num_boxes == work.box;  // else the CTA of the other channels
    ValueGradients<Cfg> const values(params, work, index);
    if (has_values) {
      values.prefetch();
    }
    smem.full[stage].wait(index / kStages % 2);
    if (num_rows < kChunk) {
      clear_foreign_rows(slice.dO, num_rows);
    }
    multiply_slice<Element>(products, slice, place, index > 0);
    if (has_values) {
      values.store(slice.dX);
    }
    __syncthreads();  // every warp is done with the slice
    if (threadIdx.x == 0) {
      load(index + kStages);
    }
  }
  float const rowsums[2] = {S_dS_rowsum(products, place, 0), S_dS_rowsum(products, place, 1)};
  place.half_of_chunk == 0 ? store_matrix<Element>(smem.dP, products.dM, params.scale, place)
                           : store_matrix<Element>(smem.dT, products.dM, -1.f, place);

  smem.full[0].wait(num_slices / kStages % 2);
  HalfAccumulators &dq = products.S_dO, &dE = products.S_dX, &dk = products.dS_R;
  HalfAccumulators dG;
  Channels<Cfg> x{smem, params, work, dq, dE, dk, dG};
  x.prepare_tiles();
  x.prepare_decays();
  x.finish_state_products(rowsums);
  PairGradients<Element>(smem, dq, dE, dk, dG).run();
  if (params.dg != nullptr || params.dA_log != nullptr || params.d_dt_bias != nullptr) {
    x.finish_decay_gradients();
    x.store_decay_gradients();
  }
  if (params.dk != nullptr || params.db != nullptr) {
    x.finish_erase_gradients();
  }
  if (Cfg::kFused && params.gates.use_qk_l2norm) {
    x.finish_norm_gradients();
  }

  CallShape const& shape = params.shape;
  bool const partial = shape.num_gate_heads != shape.num_heads;
  __syncthreads();  // the other half reads the tiles of the inputs no more
  auto& tokens = smem.tokens();
  if (partial) {
    x.store_partial(params.dq, dq);
    x.store_partial(params.dk, dk);
  } else {
    x.store_tile(tokens.q, dq);
    x.store_tile(tokens.k, dk);
  }
  x.store_tile(tokens.b, dE);
  cutlass::arch::fence_view_async_shared();  // the tiles' ordinary stores, before the copy engine reads them
  __syncthreads();
  if (!partial) {
    store_rows<Element>(params.dq, maps.dq, tokens.q, shape, work, work.head, shape.num_heads);
    store_rows<Element>(params.dk, maps.dk, tokens.k, shape, work, work.head, shape.num_heads);
  }
  store_rows<Element>(params.db, maps.db, tokens.b, shape, work, work.gate_head, shape.num_gate_heads);
  if (threadIdx.x == 0) {
    cute::tma_store_arrive();
    cute::tma_store_wait<0>();  // the tiles have been read
  }
}

// A contiguous gradient [batch, seqlen, heads, channels].
CUtensorMap gradient_map(void* out, CallShape const& shape, int heads, int channels) {
  std::int64_t const row = static_cast<std::int64_t>(heads) * channels;
  return token_map({out, shape.seqlen * row, row, channels}, shape, heads, channels, shape.element);
}

template <class Cfg>
void launch(GradientsParams const& params, cudaStream_t stream) {
  CallShape const& shape = params.shape;
  TensorMaps maps{.q = token_map(params.q, shape, shape.num_heads, shape.dim_k, shape.element),
                  .k = token_map(params.k, shape, shape.num_heads, shape.dim_k, shape.element),
                  .b = token_map(params.b, shape, shape.num_gate_heads, shape.dim_k, shape.element),
                  .g = token_map(params.g, shape, shape.num_gate_heads, shape.dim_k, params.gate_element),
                  .dO = token_map(params.dO, shape, shape.num_value_heads, shape.dim_v, shape.element)};
  if (shape.dim_k % 8 == 0) {
    bool const partial = shape.num_gate_heads != shape.num_heads;
    if (params.dq != nullptr && !partial) {
      maps.dq = gradient_map(params.dq, shape, shape.num_heads, shape.dim_k);
    }
    if (params.dk != nullptr && !partial) {
      maps.dk = gradient_map(params.dk, shape, shape.num_heads, shape.dim_k);
    }
    if (params.db != nullptr) {
      maps.db = gradient_map(params.db, shape, shape.num_gate_heads, shape.dim_k);
    }
  }
  auto const kernel = gradients_kernel<Cfg>;
  constexpr int kSmemBytes = sizeof(GradientsStorage);
  static_assert(2 * (kSmemBytes + 1024) <= 228 * 1024);
  throw_on_error(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes),
                 "gradients: shared memory");
  unsigned const boxes = shape.dim_k > kChannels ? 2 : 1;
  cudaLaunchAttribute attributes[2] = {overlapping_launch()};
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {Cfg::kFused && params.gates.use_qk_l2norm ? boxes : 1, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(shape.num_slots) * shape.num_gate_heads * boxes;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = kSmemBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  throw_on_error(cudaLaunchKernelEx(&config, kernel, params, maps), "gradients: launch");
}

template <class Element>
void dispatch(GradientsParams const& params, cudaStream_t stream) {
  GateParams const& gates = params.gates;
  bool const fused = gates.use_qk_l2norm || gates.use_gate_sigmoid || gates.decay_gate != DecayGate::kNone ||
                     params.gate_element != ElementType::kFloat32;
  fused ? launch<Config<Element, true>>(params, stream) : launch<Config<Element, false>>(params, stream);
}

}  // namespace

void run_gradients(GradientsParams const& params, cudaStream_t stream) {
  if (params.shape.num_slots == 0 || params.shape.seqlen == 0) {
    return;
  }
  params.shape.element == ElementType::kFloat16 ? dispatch<__half>(params, stream)
                                                : dispatch<__nv_bfloat16>(params, stream);
}

}  // namespace gdn2
