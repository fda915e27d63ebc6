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
// Grid: one CTA for a chunk slot, gate head and 64 channels, channels fastest; 128 threads, two CTAs an SM. Where the L2
// norm asks for sums over 128 channels, the CTAs of both halves are a cluster.
// Roles: one warpgroup. Products by wgmma over the value heads of the group and slices of 64 value columns: dP and dT
// with tokens on the rows, dO S^T, dX S^T and R dS'^T transposed, channels on the rows: 160 accumulators a thread. Then
// each warp has 16 channels x 64 tokens for itself, where the rounded factors of the pair products are fragments of the
// tensor cores in the very threads that need them for dg.
// Shared memory: two stages of 40 KB (S, dS', dO, R, dX of a slice; after the last slice q, k, b, g), dP and dT 16 KB,
// decays over groups 4 KB: 101 KB.
//
//     slice 0 | slice 1 | .. | dP, dT out | gamma, tail | levels 1 2 4 in groups of 8 tokens | 8 16 32 | sums, norms, out
#include <cooperative_groups.h>
#include <cutlass/arch/barrier.h>

#include "api/chunk_backward.h"
#include "api/cuda_error.h"
#include "sm90/token_map.h"
#include "tile/activation.cuh"
#include "tile/convert.cuh"
#include "tile/decay_levels.cuh"
#include "tile/mma.cuh"
#include "tile/pipeline.cuh"
#include "tile/tma.cuh"
#include "tile/wgmma.cuh"

namespace gdn2 {
namespace {

constexpr int kChunk = 64;
constexpr int kChannels = 64;  // of a CTA
constexpr int kColumns = 64;   // value columns of a slice
constexpr int kThreads = kWarpgroupThreads;
constexpr int kWarps = kThreads / kWarpThreads;
constexpr int kBoxBytes = kChunk * kBoxRowBytes;
constexpr int kStages = 2;

template <class Element_, bool kFused_>
struct Config {
  using Element = Element_;
  static constexpr bool kFused = kFused_;  // norms, gates, sigmoids or a 16-bit g may be asked for
};

struct SharedStorage {
  struct Slice {
    std::uint8_t S[kBoxBytes], dS[kBoxBytes], dO[kBoxBytes], R[kBoxBytes], dX[kBoxBytes];
  };
  struct Tokens {
    std::uint8_t q[kBoxBytes], k[kBoxBytes], b[kBoxBytes];
    std::uint8_t g[2][kBoxBytes];  // float32; the first one where g is 16 bits wide
  };
  struct Scratch {  // in the stage that no slice and no tokens need
    std::uint8_t E[kBoxBytes];
    float dg_writes[4 * kGroups][kThreads];
    // Of the lane's first token of a group: alpha, and the decay from the group's first token to it.
    float alpha0[2 * kGroups][kThreads], F[2 * kGroups][kThreads];
  };
  union alignas(kSwizzleAtomBytes) Stage {
    Slice slice;
    Tokens tokens;
    Scratch scratch;
  };
  Stage stages[kStages];
  struct RowDots {  // of the rows of q and k with their gradients: over a warp's channels, over all
    float of_warp[kWarps][kChunk][2], all[kChunk][2];
  };
  union {
    struct {
      std::uint8_t dP[kBoxBytes], dT[kBoxBytes];  // scale*dP, and dT; rounded, rows r
    };
    RowDots dots;  // after the pair products
  };
  GroupDecay groups[kGroups][kChannels];
  GroupPlace places[kGroups][kChannels];
  float B[2 * kGroups][kThreads];  // from the lane's second token of a group to the group's last
  FullBarrier full[kStages];
};

struct TensorMaps {
  CUtensorMap q, k, b, g, dO;
  CUtensorMap dq, dk, db;
};

// What one CTA works on.
struct Work {
  int batch, first_token, num_rows;  // rows beyond num_rows belong to nobody here
  int slot, box, first_channel;
  int head, gate_head, num_boxes;
  int heads_per_gate, num_slices;  // value heads that share the gate head; slices of each
  std::int64_t tile;               // index of the slot and gate head
};

__device__ Work find_work(GradientsParams const& params) {
  CallShape const& shape = params.shape;
  Work work;
  work.num_boxes = shape.dim_k > kChannels ? 2 : 1;
  work.box = blockIdx.x % work.num_boxes;
  work.first_channel = work.box * kChannels;
  work.tile = blockIdx.x / work.num_boxes;
  work.slot = static_cast<int>(work.tile / shape.num_gate_heads);
  work.gate_head = static_cast<int>(work.tile % shape.num_gate_heads);
  work.head = work.gate_head / (shape.num_gate_heads / shape.num_heads);
  work.heads_per_gate = shape.num_value_heads / shape.num_gate_heads;
  work.num_slices = (shape.dim_v + kColumns - 1) / kColumns;
  if (params.plan.slots != nullptr) {
    ChunkSlot const at = params.plan.slots[work.slot];
    work.batch = 0;
    work.first_token = at.first_token;
    work.num_rows = at.num_rows;
  } else {
    int const chunks = shape.num_slots / shape.batch;
    work.batch = work.slot / chunks;
    work.first_token = work.slot % chunks * kChunk;
    work.num_rows = min(kChunk, shape.seqlen - work.first_token);
  }
  return work;
}

// A slice: 64 columns of one of the value heads.
struct SliceIndex {
  int value_head, slice;
  std::int64_t tile;  // among the tiles of all slots, value heads and slices

