// scan_backward: two walks along the chunks of a sequence, side by side: states and residuals once more, and
// their gradients.
//
//     recomputation, forwards from the initial state    reverse, backwards from the final state's gradient
//     X^T = Z^T - S^T (gamma*E)^T          Z = w*v      dR^T = dO^T P + dS'^T Kt^T
//     R^T = X^T + X^T (A-I)^T                           dX^T = dR^T + dR^T (A-I)
//     S^T = S^T Diag(gamma[C-1]) + R^T Kt               dS^T = dS'^T Diag(gamma[C-1]) + dO^T (scale*gamma*q)
//                                                              - dX^T (gamma*E)
// Of every chunk S (at its start), dS' (after its end), R and dX go out, rounded: what the products read them
// as. Neither walk reads what the other writes. As in scan, everything is transposed and the left operand of
// each product is the rounded accumulator of the one before it, in the registers where it is.
//
// Grid: one CTA for a sequence, walk, segment, value head and kWarpgroups * 64 value columns; longer
// sequences first, of each the reverse walks first. CTAs of neighbouring columns are pairs, as in scan. A
// sequence is one segment, or several whose first states are known. Then reverse walks from zero come
// first, and those behind them wait for what they make, the maps to their last gradients
// (segment_start.cuh); walks of the recomputation are beside either.
// Roles: kWarpgroups math warpgroups of 64 value columns each (S or dS 64, X or dR 32 accumulators; 32
// rounded S or dS', 16 rounded R or dX, 16 rounded X or dR, 16 dO a thread; 240 registers, 216 where there
// are two); one warpgroup that makes Z (idle in the reverse walk); one whose first warp loads factors, whose
// next ones store, one a math warpgroup, and whose next one loads v and w, or dO (40 registers each).
// Shared memory (K 128, one warpgroup / two): rings of stages, each let go as soon as its product is done; of
// v, w and Z each warpgroup has its own.
//     recomputation  v and w 2 x 16 / 2 x 32, Z 2 x 16 / 1 x 32, gamma*E and gamma[C-1] 3 x 16.5 / 2 x 16.5,
//                    A-I 3 x 8 / 2 x 8, Kt 3 x 16 / 2 x 16, outgoing S and R 24 / 48: 210 / 225 KB
//     reverse        dO 3 x 8 / 2 x 16, Kt and P and gamma[C-1] 3 x 24.5 / 2 x 24.5, scale*gamma*q and A-I
//                    3 x 24 / 2 x 24, gamma*E 2 x 16, outgoing dS' and dX 24 / 48: 226 / 209 KB; maps come to
//                    where the k of chunks before the last and all q will be
//
// Tensor cores, one chunk (cycles at full rate) and what the math warps do behind them:
//     recomputation  X 256               | R 128            |         | S' 256   |
//                    last R out, decay S | round X .. S out | round R | Z of c+1 | round S
//     reverse        dR += dS' Kt 256    | dS += dO q 256 | dX 128  |          | dS -= dX E 256 | dO P, c-1 128
//                    decay, last dX out  | round dR       | dS' out | round dX | dO of c-1      | round dS
#include <cutlass/arch/barrier.h>

#include <algorithm>

#include "api/chunk_backward.h"
#include "sm90/scan_backward_walks.cuh"
#include "tile/launch.h"
#include "tile/launch_order.cuh"
#include "tile/ready_flag.cuh"
#include "tile/tensor_map.h"

namespace gdn2 {
namespace {

using namespace scan_backward;

struct TensorMaps {
  CUtensorMap v, w, dO;
};

// ---- N of segments, from walks that make them to those that need them -------------------------------------

// Of the `row`-th of a sequence's, and the CTA's value columns.
__device__ std::uint64_t* find_N_ready(ScanBackwardParams const& params, Work const& work, int row) {
  return params.N_ready + segment_state_index(params.shape, segment_row(work, row, params.num_segments),
                                              work.value_head, work.first_column / kColumns);
}

// ---- load role --------------------------------------------------------------------------------------------

// Where a chunk's tiles lie.
template <class Cfg>
struct ChunkFactors {
  std::uint8_t const *gamma_q, *Kt, *gamma_E;
  float const* gamma_last;
  std::int64_t tile;

