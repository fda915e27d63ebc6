// segment_maps: what a segment of a sequence makes of any state: S' = M S + N.
//
//     N: the walk of scan from a state of zero         M: the same walk with Z = 0 from the unit matrix
//     (the first segment's from the initial state: it starts nowhere else, and needs no M)
//     X^T = Z^T - S^T (gamma*E)^T     R^T = X^T + X^T (A-I)^T     S^T = S^T Diag(gamma[C-1]) + R^T Kt
//
// Nothing comes out but the last state, as SegmentMapsParams describes it. M is that of a gate head, for all
// of its value heads.
//
// Grid: one CTA for 64 columns of N (of a sequence and value head) or of M (of a sequence and gate head), and
// a segment; a sequence's last segment that has chunks needs none. CTAs of neighbouring columns are pairs, as
// in scan.
// Roles: a math warpgroup (S 64, X 32 accumulators; 32 rounded S, 16 rounded X or R a thread); one that makes
// Z (idle for M); one whose first warp loads factors, and whose second one loads v and w.
// Shared memory (K 128): v and w 2 x 16 KB, Z 2 x 16 KB, gamma*E and gamma[C-1] 3 x 16.5 KB, A-I 3 x 8 KB, Kt
// 3 x 16 KB.
//
// Tensor cores, one chunk: X 256 | R 128 | S' 256 cycles, one after the other.
#include <cutlass/arch/barrier.h>

#include "api/sequence_split.h"
#include "sm90/segment_start.cuh"
#include "tile/launch.h"
#include "tile/launch_order.cuh"
#include "tile/tensor_map.h"

namespace gdn2 {
namespace {

template <class Element_, int kDimK_, bool kPaired_>
struct Config {
  using Element = Element_;
  static constexpr int kDimK = kDimK_;
  static constexpr int kWarpgroups = 1;      // of math
  static constexpr bool kPaired = kPaired_;  // with the CTA of the neighbouring columns
  static constexpr int kTileBytes = kDimK / kBoxColumns * kBoxBytes;
  static constexpr int kGammaBytes = kDimK * sizeof(float);
  static constexpr int kSteps = kDimK / 16;  // fragments of a rounded state
  static constexpr int kStagesValues = 2, kStagesZ = 2, kStagesE = 3, kStagesA = 3, kStagesKt = 3;
  static constexpr int kThreads = 3 * kWarpgroupThreads;
  static constexpr int kMathRegisters = 240, kValuesRegisters = 40, kCopyRegisters = 40;
};

struct TensorMaps {
  CUtensorMap v, w;
};

// A segment of a walk, and which map.
struct MapWork : Work {
  bool is_M;
  int segment;
};

template <class Cfg>
struct SharedStorage {
  struct Values {
    std::uint8_t v[1][kBoxBytes], w[1][kBoxBytes];
  };
  alignas(kSwizzleAtomBytes) Values values[Cfg::kStagesValues];
  std::uint8_t gamma_E[Cfg::kStagesE][Cfg::kTileBytes];
  std::uint8_t A_minus_I[Cfg::kStagesA][kTriangleImageBytes];
  std::uint8_t Kt[Cfg::kStagesKt][Cfg::kTileBytes];
  FragmentsZ Z[Cfg::kStagesZ][1];
  float gamma_last[Cfg::kStagesE][Cfg::kDimK];  // in the ring of gamma_E
  ValueRings<Cfg> value_rings;
  RingBarriers<Cfg::kStagesE> ring_E;
  RingBarriers<Cfg::kStagesA> ring_A;
  RingBarriers<Cfg::kStagesKt> ring_Kt;
  MapWork work;  // where it costs no registers

  // By all threads.
  __device__ void clear_above_triangles() {
    for (auto& image : A_minus_I) {
      clear_above_triangle(image, threadIdx.x, Cfg::kThreads);
    }
  }