  __device__ SliceIndex(CallShape const& shape, Work const& work, int index)
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

__device__ void load_slice(SharedStorage& smem, int stage, GradientsParams const& params,
                           TensorMaps const& maps, Work const& work, int index) {
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

__device__ void load_tokens(SharedStorage& smem, int stage, TensorMaps const& maps, Work const& work,
                            ElementType gate_element) {
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
using Accumulators = float[4 * kGroups];

struct Products {
  Accumulators dP, dT;            // [tokens, tokens]
  Accumulators S_dO, S_dX, dS_R;  // [channels, tokens]: S dO^T, S dX^T, dS' R^T
  float S_dS[2][4] = {};          // [16 channels, 8 of them]: S dS'^T, of which the diagonal is asked for
};

template <class Element>
__device__ void multiply_slice(Products& x, SharedStorage::Slice const& slice, bool accumulate) {
  auto const S = shared_descriptor<Major::MN>(slice.S), dS = shared_descriptor<Major::MN>(slice.dS);
  auto const dO = shared_descriptor<Major::K>(slice.dO), R = shared_descriptor<Major::K>(slice.R),
             dX = shared_descriptor<Major::K>(slice.dX);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kColumns / 16; ++step) {
    int const along_row = step * 32 >> 4, along_column = step * 16 * kBoxRowBytes >> 4;
    bool const add = accumulate || step > 0;
    wgmma_shared<Element>(x.dP, dO + along_row, R + along_row, add);
    wgmma_shared<Element>(x.dT, dX + along_row, R + along_row, add);
    wgmma_shared<Element, Major::MN>(x.S_dO, S + along_column, dO + along_row, add);
    wgmma_shared<Element, Major::MN>(x.S_dX, S + along_column, dX + along_row, add);
    wgmma_shared<Element, Major::MN>(x.dS_R, dS + along_column, R + along_row, add);
  }
  wgmma_commit();
  wgmma_wait<0>();
  int const piece = 2 * (threadIdx.x / kWarpThreads);
#pragma unroll
  for (int step = 0; step < kColumns / 16; ++step) {
    std::uint32_t s[4], ds[4];
    load_matrices_transposed(s, slice.S, 16 * step, piece);
    load_matrices_transposed(ds, slice.dS, 16 * step, piece);
    std::uint32_t const a[4] = {s[0], s[2], s[1], s[3]};
    mma_16x8x16<Element>(x.S_dS[0], a, ds[0], ds[1]);
    mma_16x8x16<Element>(x.S_dS[1], a, ds[2], ds[3]);
  }
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

// dv = w*dX and dw = v*dX (and through the sigmoid of w) of a slice.
template <class Cfg>
__device__ void store_value_gradients(std::uint8_t const* dX_tile, GradientsParams const& params,
                                      Work const& work, int index) {
  using Element = typename Cfg::Element;
  CallShape const& shape = params.shape;
  SliceIndex const at(shape, work, index);
  int const piece = threadIdx.x % 8;
  int const column = at.slice * kColumns + 8 * piece, count = shape.dim_v - column;
  if (count <= 0) {
    return;
  }
  auto const row_of = [&](TokenTensor const& x, int row) {
    return static_cast<Element const*>(x.data) + work.batch * x.stride_batch +
           (work.first_token + row) * x.stride_token + at.value_head * x.stride_head + column;
  };
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int const row = threadIdx.x / 8 + 16 * i;
    if (row >= work.num_rows) {
      break;
    }
    uint4 const v8 = load_piece(row_of(params.v, row), count), w8 = load_piece(row_of(params.w, row), count);
    uint4 const dX8 = *reinterpret_cast<uint4 const*>(dX_tile + swizzled_offset(row, piece));
    auto const* const v = reinterpret_cast<std::uint32_t const*>(&v8);
    auto const* const w = reinterpret_cast<std::uint32_t const*>(&w8);
    auto const* const dX = reinterpret_cast<std::uint32_t const*>(&dX8);
    uint4 dv8, dw8;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      float2 const v2 = unpack<Element>(v[p]), dX2 = unpack<Element>(dX[p]);
      float2 w2 = unpack<Element>(w[p]), dw2{v2.x * dX2.x, v2.y * dX2.y};
      if (Cfg::kFused && params.gates.use_gate_sigmoid) {
        w2 = {sigmoid(w2.x), sigmoid(w2.y)};
        dw2 = {dw2.x * w2.x * (1.f - w2.x), dw2.y * w2.y * (1.f - w2.y)};
      }
      reinterpret_cast<std::uint32_t*>(&dv8)[p] = pack<Element>(w2.x * dX2.x, w2.y * dX2.y);
      reinterpret_cast<std::uint32_t*>(&dw8)[p] = pack<Element>(dw2.x, dw2.y);
    }
    std::int64_t const token = static_cast<std::int64_t>(work.batch) * shape.seqlen + work.first_token + row;
    std::int64_t const place = (token * shape.num_value_heads + at.value_head) * shape.dim_v + column;
    bool const aligned = shape.dim_v % 8 == 0;
    if (params.dv != nullptr) {
      store_piece(static_cast<Element*>(params.dv) + place, dv8, count, aligned);
    }
    if (params.dw != nullptr) {
      store_piece(static_cast<Element*>(params.dw) + place, dw8, count, aligned);
    }
  }
}

// The rounded matrix to its tile [rows r][columns s].
template <class Element>
__device__ void store_matrix(std::uint8_t* tile, Accumulators const& acc, float factor) {
  int const lane = lane_index(), warp = threadIdx.x / kWarpThreads;
#pragma unroll
  for (int i = 0; i < 2 * kGroups; ++i) {
    int const row = 16 * warp + lane / 4 + 8 * (i % 2);
    *reinterpret_cast<std::uint32_t*>(tile + swizzled_offset(row, i / 2) + lane % 4 * 4) =
        pack<Element>(factor * acc[2 * i], factor * acc[2 * i + 1]);
  }
}

// ---- the warp's channels -----------------------------------------------------------------------------------

// q, k or E of two groups of eight tokens and the warp's channels: pairs[group % 2 + 2*half], two tokens each.
struct GroupPair {
  std::uint32_t pairs[4];

