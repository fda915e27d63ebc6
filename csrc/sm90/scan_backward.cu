// scan_backward: two walks along the chunks of a sequence, side by side: states and residuals once more, and their
// gradients.
//
//     recomputation, forwards from the initial state       reverse, backwards from the final state's gradient
//     X^T = Z^T - S^T (gamma*E)^T          Z = w*v         dR^T = dO^T P + dS'^T Kt^T
//     R^T = X^T + X^T (A-I)^T                              dX^T = dR^T + dR^T (A-I)
//     S^T = S^T Diag(gamma[C-1]) + R^T Kt                  dS^T = dS'^T Diag(gamma[C-1]) + dO^T (scale*gamma*q)
//                                                                 - dX^T (gamma*E)
// Of every chunk S (at its start), dS' (after its end), R and dX go out, rounded: what the products read them as.
// Neither walk reads what the other writes. As in scan, everything is transposed and the left operand of each product
// is the rounded accumulator of the one before it, in the registers where it is.
//
// Grid: one CTA for a sequence, walk, segment, value head and kWarpgroups * 64 value columns; longer sequences first, of
// each the reverse walks first. A sequence is one segment, or several whose first states are known. Those take two launches:
// reverse walks from zero, and those from their last gradients, which then are known; walks of the recomputation are beside
// either.
// Roles: kWarpgroups math warpgroups of 64 value columns each (S or dS 64, X or dR 32 accumulators; 32 rounded S or
// dS', 16 rounded R or dX, 16 rounded X or dR, 16 dO a thread; 240 registers, 216 where there are two); one warpgroup
// that makes Z (idle in the reverse walk); one whose first warp loads factors, whose next ones store, one a math
// warpgroup, and whose next one loads v and w, or dO (40 registers each).
// Shared memory (K 128, one warpgroup / two): rings of stages, each let go as soon as its product is done.
//     recomputation  v and w 2 x 16 / 1 x 32, Z 2 x 16 / 1 x 32, gamma*E and gamma[C-1] 3 x 16.5 / 2 x 16.5,
//                    A-I 3 x 8, Kt 3 x 16, outgoing S and R 24 / 48: 210 / 217 KB
//     reverse        dO 3 x 8 / 2 x 16, Kt and P and gamma[C-1] 3 x 24.5 / 2 x 24.5, scale*gamma*q and A-I 3 x 24 /
//                    2 x 24, gamma*E 2 x 16, outgoing dS' and dX 24 / 48: 226 / 209 KB
//
// Tensor cores, one chunk (cycles at full rate) and what the math warps do behind them:
//     recomputation  X 256               | R 128            |         | S' 256   |
//                    last R out, decay S | round X .. S out | round R | Z of c+1 | round S
//     reverse        dR += dS' Kt 256     | dS += dO q 256 | dX 128  |          | dS -= dX E 256 | dR = dO P of c-1 128
//                    decay dS, last dX out | round dR       | dS' out | round dX | dO of c-1      | round dS
#include <cutlass/arch/barrier.h>

#include <algorithm>

#include "api/chunk_backward.h"
#include "api/cuda_error.h"
#include "sm90/scan_parts.cuh"
#include "tile/launch_order.cuh"
#include "tile/tensor_map.h"

namespace gdn2 {

namespace {

constexpr int kWarpgroupWarps = kWarpgroupThreads / kWarpThreads;

template <class Element_, int kDimK_, int kWarpgroups_>
struct Config {
  using Element = Element_;
  static constexpr int kDimK = kDimK_;
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr int kTileBytes = kDimK / kBoxColumns * kBoxBytes;
  static constexpr int kGammaBytes = kDimK * sizeof(float);
  static constexpr int kSteps = kDimK / 16;  // fragments of a rounded state
  // As many stages as shared memory holds: of the recomputation,
  static constexpr int kStagesValues = kWarpgroups == 1 ? 2 : 1, kStagesZ = kStagesValues;
  static constexpr int kStagesRecomputeE = kWarpgroups == 1 ? 3 : 2, kStagesA = 3, kStagesKt = 3;
  // and of the reverse walk.
  static constexpr int kStagesO = kWarpgroups == 1 ? 3 : 2, kStagesK = kStagesO, kStagesQ = kStagesO;
  static constexpr int kStagesE = 2;
  static constexpr int kMathWarps = kWarpgroups * kWarpgroupWarps;
  static constexpr int kThreads = (kWarpgroups + 2) * kWarpgroupThreads;
  // Registers move from the other roles to the math.
  static constexpr int kMathRegisters = kWarpgroups == 1 ? 240 : 216;
  static constexpr int kValuesRegisters = 40, kCopyRegisters = 40;
  static_assert(kWarpgroups * kMathRegisters + kValuesRegisters + kCopyRegisters <= 512,
                "64 K registers an SM");
};

// What leaves a math warpgroup every chunk: the images that BackwardTiles describes.
template <class Cfg>
struct Outgoing {
  std::uint8_t state[Cfg::kWarpgroups][Cfg::kTileBytes];  // S^T or dS'^T
  std::uint8_t rows[Cfg::kWarpgroups][kBoxBytes];         // R or dX
};

template <class Cfg>
struct OutgoingRings {
  RingBarriers<1> state[Cfg::kWarpgroups], rows[Cfg::kWarpgroups];

