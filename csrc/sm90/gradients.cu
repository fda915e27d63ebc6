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
#include "sm90/gradients_slices.cuh"
#include "sm90/gradients_stores.cuh"
#include "sm90/norm_gradients.cuh"
#include "sm90/pair_gradients.cuh"
#include "sm90/token_map.h"
#include "tile/launch.h"
#include "tile/launch_order.cuh"

namespace gdn2 {
namespace {

template <class Element_, class Extras_>
struct Config : Extras_ {
  using Element = Element_;
};

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

// ---- the end ----------------------------------------------------------------------------------------------

// What the halves of the tokens and the CTAs of the rows have for each other, and all gradients but dv and dw
// out.
template <class Cfg>
__device__ void finish(Channels<Cfg> const& channels, DecayGradients<Cfg>& decays, GradientsStorage& smem,
                       GradientsParams const& params, GradientsMaps const& maps) {
  using Element = typename Cfg::Element;
  GradientsWork const& work = smem.work;
  HalfAccumulators &dq = channels.dq, &dE = channels.dE, &dk = channels.dk;
  GradientsPlace const place;  // registers are no longer short: found once
  bool const first_warp = warp_anew() == 0;
  bool const has_other = Cfg::kNormalize && work.has_other_box();
  int const own_rows = uniform(work.num_rows);
  // The scratch stage is free but for what follows here, as are dP, dT and the decays, and no warp reads
  // another's pieces of the inputs' tiles.
  __syncthreads();
  NormGradients<Cfg> const norms{smem, work};
  float2 dots{};
  if constexpr (Cfg::kNormalize) {
    dots = norms.sum_dots(place);
  }
  decays.add_other_half(place);
  auto& tokens = smem.tokens();
  store_tile<Element>(tokens.b, dE, place);  // while dots of the other CTA come: docs/kernels.md
  if constexpr (Cfg::kNormalize) {
    norms.make_factors(dots, place, has_other);
    auto const rows = norms.rows(place);
    decays.store(place);
    norms.take_shares(rows, dq, dk, place);
  } else {
    decays.store(place);
  }
  bool const partial = params.shape.num_gate_heads != params.shape.num_heads;
  if (partial) {
    channels.store_partial(params.dq, dq, place);
    channels.store_partial(params.dk, dk, place);
  } else {
    store_tile<Element>(tokens.q, dq, place);
    store_tile<Element>(tokens.k, dk, place);
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
  Slices<Cfg> const slices{smem, params, by, maps, order};
  wait_for_earlier_kernels();  // scan_backward
  slices.begin();
  if constexpr (Cfg::kNormalize) {
    NormGradients<Cfg>::expect_dots(smem);
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
  slices.run(products, place, num_rows);
  if constexpr (Cfg::kNormalize) {
    NormGradients<Cfg>::announce_dots(order.num_boxes == 2);
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
  wait_to_read(smem.full[0], order.number / kStages % 2);
  x.prepare_tokens();
  {
    PairGradients<Element> pairs(smem, dq, dE, dk, dG);
    x.finish_state_products(pairs);
    pairs.outer_pairs();
  }
  DecayGradients<Cfg> decays{smem, params, dG};
  x.finish_erase_and_dots([&](int pair, GradientsPlace const& place) { decays.sum_groups(pair, place); });
  finish(x, decays, smem, params, maps);
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