  __device__ GroupPair(std::uint8_t const* tile, int pair) {
    load_matrices_transposed(pairs, tile, 2 * kGroup * pair, 2 * (threadIdx.x / kWarpThreads));
  }
  __device__ std::uint32_t at(int group, int half) const { return pairs[group % 2 + 2 * half]; }
};

// The gates of a thread's two channels, as prepare applies them.
template <class Cfg>
struct DecayGateOf {
  GateParams const& gates;
  float bias[2] = {0.f, 0.f};
  float rate = 1.f;

  __device__ DecayGateOf(GradientsParams const& params, int head, int channel) : gates(params.gates) {
    if (!Cfg::kFused || gates.decay_gate == DecayGate::kNone) {
      return;
    }
    int const dim_k = params.shape.dim_k;
    if (gates.dt_bias != nullptr) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const c = channel + 8 * half;
        bias[half] = c < dim_k ? gates.dt_bias[static_cast<std::int64_t>(head) * dim_k + c] : 0.f;
      }
    }
    rate = gates.A_log != nullptr ? __expf(gates.A_log[head]) : 1.f;
  }

  // g of the raw projection
  __device__ float decay(float raw, int half) const {
    if (gates.decay_gate == DecayGate::kSoftplus) {
      return -rate * softplus(raw + bias[half]);
    }
    if (gates.decay_gate == DecayGate::kLowerBound) {
      return gates.lower_bound * sigmoid(rate * (raw + bias[half]));
    }
    return raw;
  }

  // Gradient of the raw projection, and what dg adds to dA_log; zero where nothing moves any more.
  __device__ float backward(float raw, float dg, int half, float& dA_log) const {
    float const u = raw + bias[half];
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
};

// One warp's 16 channels x 64 tokens, after the products over value columns.
template <class Cfg>
struct Channels {
  using Element = typename Cfg::Element;

  SharedStorage& smem;
  SharedStorage::Tokens& tokens;
  SharedStorage::Scratch& scratch;
  GradientsParams const& params;
  Work const& work;
  Accumulators &dq, &dE, &dk;  // [16 channels, tokens]; start as dO S^T, dX S^T and R dS'^T transposed
  LaneDecays decays;
  Accumulators dG;

  __device__ static int warp() { return threadIdx.x / kWarpThreads; }
  __device__ static int row() { return lane_index() / 4; }
  __device__ static int quad() { return lane_index() % 4; }
  // Of the CTA's channels, and of its tokens.
  __device__ static int channel(int half) { return kWarpChannels * warp() + row() + 8 * half; }
  __device__ static int token(int j, int c) { return kGroup * j + 2 * quad() + c; }

  // The two groups lie behind the chunk's last row. (Asking also keeps ptxas from mixing the loads of one pair of groups
  // into another's: without it it spills 30 registers.)
  __device__ bool has_no_tokens(int pair) const { return work.num_rows <= 2 * kGroup * pair; }

  __device__ GroupDecay group_decay(int j, int half) const { return smem.groups[j][channel(half)]; }

  __device__ float raw_gate(int j, int half, int c) const {
    int const t = token(j, c), ch = channel(half);
    if (Cfg::kFused && params.gate_element != ElementType::kFloat32) {
      auto const* const place = tokens.g[0] + swizzled_offset(t, ch / 8) + ch % 8 * sizeof(Element);
      return static_cast<float>(*reinterpret_cast<Element const*>(place));
    }
    return *reinterpret_cast<float const*>(tokens.g[ch / 32] + swizzled_offset(t, ch % 32 / 4) + ch % 4 * 4);
  }

  // The warp's pieces of q, k and E as the products read them: normalised, rows that are not the chunk's own zero
  // whatever lies there; E = b*k to the scratch tile.
  __device__ void prepare_tiles() {
    bool const normalize = Cfg::kFused && params.gates.use_qk_l2norm;
    bool const use_sigmoid = Cfg::kFused && params.gates.use_gate_sigmoid;
    float const* const norms = normalize ? params.row_norms + work.tile * 2 * kChunk : nullptr;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int const t = lane_index() + kWarpThreads * (i / 2), piece = 2 * warp() + i % 2;
      auto const at = [&](std::uint8_t* tile) {
        return reinterpret_cast<uint4*>(tile + swizzled_offset(t, piece));
      };
      uint4 k8 = *at(tokens.k), b8 = *at(tokens.b), E8;
      auto* const k = reinterpret_cast<std::uint32_t*>(&k8);
      auto* const b = reinterpret_cast<std::uint32_t*>(&b8);
      auto* const E = reinterpret_cast<std::uint32_t*>(&E8);
      bool const inside = t < work.num_rows;
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
      if (!inside) {
        *at(tokens.q) = uint4{};
        *at(tokens.k) = uint4{};
        E8 = uint4{};
      }
      *at(scratch.E) = E8;
    }
    __syncwarp();
  }

  // alpha, and the decays over groups.
  __device__ void load_decays(DecayGateOf<Cfg> const& gate) {
    float alpha[4 * kGroups];
#pragma unroll
    for (int i = 0; i < 4 * kGroups; ++i) {
      int const j = i / 4, half = i / 2 % 2, c = i % 2;
      float raw = raw_gate(j, half, c);
      if constexpr (Cfg::kFused) {
        raw = gate.decay(raw, half);
      }
      alpha[i] = token(j, c) < work.num_rows ? exp2_approx(kLog2E * raw) : 1.f;
      if (c == 0) {
        scratch.alpha0[i / 2][threadIdx.x] = alpha[i];
      }
    }
    decays.scan_groups(
        alpha, [&](int j, int half, float x) { smem.groups[j][channel(half)].first = x; },
        [&](int j, int half, float x) { smem.groups[j][channel(half)].rest = x; },
        [&](int i, float f, float b) {
          scratch.F[i][threadIdx.x] = f;
          smem.B[i][threadIdx.x] = b;
        });
    __syncwarp();
    // A lane a channel: half of the warp forwards, half backwards.
    int const ch = kWarpChannels * warp() + lane_index() % kWarpChannels;
    if (lane_index() < kWarpChannels) {
      float before = 1.f;
      for (int j = 0; j < kGroups; ++j) {
        GroupDecay const group = smem.groups[j][ch];
        before *= group.first;
        smem.places[j][ch].before = before;
        before *= group.rest;
      }
    } else {
      float after = 1.f;
      for (int j = kGroups - 1; j >= 0; --j) {
        GroupDecay const group = smem.groups[j][ch];
        smem.places[j][ch].after = after;
        after *= group.first * group.rest;
      }
    }
    __syncwarp();
  }