  __device__ void init() {
    for (int wg = 0; wg < Cfg::kWarpgroups; ++wg) {
      state[wg].init(kWarpgroupWarps, 1);
      rows[wg].init(kWarpgroupWarps, 1);
    }
  }
};

template <class Cfg>
struct RecomputeStorage {
  struct Values {
    std::uint8_t v[Cfg::kWarpgroups][kBoxBytes], w[Cfg::kWarpgroups][kBoxBytes];
  };
  alignas(kSwizzleAtomBytes) Outgoing<Cfg> outgoing;
  Values values[Cfg::kStagesValues];
  std::uint8_t gamma_E[Cfg::kStagesRecomputeE][Cfg::kTileBytes];
  std::uint8_t A_minus_I[Cfg::kStagesA][kBoxBytes];
  std::uint8_t Kt[Cfg::kStagesKt][Cfg::kTileBytes];
  FragmentsZ Z[Cfg::kStagesZ][Cfg::kWarpgroups];
  float gamma_last[Cfg::kStagesRecomputeE][Cfg::kDimK];  // in the ring of gamma_E
  OutgoingRings<Cfg> rings_outgoing;
  RingBarriers<Cfg::kStagesValues> ring_values;
  RingBarriers<Cfg::kStagesZ> ring_Z;
  RingBarriers<Cfg::kStagesRecomputeE> ring_E;
  RingBarriers<Cfg::kStagesA> ring_A;
  RingBarriers<Cfg::kStagesKt> ring_Kt;

  // By one thread.
  __device__ void init_barriers() {
    constexpr int kCopyEngine = 1;
    rings_outgoing.init();
    ring_values.init(kCopyEngine, kWarpgroupWarps);
    ring_Z.init(kWarpgroupWarps, Cfg::kMathWarps);
    ring_E.init(kCopyEngine, Cfg::kMathWarps);
    ring_A.init(kCopyEngine, Cfg::kMathWarps);
    ring_Kt.init(kCopyEngine, Cfg::kMathWarps);
    cutlass::arch::fence_barrier_init();  // orders the inits before the copy engine's use of them
  }
};

template <class Cfg>
struct ReverseStorage {
  struct FactorsK {
    std::uint8_t Kt[Cfg::kTileBytes], P[kBoxBytes];
  };
  struct FactorsQ {
    std::uint8_t gamma_q[Cfg::kTileBytes], A_minus_I[kBoxBytes];
  };
  alignas(kSwizzleAtomBytes) Outgoing<Cfg> outgoing;
  std::uint8_t dO[Cfg::kStagesO][Cfg::kWarpgroups][kBoxBytes];
  FactorsK factors_k[Cfg::kStagesK];
  FactorsQ factors_q[Cfg::kStagesQ];
  std::uint8_t gamma_E[Cfg::kStagesE][Cfg::kTileBytes];
  float gamma_last[Cfg::kStagesK][Cfg::kDimK];  // in the ring of factors_k
  OutgoingRings<Cfg> rings_outgoing;
  RingBarriers<Cfg::kStagesO> ring_dO;
  RingBarriers<Cfg::kStagesK> ring_k;
  RingBarriers<Cfg::kStagesQ> ring_q;
  RingBarriers<Cfg::kStagesE> ring_E;