  __device__ ChunkFactors(ChunkTiles const& tiles, Work const& work, int chunk)
      : tile(work.first_tile + static_cast<std::int64_t>(chunk) * work.tile_stride) {
    gamma_q = static_cast<std::uint8_t const*>(tiles.factors) + tile * 3 * Cfg::kTileBytes;
    Kt = gamma_q + Cfg::kTileBytes;
    gamma_E = Kt + Cfg::kTileBytes;
    gamma_last = tiles.gamma_last + tile * Cfg::kDimK;
  }
};

template <class Cfg>
__device__ void load(RecomputeStorage<Cfg>& smem, ScanBackwardParams const& params, Work const& work) {
  RingPosition<Cfg::kStagesFactors> at_E, at_A, at_Kt;
  wait_for_earlier_kernels();  // prepare
  for (int chunk = 0; chunk < work.num_chunks; ++chunk) {
    ChunkFactors<Cfg> const factors(params.tiles, work, chunk);

    FullBarrier& full_E = smem.ring_E.begin_fill(at_E, Cfg::kTileBytes + Cfg::kGammaBytes);
    load_factors<Cfg>(smem.gamma_E[at_E.stage], factors.gamma_E, Cfg::kTileBytes, full_E);
    load_factors<Cfg>(smem.gamma_last[at_E.stage], factors.gamma_last, Cfg::kGammaBytes, full_E);
    at_E.advance();

    FullBarrier& full_A = smem.ring_A.begin_fill(at_A, kTriangleBytes);
    load_triangle<Cfg>(smem.A_minus_I[at_A.stage], params.tiles.A_minus_I, factors.tile, full_A);
    at_A.advance();

    if (chunk + 1 < work.num_chunks) {  // nobody needs the state after the last chunk
      FullBarrier& full_Kt = smem.ring_Kt.begin_fill(at_Kt, Cfg::kTileBytes);
      load_factors<Cfg>(smem.Kt[at_Kt.stage], factors.Kt, Cfg::kTileBytes, full_Kt);
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
  OwnWalk<Cfg> const own(params);
  MapsToStart<true> const maps = own.maps_to_start(params, work);
  KeptChunks const kept{params.num_kept, !own.makes_N};
  for (int step = 0; step < maps.number; ++step) {
    wait_ready(find_N_ready(params, work, maps.N_of(step)), params.call_number);
  }
  load_maps<Cfg>(smem.start, smem.maps(), params.segment_M, params.segment_N, params.shape, work, maps);
  for (int chunk = work.num_chunks - 1; chunk >= 0; --chunk) {
    CacheHint const hint = kept.hint(work.num_chunks - 1 - chunk);
    ChunkFactors<Cfg> const factors(params.tiles, work, chunk);

    auto& factors_k = smem.factors_k[at_k.stage];
    FullBarrier& full_k = smem.ring_k.begin_fill(at_k, Cfg::kTileBytes + kTriangleBytes + Cfg::kGammaBytes);
    load_triangle<Cfg>(factors_k.P, params.tiles.P, factors.tile, full_k, hint);
    load_factors<Cfg>(smem.gamma_last[at_k.stage], factors.gamma_last, Cfg::kGammaBytes, full_k, hint);
    load_factors<Cfg>(factors_k.Kt, factors.Kt, Cfg::kTileBytes, full_k, hint);
    at_k.advance();

    if (chunk == work.num_chunks - 1 && maps.number > 0) {
      wait_for_start(smem.start);
    }
    auto& factors_q = smem.factors_q[at_q.stage];
    FullBarrier& full_q = smem.ring_q.begin_fill(at_q, Cfg::kTileBytes + kTriangleBytes);
    load_factors<Cfg>(factors_q.gamma_q, factors.gamma_q, Cfg::kTileBytes, full_q, hint);
    load_triangle<Cfg>(factors_q.A_minus_I, params.tiles.A_minus_I, factors.tile, full_q, hint);
    at_q.advance();

    FullBarrier& full_E = smem.ring_E.begin_fill(at_E, Cfg::kTileBytes);
    load_factors<Cfg>(smem.gamma_E[at_E.stage], factors.gamma_E, Cfg::kTileBytes, full_E, hint);
    at_E.advance();
  }
}

// By another thread than the one that loads factors and at once, as v and w are (see load_values).
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

// ---- store role: one warp a math warpgroup ----------------------------------------------------------------

// One tile, to global memory unless `wanted` is false; its shared memory is free again on return.
__device__ void store_tile(void const* tile, void* image, int bytes, bool wanted, RingBarriers<1>& ring,
                           RingPosition<1>& at) {
  ring.wait_full(at);
  if (wanted && elect_one()) {
    // The math warps' ordinary stores, seen through the barrier, before the copy engine reads them. Here and
    // not there: it would lengthen the chain.
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
  int const slices = num_slices(shape.dim_v);
  int const slice = work.first_column / kColumns + wg;
  // The last CTA's second warpgroup may have no columns.
  bool const wanted = slice < slices && states != nullptr;
  RingPosition<1> at_state, at_rows;
  for (int step = 0; step < work.num_chunks; ++step) {
    int const chunk = forwards ? step : work.num_chunks - 1 - step;
    std::int64_t const head =
        static_cast<std::int64_t>(work.first_slot + chunk) * shape.num_value_heads + work.value_head;
    std::int64_t const tile = head * slices + slice;
    store_tile(outgoing.state[wg], static_cast<std::uint8_t*>(states) + tile * Cfg::kTileBytes,
               Cfg::kTileBytes, wanted, rings.state[wg], at_state);
    store_tile(outgoing.rows[wg], static_cast<std::uint8_t*>(rows) + tile * kBoxBytes, kBoxBytes, wanted,
               rings.rows[wg], at_rows);
  }
}

// ---- walks ------------------------------------------------------------------------------------------------

template <class Cfg>
__device__ void compute(RecomputeStorage<Cfg>& smem, ScanBackwardParams const& params, Work const& work,
                        int wg) {
  int const first_column = work.first_column + wg * kColumns;
  int const segment = OwnWalk<Cfg>(params).segment;
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
  Reverse<Cfg> walk{smem, work, wg, {smem.outgoing, smem.rings_outgoing, wg}};
  OwnWalk<Cfg> const own(params);
  bool const is_last = own.segment == work.last_segment;
  if (is_last || own.makes_N) {
    read_state<Cfg::kDimK>(walk.dS, is_last ? params.d_final_state : nullptr, params.shape,
                           params.state_v_first, work, first_column);
  } else {
    MapsToStart<true> const maps = own.maps_to_start(params, work);
    wait_for_earlier_kernels();  // prepare, if there is one: it clears flags
    wait_ready(find_N_ready(params, work, maps.first_N), params.call_number);
    find_start<Cfg>(walk.dS, smem.start, smem.maps(), params.segment_N, params.shape, work, wg, maps,
                    [&] { smem.clear_above_triangles(Cfg::kMathWarps * kWarpThreads); });
  }
  walk.run();
  OwnWalk<Cfg> const again(params);  // which needs no register during the walk
  if (again.makes_N) {
    wait_for_earlier_kernels();  // prepare, if there is one: it clears flags
    write_segment_state<Cfg::kDimK>(walk.dS, params.segment_N, params.shape,
                                    segment_row(work, again.segment - 1, params.num_segments),
                                    work.value_head, first_column);
    cutlass::arch::NamedBarrier::sync(Cfg::kMathWarps * kWarpThreads, 0);
    if (threadIdx.x == 0) {
      publish_ready(find_N_ready(params, work, again.segment - 1), params.call_number);
    }
  } else if (again.segment == 0) {
    write_state<Cfg::kDimK>(walk.dS, params.d_initial_state, params.shape, params.state_v_first, work,
                            first_column);
  }
}

// ---- kernel -----------------------------------------------------------------------------------------------

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
  bool const forwards = OwnWalk<Cfg>(params).forwards;
  Work& work = *reinterpret_cast<Work*>(smem_bytes + kStorageBytes<Cfg>);  // where it costs no registers
  if (threadIdx.x == 0) {
    work = OwnWalk<Cfg>(params).find_work(params);
    forwards ? recompute.init_barriers() : reverse.init_barriers();
  }
  if (forwards) {
    recompute.clear_above_triangles(Cfg::kThreads);
  } else {
    reverse.clear_above_first_triangle(Cfg::kThreads);
    __syncthreads();  // work is known
    if (OwnWalk<Cfg>(params).maps_to_start(params, work).number <= 0) {
      reverse.clear_above_triangles(Cfg::kThreads);
    }
  }
  sync_before_loads<Cfg>();
  let_next_kernel_start();
  if (OwnWalk<Cfg>(params).segment > work.last_segment) {
    return;
  }
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
    int const warp = uniform(static_cast<int>(threadIdx.x % kWarpgroupThreads / kWarpThreads));
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
        bool const only_N = OwnWalk<Cfg>(params).makes_N;
        store<Cfg>(reverse.outgoing, reverse.rings_outgoing, only_N ? nullptr : out.dS, out.dX, false,
                   params.shape, work, warp - 1);
      }
    } else if (warp == Cfg::kWarpgroups + 1 && elect_one()) {
      forwards ? load_values<Cfg>(recompute, maps, work, {}) : load_dO<Cfg>(reverse, maps, work);
    }
  }
  leave_together<Cfg>();
}

template <class Cfg>
void launch(ScanBackwardParams const& params, cudaStream_t stream) {
  CallShape const& shape = params.shape;
  TensorMaps maps{};
  if (shape.seqlen > 0) {
    maps = {
        .v = value_map(params.v, shape), .w = value_map(params.w, shape), .dO = value_map(params.dO, shape)};
  }
  static_assert(kSharedBytes<Cfg> <= 227 * 1024);
  int const num_walks = WalksOfPart(params, true).number() + WalksOfPart(params, false).number();
  unsigned const ctas_of_walk = WalkCtas<Cfg::kWarpgroups * kColumns>(shape).of_walk;
  launch_kernel<scan_backward_kernel<Cfg>>({.name = "scan_backward",
                                            .grid = dim3(ctas_of_walk * shape.num_sequences * num_walks),
                                            .num_threads = Cfg::kThreads,
                                            .shared_bytes = kSharedBytes<Cfg>,
                                            .stream = stream,
                                            .cluster = dim3(Cfg::kPaired ? 2 : 1),
                                            .overlaps = params.follows_prepare},
                                           params, maps);
}

template <class Element, int kDimK>
void dispatch(ScanBackwardParams const& params, cudaStream_t stream) {
  // As in scan: two warpgroups share the factors that they load, or two CTAs.
  CallShape const& shape = params.shape;
  std::int64_t const slices = num_slices(shape.dim_v);
  std::int64_t const walks =
      std::int64_t{shape.num_sequences} * shape.num_value_heads *
      std::max(WalksOfPart(params, true).number(), WalksOfPart(params, false).number());
  bool const share = slices > 1 && walks * slices > params.num_sms;
  if (share) {
    launch<Config<Element, kDimK, 2, false>>(params, stream);
  } else if (slices % 2 == 0) {
    launch<Config<Element, kDimK, 1, true>>(params, stream);
  } else {
    launch<Config<Element, kDimK, 1, false>>(params, stream);
  }
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
