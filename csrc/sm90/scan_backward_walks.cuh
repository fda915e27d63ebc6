// The two walks of `scan_backward`: what lies in shared memory, and what a math warpgroup does.
#pragma once

#include <cutlass/arch/barrier.h>

#include "sm90/segment_start.cuh"

namespace gdn2::scan_backward {

template <class Element_, int kDimK_, int kWarpgroups_, bool kPaired_>
struct Config {
  using Element = Element_;
  static constexpr int kDimK = kDimK_;
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr bool kPaired = kPaired_;  // with the CTA of the neighbouring value columns
  static constexpr int kTileBytes = kDimK / kBoxColumns * kBoxBytes;
  static constexpr int kGammaBytes = kDimK * sizeof(float);
  static constexpr int kSteps = kDimK / 16;  // fragments of a rounded state
  // As many stages as shared memory holds: of the recomputation, where v and w come before its factors, for
  // they come from further away (with one stage a chunk took as long as they did),
  static constexpr int kStagesValues = 2, kStagesZ = kWarpgroups == 1 ? 2 : 1;
  static constexpr int kStagesFactors = kWarpgroups == 1 || kDimK <= 64 ? 3 : 2;
  // and of the reverse walk.
  static constexpr int kStagesO = kWarpgroups == 1 ? 3 : 2, kStagesK = kStagesO, kStagesQ = kStagesO;
  static constexpr int kStagesE = 2;
  static constexpr int kMapPieces =
      num_map_pieces<kDimK, kWarpgroups>((kStagesK - 1 + kStagesQ) * (kTileBytes + kTriangleImageBytes));
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
  std::uint8_t gamma_E[Cfg::kStagesFactors][Cfg::kTileBytes];
  std::uint8_t A_minus_I[Cfg::kStagesFactors][kTriangleImageBytes];
  std::uint8_t Kt[Cfg::kStagesFactors][Cfg::kTileBytes];
  FragmentsZ Z[Cfg::kStagesZ][Cfg::kWarpgroups];
  float gamma_last[Cfg::kStagesFactors][Cfg::kDimK];  // in the ring of gamma_E
  OutgoingRings<Cfg> rings_outgoing;
  ValueRings<Cfg> value_rings;
  RingBarriers<Cfg::kStagesFactors> ring_E, ring_A, ring_Kt;

  // By the first num_threads threads.
  __device__ void clear_above_triangles(int num_threads) {
    for (auto& image : A_minus_I) {
      clear_above_triangle(image, threadIdx.x, num_threads);
    }
  }

  // By one thread.
  __device__ void init_barriers() {
    constexpr int kCopyEngine = 1;
    rings_outgoing.init();
    value_rings.init();
    ring_E.init(kCopyEngine, kFactorReaders<Cfg>);
    ring_A.init(kCopyEngine, kFactorReaders<Cfg>);
    ring_Kt.init(kCopyEngine, kFactorReaders<Cfg>);
    cutlass::arch::fence_barrier_init();  // orders the inits before the copy engine's use of them
  }
};

template <class Cfg>
struct ReverseStorage {
  struct FactorsK {
    std::uint8_t Kt[Cfg::kTileBytes], P[kTriangleImageBytes];
  };
  struct FactorsQ {
    std::uint8_t gamma_q[Cfg::kTileBytes], A_minus_I[kTriangleImageBytes];
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
  StartBarriers<Cfg> start;

  // Maps come to where the k of chunks before the last and all q will be.
  __device__ std::uint8_t* maps() { return factors_k[1].Kt; }

  // By the first num_threads threads: where no maps come, and where they do.
  __device__ void clear_above_first_triangle(int num_threads) {
    clear_above_triangle(factors_k[0].P, threadIdx.x, num_threads);
  }
  __device__ void clear_above_triangles(int num_threads) {
    for (int stage = 1; stage < Cfg::kStagesK; ++stage) {
      clear_above_triangle(factors_k[stage].P, threadIdx.x, num_threads);
    }
    for (auto& factors : factors_q) {
      clear_above_triangle(factors.A_minus_I, threadIdx.x, num_threads);
    }
  }

  // By one thread.
  __device__ void init_barriers() {
    constexpr int kCopyEngine = 1;
    rings_outgoing.init();
    ring_dO.init(kCopyEngine, Cfg::kMathWarps);
    start.init();
    ring_k.init(kCopyEngine, kFactorReaders<Cfg>);
    ring_q.init(kCopyEngine, kFactorReaders<Cfg>);
    ring_E.init(kCopyEngine, kFactorReaders<Cfg>);
    cutlass::arch::fence_barrier_init();  // orders the inits before the copy engine's use of them
  }
};

// ---- math roles: one warpgroup's walk, accumulators in registers over the whole sequence ------------------

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
  }

  __device__ void put_rows(FragmentA const (&rows)[4]) {
    rings.rows[wg].wait_empty(at_rows);
    store_token_rows(rows, outgoing.rows[wg]);
    rings.rows[wg].publish(at_rows);
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
  RingPosition<Cfg::kStagesFactors> at_E, at_A, at_Kt;
  float S[Cfg::kDimK / 2], X[32];

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
    release_factors<Cfg>(smem.ring_E, at_E);
    FragmentA X_rounded[4];
    round_fragments<Element>(X_rounded, X);
    smem.ring_A.wait_full(at_A);
    wgmma_fence();
    multiply_triangle_transposed<Element>(X, X_rounded, smem.A_minus_I[at_A.stage], true);
  }