  // By one thread.
  __device__ void init_barriers() {
    constexpr int kCopyEngine = 1;
    rings_outgoing.init();
    ring_dO.init(kCopyEngine, Cfg::kMathWarps);
    ring_k.init(kCopyEngine, Cfg::kMathWarps);
    ring_q.init(kCopyEngine, Cfg::kMathWarps);
    ring_E.init(kCopyEngine, Cfg::kMathWarps);
    cutlass::arch::fence_barrier_init();  // orders the inits before the copy engine's use of them
  }
};

struct TensorMaps {
  CUtensorMap v, w, dO;
};

// ---- load role ---------------------------------------------------------------------------------------------

// Where a chunk's tiles lie.
template <class Cfg>
struct ChunkFactors {
  std::uint8_t const *gamma_q, *Kt, *gamma_E, *A_minus_I, *P;
  float const* gamma_last;

  __device__ ChunkFactors(ChunkTiles const& tiles, Work const& work, int chunk) {
    std::int64_t const tile = work.first_tile + static_cast<std::int64_t>(chunk) * work.tile_stride;
    gamma_q = static_cast<std::uint8_t const*>(tiles.factors) + tile * 3 * Cfg::kTileBytes;
    Kt = gamma_q + Cfg::kTileBytes;
    gamma_E = Kt + Cfg::kTileBytes;
    A_minus_I = static_cast<std::uint8_t const*>(tiles.A_minus_I) + tile * kBoxBytes;
    P = static_cast<std::uint8_t const*>(tiles.P) + tile * kBoxBytes;
    gamma_last = tiles.gamma_last + tile * Cfg::kDimK;
  }
};

template <class Cfg>
__device__ void load(RecomputeStorage<Cfg>& smem, ScanBackwardParams const& params, Work const& work) {
  RingPosition<Cfg::kStagesRecomputeE> at_E;
  RingPosition<Cfg::kStagesA> at_A;
  RingPosition<Cfg::kStagesKt> at_Kt;
  wait_for_earlier_kernels();  // prepare
  for (int chunk = 0; chunk < work.num_chunks; ++chunk) {
    ChunkFactors<Cfg> const factors(params.tiles, work, chunk);

    FullBarrier& full_E = smem.ring_E.begin_fill(at_E, Cfg::kTileBytes + Cfg::kGammaBytes);
    bulk_load(smem.gamma_E[at_E.stage], factors.gamma_E, Cfg::kTileBytes, full_E);
    bulk_load(smem.gamma_last[at_E.stage], factors.gamma_last, Cfg::kGammaBytes, full_E);
    at_E.advance();

    FullBarrier& full_A = smem.ring_A.begin_fill(at_A, kBoxBytes);
    bulk_load(smem.A_minus_I[at_A.stage], factors.A_minus_I, kBoxBytes, full_A);
    at_A.advance();

    if (chunk + 1 < work.num_chunks) {  // nobody needs the state after the last chunk
      FullBarrier& full_Kt = smem.ring_Kt.begin_fill(at_Kt, Cfg::kTileBytes);
      bulk_load(smem.Kt[at_Kt.stage], factors.Kt, Cfg::kTileBytes, full_Kt);
      at_Kt.advance();
    }
  }
}

template <class Cfg>
__device__ void load(ReverseStorage<Cfg>& smem, ScanBackwardParams const& params, Work const& work) {
  RingPosition<Cfg::kStagesK> at_k;
  RingPosition<Cfg::kStagesQ> at_q;
  RingPosition<Cfg::kStagesE> at_E;
  wait_for_earlier_kernels();  // prepare
  for (int chunk = work.num_chunks - 1; chunk >= 0; --chunk) {
    ChunkFactors<Cfg> const factors(params.tiles, work, chunk);

    auto& factors_k = smem.factors_k[at_k.stage];
    FullBarrier& full_k = smem.ring_k.begin_fill(at_k, sizeof(factors_k) + Cfg::kGammaBytes);
    bulk_load(factors_k.P, factors.P, kBoxBytes, full_k);
    bulk_load(smem.gamma_last[at_k.stage], factors.gamma_last, Cfg::kGammaBytes, full_k);
    bulk_load(factors_k.Kt, factors.Kt, Cfg::kTileBytes, full_k);
    at_k.advance();

    auto& factors_q = smem.factors_q[at_q.stage];
    FullBarrier& full_q = smem.ring_q.begin_fill(at_q, sizeof(factors_q));
    bulk_load(factors_q.gamma_q, factors.gamma_q, Cfg::kTileBytes, full_q);
    bulk_load(factors_q.A_minus_I, factors.A_minus_I, kBoxBytes, full_q);
    at_q.advance();

    FullBarrier& full_E = smem.ring_E.begin_fill(at_E, Cfg::kTileBytes);
    bulk_load(smem.gamma_E[at_E.stage], factors.gamma_E, Cfg::kTileBytes, full_E);
    at_E.advance();
  }
}

// By another thread than the one that loads factors, as v and w are (see load_values).
template <class Cfg>
__device__ void load_dO(ReverseStorage<Cfg>& smem, TensorMaps const& maps, Work const& work) {
  RingPosition<Cfg::kStagesO> at;
  for (int chunk = work.num_chunks - 1; chunk >= 0; --chunk, at.advance()) {
    auto& dO = smem.dO[at.stage];
    FullBarrier& full = smem.ring_dO.begin_fill(at, sizeof(dO));
    int const token = work.first_token + chunk * kChunk;
    for (int wg = 0; wg < Cfg::kWarpgroups; ++wg) {
      int const column = work.first_column + wg * kColumns;
      tma_load(maps.dO, full, dO[wg], column, work.value_head, token, work.batch);
    }
  }
}

// ---- store role: one warp a math warpgroup -------------------------------------------------------------------

// One tile, to global memory unless `wanted` is false; its shared memory is free again on return.
__device__ void store_tile(void const* tile, void* image, int bytes, bool wanted, RingBarriers<1>& ring,
                           RingPosition<1> at) {
  ring.wait_full(at);
  if (wanted && elect_one()) {
    // The math warps' ordinary stores, seen through the barrier, before the copy engine reads them. Here and not there:
    // it would lengthen the chain.
    cutlass::arch::fence_view_async_shared();
    cute::SM90_BULK_COPY_S2G::copy(tile, image, bytes);
    cute::tma_store_arrive();
    cute::tma_store_wait<0>();  // the tile has been read
  }
  ring.release(at);
}

// The tiles of every chunk, in the order in which the walk (forwards or backwards) finishes them.
template <class Cfg>
__device__ void store(Outgoing<Cfg> const& outgoing, OutgoingRings<Cfg>& rings, void* states, void* rows,
                      bool forwards, CallShape const& shape, Work const& work, int wg) {
  int const slices = (shape.dim_v + kColumns - 1) / kColumns;
  int const slice = work.first_column / kColumns + wg;
  // The last CTA's second warpgroup may have no columns.
  bool const wanted = slice < slices && states != nullptr;
  RingPosition<1> at;
  for (int step = 0; step < work.num_chunks; ++step, at.advance()) {
    int const chunk = forwards ? step : work.num_chunks - 1 - step;
    std::int64_t const head =
        static_cast<std::int64_t>(work.first_slot + chunk) * shape.num_value_heads + work.value_head;
    std::int64_t const tile = head * slices + slice;
    store_tile(outgoing.state[wg], static_cast<std::uint8_t*>(states) + tile * Cfg::kTileBytes,
               Cfg::kTileBytes, wanted, rings.state[wg], at);
    store_tile(outgoing.rows[wg], static_cast<std::uint8_t*>(rows) + tile * kBoxBytes, kBoxBytes, wanted,
               rings.rows[wg], at);
  }
}

// ---- math roles: one warpgroup's walk. Accumulators stay in registers over the whole sequence ----------------

// Where a math warpgroup leaves its tiles.
template <class Cfg>
struct Stager {
  Outgoing<Cfg>& outgoing;
  OutgoingRings<Cfg>& rings;
  int wg;
  RingPosition<1> at_state, at_rows;

