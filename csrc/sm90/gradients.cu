// gradients: every gradient of a chunk, from the states and residuals that the scans left. All chunks at
// once.
//
//     dP = tril(dO R^T)      dT = -tril(dX R^T, -1)      dv = w*dX      dw = v*dX
//     dq = scale [ pairs(dP).x + gamma * (dO S^T) ]
//     dE =         pairs(dT).x - gamma * (dX S^T)                          db = k*dE
//     dk_ = scale pairs(dP).y + pairs(dT).y + exp(G[C-1]-G) * (R dS'^T)    dk = dk_ + b*dE
//     dg[i]: sums of q*dq and E*dE over the reads at tokens r >= i, less k*dk_ of the writes that they are
//     paired with; k*dk_ of the writes to S' over tokens s < i; and gamma[C-1] * rowsum(S*dS')
//
// where pairs(M).x[r] = sum_s M[r,s] k[s] exp(G[r]-G[s]) and pairs(M).y[s] = sum_r M[r,s] x[r]
// exp(G[r]-G[s]), split by halves as in prepare: exp(G[r]-G[s]) = D[r] U[s], both products of alpha, in [0,
// 1].
//
// Grid: one CTA for a chunk slot, gate head and 64 channels, channels fastest, dense chunks as chunk_order.h
// has them; 256 threads, two CTAs an SM. Where the L2 norm asks for sums over 128 channels, the CTAs of both
// halves are a cluster.
// Roles: two warpgroups, half of the tokens each. Products by wgmma over the value heads of the group and
// slices of 64 value columns: one warpgroup dP and the other dT, tokens on the rows; each for its tokens dO
// S^T, dX S^T and R dS'^T transposed, channels on the rows, S from registers: 80 accumulators a thread. Then
// each warp has 16 channels x 32 tokens, and the pair products of pair_gradients.cuh add to the accumulators
// where they are.
// Shared memory: two stages of 40 KB (S, dS', dO, R, dX of a slice; after the last slice q, k, b and g in
// one, decays in the other), v and w 16 KB, then dP and dT; dv and dw 16 KB, then decays of lanes: 113 KB.
//
//     slices, dv, dw .. | dP, dT out | norms, E, decays | gamma, tail, pairs of a group .. | other pairs
//     | erase, y.dy, sums of dg, back through the gate | dg of both halves, norms | all out
//
// Phases are runs of instructions with few branches, and where two do not depend on each other they are one:
// with four warps a scheduler, what one of them waits for is hidden by its own work or not at all.
#include <cutlass/arch/barrier.h>

#include "api/chunk_backward.h"
#include "sm90/channel_gradients.cuh"
#include "sm90/decay_gradients.cuh"
#include "sm90/gradients_stores.cuh"
#include "sm90/token_map.h"
#include "sm90/value_gradients.cuh"
#include "tile/convert.cuh"
#include "tile/launch.h"
#include "tile/launch_order.cuh"
#include "tile/wgmma.cuh"

