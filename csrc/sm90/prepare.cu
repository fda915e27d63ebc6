// prepare: everything about a chunk that does not depend on the state or on v, for all chunks at once.
//
//     T[r,s] = sum_i E[r,i] k[s,i] exp(G[r,i]-G[s,i])  (s < r)       A = (I+T)^-1
//     P[r,s] = scale sum_i q[r,i] k[s,i] exp(G[r,i]-G[s,i])  (s <= r)
//     tiles gamma*E, scale*gamma*q, Kt = exp(G[C-1]-G)*k, and gamma[C-1]
//
// The triangle is split by halves (level h = 1, 2, .., 32): rows of the later half of a pair of h rows each
// meet rows of the earlier one, and exp(G[r]-G[s]) = D[r] U[s] with D the decay from the later half's first
// row to r and U from s to that row. Both are running products of alpha = exp(g), in [0, 1] for any g <= 0,
// so no level overflows and no factor looks past r. Over all pairs a level has 32 later and 32 earlier rows,
// and is one product
//     [E*D; q*D] [64, K]  x  (k*U)^T [K, 32]
// of which the entries of matching pairs are kept.
//
// Grid: one CTA for a chunk slot and gate head, heads fastest, dense chunks as chunk_order.h has them; beside
// a walk one CTA an SM, whose teams each take every so many-th. K 128: 256 threads, two CTAs an SM. K 64: 128
// threads, three. One thread asks for the inputs, in the order in which they are needed: several at once took
// longer.
// Roles: a thread owns two channels of 16 tokens, in registers from the first read to the last store, so that
// the running products stay inside it; the four warps of a warpgroup take the four blocks of 16 tokens of 64
// channels. alpha, normalised k and, but for the sigmoid of b, E are made where they are read; q is divided
// by its norms where it is used. The backward's norms are those of the forward. The first warpgroup
// multiplies rows of q for their norms and the diagonal of P before it makes alpha, the last one rows of k
// afterwards: the tensor cores' waits and special functions meet each other. Of three levels at a time each
// of two warpgroups multiplies one and a half, and one alone (K 64) all; the first one inverts.
// Shared memory (K 128): q, k, b, g 80 KB, which then hold three operand buffers of 24 KB; T 17 KB, P 8 KB,
// block products 4 KB: 110 KB.
//
//     q, k | q's rows | g | alpha | k's rows | b | q, k, E | tiles out | build 1, 2, 4 | multiply
//     | build 8, 16, 32 | multiply | A, P out, next chunk in ..
#include <cutlass/arch/barrier.h>

#include <algorithm>
#include <stdexcept>

#include "api/chunk_forward.h"
#include "sm90/prepare_inputs.cuh"
#include "sm90/prepare_levels.cuh"
#include "sm90/token_map.h"
#include "tile/convert.cuh"
#include "tile/launch.h"
#include "tile/launch_order.cuh"
#include "tile/ready_flag.cuh"
#include "tile/triangular_inverse.cuh"