  __device__ void put_state(FragmentA const (&state)[Cfg::kSteps]) {
    rings.state[wg].wait_empty(at_state);
    store_state_rows(state, outgoing.state[wg]);
    rings.state[wg].publish(at_state);
    at_state.advance();
  }

  __device__ void put_rows(FragmentA const (&rows)[4]) {
    rings.rows[wg].wait_empty(at_rows);
    store_token_rows(rows, outgoing.rows[wg]);
    rings.rows[wg].publish(at_rows);
    at_rows.advance();
  }
};

template <class Cfg>
struct Recompute {
  using Element = typename Cfg::Element;

  RecomputeStorage<Cfg>& smem;
  Work const& work;
  int wg;
  Stager<Cfg> stager;
  RingPosition<Cfg::kStagesZ> at_Z;
  RingPosition<Cfg::kStagesRecomputeE> at_E;
  RingPosition<Cfg::kStagesA> at_A;
  RingPosition<Cfg::kStagesKt> at_Kt;
  float S[Cfg::kDimK / 2], X[32];

  // Z^T of the next chunk into X.
  __device__ void begin_Z() {
    smem.ring_Z.wait_full(at_Z);
    read_Z(X, smem.Z[at_Z.stage][wg]);
    smem.ring_Z.release(at_Z);
    at_Z.advance();
  }

