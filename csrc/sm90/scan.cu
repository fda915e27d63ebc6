// scan: the state walks along the chunks of a sequence; outputs come out on the way.
//
//     X^T = Z^T - S^T (gamma*E)^T              Z = w*v
//     R^T = X^T + X^T (A-I)^T
//     O^T = S^T (scale*gamma*q)^T + R^T P^T
//     S^T = S^T Diag(gamma[C-1]) + R^T Kt
//
// Everything is transposed, value columns on the rows of the accumulators: then the left operand of each
// product is the rounded accumulator of the one before it, in the registers where it is, and neither state
// nor residual passes through shared memory.
//
// Grid: one CTA for a sequence, segment, value head and kWarpgroups * 64 value columns, longer sequences
// first. CTAs of neighbouring columns are pairs (clusters): each loads a half of every tile of factors, for
// both. A sequence is one segment, or several (kSplit), which start where the maps of those before lead
// (segment_start.cuh).
// Roles: kWarpgroups math warpgroups of 64 value columns each (S 64, X 32, O 32 accumulators; 32 rounded S,
// 16 rounded X or R or O a thread); one warpgroup that makes Z; one whose first warp loads factors, whose
// next ones store O, one a math warpgroup, and whose next one loads v and w. A math warp has its scheduler
// nearly to itself, so that every instruction it is spared shortens the chain.
// Shared memory (K 128): rings of stages, each let go as soon as its product is done: v and w (16 KB a
// warpgroup), Z (16 KB a warpgroup, float32, in the order of the accumulators), gamma*E (16 KB),
// scale*gamma*q and A-I (24 KB), Kt and P (24 KB); O 8 KB a warpgroup. Maps come to where the q of chunks
// after the first and all k will be.
//
// Beside prepare (few heads): the loads of a chunk's tiles wait for its flag.
//
// Tensor cores, one chunk (cycles at full rate) and what the math warps do behind them:
//     X 256        | O = S q 256        | R 128        |         | S' 256    | O += R P 128
//     last O out   | round X            |              | round R | Z of c+1  | round and decay S
#include <cutlass/arch/barrier.h>

#include "api/chunk_forward.h"
#include "sm90/segment_start.cuh"
#include "tile/launch.h"
#include "tile/launch_order.cuh"
#include "tile/ready_flag.cuh"
#include "tile/tensor_map.h"

namespace gdn2 {
namespace {

template <class Element_, int kDimK_, int kWarpgroups_, bool kSplit_, bool kStoreStates_, bool kPaired_>
struct Config {
  using Element = Element_;
  static constexpr int kDimK = kDimK_;
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr bool kSplit = kSplit_;              // sequences of several segments
  static constexpr bool kStoreStates = kStoreStates_;  // of every chunk's start
  static constexpr bool kPaired = kPaired_;            // with the CTA of the neighbouring value columns
  static constexpr int kBoxes = kDimK / kBoxColumns;
  static constexpr int kTileBytes = kBoxes * kBoxBytes;
  // As many stages as shared memory holds.
  static constexpr int kStagesValues = kWarpgroups == 1 ? 2 : 1, kStagesZ = kStagesValues, kStagesE = 2;
  static constexpr int kStagesQ = kWarpgroups == 1 ? 3 : 2, kStagesK = 2;
  static constexpr int kMapPieces =
      num_map_pieces<kDimK, kWarpgroups>((kStagesQ - 1 + kStagesK) * (kTileBytes + kTriangleImageBytes));
  static constexpr int kMathThreads = kWarpgroups * kWarpgroupThreads;
  static constexpr int kThreads = kMathThreads + 2 * kWarpgroupThreads;
  // Registers move from the other roles to the math.
  static constexpr int kMathRegisters = kWarpgroups == 1 ? 240 : 216;
  static constexpr int kValuesRegisters = 40, kCopyRegisters = 40;
};

template <class Cfg>
struct SharedStorage {
  struct Values {
    std::uint8_t v[Cfg::kWarpgroups][kBoxBytes], w[Cfg::kWarpgroups][kBoxBytes];
  };
  struct FactorsQ {
    std::uint8_t gamma_q[Cfg::kTileBytes], A_minus_I[kTriangleImageBytes];
  };
  struct FactorsK {
    std::uint8_t Kt[Cfg::kTileBytes], P[kTriangleImageBytes];
  };
  alignas(kSwizzleAtomBytes) Values values[Cfg::kStagesValues];
  std::uint8_t gamma_E[Cfg::kStagesE][Cfg::kTileBytes];
  FactorsQ factors_q[Cfg::kStagesQ];
  FactorsK factors_k[Cfg::kStagesK];
  std::uint8_t O[Cfg::kWarpgroups][kBoxBytes];
  FragmentsZ Z[Cfg::kStagesZ][Cfg::kWarpgroups];
  float gamma_last[Cfg::kStagesE][Cfg::kDimK];  // in the ring of gamma_E
  ValueRings<Cfg> value_rings;
  RingBarriers<Cfg::kStagesE> ring_E;
  RingBarriers<Cfg::kStagesQ> ring_q;
  RingBarriers<Cfg::kStagesK> ring_k;
  RingBarriers<1> ring_O[Cfg::kWarpgroups];
  StartBarriers<Cfg> start;
  Work work;  // of a split: here it costs no registers