namespace gdn2 {
namespace {

template <class Element_, class Extras_>
struct Config : Extras_ {
  using Element = Element_;
};

// ---- loads, by one thread ---------------------------------------------------------------------------------

__device__ void load_box(void* smem, void const* boxes, int box, FullBarrier& full) {
  bulk_load(smem, static_cast<std::uint8_t const*>(boxes) + static_cast<std::int64_t>(box) * kBoxBytes,
            kBoxBytes, full);
}

__device__ void load_slice(GradientsStorage& smem, int stage, GradientsParams const& params,
                           GradientsDivisors const& by, GradientsMaps const& maps, GradientsWork const& work,
                           int index, bool has_norms) {
  SliceIndex const at(params.shape, by, work, index);
  auto& slice = smem.stages[stage].slice;
  FullBarrier& full = smem.full[stage];
  full.arrive_and_expect_tx(sizeof(slice) + (has_norms ? sizeof(smem.inverse_norms) : 0));
  tma_load(maps.dO, full, slice.dO, at.slice * kColumns, at.value_head, work.first_token, work.batch);
  int const state_box = at.tile * work.num_boxes + work.box;
  load_box(slice.R, params.tiles.R, at.tile, full);
  load_box(slice.dX, params.tiles.dX, at.tile, full);
  load_box(slice.S, params.tiles.S, state_box, full);
  load_box(slice.dS, params.tiles.dS, state_box, full);
  if (has_norms) {
    bulk_load(smem.inverse_norms, params.row_norms + work.tile * 2 * kChunk, sizeof(smem.inverse_norms),
              full);
  }
}

__device__ void load_values(GradientsStorage& smem, GradientsParams const& params,
                            GradientsDivisors const& by, GradientsMaps const& maps, GradientsWork const& work,
                            int index) {
  SliceIndex const at(params.shape, by, work, index);
  smem.values_full.arrive_and_expect_tx(sizeof(smem.values));
  int const column = at.slice * kColumns;
  tma_load(maps.v, smem.values_full, smem.values.v, column, at.value_head, work.first_token, work.batch);
  tma_load(maps.w, smem.values_full, smem.values.w, column, at.value_head, work.first_token, work.batch);
}

// They count on their barrier before it expects them: it waits for the arrival of expect_tokens as well.
__device__ void load_tokens(GradientsStorage& smem, GradientsMaps const& maps, GradientsWork const& work,
                            ElementType gate_element) {
  bool const wide = gate_element == ElementType::kFloat32;
  auto& tokens = smem.tokens();
  FullBarrier& full = smem.full[0];
  int const channel = work.first_channel, token = work.first_token;
#pragma unroll
  for (int box = 0; box < 2; ++box) {
    if (box == 0 || wide) {
      tma_load(maps.g, full, tokens.g.boxes[box], channel + box * kChannels / 2, work.gate_head, token,
               work.batch);
    }
  }
  tma_load(maps.q, full, tokens.q, channel, work.head, token, work.batch);
  tma_load(maps.k, full, tokens.k, channel, work.head, token, work.batch);
  tma_load(maps.b, full, tokens.b, channel, work.gate_head, token, work.batch);
}

__device__ void expect_tokens(GradientsStorage& smem, ElementType gate_element) {
  smem.full[0].arrive_and_expect_tx((gate_element == ElementType::kFloat32 ? 5 : 4) * kBoxBytes);
}

// ---- slices: products over value columns ------------------------------------------------------------------

// acc[4*j + 2*half + c]: row 16*warp + lane/4 + 8*half, column 8*j + 2*(lane%4) + c.
struct Products {
  float dM[4 * kGroups];              // [tokens, tokens]: dP in the first warpgroup, -dT in the second
  HalfAccumulators S_dO, S_dX, dS_R;  // [channels, tokens of the half]: S dO^T, S dX^T, dS' R^T
  // Second warpgroup: of the diagonal of S dS'^T, rows lane/4 + 8*half, in lanes that have entries of it.
  float S_dS[2] = {};
};

// S of the warp's 16 channels, a left operand: read once for all its products.
using StateFragments = FragmentA[kColumns / 16];

// S_dS, by the second warpgroup: products [16 channels, 8 of them].
template <class Element>
__device__ void multiply_states(Products& x, StateFragments const& S, std::uint8_t const* dS_tile,
                                GradientsPlace const& place) {
  float products[2][4] = {};
#pragma unroll
  for (int step = 0; step < kColumns / 16; ++step) {
    std::uint32_t dS[4];
    load_matrices_transposed(dS, dS_tile, 16 * step, 2 * place.warp);
    mma_16x8x16<Element>(products[0], S[step].pairs, dS[0], dS[1]);
    mma_16x8x16<Element>(products[1], S[step].pairs, dS[2], dS[3]);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    x.S_dS[half] += place.row % 2 == 0 ? products[half][2 * half] : products[half][2 * half + 1];
  }
}

template <class Element>
__device__ void multiply_slice(Products& x, GradientsStorage::Slice const& slice, GradientsPlace const& place,
                               bool accumulate) {
  int const half_rows = place.half_of_chunk * kHalfTokens * kBoxRowBytes >> 4;
  auto const dS = shared_descriptor<Major::MN>(slice.dS);
  auto const dO = shared_descriptor<Major::K>(slice.dO), R = shared_descriptor<Major::K>(slice.R),
             dX = shared_descriptor<Major::K>(slice.dX);
  auto const left = place.half_of_chunk == 0 ? dO : dX;
  auto const along_row = [](int step) { return step * 32 >> 4; };
  auto const add = [&](int step) { return accumulate || step > 0; };
  StateFragments S;
#pragma unroll
  for (int step = 0; step < kColumns / 16; ++step) {
    load_matrices_transposed<true>(S[step].pairs, slice.S, 16 * step, 2 * place.warp);
  }
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kColumns / 16; ++step) {
    int const along_column = step * 16 * kBoxRowBytes >> 4;
    wgmma_shared<Element>(x.dM, left + along_row(step), R + along_row(step), add(step));
    wgmma_shared<Element, Major::MN>(x.dS_R, dS + along_column, R + half_rows + along_row(step), add(step));
  }
  wgmma_commit();
  if (place.half_of_chunk == 1) {
    multiply_states<Element>(x, S, slice.dS, place);
  }
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kColumns / 16; ++step) {
    wgmma<Element, Major::K>(x.S_dO, S[step], dO + half_rows + along_row(step), add(step));
    wgmma<Element, Major::K>(x.S_dX, S[step], dX + half_rows + along_row(step), add(step));
  }
  wgmma_commit();
}