  // X^T = Z^T - S^T (gamma*E)^T: issued, and behind it S goes on as S Diag(gamma[C-1]).
  __device__ void issue_X(FragmentA (&S_rounded)[Cfg::kSteps]) {
    smem.ring_E.wait_full(at_E);
    round_fragments<Element>(S_rounded, S);
    wgmma_fence();
    multiply_transposed<Element, ScaleIn::Neg>(X, S_rounded, smem.gamma_E[at_E.stage], true);
    decay_state(S, smem.gamma_last[at_E.stage]);
  }

  // R^T = X^T + X^T (A-I)^T: issued.
  __device__ void finish_X_and_issue_R() {
    wgmma_wait<0>();  // X
    smem.ring_E.release(at_E);
    at_E.advance();
    FragmentA X_rounded[4];
    round_fragments<Element>(X_rounded, X);
    smem.ring_A.wait_full(at_A);
    wgmma_fence();
    multiply_transposed<Element, ScaleIn::One>(X, X_rounded, smem.A_minus_I[at_A.stage], true);
  }

  __device__ void wait_R() {
    wgmma_wait<0>();
    smem.ring_A.release(at_A);
    at_A.advance();
  }

  // S'^T = S^T Diag(gamma[C-1]) + R^T Kt: issued.
  __device__ void issue_S(FragmentA const (&R_rounded)[4]) {
    smem.ring_Kt.wait_full(at_Kt);
    wgmma_fence();
    multiply<Element, ScaleIn::One>(S, R_rounded, smem.Kt[at_Kt.stage], true);
  }

  __device__ void wait_S() {
    wgmma_wait<0>();
    smem.ring_Kt.release(at_Kt);
    at_Kt.advance();
  }

  // No product is in flight between iterations: the compiler would have to wait for it.
  __device__ void run() {
    if (work.num_chunks == 0) {
      return;
    }
    begin_Z();
    {
      FragmentA S_rounded[Cfg::kSteps];
      issue_X(S_rounded);
      finish_X_and_issue_R();
      stager.put_state(S_rounded);
      wait_R();
    }
    for (int chunk = 1; chunk < work.num_chunks; ++chunk) {
      FragmentA R_rounded[4], S_rounded[Cfg::kSteps];
      round_fragments<Element>(R_rounded, X);
      issue_S(R_rounded);
      begin_Z();
      wait_S();
      issue_X(S_rounded);
      stager.put_rows(R_rounded);  // of the last chunk
      finish_X_and_issue_R();
      stager.put_state(S_rounded);
      wait_R();
    }
    FragmentA R_rounded[4];
    round_fragments<Element>(R_rounded, X);
    stager.put_rows(R_rounded);
  }
};

template <class Cfg>
struct Reverse {
  using Element = typename Cfg::Element;

  ReverseStorage<Cfg>& smem;
  Work const& work;
  int wg;
  Stager<Cfg> stager;
  RingPosition<Cfg::kStagesO> at_dO;
  RingPosition<Cfg::kStagesK> at_k;
  RingPosition<Cfg::kStagesQ> at_q;
  RingPosition<Cfg::kStagesE> at_E;
  float dS[Cfg::kDimK / 2], dR[32];  // dR becomes dX

