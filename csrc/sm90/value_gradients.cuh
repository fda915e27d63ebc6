// The gradients of v and w in `gradients`.
#pragma once

#include "sm90/gradients_parts.cuh"
#include "tile/activation.cuh"
#include "tile/convert.cuh"

namespace gdn2 {

// A slice: 64 columns of one of the value heads.
struct SliceIndex {
  int value_head, slice;
  int tile;  // among the tiles of all slots, value heads and slices: of 8 KB each, so that an int has room

  __device__ SliceIndex(CallShape const& shape, GradientsDivisors const& by, GradientsWork const& work,
                        int index) {
    by.slices(value_head, slice, index);
    value_head += work.gate_head * by.heads_per_gate;
    tile = (work.slot * shape.num_value_heads + value_head) * by.slices.divisor + slice;
  }
};

// dv = w*dX and dw = v*dX of a slice, and through the sigmoid of w, from tile to tile: a thread has a piece
// of 8 columns of two rows.
template <class Cfg>
struct ValueGradients {
  using Element = typename Cfg::Element;
  static constexpr int kRowStep = kThreads / 8;
  static_assert(kRowStep % 8 == 0);  // so that the pieces lie in the same place of their rows

  __device__ static void run(GradientsStorage& smem, std::uint8_t const* dX_tile) {
    int const thread = static_cast<int>(thread_anew());
    std::uint32_t const first = swizzled_offset(thread / 8, thread % 8);
    auto const of_row = [&](std::uint32_t offset) {
      auto const read = [&](std::uint8_t const* tile) {
        return *reinterpret_cast<uint4 const*>(tile + offset);
      };
      uint4 dv, dw;
      multiply(dv, dw, read(smem.values.v), read(smem.values.w), read(dX_tile));
      *reinterpret_cast<uint4*>(smem.d_values.v + offset) = dv;
      *reinterpret_cast<uint4*>(smem.d_values.w + offset) = dw;
    };
    // With the sigmoid a loop, so that both rows run what has been fetched once.
    constexpr std::uint32_t kStep = kRowStep * kBoxRowBytes;
    if constexpr (Cfg::kSigmoid) {
#pragma unroll 1
      for (std::uint32_t offset = first; offset < first + kBoxBytes; offset += kStep) {
        of_row(offset);
      }
    } else {
      of_row(first);
      of_row(first + kStep);
    }
  }

 private:
  static_assert(kChunk == 2 * kRowStep);

  __device__ static void multiply(uint4& dv, uint4& dw, uint4 v, uint4 w, uint4 dX) {
    multiply(dv.x, dw.x, v.x, w.x, dX.x);
    multiply(dv.y, dw.y, v.y, w.y, dX.y);
    multiply(dv.z, dw.z, v.z, w.z, dX.z);
    multiply(dv.w, dw.w, v.w, w.w, dX.w);
  }

  __device__ static void multiply(std::uint32_t& dv, std::uint32_t& dw, std::uint32_t v, std::uint32_t w,
                                  std::uint32_t dX) {
    if constexpr (Cfg::kSigmoid) {
      float2 const v2 = unpack<Element>(v), dX2 = unpack<Element>(dX), w2 = sigmoid(unpack<Element>(w)),
                   dv2{w2.x * dX2.x, w2.y * dX2.y}, v_dv{v2.x * dv2.x, v2.y * dv2.y};
      dv = pack<Element>(dv2.x, dv2.y);
      dw = pack<Element>(fmaf(-v_dv.x, w2.x, v_dv.x), fmaf(-v_dv.y, w2.y, v_dv.y));
    } else {
      dv = multiply_pairs<Element>(w, dX);
      dw = multiply_pairs<Element>(v, dX);
    }
  }
};

}  // namespace gdn2