// rowsum(S*dS') of the warp's channels, by the second warpgroup.
__device__ void store_S_dS(GradientsStorage& smem, Products const& x, GradientsPlace const& place) {
  if (place.half_of_chunk == 1 && place.quad == place.row / 2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      smem.scratch().S_dS[place.channel(half)] = x.S_dS[half];
    }
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

// The rounded matrix to its tile [rows r][columns s], up to the diagonal. Of the 8x8 blocks on it the entries
// of level 1, and beside them those of level 2, to rows of the chunk's first half and columns of its second:
// group i of a half to the i-th eight rows, and the halves' columns one behind the other.
template <class Element>
__device__ void store_matrix(std::uint8_t* tile, float const (&acc)[4 * kGroups],
                             GradientsPlace const& place) {
  int const warp = uniform(place.warp);
  std::uint32_t diagonal[2];
#pragma unroll
  for (int j = 0; j < kGroups; j += 2) {
    std::uint32_t r[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      r[m] = pack<Element>(acc[4 * j + 2 * m], acc[4 * j + 2 * m + 1]);
    }
    store_matrices(r, tile, 16 * place.warp, j);
    diagonal[0] = r[0];
    diagonal[1] = r[3];
    if (j == 2 * warp) {
      break;
    }
  }
  // Of the entries that a lane has, at (row, 2*quad) and the next one.
  int const row = place.row, quad = place.quad;
  bool const in_level2 = row / 4 == quad / 2 && row % 4 >= 2 && quad % 2 == 0;
  std::uint32_t const level1 = row == 2 * quad + 1 ? 0x0000ffffu : 0u;
  std::uint32_t r[4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    r[2 * i] = diagonal[i] & level1;
    r[2 * i + 1] = in_level2 ? diagonal[i] : 0u;
  }
  store_matrices(
      r, matrix_address<true>(tile, 16 * warp % kHalfTokens, kHalfGroups + 2 * (2 * warp / kHalfGroups)));
  cutlass::arch::fence_view_async_shared();  // before wgmma reads it, behind a barrier
}

// ---- rows that no sequence owns, behind the last well-formed one: NaN -------------------------------------

template <class Value>
__device__ void poison(void* out, std::int64_t first, std::int64_t count) {
  if (out == nullptr) {
    return;
  }
#pragma unroll 1
  for (std::int64_t i = threadIdx.x; i < count; i += kThreads) {
    static_cast<Value*>(out)[first + i] = static_cast<Value>(__int_as_float(0x7fffffff));
  }
}

// Rarely called and never inlined: code that is not in the way.
template <class Cfg>
__device__ __noinline__ void poison_unowned_rows(GradientsParams const& params) {
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
  if (params.d_dt_bias_of_slots != nullptr && threadIdx.x < kChannels && channel < params.shape.dim_k) {
    params.d_dt_bias_of_slots[work.tile * params.shape.dim_k + channel] = 0.f;
  }
  if (params.dA_log_of_slots != nullptr && threadIdx.x == 0) {
    params.dA_log_of_slots[work.tile * work.num_boxes + work.box] = 0.f;
  }
}

// ---- kernel -----------------------------------------------------------------------------------------------

template <class Cfg>
__global__ void __launch_bounds__(kThreads, 2)
    gradients_kernel(__grid_constant__ GradientsParams const params,
                     __grid_constant__ GradientsDivisors const by,
                     __grid_constant__ GradientsMaps const maps) {
  using Element = typename Cfg::Element;
  extern __shared__ std::uint8_t smem_bytes[];
  auto& smem = *reinterpret_cast<GradientsStorage*>(smem_bytes);
  GradientsWork const& work = smem.work;  // where it costs no registers
  SliceOrder const order(by);
  int const num_slices = order.number;
  auto const stage_of = [&](int index) { return (num_slices - index) % kStages; };
  auto const load = [&](GradientsWork const& of, int index) {
    if (index < num_slices) {
      load_slice(smem, stage_of(index), params, by, maps, of, order.slice(index),
                 Cfg::kNormalize && index == 0);
    } else if (index == num_slices) {
      load_tokens(smem, maps, of, params.gate_element);
    }
  };
  wait_for_earlier_kernels();  // scan_backward
  // A thread of a warp a stage: all wait for them, and they not for each other.
  if (int const index = uniform(threadIdx.x / kWarpThreads); index < kStages && elect_one()) {
    GradientsWork const own(params, by);
    smem.full[stage_of(index)].init(1);
    if (index == 1) {
      smem.values_full.init(1);
    }
    cutlass::arch::fence_barrier_init();
    if (own.num_rows > 0) {
      load(own, index);
      if (int const first = order.with_values(0); index == 1 && order.has_values(first)) {
        load_values(smem, params, by, maps, own, order.slice(first));
      }
    }
    if (index == 0) {
      smem.work = own;
    }
  }
  if constexpr (Cfg::kNormalize) {
    if (threadIdx.x == kThreads - 1) {
      smem.dots_full.init(1);
      cutlass::arch::fence_barrier_init();
      smem.dots_full.arrive_and_expect_tx(sizeof(smem.scratch().other_dots));
    }
  }
  __syncthreads();
  let_next_kernel_start();  // gate_sums
  int const num_rows = uniform(work.num_rows);
  if (params.plan.spans != nullptr) {
    poison_unowned_rows<Cfg>(params);
  }
  if (num_rows == 0) {  // a slot without a chunk
    store_no_sums(params, work);
    return;
  }

  GradientsPlace const place;
  Products products;
  HalfAccumulators &dq = products.S_dO, &dE = products.S_dX, &dk = products.dS_R;
  HalfAccumulators dG;
  Channels<Cfg> x{smem, params, work, dq, dE, dk, dG};
  if constexpr (Cfg::kIsGated) {
    if (threadIdx.x < kChannels) {
      smem.gate.load(params.gates, work.head, work.first_channel, params.shape.dim_k, threadIdx.x);
    }
  }
  bool const whole_boxes = has_whole_boxes(num_rows, params.shape.dim_v);
  for (int index = 0; index < num_slices; ++index) {
    int const stage = uniform(stage_of(index));
    auto& slice = smem.stages[stage].slice;
    bool const has_values = order.has_values(index);
    wait_to_read(smem.full[stage], index / kStages % 2);
    if (num_rows < kChunk) {
      clear_foreign_rows(slice.dO, num_rows);
    }
    multiply_slice<Element>(products, slice, place, index > 0);
    // With the sigmoid, dv and dw need the registers that S has, or they wait for one special function after
    // the other (a CTA 0.2 us of 15.7).
    if constexpr (Cfg::kSigmoid) {
      wgmma_wait<0>();
    }
    int const warp = warp_anew();  // of those without states one loads, and one sees to dv and dw
    if (has_values) {
      wait_to_read(smem.values_full, order.num_values_before(index) % 2);
      ValueGradients<Cfg>::run(smem, slice.dX);
      cutlass::arch::fence_view_async_shared();  // dv and dw, before the copy engine reads them
    } else if (warp == 1 && elect_one()) {
      cute::tma_store_wait<0>();  // the copy engine has read those before
    }
    if constexpr (!Cfg::kSigmoid) {
      wgmma_wait<0>();
    }
    if constexpr (Cfg::kIsGated) {
      wait_for_copies();  // the parameters
    }
    __syncthreads();  // every warp is done with the slice
    if (warp == 0) {
      GradientsWork const own = work.for_loads();
      if (elect_one()) {
        load(own, index + kStages);
      }
    } else if (warp == 1 && has_values) {
      GradientsWork const own = work.for_loads();
      if (elect_one()) {
        if (whole_boxes) {
          store_values(smem, params, by, maps, own, order.slice(index));
        }
        if (int const next = order.with_values(index + 1); order.has_values(next)) {
          load_values(smem, params, by, maps, own, order.slice(next));
        }
      }
    }
    if (has_values && (!whole_boxes || order.has_values(index + 1))) {
      if (!whole_boxes) {
        store_some_values<Element>(smem, params, by, work, order.slice(index));
      } else if (warp == 1 && elect_one()) {
        cute::tma_store_wait<0>();
      }
      __syncthreads();  // dv and dw have been read
    }
  }
  if constexpr (Cfg::kNormalize) {
    x.announce_dots(order.num_boxes == 2);
  }
  store_S_dS(smem, products, place);
  bool const has_dP = place.half_of_chunk == 0;
  if (has_dP) {
    x.scale_dP(products.dM, place);
  }
  store_matrix<Element>(has_dP ? smem.dP : smem.dT, products.dM, place);

  // With the tokens all know that the copy engine has read dv and dw, over which decays go.
  if (warp_anew() == 1 && elect_one()) {
    cute::tma_store_wait<0>();
    expect_tokens(smem, params.gate_element);
  }
  wait_to_read(smem.full[0], num_slices / kStages % 2);
  x.prepare_tokens();
  {
    PairGradients<Element> pairs(smem, dq, dE, dk, dG);
    x.finish_state_products(pairs);
    pairs.outer_pairs();
  }
  DecayGradients<Cfg> decays{smem, params, dG};
  x.finish_erase_and_dots([&](int pair, GradientsPlace const& place) { decays.sum_groups(pair, place); });
  // Registers are no longer short: what follows finds its place once.
  GradientsPlace const end_place;
  bool const first_warp = warp_anew() == 0;
  bool const has_other = Cfg::kNormalize && work.has_other_box();
  int const own_rows = uniform(work.num_rows);
  // The scratch stage is free but for what follows here, as are dP, dT and the decays, and no warp reads
  // another's pieces of the inputs' tiles.
  __syncthreads();
  float2 dots{};
  if constexpr (Cfg::kNormalize) {
    dots = x.sum_dots(end_place);
  }
  decays.add_other_half(end_place);
  auto& tokens = smem.tokens();
  auto const store_db_dg = [&] {
    store_tile<Element>(tokens.b, dE, end_place);
    decays.store(end_place);
  };
  if constexpr (Cfg::kNormalize) {
    x.make_norm_factors(dots, end_place, has_other);
    auto const rows = x.rows(end_place);
    store_db_dg();
    x.finish_norm_gradients(rows, end_place);
  } else {
    store_db_dg();
  }
  bool const partial = params.shape.num_gate_heads != params.shape.num_heads;
  if (partial) {
    x.store_partial(params.dq, dq, end_place);
    x.store_partial(params.dk, dk, end_place);
  } else {
    store_tile<Element>(tokens.q, dq, end_place);
    store_tile<Element>(tokens.k, dk, end_place);
  }
  cutlass::arch::fence_view_async_shared();  // the tiles' ordinary stores, before the copy engine reads them
  __syncthreads();
  if (!has_whole_boxes(own_rows, params.shape.dim_k)) {
    store_tiles_by_rows<Cfg>(smem, params, work, partial, decays.is_wide());
  } else if (first_warp) {
    GradientsWork const own = work.for_loads();
    if (elect_one()) {
      store_boxes<Cfg>(smem, params, maps, own, partial, decays.is_wide());
    }
  }
  if constexpr (Cfg::kIsGated) {
    decays.store_sums(work);
  }
  if (first_warp && elect_one()) {
    cute::tma_store_wait<0>();  // the tiles have been read
  }
}

// A contiguous gradient [batch, seqlen, heads, channels]; none where nobody asks for it, or where its rows
// are not whole pieces of 16 bytes.
CUtensorMap gradient_map(void* out, CallShape const& shape, int heads, int channels, ElementType element) {
  if (out == nullptr || channels % 8 != 0) {
    return {};
  }
  std::int64_t const row = static_cast<std::int64_t>(heads) * channels;
  return token_map({out, shape.seqlen * row, row, channels}, shape, heads, channels, element);
}

template <class Cfg>
void launch(GradientsParams const& params, cudaStream_t stream) {
  CallShape const& shape = params.shape;
  bool const partial = shape.num_gate_heads != shape.num_heads;
  auto const of_keys = [&](void* out, ElementType element) {
    return gradient_map(out, shape, shape.num_gate_heads, shape.dim_k, element);
  };
  auto const of_values = [&](void* out) {
    return gradient_map(out, shape, shape.num_value_heads, shape.dim_v, shape.element);
  };
  GradientsMaps const maps{
      .q = token_map(params.q, shape, shape.num_heads, shape.dim_k, shape.element),
      .k = token_map(params.k, shape, shape.num_heads, shape.dim_k, shape.element),
      .b = token_map(params.b, shape, shape.num_gate_heads, shape.dim_k, shape.element),
      .g = token_map(params.g, shape, shape.num_gate_heads, shape.dim_k, params.gate_element),
      .v = token_map(params.v, shape, shape.num_value_heads, shape.dim_v, shape.element),
      .w = token_map(params.w, shape, shape.num_value_heads, shape.dim_v, shape.element),
      .dO = token_map(params.dO, shape, shape.num_value_heads, shape.dim_v, shape.element),
      .dq = of_keys(partial ? nullptr : params.dq, shape.element),
      .dk = of_keys(partial ? nullptr : params.dk, shape.element),
      .db = of_keys(params.db, shape.element),
      .dg = of_keys(params.dg, params.gate_element),
      .dv = of_values(params.dv),
      .dw = of_values(params.dw)};
  constexpr int kSmemBytes = sizeof(GradientsStorage);
  static_assert(2 * (kSmemBytes + 1024) <= 228 * 1024);
  GradientsDivisors const by(params);
  launch_kernel<gradients_kernel<Cfg>>({.name = "gradients",
                                        .grid = by.grid(shape, by.num_boxes),
                                        .num_threads = kThreads,
                                        .shared_bytes = kSmemBytes,
                                        .stream = stream,
                                        .cluster = dim3(Cfg::kNormalize ? by.num_boxes : 1),
                                        .overlaps = true},
                                       params, by, maps);
}

template <class Element>
void dispatch(GradientsParams const& params, cudaStream_t stream) {
  with_extras(params.gates, params.gate_element,
              [&](auto extras) { launch<Config<Element, decltype(extras)>>(params, stream); });
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