  // dO^T of a chunk as a left operand; tokens from num_rows on, where others' numbers may lie, are zero.
  template <bool kWhole>
  __device__ void read_dO(FragmentA (&dO)[4], int num_rows) {
    smem.ring_dO.wait_full(at_dO);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      std::uint32_t r[4];
      load_matrices_transposed(r, smem.dO[at_dO.stage][wg], 16 * t,
                               2 * (threadIdx.x % kWarpgroupThreads / kWarpThreads));
      if constexpr (!kWhole) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          // r[i]: tokens 16*t + 8*(i%2) + 2*(lane%4) and the next, value columns 8*(i/2) of the warp's 16
          int const rows_left = num_rows - (16 * t + 8 * (i % 2) + 2 * (lane_index() % 4));
          r[i] &= rows_left >= 2 ? 0xffffffff : rows_left == 1 ? 0x0000ffff : 0;
        }
      }
      dO[t] = {r[0], r[2], r[1], r[3]};
    }
    smem.ring_dO.release(at_dO);
    at_dO.advance();
  }

  // dR^T = dO^T P: issued.
  __device__ void begin_dR(FragmentA const (&dO)[4]) {
    smem.ring_k.wait_full(at_k);
    wgmma_fence();
    multiply<Element, ScaleIn::One>(dR, dO, smem.factors_k[at_k.stage].P, false);
  }

  // dR^T += dS'^T Kt^T, then dS^T = dS'^T Diag(gamma[C-1]) + dO^T (scale*gamma*q): issued. dS decays behind the first
  // product; the second fence then spares the compiler one of its own.
  __device__ void issue_dR_and_dS(FragmentA (&dS_rounded)[Cfg::kSteps], FragmentA const (&dO)[4]) {
    round_fragments<Element>(dS_rounded, dS);
    wgmma_fence();
    multiply_transposed<Element, ScaleIn::One>(dR, dS_rounded, smem.factors_k[at_k.stage].Kt, true);
    decay_state(dS, smem.gamma_last[at_k.stage]);
    smem.ring_q.wait_full(at_q);
    wgmma_fence();
    multiply<Element, ScaleIn::One>(dS, dO, smem.factors_q[at_q.stage].gamma_q, true);
  }

  // dX^T = dR^T + dR^T (A-I): issued, while dO^T (scale*gamma*q) may still run.
  __device__ void finish_dR_and_issue_dX() {
    wgmma_wait<1>();  // dR
    smem.ring_k.release(at_k);
    at_k.advance();
    FragmentA dR_rounded[4];
    round_fragments<Element>(dR_rounded, dR);
    wgmma_fence();
    multiply<Element, ScaleIn::One>(dR, dR_rounded, smem.factors_q[at_q.stage].A_minus_I, true);
  }

  __device__ void wait_dX() {
    wgmma_wait<0>();
    smem.ring_q.release(at_q);
    at_q.advance();
  }

  // dS^T -= dX^T (gamma*E): issued.
  __device__ void finish_dS(FragmentA const (&dX_rounded)[4]) {
    smem.ring_E.wait_full(at_E);
    wgmma_fence();
    multiply<Element, ScaleIn::Neg>(dS, dX_rounded, smem.gamma_E[at_E.stage], true);
  }

  __device__ void release_gamma_E() {
    smem.ring_E.release(at_E);
    at_E.advance();
  }

  // No product is in flight between iterations: the compiler would have to wait for it.
  __device__ void run() {
    if (work.num_chunks == 0) {
      return;
    }
    {
      FragmentA dO[4], dS_rounded[Cfg::kSteps];
      read_dO<false>(dO, work.num_tokens - (work.num_chunks - 1) * kChunk);
      begin_dR(dO);
      wgmma_wait<0>();  // for dS is touched next
      issue_dR_and_dS(dS_rounded, dO);
      finish_dR_and_issue_dX();
      stager.put_state(dS_rounded);
      wait_dX();
    }
    for (int chunk = work.num_chunks - 2; chunk >= 0; --chunk) {
      FragmentA dX_rounded[4], dO[4], dS_rounded[Cfg::kSteps];
      round_fragments<Element>(dX_rounded, dR);
      finish_dS(dX_rounded);
      read_dO<true>(dO, kChunk);  // only a sequence's last chunk is short
      begin_dR(dO);
      wgmma_wait<1>();  // dS
      release_gamma_E();
      issue_dR_and_dS(dS_rounded, dO);
      stager.put_rows(dX_rounded);  // of the last chunk
      finish_dR_and_issue_dX();
      stager.put_state(dS_rounded);
      wait_dX();
    }
    FragmentA dX_rounded[4];
    round_fragments<Element>(dX_rounded, dR);
    finish_dS(dX_rounded);
    wgmma_wait<0>();
    stager.put_rows(dX_rounded);
  }
};