  // The products with S and dS' become their shares of dq, dE and dk, and of dg: reads of S by tokens r >= i and the
  // state that is carried through in dG, to be summed from the end; writes to S' by tokens s < i summed here.
  __device__ void finish_state_products(float const (&S_dS)[2][4]) {
    float written[2] = {0.f, 0.f};
#pragma unroll
    for (float& x : dG) {
      x = 0.f;
    }
#pragma unroll
    for (int pair = 0; pair < kGroups / 2; ++pair) {
      if (has_no_tokens(pair)) {
        break;
      }
      GroupPair const q(tokens.q, pair), k(tokens.k, pair), E(scratch.E, pair);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int const j = 2 * pair + i / 2, half = i % 2, n = 4 * j + 2 * half;
        float2 const q2 = unpack<Element>(q.at(j, half)), k2 = unpack<Element>(k.at(j, half)),
                     E2 = unpack<Element>(E.at(j, half));
        float const alpha1 = decays.alpha1[n / 2];
        GroupPlace const place = smem.places[j][channel(half)];
        float const gamma0 = place.before * scratch.F[n / 2][threadIdx.x], gamma1 = gamma0 * alpha1;
        float const tail1 = place.after * smem.B[n / 2][threadIdx.x], tail0 = tail1 * alpha1;
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
        scratch.dg_writes[n][threadIdx.x] = before;
        scratch.dg_writes[n + 1][threadIdx.x] = before + write0;
        written[half] += all;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // The diagonal: row lane/4, column 2*(lane%4) + c of the half's eight.
      float const diagonal = row() % 2 ? S_dS[half][2 * half + 1] : S_dS[half][2 * half];
      float const gamma_last =
          smem.places[kGroups - 1][channel(half)].before * group_decay(kGroups - 1, half).rest;
      float const carried = gamma_last * from_quad_lane(diagonal, row() / 2);
      if (quad() == 3) {
        dG[4 * (kGroups - 1) + 2 * half + 1] += carried;
      }
    }
  }

  // ---- pair products -----------------------------------------------------------------------------------------

  // Two factors, rounded once for all of their products.
  __device__ static std::uint32_t factors(float x, float y) { return pack<Element>(x, y); }
  __device__ static std::uint32_t times(std::uint32_t a, std::uint32_t b) {
    return multiply_pairs<Element>(a, b);
  }

  // dE += D*acc and dq likewise of the two tokens of index n, and their share of dG.
  __device__ void add_later(int n, float D0, float D1, float dE0, float dE1, float dq0, float dq1,
                            std::uint32_t E_D, std::uint32_t q_D) {
    float2 const E2 = unpack<Element>(E_D), q2 = unpack<Element>(q_D);
    dE[n] += D0 * dE0;
    dE[n + 1] += D1 * dE1;
    dq[n] += D0 * dq0;
    dq[n + 1] += D1 * dq1;
    dG[n] += E2.x * dE0 + q2.x * dq0;
    dG[n + 1] += E2.y * dE1 + q2.y * dq1;
  }

  __device__ void add_earlier(int n, float U0, float U1, float dk0, float dk1, std::uint32_t k_U) {
    float2 const k2 = unpack<Element>(k_U);
    dk[n] += U0 * dk0;
    dk[n + 1] += U1 * dk1;
    dG[n] -= k2.x * dk0;
    dG[n + 1] -= k2.y * dk1;
  }

  // Four 8x8 blocks of dP or dT: block i at the address of this lane group's (row block, column block).
  __device__ static void load_blocks(std::uint32_t (&r)[4], std::uint8_t const* tile, int row_block,
                                     int column_block) {
    auto const address = static_cast<std::uint32_t>(__cvta_generic_to_shared(tile)) +
                         swizzled_offset(kGroup * row_block + lane_index() % 8, column_block);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
  __device__ static void load_blocks_transposed(std::uint32_t (&r)[4], std::uint8_t const* tile,
                                                int row_block, int column_block) {
    auto const address = static_cast<std::uint32_t>(__cvta_generic_to_shared(tile)) +
                         swizzled_offset(kGroup * row_block + lane_index() % 8, column_block);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }

  // The blocks of dP and dT on the diagonal of one group: as they are ([s, r] fragments) and transposed ([r, s]).
  struct DiagonalBlocks {
    std::uint32_t dT, dP, dT_t, dP_t;
  };

  // Levels 1, 2 and 4: pairs inside the group j. `kLevel` rows a block; D and U of the lane's two tokens, zero where the
  // token is not in the level's later or earlier half.
  template <int kLevel>
  __device__ void inner_level(int j, float const (&D)[2][2], float const (&U)[2][2], GroupPair const& q,
                              GroupPair const& k, GroupPair const& E, DiagonalBlocks const& blocks) {
    std::uint32_t E_D[2], q_D[2], k_U[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      std::uint32_t const d = factors(D[half][0], D[half][1]), u = factors(U[half][0], U[half][1]);
      E_D[half] = times(E.at(j, half), d);
      q_D[half] = times(q.at(j, half), d);
      k_U[half] = times(k.at(j, half), u);
    }
    std::uint32_t const mask = pair_mask<kLevel>(), mask_t = pair_mask_transposed<kLevel>();
    float later_E[4] = {}, later_q[4] = {}, earlier[4] = {};
    mma_16x8x8<Element>(later_E, k_U, blocks.dT & mask);
    mma_16x8x8<Element>(later_q, k_U, blocks.dP & mask);
    mma_16x8x8<Element>(earlier, E_D, blocks.dT_t & mask_t);
    mma_16x8x8<Element>(earlier, q_D, blocks.dP_t & mask_t);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const n = 4 * j + 2 * half;
      add_later(n, D[half][0], D[half][1], later_E[2 * half], later_E[2 * half + 1], later_q[2 * half],
                later_q[2 * half + 1], E_D[half], q_D[half]);
      add_earlier(n, U[half][0], U[half][1], earlier[2 * half], earlier[2 * half + 1], k_U[half]);
    }
  }