  // Maps come to where the q of chunks after the first and all k will be.
  __device__ std::uint8_t* maps() { return factors_q[1].gamma_q; }

  // By the first num_threads threads: where no maps come, and where they do.
  __device__ void clear_above_first_triangle(int num_threads) {
    clear_above_triangle(factors_q[0].A_minus_I, threadIdx.x, num_threads);
  }
  __device__ void clear_above_triangles(int num_threads) {
    for (int stage = 1; stage < Cfg::kStagesQ; ++stage) {
      clear_above_triangle(factors_q[stage].A_minus_I, threadIdx.x, num_threads);
    }
    for (auto& factors : factors_k) {
      clear_above_triangle(factors.P, threadIdx.x, num_threads);
    }
  }

  // By one thread.
  __device__ void init_barriers() {
    constexpr int kCopyEngine = 1;
    value_rings.init();
    ring_E.init(kCopyEngine, kFactorReaders<Cfg>);
    ring_q.init(kCopyEngine, kFactorReaders<Cfg>);
    ring_k.init(kCopyEngine, kFactorReaders<Cfg>);
    for (auto& ring : ring_O) {
      ring.init(kWarpgroupWarps, 1);
    }
    if constexpr (Cfg::kSplit) {
      start.init();
    }
    cutlass::arch::fence_barrier_init();  // orders the inits before the copy engine's use of them
  }
};

struct TensorMaps {
  CUtensorMap v, w, o;
};

// By how many value columns a CTA has.
template <class Cfg>
using Ctas = WalkCtas<Cfg::kWarpgroups * kColumns>;

template <class Cfg>
__device__ int find_segment(ScanParams const& params) {
  return Cfg::kSplit ? Ctas<Cfg>(params.shape).find_walk(blockIdx.x, params.num_segments) : 0;
}

template <class Cfg>
__device__ Work find_work(ScanParams const& params) {
  int const num_segments = Cfg::kSplit ? params.num_segments : 1;
  Work work = Ctas<Cfg>(params.shape).find_work(params.shape, params.plan, blockIdx.x, num_segments);
  take_segment(work, find_segment<Cfg>(params), num_segments);
  return work;
}

template <class Cfg>
__device__ MapsToStart<false> maps_to_start(ScanParams const& params) {
  return {.number = find_segment<Cfg>(params) - 1, .first_N = 0, .num_segments = params.num_segments};
}

__device__ KeptChunks kept_chunks(ScanParams const& params) {
  return {.number = params.num_kept, .again = true};
}

// ---- load role --------------------------------------------------------------------------------------------

template <class Cfg>
__device__ void load(SharedStorage<Cfg>& smem, ScanParams const& params, Work const& work) {
  constexpr int kTile = Cfg::kTileBytes;
  constexpr int kGammaBytes = Cfg::kDimK * sizeof(float);
  ChunkTiles const& tiles = params.tiles;
  RingPosition<Cfg::kStagesE> at_E;
  RingPosition<Cfg::kStagesQ> at_q;
  RingPosition<Cfg::kStagesK> at_k;
  if (params.ready == nullptr) {
    wait_for_earlier_kernels();  // prepare, or segment_maps
  }
  if constexpr (Cfg::kSplit) {
    load_maps<Cfg>(smem.start, smem.maps(), params.segment_M, params.segment_N, params.shape, work,
                   maps_to_start<Cfg>(params));
  }
  for (int chunk = 0; chunk < work.num_chunks; ++chunk) {
    CacheHint const hint = kept_chunks(params).hint(chunk);
    std::int64_t const tile = work.first_tile + static_cast<std::int64_t>(chunk) * work.tile_stride;
    auto const* const factors = static_cast<std::uint8_t const*>(tiles.factors) + tile * 3 * kTile;

    FullBarrier& full_E = smem.ring_E.begin_fill(at_E, kTile + kGammaBytes);
    if (params.ready != nullptr) {
      wait_ready(params.ready + tile, kTileReady);
    }
    load_factors<Cfg>(smem.gamma_E[at_E.stage], factors + 2 * kTile, kTile, full_E, hint);
    load_factors<Cfg>(smem.gamma_last[at_E.stage], tiles.gamma_last + tile * Cfg::kDimK, kGammaBytes, full_E,
                      hint);
    at_E.advance();

    auto& factors_q = smem.factors_q[at_q.stage];
    FullBarrier& full_q = smem.ring_q.begin_fill(at_q, kTile + kTriangleBytes);
    load_factors<Cfg>(factors_q.gamma_q, factors, kTile, full_q, hint);
    load_triangle<Cfg>(factors_q.A_minus_I, tiles.A_minus_I, tile, full_q, hint);
    at_q.advance();

    if constexpr (Cfg::kSplit) {
      if (chunk == 0 && maps_to_start<Cfg>(params).number > 0) {
        wait_for_start(smem.start);
      }
    }
    auto& factors_k = smem.factors_k[at_k.stage];
    FullBarrier& full_k = smem.ring_k.begin_fill(at_k, kTile + kTriangleBytes);
    load_factors<Cfg>(factors_k.Kt, factors + kTile, kTile, full_k, hint);
    load_triangle<Cfg>(factors_k.P, tiles.P, tile, full_k, hint);
    at_k.advance();
  }
  if (params.ready != nullptr) {
    wait_for_earlier_kernels();  // prepare, which has nothing left to do: what comes next may rely on both
  }
}

// ---- store role: one warp a math warpgroup ----------------------------------------------------------------

// The rows of o that the chunk owns, from the warpgroup's tile.
template <class Cfg>
__device__ void store_rows(std::uint8_t const* tile, ScanParams const& params, TensorMaps const& maps,
                           Work const& work, int column, int chunk) {
  using Element = typename Cfg::Element;
  CallShape const& shape = params.shape;
  int const num_rows = min(kChunk, work.num_tokens - chunk * kChunk),
            token = work.first_token + chunk * kChunk;
  if (num_rows == kChunk && shape.dim_v % 8 == 0) {
    if (elect_one()) {
      // The math warps' ordinary stores, seen through the barrier, before the copy engine reads them. Here
      // and not there: it would lengthen the chain.
      cutlass::arch::fence_view_async_shared();
      cute::SM90_TMA_STORE::copy(&maps.o, tile, column, work.value_head, token, work.batch);
      cute::tma_store_arrive();
      cute::tma_store_wait<0>();  // the tile has been read
    }
    return;
  }
  // A tail must not touch the next sequence's rows, and a copy needs rows of whole 16 bytes.
  auto* const o = static_cast<Element*>(params.o);
  for (int i = lane_index(); i < num_rows * kColumns; i += kWarpThreads) {
    int const row = i / kColumns, v = i % kColumns;
    if (column + v < shape.dim_v) {
      std::int64_t const token_head =
          (static_cast<std::int64_t>(work.batch) * shape.seqlen + token + row) * shape.num_value_heads +
          work.value_head;
      o[token_head * shape.dim_v + column + v] =
          *reinterpret_cast<Element const*>(tile + swizzled_offset(row, v / 8) + v % 8 * sizeof(Element));
    }
  }
}

template <class Cfg>
__device__ void store_outputs(SharedStorage<Cfg>& smem, ScanParams const& params, TensorMaps const& maps,
                              Work const& work, int wg) {
  RingPosition<1> at;
  int const column = work.first_column + wg * kColumns;
  for (int chunk = 0; chunk < work.num_chunks; ++chunk) {
    smem.ring_O[wg].wait_full(at);
    store_rows<Cfg>(smem.O[wg], params, maps, work, column, chunk);
    smem.ring_O[wg].release(at);
  }
}

// Rows that no sequence owns, behind the last well-formed one: NaN.
template <class Cfg>
__device__ void poison_unowned_rows(ScanParams const& params, Work const& work, int wg) {
  using Element = typename Cfg::Element;
  CallShape const& shape = params.shape;
  int const first_row = work.first_token + work.num_tokens;
  int const column = work.first_column + wg * kColumns + threadIdx.x % kColumns;
  if (column >= shape.dim_v) {
    return;
  }
  for (int row = first_row + threadIdx.x % kWarpgroupThreads / kColumns; row < shape.seqlen;
       row += kWarpgroupThreads / kColumns) {
    std::int64_t const at =
        (static_cast<std::int64_t>(row) * shape.num_value_heads + work.value_head) * shape.dim_v + column;
    static_cast<Element*>(params.o)[at] = round_to<Element>(__int_as_float(0x7fffffff));
  }
}

// ---- math role --------------------------------------------------------------------------------------------

// One warpgroup's walk. Accumulators stay in registers over the whole sequence.
template <class Cfg>
struct Walk {
  using Element = typename Cfg::Element;
  static constexpr int kSteps = Cfg::kDimK / 16;