// Walks of a sequence, value head and slice: first the reverse ones (those that make N: of all segments but the first),
// then those of the recomputation.
__host__ __device__ int num_reverse_walks(ScanBackwardParams const& params) {
  return params.segment_N != nullptr ? params.num_segments - 1 : params.num_segments;
}
__host__ __device__ int num_walks(ScanBackwardParams const& params) {
  return num_reverse_walks(params) + params.num_recomputed;
}

// The CTA's walk; asked of the machine, it needs no register in between.
__device__ int find_own_walk(ScanBackwardParams const& params) {
  asm volatile("" ::: "memory");
  return find_walk(params.shape, num_walks(params));
}

__device__ int find_segment(ScanBackwardParams const& params) {
  int const walk = find_own_walk(params), recomputed = walk - num_reverse_walks(params);
  return recomputed >= 0               ? params.first_recomputed + recomputed
         : params.segment_N != nullptr ? walk + 1
                                       : walk;
}

template <class Cfg>
__device__ void compute(RecomputeStorage<Cfg>& smem, ScanBackwardParams const& params, Work const& work,
                        int wg) {
  int const first_column = work.first_column + wg * kColumns;
  int const segment = find_segment(params);
  Recompute<Cfg> walk{smem, work, wg, {smem.outgoing, smem.rings_outgoing, wg}};
  if (segment == 0) {
    read_state<Cfg::kDimK>(walk.S, params.initial_state, params.shape, params.state_v_first, work,
                           first_column);
  } else {
    read_segment_state<Cfg::kDimK>(walk.S, params.segment_states, params.shape,
                                   segment_row(work, segment - 1, params.num_segments), work.value_head,
                                   first_column);
  }
  walk.run();
}

template <class Cfg>
__device__ void compute(ReverseStorage<Cfg>& smem, ScanBackwardParams const& params, Work const& work,
                        int wg) {
  int const first_column = work.first_column + wg * kColumns;
  bool const only_N = params.segment_N != nullptr;
  Reverse<Cfg> walk{smem, work, wg, {smem.outgoing, smem.rings_outgoing, wg}};
  int const segment = find_segment(params);
  bool const is_last = segment == params.num_segments - 1;
  if (is_last || only_N) {
    read_state<Cfg::kDimK>(walk.dS, is_last ? params.d_final_state : nullptr, params.shape,
                           params.state_v_first, work, first_column);
  } else {
    wait_for_earlier_kernels();  // segment_states
    read_segment_state<Cfg::kDimK>(walk.dS, params.segment_gradients, params.shape,
                                   segment_row(work, segment, params.num_segments), work.value_head,
                                   first_column);
  }
  walk.run();
  int const again = find_segment(params);  // which needs no register during the walk
  if (only_N) {
    write_segment_state<Cfg::kDimK>(walk.dS, params.segment_N, params.shape,
                                    segment_row(work, again - 1, params.num_segments), work.value_head,
                                    first_column);
  } else if (again == 0) {
    write_state<Cfg::kDimK>(walk.dS, params.d_initial_state, params.shape, params.state_v_first, work,
                            first_column);
  }
}

// ---- kernel ------------------------------------------------------------------------------------------------

template <class Cfg>
constexpr int kStorageBytes = std::max(sizeof(RecomputeStorage<Cfg>), sizeof(ReverseStorage<Cfg>));
template <class Cfg>
constexpr int kSharedBytes = kStorageBytes<Cfg> + sizeof(Work);