namespace gdn2 {
namespace {

using namespace prepare;

// By 64 threads: the diagonal of P to its place, when nobody reads the chunk before there.
template <class Cfg>
__device__ void place_diagonal(SharedStorage<Cfg>& smem, int row) {
  using Element = typename Cfg::Element;
  auto* const place = smem.P + swizzled_offset(row, row / 8) + row % 8 * sizeof(Element);
  float const k_scale = Cfg::kNormalize ? smem.k_scale[row].value() : 1.f;
  *reinterpret_cast<Element*>(place) = round_to<Element>(smem.diagonal[row] * smem.q_scale[row] * k_scale);
}

// scale*gamma*q, Kt and gamma*E from running products over the chunk, straight to their tiles: a warp writes
// the 128 bytes of a row. Makes x.E of what read_pairs left of it, see activate_erase_of.
template <class Cfg>
__device__ void store_factor_tiles(SharedStorage<Cfg>& smem, PrepareParams const& params, Work const& work,
                                   ThreadInputs<Cfg>& x) {
  using Element = typename Cfg::Element;
  ThreadPlace const at = thread_place<Cfg>();
  ChunkTiles const& tiles = params.tiles;
  auto* const box =
      static_cast<std::uint8_t*>(tiles.factors) + work.tile * 3 * Cfg::kTileBytes + at.box * kBoxBytes;
  int const first_row = at.block * kBlock;
  auto const gamma_q = image_pairs_of(box, first_row, at.lane);
  constexpr int kFromKt = Cfg::kTileBytes, kFromE = 2 * Cfg::kTileBytes;  // behind gamma_q
  BlockProducts<Cfg> const blocks(smem, at.channel());
  float2 gamma = blocks.first[0], tail{1.f, 1.f};
#pragma unroll
  for (int block = 0; block < kNumBlocks - 1; ++block) {
    gamma = block < at.block ? gamma * blocks.rest[block] * blocks.first[block + 1] : gamma;
    tail = block + 1 > at.block ? tail * blocks.first[block + 1] * blocks.rest[block + 1] : tail;
  }
#pragma unroll
  for (int first = 0; first < kBlock; first += Cfg::kGroup) {
    if (phase_begins_if_crowded<Cfg>()) {
      RowScales<float> q_scales;
#pragma unroll
      for (int i = first; i < first + Cfg::kGroup; ++i) {
        if (i > 0) {
          gamma = gamma * float2{x.alpha[i][0], x.alpha[i][1]};
        }
        activate_erase_of(x, params.gates, i);
        float const q_scale = Cfg::kNormalize ? q_scales.of(smem.q_scale, first_row, i) : params.scale;
        float2 const q = unpack<Element>(x.q[i]), E = unpack<Element>(x.E[i]);
        store_pair(gamma_q[i], pack<Element>(q.x * gamma.x * q_scale, q.y * gamma.y * q_scale));
        store_pair(gamma_q[i] + kFromE, pack<Element>(E.x * gamma.x, E.y * gamma.y));
      }
    }
  }
  if (at.block == kNumBlocks - 1) {
    *reinterpret_cast<float2*>(tiles.gamma_last + work.tile * Cfg::kDimK + at.channel()) = gamma;
  }
#pragma unroll
  for (int last = kBlock - 1; last >= 0; last -= Cfg::kGroup) {
    if (phase_begins_if_crowded<Cfg>()) {
#pragma unroll
      for (int i = last; i > last - Cfg::kGroup; --i) {
        if (i < kBlock - 1) {
          tail = tail * float2{x.alpha[i + 1][0], x.alpha[i + 1][1]};
        }
        float2 const k = unpack<Element>(x.k[i]);
        store_pair(gamma_q[i] + kFromKt, pack<Element>(k.x * tail.x, k.y * tail.y));
      }
    }
  }
}

// A lower triangle to global memory, by kThreads threads, a block a warp: pieces of eight elements as
// piece_of(block, piece) has them.
template <int kThreads, class PieceOf>
__device__ void store_triangle(void* triangles, std::int64_t tile, int thread, PieceOf piece_of) {
  static_assert(kPiecesOfTriangleBlock == kWarpThreads);
  auto* const out = reinterpret_cast<uint4*>(static_cast<std::uint8_t*>(triangles) + tile * kTriangleBytes);
  int const warp = uniform(thread / kWarpThreads), index = thread % kWarpThreads;
  TrianglePiece const piece(index);
#pragma unroll
  for (int first = 0; first < kTriangleBlocks; first += kThreads / kWarpThreads) {
    if (int const block = first + warp; block < kTriangleBlocks) {
      out[block * kPiecesOfTriangleBlock + index] = piece_of(TriangleBlock(block), piece);
    }
  }
}

template <class Cfg>
__device__ void store_P(SharedStorage<Cfg> const& smem, PrepareParams const& params, Work const& work) {
  store_triangle<Cfg::kTeamThreads>(
      params.tiles.P, work.tile, thread_of_team<Cfg>(), [&](TriangleBlock block, TrianglePiece piece) {
        // Two pieces a block and row: the swizzle's ^ of a piece and one of a block are one.
        std::uint32_t const in_block = swizzled_offset(piece.row, piece.first_column / 8);
        return *reinterpret_cast<uint4 const*>(smem.P + block.row * kTriangleBlock * kBoxRowBytes +
                                               (in_block ^ (block.strip * kTriangleRowBytes)));
      });
}

// A - I, zero on and above the diagonal. By one warpgroup.
template <class Cfg>
__device__ void store_A_minus_I(SharedStorage<Cfg>& smem, PrepareParams const& params, Work const& work) {
  using Element = typename Cfg::Element;
  TriangularMatrix const A{smem.T};
  store_triangle<kWarpgroupThreads>(
      params.tiles.A_minus_I, work.tile, threadIdx.x % kWarpgroupThreads,
      [&](TriangleBlock block, TrianglePiece piece) {
        float const* const from =
            &A.at(block.row * kTriangleBlock + piece.row, block.strip * kTriangleBlock + piece.first_column);
        float4 const low = *reinterpret_cast<float4 const*>(from),
                     high = *reinterpret_cast<float4 const*>(from + 4);
        float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        if (block.is_on_diagonal()) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            x[i] = piece.first_column + i < piece.row ? x[i] : 0.f;
          }
        }
        return uint4{pack<Element>(x[0], x[1]), pack<Element>(x[2], x[3]), pack<Element>(x[4], x[5]),
                     pack<Element>(x[6], x[7])};
      });
}