  // By one thread.
  __device__ void init_barriers() {
    constexpr int kCopyEngine = 1;
    value_rings.init();
    ring_E.init(kCopyEngine, kFactorReaders<Cfg>);
    ring_A.init(kCopyEngine, kFactorReaders<Cfg>);
    ring_Kt.init(kCopyEngine, kFactorReaders<Cfg>);
    cutlass::arch::fence_barrier_init();  // orders the inits before the copy engine's use of them
  }
};

__device__ MapWork find_map(SegmentMapsParams const& params) {
  CallShape const& shape = params.shape;
  int const num_N = shape.num_sequences * shape.num_value_heads * num_slices(shape.dim_v);
  bool const is_M = static_cast<int>(blockIdx.x) >= num_N;
  // Columns fastest: two slices may be a pair.
  int const index = blockIdx.x - (is_M ? num_N : 0);
  int const heads = is_M ? shape.num_gate_heads : shape.num_value_heads;
  int const slices = is_M ? num_slices(shape.dim_k) : num_slices(shape.dim_v);
  int const lane = index / slices, column = index % slices * kColumns;
  int const group = shape.num_value_heads / shape.num_gate_heads;
  MapWork work;
  static_cast<Work&>(work) =
      find_work(shape, params.plan, lane / heads, is_M ? lane % heads * group : lane % heads, column);
  work.is_M = is_M;
  work.segment = blockIdx.y;
  take_segment(work, work.segment, params.num_segments);
  return work;
}

__device__ KeptChunks kept_chunks(SegmentMapsParams const& params) {
  return {.number = params.num_kept, .again = false};
}

// ---- load role --------------------------------------------------------------------------------------------

template <class Cfg>
__device__ void load(SharedStorage<Cfg>& smem, SegmentMapsParams const& params, MapWork const& work) {
  ChunkTiles const& tiles = params.tiles;
  RingPosition<Cfg::kStagesE> at_E;
  RingPosition<Cfg::kStagesA> at_A;
  RingPosition<Cfg::kStagesKt> at_Kt;
  wait_for_earlier_kernels();  // prepare
  for (int chunk = 0; chunk < work.num_chunks; ++chunk) {
    CacheHint const hint = kept_chunks(params).hint(chunk);
    std::int64_t const tile = work.first_tile + static_cast<std::int64_t>(chunk) * work.tile_stride;
    auto const* const factors = static_cast<std::uint8_t const*>(tiles.factors) + tile * 3 * Cfg::kTileBytes;

    FullBarrier& full_E = smem.ring_E.begin_fill(at_E, Cfg::kTileBytes + Cfg::kGammaBytes);
    load_factors<Cfg>(smem.gamma_E[at_E.stage], factors + 2 * Cfg::kTileBytes, Cfg::kTileBytes, full_E, hint);
    load_factors<Cfg>(smem.gamma_last[at_E.stage], tiles.gamma_last + tile * Cfg::kDimK, Cfg::kGammaBytes,
                      full_E, hint);
    at_E.advance();

    FullBarrier& full_A = smem.ring_A.begin_fill(at_A, kTriangleBytes);
    load_triangle<Cfg>(smem.A_minus_I[at_A.stage], tiles.A_minus_I, tile, full_A, hint);
    at_A.advance();

    FullBarrier& full_Kt = smem.ring_Kt.begin_fill(at_Kt, Cfg::kTileBytes);
    load_factors<Cfg>(smem.Kt[at_Kt.stage], factors + Cfg::kTileBytes, Cfg::kTileBytes, full_Kt, hint);
    at_Kt.advance();
  }
}

// ---- math role --------------------------------------------------------------------------------------------

template <class Cfg>
struct Walk {
  using Element = typename Cfg::Element;

  SharedStorage<Cfg>& smem;
  MapWork const& work;
  RingPosition<Cfg::kStagesZ> at_Z;
  RingPosition<Cfg::kStagesE> at_E;
  RingPosition<Cfg::kStagesA> at_A;
  RingPosition<Cfg::kStagesKt> at_Kt;
  float S[Cfg::kDimK / 2], X[32];