  SharedStorage<Cfg>& smem;
  ScanParams const& params;
  Work const& work;
  int wg;
  RingPosition<Cfg::kStagesZ> at_Z;
  RingPosition<Cfg::kStagesE> at_E;
  RingPosition<Cfg::kStagesQ> at_q;
  RingPosition<Cfg::kStagesK> at_k;
  RingPosition<1> at_O;
  float S[Cfg::kDimK / 2], X[32], O[32];
  MathThread own;

  // O^T, rounded, to the tile that the store role empties.
  __device__ void finish_O() {
    FragmentA O_rounded[4];
    round_fragments<Element>(O_rounded, O);
    smem.ring_O[wg].wait_empty(at_O);
    store_token_rows(O_rounded, smem.O[wg], own);
    smem.ring_O[wg].publish(at_O);
  }

  // X^T = Z^T - S^T (gamma*E)^T: issued. S goes on as S Diag(gamma[C-1]): the compiler lets nobody touch
  // accumulators, not even idle ones, between a product's issue and its wait.
  __device__ void issue_X(FragmentA (&S_rounded)[kSteps]) {
    smem.ring_E.wait_full(at_E);
    round_fragments<Element>(S_rounded, S);
    decay_state(S, smem.gamma_last[at_E.stage], own);
    wgmma_fence();
    multiply_transposed<Element, ScaleIn::Neg>(X, S_rounded, smem.gamma_E[at_E.stage], true);
  }