// Products of alpha over a thread's 16 tokens, for what reaches over blocks.
template <class Cfg>
__device__ void store_block_products(SharedStorage<Cfg>& smem, ThreadInputs<Cfg> const& x) {
  ThreadPlace const at = thread_place<Cfg>();
  float2 rest{1.f, 1.f};
#pragma unroll
  for (int i = 1; i < kBlock; ++i) {
    rest = rest * float2{x.alpha[i][0], x.alpha[i][1]};
  }
  *reinterpret_cast<float2*>(&smem.block_first[at.block][at.channel()]) =
      float2{x.alpha[0][0], x.alpha[0][1]};
  *reinterpret_cast<float2*>(&smem.block_rest[at.block][at.channel()]) = rest;
}

// ---- a walk beside it -------------------------------------------------------------------------------------

// Nothing of the team's is ready; only then may the walk start.
template <class Cfg>
__device__ void clear_ready(PrepareParams const& params, ChunkDivisors const& by, int first_order) {
  int const stride = gridDim.x * Cfg::kTeams;
  for (int order = first_order + thread_of_team<Cfg>() * stride; has_order(params, order);
       order += Cfg::kTeamThreads * stride) {
    params.ready[find_work<Cfg>(params, by, order).tile] = 0;
  }
  __threadfence();
  __syncthreads();
  let_next_kernel_start();
}

// Says that the chunk's tiles are written, once all warpgroups of the team have written theirs; the last one,
// which inverts, waits for the others.
template <class Cfg>
__device__ void publish_tile(PrepareParams const& params, Work const& work, bool is_last) {
  using cutlass::arch::NamedBarrier;
  if (!is_last) {
    NamedBarrier::arrive(Cfg::kTeamThreads, barrier_id<Cfg>(TeamBarrier::kTilesOut));
    return;
  }
  NamedBarrier::sync(Cfg::kTeamThreads, barrier_id<Cfg>(TeamBarrier::kTilesOut));
  if (thread_of_team<Cfg>() == 0) {
    publish_ready(params.ready + work.tile, kTileReady);
  }
}

// What a team that stays does for its next chunk while it is at one.
template <class Cfg>
struct NextChunk {
  SharedStorage<Cfg>& smem;
  PrepareParams const& params;
  ChunkDivisors const& by;
  InputLoads<Cfg> const& loads;
  Work const& work;
  Work& next;

  // By all; the inputs are asked for by a thread of the last warpgroup, which does not invert.
  __device__ void find() const {
    if (is_asking()) {
      next.order = work.order + gridDim.x * Cfg::kTeams;
      if (has_order(params, next.order)) {
        next = find_work<Cfg>(params, by, next.order);
      }
    }
  }
  __device__ void load() const {
    if (is_asking() && has_order(params, next.order)) {
      loads.load(next);
    }
  }

 private:
  __device__ static bool is_asking() {
    return thread_of_team<Cfg>() == (Cfg::kWarpgroups - 1) * kWarpgroupThreads;
  }
};