template <class Cfg>
__global__ void __launch_bounds__(Cfg::kThreads, 1)
    scan_backward_kernel(__grid_constant__ ScanBackwardParams const params,
                         __grid_constant__ TensorMaps const maps) {
  extern __shared__ std::uint8_t smem_bytes[];
  auto& recompute = *reinterpret_cast<RecomputeStorage<Cfg>*>(smem_bytes);
  auto& reverse = *reinterpret_cast<ReverseStorage<Cfg>*>(smem_bytes);
  bool const forwards = find_own_walk(params) >= num_reverse_walks(params);
  Work& work = *reinterpret_cast<Work*>(smem_bytes + kStorageBytes<Cfg>);  // where it costs no registers
  if (threadIdx.x == 0) {
    work = find_work(params.shape, params.plan, num_walks(params), Cfg::kWarpgroups * kColumns);
    take_segment(work, find_segment(params), params.num_segments);
    forwards ? recompute.init_barriers() : reverse.init_barriers();
  }
  __syncthreads();
  let_next_kernel_start();
  int const wg = warpgroup_index();
  if (wg < Cfg::kWarpgroups) {
    claim_registers<Cfg::kMathRegisters>();
    forwards ? compute(recompute, params, work, wg) : compute(reverse, params, work, wg);
  } else if (wg == Cfg::kWarpgroups) {
    give_up_registers<Cfg::kValuesRegisters>();
    if (forwards) {
      make_values<Cfg>(recompute, params.gates, work);
    }
  } else {
    give_up_registers<Cfg::kCopyRegisters>();
    int const warp = __shfl_sync(0xffffffff, threadIdx.x % kWarpgroupThreads / kWarpThreads, 0);
    if (warp == 0) {
      if (elect_one()) {
        forwards ? load(recompute, params, work) : load(reverse, params, work);
      }
    } else if (warp <= Cfg::kWarpgroups) {
      BackwardTiles const& out = params.out;
      if (forwards) {
        store<Cfg>(recompute.outgoing, recompute.rings_outgoing, out.S, out.R, true, params.shape, work,
                   warp - 1);
      } else {
        bool const only_N = params.segment_N != nullptr;
        store<Cfg>(reverse.outgoing, reverse.rings_outgoing, only_N ? nullptr : out.dS, out.dX, false,
                   params.shape, work, warp - 1);
      }
    } else if (warp == Cfg::kWarpgroups + 1 && elect_one()) {
      wait_for_earlier_kernels();
      forwards ? load_values<Cfg>(recompute, maps, work) : load_dO<Cfg>(reverse, maps, work);
    }
  }
}

template <class Cfg>
void launch(ScanBackwardParams const& params, cudaStream_t stream) {
  CallShape const& shape = params.shape;
  TensorMaps maps{};
  if (shape.seqlen > 0) {
    maps = {
        .v = value_map(params.v, shape), .w = value_map(params.w, shape), .dO = value_map(params.dO, shape)};
  }
  auto const kernel = scan_backward_kernel<Cfg>;
  static_assert(kSharedBytes<Cfg> <= 227 * 1024);
  throw_on_error(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes<Cfg>),
                 "scan_backward: shared memory");
  constexpr int kColumnsPerCta = Cfg::kWarpgroups * kColumns;
  dim3 const grid(static_cast<unsigned>(shape.num_sequences) * num_walks(params) * shape.num_value_heads,
                  (shape.dim_v + kColumnsPerCta - 1) / kColumnsPerCta);
  cudaLaunchAttribute overlap = overlapping_launch();
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(Cfg::kThreads);
  config.dynamicSmemBytes = kSharedBytes<Cfg>;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = params.follows_prepare && shape.seqlen > 0 ? 1 : 0;
  throw_on_error(cudaLaunchKernelEx(&config, kernel, params, maps), "scan_backward: launch");
}

template <class Element, int kDimK>
void dispatch(ScanBackwardParams const& params, cudaStream_t stream) {
  // As in scan: two warpgroups share the factors that they load, at half the number of CTAs.
  CallShape const& shape = params.shape;
  std::int64_t const slices = (shape.dim_v + kColumns - 1) / kColumns;
  std::int64_t const walks = std::int64_t{shape.num_sequences} * shape.num_value_heads * num_walks(params);
  bool const share = slices > 1 && walks * slices > params.num_sms;
  share ? launch<Config<Element, kDimK, 2>>(params, stream)
        : launch<Config<Element, kDimK, 1>>(params, stream);
}

}  // namespace

void run_scan_backward(ScanBackwardParams const& params, cudaStream_t stream) {
  if (params.shape.num_sequences == 0) {
    return;
  }
  bool const wide = params.shape.dim_k > 64;
  if (params.shape.element == ElementType::kFloat16) {
    wide ? dispatch<__half, 128>(params, stream) : dispatch<__half, 64>(params, stream);
  } else {
    wide ? dispatch<__nv_bfloat16, 128>(params, stream) : dispatch<__nv_bfloat16, 64>(params, stream);
  }
}

}  // namespace gdn2