  // O^T = S^T (scale*gamma*q)^T while X is finished and rounded, then R^T = X^T + X^T (A-I)^T. All are done
  // on return.
  __device__ void finish_X_and_R(FragmentA const (&S_rounded)[kSteps]) {
    smem.ring_q.wait_full(at_q);
    auto const& factors = smem.factors_q[at_q.stage];
    wgmma_fence();
    multiply_transposed<Element, ScaleIn::One>(O, S_rounded, factors.gamma_q, false);
    wgmma_wait<1>();  // X
    release_factors<Cfg>(smem.ring_E, at_E);
    FragmentA X_rounded[4];
    round_fragments<Element>(X_rounded, X);
    wgmma_fence();
    multiply_triangle_transposed<Element>(X, X_rounded, factors.A_minus_I, true);
  }

  __device__ void wait_R() {
    wgmma_wait<0>();
    release_factors<Cfg>(smem.ring_q, at_q);
  }

  // S'^T = S^T Diag(gamma[C-1]) + R^T Kt, then O^T += R^T P^T: issued.
  __device__ void issue_S_and_O(FragmentA const (&R_rounded)[4]) {
    smem.ring_k.wait_full(at_k);
    auto const& factors = smem.factors_k[at_k.stage];
    wgmma_fence();
    multiply<Element, ScaleIn::One>(S, R_rounded, factors.Kt, true);
    multiply_triangle_transposed<Element>(O, R_rounded, factors.P, true);
  }