// One chunk and gate head, whose inputs are on their way to shared memory. inputs_read(): when they are in
// registers; operands_read(): when the products are made.
template <class Cfg, class InputsRead, class OperandsRead>
__device__ void run_tile(SharedStorage<Cfg>& smem, PrepareParams const& params, Work const& work,
                         GateOfThread const& gate, int phase, InputsRead inputs_read,
                         OperandsRead operands_read) {
  ThreadPlace const at = thread_place<Cfg>();
  ThreadInputs<Cfg> x;
  if constexpr (Cfg::kReadsNorms) {
    read_norms(smem, params, work);
  }
  smem.rows_full.wait(phase);
  if (!Cfg::kFactorsOnly && at.box == 0) {
    scale_q_rows(smem, params, work);
  }
  smem.g_full.wait(phase);
  read_decays(x, smem, params, gate, work.num_rows);
  store_block_products(smem, x);
  if (Cfg::kNormalize && !Cfg::kReadsNorms && at.box == Cfg::kBoxes - 1) {
    scale_k_rows(smem, params, work);
  }
  smem.b_full.wait(phase);
  if constexpr (Cfg::kNormalize) {
    sync_block<Cfg>(at.block);  // norms of the block's rows are there
  }
  read_pairs(x, smem, work.num_rows);
  // The inputs are in registers: their shared memory becomes operands. Nobody reads the tiles of the chunk
  // before.
  sync_team<Cfg>();
  inputs_read();
  store_factor_tiles(smem, params, work, x);
  if constexpr (Cfg::kFactorsOnly) {
    return;
  }
  if (thread_of_team<Cfg>() < kChunk) {
    place_diagonal(smem, thread_of_team<Cfg>());
  }
  build<0>(smem, x);
  build<1>(smem, x);
  build<2>(smem, x);
  meet_at_operands<Cfg>();
  multiply_three_levels<0>(smem);
  meet_at_operands<Cfg>();
  build<3>(smem, x);
  build<4>(smem, x);
  build<5>(smem, x);
  meet_at_operands<Cfg>();
  multiply_three_levels<3>(smem);
  meet_at_operands<Cfg>();  // T and P are complete; the copy engine may write where operands have been
  operands_read();

  store_P(smem, params, work);
  bool const inverts = thread_place<Cfg>().box == 0;
  if (inverts) {
    invert_unit_lower(TriangularMatrix{smem.T}, barrier_id<Cfg>(TeamBarrier::kInverse));
    store_A_minus_I(smem, params, work);
  }
  if constexpr (Cfg::kStays) {
    publish_tile<Cfg>(params, work, inverts);
  }
}

// The factors' tiles of a chunk that the walk reads first.
template <class Cfg>
__device__ void keep_factors(PrepareParams const& params, Work const& work) {
  constexpr int kBytes = 3 * Cfg::kTileBytes, kLineBytes = 128;
  auto const* const factors = static_cast<std::uint8_t const*>(params.tiles.factors) + work.tile * kBytes;
  for (int at = static_cast<int>(threadIdx.x) * kLineBytes; at < kBytes; at += Cfg::kThreads * kLineBytes) {
    keep_in_cache(factors + at);
  }
}