  // Z^T of the next chunk into X.
  __device__ void begin_Z() {
    if (work.is_M) {
#pragma unroll
      for (float& x : X) {
        x = 0.f;
      }
      return;
    }
    take_Z(X, smem, at_Z, 0);
  }

  // X^T = Z^T - S^T (gamma*E)^T, and behind it S goes on as S Diag(gamma[C-1]).
  __device__ void make_X() {
    smem.ring_E.wait_full(at_E);
    FragmentA S_rounded[Cfg::kSteps];
    round_fragments<Element>(S_rounded, S);
    decay_state(S, smem.gamma_last[at_E.stage]);
    wgmma_fence();
    multiply_transposed<Element, ScaleIn::Neg>(X, S_rounded, smem.gamma_E[at_E.stage], true);
    wgmma_wait<0>();
    release_factors<Cfg>(smem.ring_E, at_E);
  }

  // R^T = X^T + X^T (A-I)^T
  __device__ void make_R() {
    FragmentA X_rounded[4];
    round_fragments<Element>(X_rounded, X);
    smem.ring_A.wait_full(at_A);
    wgmma_fence();
    multiply_triangle_transposed<Element>(X, X_rounded, smem.A_minus_I[at_A.stage], true);
    wgmma_wait<0>();
    release_factors<Cfg>(smem.ring_A, at_A);
  }

  // S'^T = S^T Diag(gamma[C-1]) + R^T Kt, while Z of the next chunk comes.
  __device__ void make_S(bool is_last) {
    FragmentA R_rounded[4];
    round_fragments<Element>(R_rounded, X);
    smem.ring_Kt.wait_full(at_Kt);
    wgmma_fence();
    multiply<Element, ScaleIn::One>(S, R_rounded, smem.Kt[at_Kt.stage], true);
    if (!is_last) {
      begin_Z();
    }
    wgmma_wait<0>();
    release_factors<Cfg>(smem.ring_Kt, at_Kt);
  }

  __device__ void run(SegmentMapsParams const& params) {
    for_each_element<Cfg::kDimK>(work.first_column, [&](int acc, int channel, int column) {
      S[acc] = work.is_M && channel == column ? 1.f : 0.f;
    });
    if (work.segment == 0) {
      read_state<Cfg::kDimK>(S, params.initial_state, params.shape, params.state_v_first, work,
                             work.first_column);
    }
    begin_Z();
    for (int chunk = 0; chunk < work.num_chunks; ++chunk) {
      make_X();
      make_R();
      make_S(chunk + 1 == work.num_chunks);
    }
  }

  __device__ void store(SegmentMapsParams const& params) {
    CallShape const& shape = params.shape;
    if (work.is_M) {
      // The first segment has none.
      std::int64_t const row = segment_row(work, work.segment - 1, params.num_segments - 1);
      int const gate_head = work.value_head / (shape.num_value_heads / shape.num_gate_heads);
      float* const map = params.M + (row * shape.num_gate_heads + gate_head) * Cfg::kDimK * Cfg::kDimK;
      store_M(reinterpret_cast<std::uint8_t*>(map));
    } else {
      write_segment_state<Cfg::kDimK>(S, params.N, shape,
                                      segment_row(work, work.segment, params.num_segments), work.value_head,
                                      work.first_column);
    }
  }

