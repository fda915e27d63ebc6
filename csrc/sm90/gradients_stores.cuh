// How `gradients` stores what lies in tiles: whole boxes by the copy engine, or row by row.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "sm90/gradients_parts.cuh"
#include "sm90/value_gradients.cuh"

namespace gdn2 {

// The chunk's own rows of a gradient [batch, seqlen, heads, channels], from its box, which begins at a
// channel: where a copy by the copy engine would touch the next sequence's rows, or rows are not whole 16
// bytes.
template <class Value>
__device__ void store_some_rows(void* out, std::uint8_t const* box, int first_channel, CallShape const& shape,
                                GradientsWork const& work, int head, int heads, int channels) {
  if (out == nullptr) {
    return;
  }
  constexpr int kSize = sizeof(uint4) / sizeof(Value);
  int const piece = threadIdx.x % 8, channel = first_channel + kSize * piece, count = channels - channel;
#pragma unroll 1
  for (int row = threadIdx.x / 8; row < work.num_rows && count > 0; row += kThreads / 8) {
    std::int64_t const at = ((work.token(shape) + row) * heads + head) * channels + channel;
    Value* const to = static_cast<Value*>(out) + at;
    uint4 const from = *reinterpret_cast<uint4 const*>(box + swizzled_offset(row, piece));
    if (count >= kSize && channels % kSize == 0) {
      __stcg(reinterpret_cast<uint4*>(to), from);  // a plain store is merged with those below, and split
      continue;
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i < count) {
        to[i] = reinterpret_cast<Value const*>(&from)[i];
      }
    }
  }
}

// Whether the copy engine stores the chunk's rows.
__device__ inline bool has_whole_boxes(int num_rows, int channels) {
  return num_rows == kChunk && channels % 8 == 0;
}

// dv and dw of a slice from their tiles, by one thread.
__device__ inline void store_values(GradientsStorage& smem, GradientsParams const& params,
                                    GradientsDivisors const& by, GradientsMaps const& maps,
                                    GradientsWork const& work, int index) {
  SliceIndex const at(params.shape, by, work, index);
  auto const store = [&](void const* out, CUtensorMap const& map, std::uint8_t const* tile) {
    if (out != nullptr) {
      cute::SM90_TMA_STORE::copy(&map, tile, at.slice * kColumns, at.value_head, work.first_token,
                                 work.batch);
    }
  };
  store(params.dv, maps.dv, smem.d_values.v);
  store(params.dw, maps.dw, smem.d_values.w);
  cute::tma_store_arrive();
}

// The same by all threads, row by row.
template <class Element>
__device__ void store_some_values(GradientsStorage& smem, GradientsParams const& params,
                                  GradientsDivisors const& by, GradientsWork const& work, int index) {
  CallShape const& shape = params.shape;
  SliceIndex const at(shape, by, work, index);
  auto const store = [&](void* out, std::uint8_t const* tile) {
    store_some_rows<Element>(out, tile, at.slice * kColumns, shape, work, at.value_head,
                             shape.num_value_heads, shape.dim_v);
  };
  store(params.dv, smem.d_values.v);
  store(params.dw, smem.d_values.w);
}

// dq and dk (unless they are partial), db and dg from their tiles: whole boxes, by one thread.
template <class Cfg>
__device__ void store_boxes(GradientsStorage& smem, GradientsParams const& params, GradientsMaps const& maps,
                            GradientsWork const& work, bool partial, bool is_wide) {
  auto& tokens = smem.tokens();
  int const channel = work.first_channel;
  auto const store = [&](void const* out, CUtensorMap const& map, std::uint8_t const* box, int first_channel,
                         int head) {
    if (out != nullptr) {
      cute::SM90_TMA_STORE::copy(&map, box, first_channel, head, work.first_token, work.batch);
    }
  };
  if (!partial) {
    store(params.dq, maps.dq, tokens.q, channel, work.head);
    store(params.dk, maps.dk, tokens.k, channel, work.head);
  }
  store(params.db, maps.db, tokens.b, channel, work.gate_head);
  auto const& dg = smem.scratch().dg.boxes;
  store(params.dg, maps.dg, dg[0], channel, work.gate_head);
  if (is_wide) {
    store(params.dg, maps.dg, dg[1], channel + kChannels / 2, work.gate_head);
  }
  cute::tma_store_arrive();
}

// The same by all threads, row by row. Rarely called and never inlined: code that is not in the way.
template <class Cfg>
__device__ __noinline__ void store_tiles_by_rows(GradientsStorage& smem, GradientsParams const& params,
                                                 GradientsWork const& work, bool partial, bool is_wide) {
  using Element = typename Cfg::Element;
  CallShape const& shape = params.shape;
  auto& tokens = smem.tokens();
  auto const store = [&](auto value, void* out, std::uint8_t const* box, int first_channel, int head,
                         int heads) {
    store_some_rows<decltype(value)>(out, box, first_channel, shape, work, head, heads, shape.dim_k);
  };
  int const channel = work.first_channel;
  if (!partial) {
    store(Element{}, params.dq, tokens.q, channel, work.head, shape.num_heads);
    store(Element{}, params.dk, tokens.k, channel, work.head, shape.num_heads);
  }
  store(Element{}, params.db, tokens.b, channel, work.gate_head, shape.num_gate_heads);
  auto const& dg = smem.scratch().dg.boxes;
  if (is_wide) {
    store(float{}, params.dg, dg[0], channel, work.gate_head, shape.num_gate_heads);
    store(float{}, params.dg, dg[1], channel + kChannels / 2, work.gate_head, shape.num_gate_heads);
  } else {
    store(Element{}, params.dg, dg[0], channel, work.gate_head, shape.num_gate_heads);
  }
}

}  // namespace gdn2