  __device__ void wait_R() {
    wgmma_wait<0>();
    release_factors<Cfg>(smem.ring_A, at_A);
  }

  // S'^T = S^T Diag(gamma[C-1]) + R^T Kt: issued.
  __device__ void issue_S(FragmentA const (&R_rounded)[4]) {
    smem.ring_Kt.wait_full(at_Kt);
    wgmma_fence();
    multiply<Element, ScaleIn::One>(S, R_rounded, smem.Kt[at_Kt.stage], true);
  }

  __device__ void wait_S() {
    wgmma_wait<0>();
    release_factors<Cfg>(smem.ring_Kt, at_Kt);
  }

  // No product is in flight between iterations: the compiler would have to wait for it.
  __device__ void run() {
    if (work.num_chunks == 0) {
      return;
    }
    take_Z(X, smem, at_Z, wg);
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
      take_Z(X, smem, at_Z, wg);
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
          r[i] &= mask_of_rows(num_rows - (16 * t + 8 * (i % 2) + 2 * (lane_index() % 4)));
        }
      }
      dO[t] = {r[0], r[2], r[1], r[3]};
    }
    smem.ring_dO.release(at_dO);
  }

  // dR^T = dO^T P: issued.
  __device__ void begin_dR(FragmentA const (&dO)[4]) {
    smem.ring_k.wait_full(at_k);
    wgmma_fence();
    multiply_triangle<Element>(dR, dO, smem.factors_k[at_k.stage].P, false);
  }

  // dR^T += dS'^T Kt^T, then dS^T = dS'^T Diag(gamma[C-1]) + dO^T (scale*gamma*q): issued. dS decays behind
  // the first product; the second fence then spares the compiler one of its own.
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
    release_factors<Cfg>(smem.ring_k, at_k);
    FragmentA dR_rounded[4];
    round_fragments<Element>(dR_rounded, dR);
    wgmma_fence();
    multiply_triangle<Element>(dR, dR_rounded, smem.factors_q[at_q.stage].A_minus_I, true);
  }

  __device__ void wait_dX() {
    wgmma_wait<0>();
    release_factors<Cfg>(smem.ring_q, at_q);
  }

  // dS^T -= dX^T (gamma*E): issued.
  __device__ void finish_dS(FragmentA const (&dX_rounded)[4]) {
    smem.ring_E.wait_full(at_E);
    wgmma_fence();
    multiply<Element, ScaleIn::Neg>(dS, dX_rounded, smem.gamma_E[at_E.stage], true);
  }

  __device__ void release_gamma_E() { release_factors<Cfg>(smem.ring_E, at_E); }

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

// ---- walks of a sequence, value head and slice ------------------------------------------------------------

// The grid has two parts. In the first one segments but the first are walked in reverse from a gradient of
// zero, the last one from d_final_state; nothing comes out of it but N. The second one has all segments'
// reverse walks, each from the gradient that those N lead to. Both have walks of the recomputation beside
// them. CTAs start in the order of their numbers: what one waits for has started before it.
struct WalksOfPart {
  int reverse, forwards;

  __host__ __device__ WalksOfPart(ScanBackwardParams const& params, bool makes_N)
      : reverse(makes_N ? params.num_segments - 1 : params.num_segments),
        forwards(makes_N ? params.num_recomputed_first
                         : params.num_recomputed - params.num_recomputed_first) {}
  __host__ __device__ int number() const { return reverse + forwards; }
};

// The CTA's own. Asked of the machine, it needs no register in between.
template <class Cfg>
struct OwnWalk {
  WalkCtas<Cfg::kWarpgroups * kColumns> ctas;
  unsigned cta;  // of its part of the grid
  int number;    // of walks in that
  bool forwards, makes_N;
  int segment;

  __device__ explicit OwnWalk(ScanBackwardParams const& params) : ctas(params.shape) {
    asm volatile("" ::: "memory");
    unsigned const first_part =
        ctas.of_walk * params.shape.num_sequences * WalksOfPart(params, true).number();
    cta = blockIdx.x;
    makes_N = cta < first_part;
    cta = makes_N ? cta : cta - first_part;
    WalksOfPart const walks(params, makes_N);
    number = walks.number();
    int const walk = ctas.find_walk(cta, number), recomputed = walk - walks.reverse;
    forwards = recomputed >= 0;
    segment = forwards  ? (makes_N ? recomputed : params.num_recomputed_first + recomputed)
              : makes_N ? walk + 1
                        : walk;
    makes_N = makes_N && !forwards;
  }

  __device__ Work find_work(ScanBackwardParams const& params) const {
    Work work = ctas.find_work(params.shape, params.plan, cta, number);
    take_segment(work, segment, params.num_segments);
    return work;
  }

  // Reverse walks from zero need none.
  __device__ MapsToStart<true> maps_to_start(ScanBackwardParams const& params, Work const& work) const {
    int const first_N = work.last_segment - 1;
    return {
        .number = makes_N ? 0 : first_N - segment, .first_N = first_N, .num_segments = params.num_segments};
  }
};

}  // namespace gdn2::scan_backward