  __device__ void release_factors_k() { release_factors<Cfg>(smem.ring_k, at_k); }

  __device__ void store_chunk_state(int chunk) {
    float* const state =
        params.chunk_states + state_offset(params.shape, work.first_slot + chunk, work.value_head);
    for_each_state<Cfg::kDimK>(params.shape, params.state_v_first, work.first_column + wg * kColumns,
                               [&](int acc, int place) { state[place] = S[acc]; });
  }

  // No product is in flight between iterations: the compiler would have to wait for it.
  __device__ void run() {
    if (work.num_chunks == 0) {
      return;
    }
    own.pin();
    take_Z(X, smem, at_Z, wg, own);
    {
      if constexpr (Cfg::kStoreStates) {
        store_chunk_state(0);
      }
      FragmentA S_rounded[kSteps];
      issue_X(S_rounded);
      finish_X_and_R(S_rounded);
      wait_R();
    }
    for (int chunk = 1; chunk < work.num_chunks; ++chunk) {
      FragmentA R_rounded[4];
      round_fragments<Element>(R_rounded, X);
      issue_S_and_O(R_rounded);
      take_Z(X, smem, at_Z, wg, own);
      if constexpr (Cfg::kStoreStates) {
        wgmma_wait<0>();
        store_chunk_state(chunk);
      }
      wgmma_wait<1>();  // S'
      FragmentA S_rounded[kSteps];
      issue_X(S_rounded);
      wgmma_wait<1>();  // O of the last chunk
      release_factors_k();
      finish_O();
      finish_X_and_R(S_rounded);
      wait_R();
    }
    FragmentA R_rounded[4];
    round_fragments<Element>(R_rounded, X);
    issue_S_and_O(R_rounded);
    wgmma_wait<0>();
    finish_O();
  }
};

template <class Cfg>
__device__ void compute(SharedStorage<Cfg>& smem, ScanParams const& params, Work const& work, int wg) {
  int const first_column = work.first_column + wg * kColumns;
  int const segment = find_segment<Cfg>(params);
  Walk<Cfg> walk{smem, params, work, wg};
  if (segment == 0) {
    read_state<Cfg::kDimK>(walk.S, params.initial_state, params.shape, params.state_v_first, work,
                           first_column);
  } else if constexpr (Cfg::kSplit) {
    wait_for_earlier_kernels();  // segment_maps
    find_start<Cfg>(walk.S, smem.start, smem.maps(), params.segment_N, params.shape, work, wg,
                    maps_to_start<Cfg>(params), [&] { smem.clear_above_triangles(Cfg::kMathThreads); });
    if (params.segment_states != nullptr) {
      write_segment_state<Cfg::kDimK>(walk.S, params.segment_states, params.shape,
                                      segment_row(work, segment - 1, params.num_segments), work.value_head,
                                      first_column);
    }
  }
  walk.run();
  if (Cfg::kSplit && segment != work.last_segment) {
    return;
  }
  write_state<Cfg::kDimK>(walk.S, params.final_state, params.shape, params.state_v_first, work, first_column);
  if (params.plan.spans != nullptr && work.sequence == params.shape.num_sequences - 1) {
    poison_unowned_rows<Cfg>(params, work, wg);
  }
}

// By all threads of a CTA. `work` may be read after sync_before_loads.
template <class Cfg>
__device__ void run(SharedStorage<Cfg>& smem, ScanParams const& params, TensorMaps const& maps,
                    Work const& work) {
  if (threadIdx.x == 0) {
    smem.init_barriers();
  }
  smem.clear_above_first_triangle(Cfg::kThreads);
  if (!Cfg::kSplit || maps_to_start<Cfg>(params).number <= 0) {
    smem.clear_above_triangles(Cfg::kThreads);
  }
  sync_before_loads<Cfg>();
  if (Cfg::kSplit && find_segment<Cfg>(params) > work.last_segment) {
    return;
  }
  int const wg = warpgroup_index();
  if (wg < Cfg::kWarpgroups) {
    claim_registers<Cfg::kMathRegisters>();
    compute(smem, params, work, wg);
  } else if (wg == Cfg::kWarpgroups) {
    give_up_registers<Cfg::kValuesRegisters>();
    make_values<Cfg>(smem, params.gates, work);
  } else {
    give_up_registers<Cfg::kCopyRegisters>();
    int const warp = uniform(static_cast<int>(threadIdx.x % kWarpgroupThreads / kWarpThreads));
    if (warp == 0) {
      if (elect_one()) {
        load(smem, params, work);
      }
    } else if (warp <= Cfg::kWarpgroups) {
      store_outputs(smem, params, maps, work, warp - 1);
    } else if (warp == Cfg::kWarpgroups + 1 && elect_one()) {
      load_values<Cfg>(smem, maps, work, kept_chunks(params));
    }
  }
  leave_together<Cfg>();
}

template <class Cfg>
__global__ void __launch_bounds__(Cfg::kThreads, 1)
    scan_kernel(__grid_constant__ ScanParams const params, __grid_constant__ TensorMaps const maps) {
  extern __shared__ std::uint8_t smem_bytes[];
  auto& smem = *reinterpret_cast<SharedStorage<Cfg>*>(smem_bytes);
  if constexpr (Cfg::kSplit) {
    if (threadIdx.x == 0) {
      smem.work = find_work<Cfg>(params);
    }
    run(smem, params, maps, smem.work);
  } else {
    run(smem, params, maps, find_work<Cfg>(params));
  }
}

template <class Cfg>
void launch(ScanParams const& params, cudaStream_t stream) {
  CallShape const& shape = params.shape;
  TensorMaps maps{};
  if (shape.seqlen > 0) {
    maps.v = value_map(params.v, shape);
    maps.w = value_map(params.w, shape);
  }
  if (shape.seqlen > 0 && shape.dim_v % 8 == 0) {
    std::int64_t const row = static_cast<std::int64_t>(shape.num_value_heads) * shape.dim_v;
    maps.o = value_map({params.o, shape.seqlen * row, row, shape.dim_v}, shape);
  }
  constexpr int kSmemBytes = sizeof(SharedStorage<Cfg>);
  static_assert(kSmemBytes <= 227 * 1024);
  launch_kernel<scan_kernel<Cfg>>(
      {.name = "scan",
       .grid = dim3(Ctas<Cfg>(shape).of_walk * shape.num_sequences * params.num_segments),
       .num_threads = Cfg::kThreads,
       .shared_bytes = kSmemBytes,
       .stream = stream,
       .cluster = dim3(Cfg::kPaired ? 2 : 1),
       .overlaps = shape.seqlen > 0},  // without tokens there has been no prepare
      params, maps);
}

template <class Element, int kDimK>
void dispatch(ScanParams const& params, cudaStream_t stream) {
  // Value columns share the factors that are loaded. Two warpgroups do so at half the number of CTAs: where
  // one warpgroup a CTA would not run all at once, they are the better choice. Elsewhere pairs of CTAs do,
  // and in a split, which is for few heads.
  CallShape const& shape = params.shape;
  std::int64_t const slices = num_slices(shape.dim_v);
  std::int64_t const walks = std::int64_t{shape.num_sequences} * shape.num_value_heads;
  bool const split = params.num_segments > 1;
  // Beside prepare there may be no two SMs free that could be a cluster.
  bool const pair = slices % 2 == 0 && params.ready == nullptr;
  if (params.chunk_states != nullptr) {
    split ? launch<Config<Element, kDimK, 1, true, true, false>>(params, stream)
          : launch<Config<Element, kDimK, 1, false, true, false>>(params, stream);
  } else if (split) {
    pair ? launch<Config<Element, kDimK, 1, true, false, true>>(params, stream)
         : launch<Config<Element, kDimK, 1, true, false, false>>(params, stream);
  } else if (slices > 1 && walks * slices > params.num_sms) {
    launch<Config<Element, kDimK, 2, false, false, false>>(params, stream);
  } else if (pair) {
    launch<Config<Element, kDimK, 1, false, false, true>>(params, stream);
  } else {
    launch<Config<Element, kDimK, 1, false, false, false>>(params, stream);
  }
}

}  // namespace

void run_scan(ScanParams const& params, cudaStream_t stream) {
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