template <class Cfg>
__global__ void __launch_bounds__(Cfg::kThreads, Cfg::kCtasPerSm)
    prepare_kernel(__grid_constant__ PrepareParams const params, __grid_constant__ ChunkDivisors const by,
                   __grid_constant__ TensorMaps const maps) {
  extern __shared__ std::uint8_t smem_bytes[];
  // Uniform, so that descriptors of wgmma are made of it without asking.
  int const team = Cfg::kTeams == 1 ? 0 : uniform(team_index<Cfg>());
  auto& smem = reinterpret_cast<SharedStorage<Cfg>*>(smem_bytes)[team];
  InputLoads<Cfg> const loads{smem, maps, params.gate_element};
  int const first_order = blockIdx.x * Cfg::kTeams + team_index<Cfg>();  // of a team that stays
  if (Cfg::kFactorsOnly && cta_index() == 0) {
    clear_flags(params.cleared, params.num_cleared);
  }
  if (uniform(thread_of_team<Cfg>() / kWarpThreads) == 0 && elect_one()) {
    smem.rows_full.init(1);
    smem.g_full.init(1);
    smem.b_full.init(1);
    cutlass::arch::fence_barrier_init();
    if constexpr (Cfg::kStays) {
      smem.work[0].order = first_order;
    }
    if (!Cfg::kStays || has_order(params, first_order)) {
      Work const own =
          Cfg::kStays ? find_work<Cfg>(params, by, first_order) : find_work_of_cta<Cfg>(params, by);
      loads.load(own);
      smem.work[0] = own;
    }
  }
  if constexpr (!Cfg::kFactorsOnly) {
    // The upper triangle of P, which no level writes, is zero.
#pragma unroll
    for (int i = 0; i < kBoxBytes / 16; i += Cfg::kTeamThreads) {
      reinterpret_cast<uint4*>(smem.P)[i + thread_of_team<Cfg>()] = uint4{};
    }
  }
  if constexpr (Cfg::kStays) {
    clear_ready<Cfg>(params, by, first_order);
    sync_team<Cfg>();
    for (unsigned round = 0; has_order(params, smem.work[round % 4].order); ++round) {
      NextChunk<Cfg> const next{smem, params, by, loads, smem.work[round % 4], smem.work[(round + 1) % 4]};
      GateOfThread const gate(params, next.work.head, thread_place<Cfg>().channel());
      run_tile(smem, params, next.work, gate, round % 2, [&] { next.find(); }, [&] { next.load(); });
    }
  } else {
    GateOfThread const gate(params, by.head_of_cta(), thread_place<Cfg>().channel());
    let_next_kernel_start();  // where there is room; it waits for the end of this one
    sync_team<Cfg>();
    run_tile(smem, params, smem.work[0], gate, 0, [] {}, [] {});
    if (!Cfg::kFactorsOnly && !has_order(params, cta_index() + params.num_kept)) {
      keep_factors<Cfg>(params, smem.work[0]);
    }
  }
}

template <class Cfg>
void launch(PrepareParams const& params, cudaStream_t stream) {
  CallShape const& shape = params.shape;
  TensorMaps const maps{
      .q = token_map(params.q, shape, shape.num_heads, shape.dim_k, shape.element),
      .k = token_map(params.k, shape, shape.num_heads, shape.dim_k, shape.element),
      .b = token_map(params.b, shape, shape.num_gate_heads, shape.dim_k, shape.element),
      .g = token_map(params.g, shape, shape.num_gate_heads, shape.dim_k, params.gate_element)};
  if (reinterpret_cast<std::uintptr_t>(params.tiles.factors) % kBoxRowBytes != 0) {
    throw std::runtime_error("prepare: tiles have to lie at multiples of 128 bytes");
  }
  constexpr int kSmemBytes = Cfg::kTeams * sizeof(SharedStorage<Cfg>);
  static_assert(Cfg::kCtasPerSm * (kSmemBytes + 1024) <= 228 * 1024);
  ChunkDivisors const by(shape, params.plan, params.num_segments);
  int const tiles = shape.num_slots * shape.num_gate_heads;
  launch_kernel<prepare_kernel<Cfg>>(
      {.name = "prepare",
       .grid = Cfg::kStays ? dim3(std::min(tiles, params.num_sms)) : by.grid(shape),
       .num_threads = Cfg::kThreads,
       .shared_bytes = kSmemBytes,
       .stream = stream},
      params, by, maps);
}

template <class Element, bool kFactorsOnly, bool kWholeSm>
void dispatch(PrepareParams const& params, cudaStream_t stream) {
  with_extras(params.gates, params.gate_element, [&](auto extras) {
    using Extras = decltype(extras);
    params.shape.dim_k > 64 ? launch<Config<Element, 128, Extras, kFactorsOnly, kWholeSm>>(params, stream)
                            : launch<Config<Element, 64, Extras, kFactorsOnly, kWholeSm>>(params, stream);
  });
}

template <class Element>
void dispatch(PrepareParams const& params, cudaStream_t stream) {
  if (params.factors_only) {
    dispatch<Element, true, false>(params, stream);
  } else if (params.ready != nullptr) {
    dispatch<Element, false, true>(params, stream);
  } else {
    dispatch<Element, false, false>(params, stream);
  }
}

}  // namespace

void run_prepare(PrepareParams const& params, cudaStream_t stream) {
  if (params.shape.num_slots == 0 || params.shape.seqlen == 0) {
    return;
  }
  if (params.shape.element == ElementType::kFloat16) {
    dispatch<__half>(params, stream);
  } else {
    dispatch<__nv_bfloat16>(params, stream);
  }
}

}  // namespace gdn2
