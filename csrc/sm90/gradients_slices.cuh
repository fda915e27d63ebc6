// The slices of `gradients`: 64 value columns of one of the group's value heads each, their loads and what is
// made of them: dP and dT, the products with the states, dv and dw. And the loads of the tokens, which take a
// slice's place.
#pragma once

#include <cutlass/arch/barrier.h>

#include "sm90/gradients_stores.cuh"
#include "sm90/value_gradients.cuh"
#include "tile/convert.cuh"
#include "tile/mma.cuh"
#include "tile/pipeline.cuh"
#include "tile/tma.cuh"
#include "tile/wgmma.cuh"

namespace gdn2 {

// ---- loads, by one thread ---------------------------------------------------------------------------------

__device__ inline void load_box(void* smem, void const* boxes, int box, FullBarrier& full) {
  bulk_load(smem, static_cast<std::uint8_t const*>(boxes) + static_cast<std::int64_t>(box) * kBoxBytes,
            kBoxBytes, full);
}

__device__ inline void load_slice(GradientsStorage& smem, int stage, GradientsParams const& params,
                                  GradientsDivisors const& by, GradientsMaps const& maps,
                                  GradientsWork const& work, int index, bool has_norms) {
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

__device__ inline void load_values(GradientsStorage& smem, GradientsParams const& params,
                                   GradientsDivisors const& by, GradientsMaps const& maps,
                                   GradientsWork const& work, int index) {
  SliceIndex const at(params.shape, by, work, index);
  smem.values_full.arrive_and_expect_tx(sizeof(smem.values));
  int const column = at.slice * kColumns;
  tma_load(maps.v, smem.values_full, smem.values.v, column, at.value_head, work.first_token, work.batch);
  tma_load(maps.w, smem.values_full, smem.values.w, column, at.value_head, work.first_token, work.batch);
}

// They count on their barrier before it expects them: it waits for the arrival of expect_tokens as well.
__device__ inline void load_tokens(GradientsStorage& smem, GradientsMaps const& maps,
                                   GradientsWork const& work, ElementType gate_element) {
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

__device__ inline void expect_tokens(GradientsStorage& smem, ElementType gate_element) {
  smem.full[0].arrive_and_expect_tx((gate_element == ElementType::kFloat32 ? 5 : 4) * kBoxBytes);
}

// ---- products over value columns --------------------------------------------------------------------------

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
__device__ inline void store_S_dS(GradientsStorage& smem, Products const& x, GradientsPlace const& place) {
  if (place.half_of_chunk == 1 && place.quad == place.row / 2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      smem.scratch().S_dS[place.channel(half)] = x.S_dS[half];
    }
  }
}

// Rows of dO that are not the chunk's own become zero, whatever lies there.
__device__ inline void clear_foreign_rows(std::uint8_t* tile, int num_rows) {
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

// ---- one slice after the other ----------------------------------------------------------------------------

// The slices of a CTA, and the tokens behind them, in stages that take turns: the last slice is in stage 1,
// the tokens are in stage 0.
template <class Cfg>
struct Slices {
  GradientsStorage& smem;
  GradientsParams const& params;
  GradientsDivisors const& by;
  GradientsMaps const& maps;
  SliceOrder const& order;

  // Barriers and the first loads; before a barrier of the CTA.
  __device__ void begin() const {
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
        if (index == 1) {
          load_next_values(own, 0);
        }
      }
      if (index == 0) {
        smem.work = own;
      }
    }
  }

  __device__ void run(Products& products, GradientsPlace const& place, int num_rows) const {
    GradientsWork const& work = smem.work;
    bool const whole_boxes = has_whole_boxes(num_rows, params.shape.dim_v);
    for (int index = 0; index < order.number; ++index) {
      int const stage = uniform(stage_of(index));
      auto& slice = smem.stages[stage].slice;
      bool const has_values = order.has_values(index);
      wait_to_read(smem.full[stage], index / kStages % 2);
      if (num_rows < kChunk) {
        clear_foreign_rows(slice.dO, num_rows);
      }
      multiply_slice<typename Cfg::Element>(products, slice, place, index > 0);
      // With the sigmoid, dv and dw need the registers that S has, or they wait for one special function
      // after the other (a CTA 0.2 us of 15.7).
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
      follow(index, warp, has_values, whole_boxes);
      if (has_values && (!whole_boxes || order.has_values(index + 1))) {
        if (!whole_boxes) {
          store_some_values<typename Cfg::Element>(smem, params, by, work, order.slice(index));
        } else if (warp == 1 && elect_one()) {
          cute::tma_store_wait<0>();
        }
        __syncthreads();  // dv and dw have been read
      }
    }
  }

 private:
  __device__ int stage_of(int index) const { return (order.number - index) % kStages; }

  // The index-th slice, or the tokens behind the last one.
  __device__ void load(GradientsWork const& of, int index) const {
    if (index < order.number) {
      load_slice(smem, stage_of(index), params, by, maps, of, order.slice(index),
                 Cfg::kNormalize && index == 0);
    } else if (index == order.number) {
      load_tokens(smem, maps, of, params.gate_element);
    }
  }

  // v and w of the first slice from the index-th on that has its dv and dw from this CTA.
  __device__ void load_next_values(GradientsWork const& of, int index) const {
    if (int const next = order.with_values(index); order.has_values(next)) {
      load_values(smem, params, by, maps, of, order.slice(next));
    }
  }

  // What takes the place of a slice that all are done with; and dv and dw of it out, those values in that
  // come next.
  __device__ void follow(int index, int warp, bool has_values, bool whole_boxes) const {
    if (warp == 0) {
      GradientsWork const own = smem.work.for_loads();
      if (elect_one()) {
        load(own, index + kStages);
      }
    } else if (warp == 1 && has_values) {
      GradientsWork const own = smem.work.for_loads();
      if (elect_one()) {
        if (whole_boxes) {
          store_values(smem, params, by, maps, own, order.slice(index));
        }
        load_next_values(own, index + 1);
      }
    }
  }
};

}  // namespace gdn2