  // Both parts, in boxes of 64 channels before (which this walk's columns are) and 64 after.
  __device__ void store_M(std::uint8_t* map) const {
    constexpr int kBoxes = Cfg::kDimK / kBoxColumns;
    FragmentA larger[Cfg::kSteps], smaller[Cfg::kSteps];
    split_fragments(larger, smaller, S);
    int const lane = lane_index(), warp = threadIdx.x % kWarpgroupThreads / kWarpThreads;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const before = 16 * warp + 8 * half + lane / 4;
      auto* const row =
          map + work.first_column / kBoxColumns * kBoxBytes + before * kBoxRowBytes + lane % 4 * 4;
#pragma unroll
      for (int piece = 0; piece < Cfg::kDimK / 8; ++piece) {
        auto* const place = row + piece / 8 * kBoxes * kBoxBytes + ((piece % 8 ^ lane / 4) << 4);
        int const i = piece % 2 * 2 + half;
        *reinterpret_cast<std::uint32_t*>(place) = larger[piece / 2].pairs[i];
        *reinterpret_cast<std::uint32_t*>(place + kBoxes * kBoxes * kBoxBytes) = smaller[piece / 2].pairs[i];
      }
    }
  }
};

template <class Cfg>
__global__ void __launch_bounds__(Cfg::kThreads, 1)
    segment_maps_kernel(__grid_constant__ SegmentMapsParams const params,
                        __grid_constant__ TensorMaps const maps) {
  extern __shared__ std::uint8_t smem_bytes[];
  auto& smem = *reinterpret_cast<SharedStorage<Cfg>*>(smem_bytes);
  MapWork& work = smem.work;
  if (threadIdx.x == 0) {
    work = find_map(params);
    smem.init_barriers();
  }
  smem.clear_above_triangles();
  sync_before_loads<Cfg>();
  let_next_kernel_start();
  if (work.segment >= work.last_segment || (work.is_M && work.segment == 0)) {
    wait_for_earlier_kernels();  // scan, which waits for this kernel, relies on prepare
    return;
  }
  int const wg = warpgroup_index();
  if (wg == 0) {
    claim_registers<Cfg::kMathRegisters>();
    Walk<Cfg> walk{smem, work};
    walk.run(params);
    walk.store(params);
  } else if (wg == 1) {
    give_up_registers<Cfg::kValuesRegisters>();
    if (!work.is_M) {
      make_values<Cfg>(smem, params.gates, work);
    }
  } else {
    give_up_registers<Cfg::kCopyRegisters>();
    int const warp = uniform(static_cast<int>(threadIdx.x % kWarpgroupThreads / kWarpThreads));
    if (warp == 0 && elect_one()) {
      load(smem, params, work);
    } else if (warp == 1 && !work.is_M && elect_one()) {
      load_values<Cfg, true>(smem, maps, work, kept_chunks(params));
    }
  }
  leave_together<Cfg>();
}

template <class Cfg>
void launch(SegmentMapsParams const& params, cudaStream_t stream) {
  CallShape const& shape = params.shape;
  TensorMaps const maps{.v = value_map(params.v, shape), .w = value_map(params.w, shape)};
  constexpr int kSmemBytes = sizeof(SharedStorage<Cfg>);
  static_assert(kSmemBytes <= 227 * 1024);
  int const maps_of_a_segment = shape.num_sequences * (shape.num_value_heads * num_slices(shape.dim_v) +
                                                       shape.num_gate_heads * num_slices(shape.dim_k));
  launch_kernel<segment_maps_kernel<Cfg>>({.name = "segment_maps",
                                           .grid = dim3(maps_of_a_segment, params.num_segments - 1),
                                           .num_threads = Cfg::kThreads,
                                           .shared_bytes = kSmemBytes,
                                           .stream = stream,
                                           .cluster = dim3(Cfg::kPaired ? 2 : 1),
                                           .overlaps = true},
                                          params, maps);
}

template <class Element>
void dispatch(SegmentMapsParams const& params, cudaStream_t stream) {
  bool const pair = num_slices(params.shape.dim_k) % 2 == 0 && num_slices(params.shape.dim_v) % 2 == 0;
  if (params.shape.dim_k <= 64) {
    launch<Config<Element, 64, false>>(params, stream);
  } else if (pair) {
    launch<Config<Element, 128, true>>(params, stream);
  } else {
    launch<Config<Element, 128, false>>(params, stream);
  }
}

}  // namespace

void run_segment_maps(SegmentMapsParams const& params, cudaStream_t stream) {
  params.shape.element == ElementType::kFloat16 ? dispatch<__half>(params, stream)
                                                : dispatch<__nv_bfloat16>(params, stream);
}

}  // namespace gdn2