  // Which of the lane's two entries (r, s) = (row, 2*quad + c) of a diagonal block are pairs of the level; 0: r = s.
  template <int kLevel>
  __device__ static std::uint32_t pair_mask() {
    int const r = row(), s = 2 * quad();
    if constexpr (kLevel == 0) {
      return r == s ? 0x0000ffffu : r == s + 1 ? 0xffff0000u : 0u;
    } else if constexpr (kLevel == 1) {
      return r == s + 1 ? 0x0000ffffu : 0u;
    } else {
      return (r & kLevel) && !(s & kLevel) && r / (2 * kLevel) == s / (2 * kLevel) ? 0xffffffffu : 0u;
    }
  }
  // The same of the entries (r, s) = (2*quad + c, row).
  template <int kLevel>
  __device__ static std::uint32_t pair_mask_transposed() {
    int const r = 2 * quad(), s = row();
    if constexpr (kLevel == 1) {
      return r == s ? 0xffff0000u : 0u;
    } else {
      return (r & kLevel) && !(s & kLevel) && r / (2 * kLevel) == s / (2 * kLevel) ? 0xffffffffu : 0u;
    }
  }

  __device__ void inner_pairs() {
    int const q4 = quad();
    // Matrices 0, 1: the two groups of dT; 2, 3: of dP.
    std::uint8_t const* const matrix = lane_index() / 16 ? smem.dP : smem.dT;
#pragma unroll
    for (int pair = 0; pair < kGroups / 2; ++pair) {
      if (has_no_tokens(pair)) {
        break;
      }
      GroupPair const q(tokens.q, pair), k(tokens.k, pair), E(scratch.E, pair);
      std::uint32_t plain[4], transposed[4];
      int const block = 2 * pair + lane_index() / 8 % 2;
      load_blocks(plain, matrix, block, block);
      load_blocks_transposed(transposed, matrix, block, block);
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        int const j = 2 * pair + g;
        DiagonalBlocks const blocks{plain[g], plain[g + 2], transposed[g], transposed[g + 2]};
        // r = s: no decay between them.
        std::uint32_t const diagonal = blocks.dP & pair_mask<0>();
        std::uint32_t const k_pairs[2] = {k.at(j, 0), k.at(j, 1)}, q_pairs[2] = {q.at(j, 0), q.at(j, 1)};
        auto& dq_group = *reinterpret_cast<float (*)[4]>(&dq[4 * j]);
        auto& dk_group = *reinterpret_cast<float (*)[4]>(&dk[4 * j]);
        mma_16x8x8<Element>(dq_group, k_pairs, diagonal);
        mma_16x8x8<Element>(dk_group, q_pairs, diagonal);

        float D[2][2], U[2][2], link[2], ahead[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float const a0 = scratch.alpha0[2 * j + half][threadIdx.x], a1 = decays.alpha1[2 * j + half];
          D[half][0] = 0.f;
          D[half][1] = 1.f;
          U[half][0] = a1;
          U[half][1] = 0.f;
          link[half] = from_neighbor(a1, -1) * a0;  // from the last lane's first token to this one's
          ahead[half] = from_neighbor(a0, 1);       // from this lane's second token to the next one's first
        }
        inner_level<1>(j, D, U, q, k, E, blocks);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float const a1 = decays.alpha1[2 * j + half];
          bool const later = q4 % 2 == 1;
          D[half][0] = later ? 1.f : 0.f;
          D[half][1] = later ? a1 : 0.f;
          U[half][1] = later ? 0.f : ahead[half];
          U[half][0] = U[half][1] * a1;
        }
        inner_level<2>(j, D, U, q, k, E, blocks);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float const a1 = decays.alpha1[2 * j + half];
          float const middle = from_quad_lane(link[half], 2);
          D[half][0] = q4 == 2 ? 1.f : q4 == 3 ? link[half] : 0.f;
          D[half][1] = D[half][0] * a1;
          U[half][1] = q4 == 0 ? ahead[half] * middle : q4 == 1 ? ahead[half] : 0.f;
          U[half][0] = U[half][1] * a1;
        }
        inner_level<4>(j, D, U, q, k, E, blocks);
      }
    }
  }

  // D of whole groups goes up from 1 at the later half's first group; U down from the earlier half's last.
  __device__ void next_D(int j, float (&D)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      D[half] *= group_decay(j, half).rest * group_decay(j + 1, half).first;
    }
  }
  __device__ void first_U(int first_later, float (&U)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      U[half] = group_decay(first_later, half).first;
    }
  }
  __device__ void next_U(int j, float (&U)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      GroupDecay const group = group_decay(j, half);
      U[half] *= group.first * group.rest;
    }
  }

  // Levels 8, 16 and 32: kBlock groups from `base` on are earlier, the next kBlock later. Later groups behind the chunk's
  // last row have no pairs.
  template <int kBlock>
  __device__ void outer_level(int base) {
    if (work.num_rows <= kGroup * (base + kBlock)) {
      return;
    }
    std::uint32_t E_D[kBlock][2], q_D[kBlock][2], k_U[kBlock][2];
    auto const build_later = [&](int i, float const(&D)[2], GroupPair const& E, GroupPair const& q) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const j = base + kBlock + i, n = 4 * j + 2 * half;
        float const D0 = D[half] * scratch.F[n / 2][threadIdx.x];
        std::uint32_t const d = factors(D0, D0 * decays.alpha1[n / 2]);
        E_D[i][half] = times(E.at(j, half), d);
        q_D[i][half] = times(q.at(j, half), d);
      }
    };
    auto const build_earlier = [&](int i, float const(&U)[2], GroupPair const& k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const j = base + i, n = 4 * j + 2 * half;
        float const U1 = U[half] * smem.B[n / 2][threadIdx.x];
        k_U[i][half] = times(k.at(j, half), factors(U1 * decays.alpha1[n / 2], U1));
      }
    };
    float D[2] = {1.f, 1.f}, U[2];
    first_U(base + kBlock, U);
    if constexpr (kBlock == 1) {
      build_later(0, D, GroupPair(scratch.E, base / 2), GroupPair(tokens.q, base / 2));
      build_earlier(0, U, GroupPair(tokens.k, base / 2));
    } else {
#pragma unroll
      for (int i = 0; i < kBlock; i += 2) {
        int const later = base + kBlock + i, earlier = base + kBlock - 2 - i;
        GroupPair const E(scratch.E, later / 2), q(tokens.q, later / 2), k(tokens.k, earlier / 2);
        build_later(i, D, E, q);
        next_D(later, D);
        build_later(i + 1, D, E, q);
        build_earlier(kBlock - 1 - i, U, k);
        next_U(earlier + 1, U);
        build_earlier(kBlock - 2 - i, U, k);
        if (i + 2 < kBlock) {
          next_D(later + 1, D);
          next_U(earlier, U);
        }
      }
    }

    int const lane_block = lane_index() / 8;
    // dE, dq of the later groups.
    D[0] = D[1] = 1.f;
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      int const r = base + kBlock + i;
      if (work.num_rows <= kGroup * r) {  // no tokens
        break;
      }
      float later_E[4] = {}, later_q[4] = {};
      if constexpr (kBlock == 4) {
        std::uint32_t m[4];
        load_blocks(m, smem.dT, r, base + lane_block);
        multiply_groups(later_E, k_U, 0, m[0], m[1]);
        multiply_groups(later_E, k_U, 2, m[2], m[3]);
        load_blocks(m, smem.dP, r, base + lane_block);
        multiply_groups(later_q, k_U, 0, m[0], m[1]);
        multiply_groups(later_q, k_U, 2, m[2], m[3]);
      } else {
        std::uint32_t m[4];  // kBlock blocks of dT, then of dP
        load_blocks(m, lane_block / 2 ? smem.dP : smem.dT, r, base + (kBlock == 2 ? lane_block % 2 : 0));
        if constexpr (kBlock == 2) {
          multiply_groups(later_E, k_U, 0, m[0], m[1]);
          multiply_groups(later_q, k_U, 0, m[2], m[3]);
        } else {
          mma_16x8x8<Element>(later_E, k_U[0], m[0]);
          mma_16x8x8<Element>(later_q, k_U[0], m[2]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const n = 4 * r + 2 * half;
        float const D0 = D[half] * scratch.F[n / 2][threadIdx.x];
        add_later(n, D0, D0 * decays.alpha1[n / 2], later_E[2 * half], later_E[2 * half + 1],
                  later_q[2 * half], later_q[2 * half + 1], E_D[i][half], q_D[i][half]);
      }
      if (i + 1 < kBlock) {
        next_D(r, D);
      }
    }
    // dk of the earlier groups.
    first_U(base + kBlock, U);
#pragma unroll
    for (int i = kBlock - 1; i >= 0; --i) {
      float earlier[4] = {};
      int const s = base + i;
      if constexpr (kBlock == 4) {
        std::uint32_t m[4];
        load_blocks_transposed(m, smem.dT, base + kBlock + lane_block, s);
        multiply_groups(earlier, E_D, 0, m[0], m[1]);
        multiply_groups(earlier, E_D, 2, m[2], m[3]);
        load_blocks_transposed(m, smem.dP, base + kBlock + lane_block, s);
        multiply_groups(earlier, q_D, 0, m[0], m[1]);
        multiply_groups(earlier, q_D, 2, m[2], m[3]);
      } else {
        std::uint32_t m[4];
        load_blocks_transposed(m, lane_block / 2 ? smem.dP : smem.dT,
                               base + kBlock + (kBlock == 2 ? lane_block % 2 : 0), s);
        if constexpr (kBlock == 2) {
          multiply_groups(earlier, E_D, 0, m[0], m[1]);
          multiply_groups(earlier, q_D, 0, m[2], m[3]);
        } else {
          mma_16x8x8<Element>(earlier, E_D[0], m[0]);
          mma_16x8x8<Element>(earlier, q_D[0], m[2]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const n = 4 * s + 2 * half;
        float const U1 = U[half] * smem.B[n / 2][threadIdx.x];
        add_earlier(n, U1 * decays.alpha1[n / 2], U1, earlier[2 * half], earlier[2 * half + 1], k_U[i][half]);
      }
      if (i > 0) {
        next_U(s, U);
      }
    }
  }

  // acc [16 channels, 8 tokens] += the groups i and i + 1 of A times the blocks b0 and b1.
  template <int kBlock>
  __device__ static void multiply_groups(float (&acc)[4], std::uint32_t const (&A)[kBlock][2], int i,
                                         std::uint32_t b0, std::uint32_t b1) {
    std::uint32_t const a[4] = {A[i][0], A[i][1], A[i + 1][0], A[i + 1][1]};
    mma_16x8x16<Element>(acc, a, b0, b1);
  }

  __device__ void outer_pairs() {
    outer_level<1>(0);
    outer_level<1>(2);
    outer_level<1>(4);
    outer_level<1>(6);
    outer_level<2>(0);
    outer_level<2>(4);
    outer_level<4>(0);
  }

  // ---- outputs -----------------------------------------------------------------------------------------------

  // dG becomes dg, summed from the end, and is stored; through the gate where there is one.
  __device__ void store_decay_gradients(DecayGateOf<Cfg> const& gate) {
    CallShape const& shape = params.shape;
    float later[2] = {0.f, 0.f}, dA_log[2] = {0.f, 0.f}, d_bias[2] = {0.f, 0.f};
    std::int64_t const first_row =
        (static_cast<std::int64_t>(work.batch) * shape.seqlen + work.first_token) * shape.num_gate_heads +
        work.gate_head;
    std::int64_t const first = first_row * shape.dim_k + work.first_channel;
    int const row_stride = shape.num_gate_heads * shape.dim_k;  // from token to token
#pragma unroll
    for (int j = kGroups - 1; j >= 0; --j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const n = 4 * j + 2 * half;
        float all;
        float const both = dG[n] + dG[n + 1];
        float const after = later[half] + exclusive_sum<false>(both, all);
        later[half] += all;
        float dg[2] = {after + both + scratch.dg_writes[n][threadIdx.x],
                       after + dG[n + 1] + scratch.dg_writes[n + 1][threadIdx.x]};
        int const ch = work.first_channel + channel(half);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          int const t = token(j, c);
          if (t >= work.num_rows || ch >= shape.dim_k) {
            continue;
          }
          if (Cfg::kFused && params.gates.decay_gate != DecayGate::kNone) {
            float of_A_log;
            dg[c] = gate.backward(raw_gate(j, half, c), dg[c], half, of_A_log);
            dA_log[half] += of_A_log;
            d_bias[half] += dg[c];
          }
          if (params.dg != nullptr) {
            int const place = t * row_stride + channel(half);
            if (Cfg::kFused && params.gate_element != ElementType::kFloat32) {
              (static_cast<Element*>(params.dg) + first)[place] = round_to<Element>(dg[c]);
            } else {
              (static_cast<float*>(params.dg) + first)[place] = dg[c];
            }
          }
        }
      }
    }
    if constexpr (Cfg::kFused) {
      store_sums(params.dA_log, dA_log);
      store_sums(params.d_dt_bias, d_bias);
    }
  }

  // Sums over the four lanes of a channel, to [num_slots, num_gate_heads, dim_k].
  __device__ void store_sums(float* out, float const (&sums)[2]) {
    if (out == nullptr) {
      return;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float all;
      exclusive_sum<true>(sums[half], all);
      int const ch = work.first_channel + channel(half);
      if (quad() == 0 && ch < params.shape.dim_k) {
        out[work.tile * params.shape.dim_k + ch] = all;
      }
    }
  }

  // dE becomes db, and dk takes its share; through the sigmoid of b where there is one.
  __device__ void finish_erase_gradients() {
    float const erase_scale = params.gates.erase_scale;
    bool const use_sigmoid = Cfg::kFused && params.gates.use_gate_sigmoid;
#pragma unroll
    for (int pair = 0; pair < kGroups / 2; ++pair) {
      GroupPair const k(tokens.k, pair), b(tokens.b, pair);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int const j = 2 * pair + i / 2, half = i % 2, n = 4 * j + 2 * half;
        float2 const k2 = unpack<Element>(k.at(j, half));
        float2 b2 = unpack<Element>(b.at(j, half));
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
  __device__ static void halve_sums(float (&x)[2 * kGroups], bool upper, int lane_distance) {
#pragma unroll
    for (int i = 0; i < kKeep; ++i) {
      float const low = x[i], high = x[kKeep + i];
      x[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffff, upper ? low : high, lane_distance);
    }
  }

  // Through the norms: with y the normalised row and n its norm, dx = (dy - y (y.dy)) / n. The sums over channels go
  // over lanes, warps, and the CTA of the other channels.
  __device__ void finish_norm_gradients() {
    float dots[2][2 * kGroups];  // [of q, of k][2*j + c]
#pragma unroll
    for (int pair = 0; pair < kGroups / 2; ++pair) {
      GroupPair const q(tokens.q, pair), k(tokens.k, pair);
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        int const j = 2 * pair + g;
        float2 const q0 = unpack<Element>(q.at(j, 0)), q1 = unpack<Element>(q.at(j, 1));
        float2 const k0 = unpack<Element>(k.at(j, 0)), k1 = unpack<Element>(k.at(j, 1));
        dots[0][2 * j] = q0.x * dq[4 * j] + q1.x * dq[4 * j + 2];
        dots[0][2 * j + 1] = q0.y * dq[4 * j + 1] + q1.y * dq[4 * j + 3];
        dots[1][2 * j] = k0.x * dk[4 * j] + k1.x * dk[4 * j + 2];
        dots[1][2 * j + 1] = k0.y * dk[4 * j + 1] + k1.y * dk[4 * j + 3];
      }
    }
    // Each step halves the tokens that a lane has sums of: at the end two of q's and two of k's.
    int const r = row();
#pragma unroll
    for (auto& x : dots) {
      halve_sums<8>(x, r & 4, 16);
      halve_sums<4>(x, r & 2, 8);
      halve_sums<2>(x, r & 1, 4);
    }
    __syncthreads();  // every warp is done with dP and dT
                      // What lane row r is left with: group j = r.
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      *reinterpret_cast<float2*>(smem.dots.of_warp[warp()][token(r, c)]) = float2{dots[0][c], dots[1][c]};
    }
    auto const cluster = cooperative_groups::this_cluster();
    cluster.sync();
    {
      int const t = threadIdx.x / 2, which = threadIdx.x % 2;
      float sum = 0.f;
      for (int box = 0; box < work.num_boxes; ++box) {
        auto const& of_box = *cluster.map_shared_rank(&smem.dots, box);
        for (int w = 0; w < kWarps; ++w) {
          sum += of_box.of_warp[w][t][which];
        }
      }
      smem.dots.all[t][which] = sum;
    }
    cluster.sync();  // all of them are there, and nobody reads the other CTA's memory any more
    float const* const norms = params.row_norms + work.tile * 2 * kChunk;
#pragma unroll
    for (int pair = 0; pair < kGroups / 2; ++pair) {
      GroupPair const q(tokens.q, pair), k(tokens.k, pair);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int const j = 2 * pair + i / 2, half = i % 2, n = 4 * j + 2 * half;
        float2 const q2 = unpack<Element>(q.at(j, half)), k2 = unpack<Element>(k.at(j, half));
        int const t = token(j, 0);
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
  __device__ void store_tile(std::uint8_t* tile, Accumulators const& acc) const {
#pragma unroll
    for (int pair = 0; pair < kGroups / 2; ++pair) {
      std::uint32_t r[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int const n = 4 * (2 * pair + i % 2) + 2 * (i / 2);
        r[i] = pack<Element>(acc[n], acc[n + 1]);
      }
      store_matrices_transposed(r, tile, 2 * kGroup * pair, 2 * warp());
    }
  }

  // dq or dk for every gate head, float32 [batch, seqlen, num_gate_heads, dim_k].
  __device__ void store_partial(void* out, Accumulators const& acc) const {
    if (out == nullptr) {
      return;
    }
    CallShape const& shape = params.shape;
    std::int64_t const first_row =
        (static_cast<std::int64_t>(work.batch) * shape.seqlen + work.first_token) * shape.num_gate_heads +
        work.gate_head;
    float* const base = static_cast<float*>(out) + first_row * shape.dim_k + work.first_channel;
    int const row_stride = shape.num_gate_heads * shape.dim_k;  // from token to token
#pragma unroll
    for (int i = 0; i < 4 * kGroups; ++i) {
      int const t = token(i / 4, i % 2), ch = channel(i / 2 % 2);
      if (t < work.num_rows && work.first_channel + ch < shape.dim_k) {
        base[t * row_stride + ch] = acc[i];
      }
    }
  }
};

// The chunk's own rows of a gradient [batch, seqlen, heads, dim_k], from its tile.
template <class Element>
__device__ void store_rows(void* out, CUtensorMap const& map, std::uint8_t const* tile,
                           CallShape const& shape, Work const& work, int head, int heads) {
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

// ---- kernel ------------------------------------------------------------------------------------------------

template <class Cfg>
__global__ void __launch_bounds__(kThreads, 2)
    gradients_kernel(__grid_constant__ GradientsParams const params,
                     __grid_constant__ TensorMaps const maps) {
  using Element = typename Cfg::Element;
  extern __shared__ std::uint8_t smem_bytes[];
  auto& smem = *reinterpret_cast<SharedStorage*>(smem_bytes);
  Work const work = find_work(params);
  if (params.plan.spans != nullptr) {
    poison_unowned_rows<Cfg>(params);
  }
  if (work.num_rows == 0) {  // a slot without a chunk
    for (int i = threadIdx.x; i < kChannels; i += kThreads) {
      int const channel = work.first_channel + i;
      for (float* const sums : {params.dA_log, params.d_dt_bias}) {
        if (sums != nullptr && channel < params.shape.dim_k) {
          sums[work.tile * params.shape.dim_k + channel] = 0.f;
        }
      }
    }
    return;
  }
  int const num_slices = work.heads_per_gate * work.num_slices;
  auto const load = [&](int index) {
    int const stage = index % kStages;
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

  Products products;
  RingPosition<kStages> at;
  for (int index = 0; index < num_slices; ++index, at.advance()) {
    smem.full[at.stage].wait(at.parity);
    auto& slice = smem.stages[at.stage].slice;
    if (work.num_rows < kChunk) {
      clear_foreign_rows(slice.dO, work.num_rows);
    }
    multiply_slice<Element>(products, slice, index > 0);
    if (index % work.num_boxes == work.box) {
      store_value_gradients<Cfg>(slice.dX, params, work, index);
    }
    __syncthreads();  // every warp is done with the slice
    if (threadIdx.x == 0) {
      load(index + kStages);
    }
  }
  store_matrix<Element>(smem.dP, products.dP, params.scale);
  store_matrix<Element>(smem.dT, products.dT, -1.f);
  __syncthreads();

  smem.full[at.stage].wait(at.parity);
  auto& tokens = smem.stages[at.stage].tokens;
  auto& scratch = smem.stages[(at.stage + 1) % kStages].scratch;
  Channels<Cfg> x{smem, tokens, scratch, params, work, products.S_dO, products.S_dX, products.dS_R};
  DecayGateOf<Cfg> const gate(params, work.head, work.first_channel + x.channel(0));
  x.prepare_tiles();
  x.load_decays(gate);
  x.finish_state_products(products.S_dS);
  x.inner_pairs();
  x.outer_pairs();
  if (params.dg != nullptr || params.dA_log != nullptr || params.d_dt_bias != nullptr) {
    x.store_decay_gradients(gate);
  }
  if (params.dk != nullptr || params.db != nullptr) {
    x.finish_erase_gradients();
  }
  if (Cfg::kFused && params.gates.use_qk_l2norm) {
    x.finish_norm_gradients();
  }

  CallShape const& shape = params.shape;
  bool const partial = shape.num_gate_heads != shape.num_heads;
  if (partial) {
    x.store_partial(params.dq, x.dq);
    x.store_partial(params.dk, x.dk);
  } else {
    x.store_tile(tokens.q, x.dq);
    x.store_tile(tokens.k, x.dk);
  }
  x.store_tile(tokens.b, x.dE);
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
  constexpr int kSmemBytes = sizeof(SharedStorage);
  static_assert(2 * (kSmemBytes + 1024) <= 228 * 1024);
  throw_on_error(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes),
                 "gradients: shared memory");
  unsigned const boxes = shape.dim_k > kChannels ? 2 : 1;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {Cfg::kFused && params.gates.use_qk_l2norm ? boxes : 1, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(shape.num_slots) * shape.num_gate_heads * boxes;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = kSmemBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
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
