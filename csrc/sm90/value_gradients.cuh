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
    if constexpr (Cfg::kSigmoid) {
      float2 s[4] = {unpack<Element>(w.x), unpack<Element>(w.y), unpack<Element>(w.z), unpack<Element>(w.w)};
      make_sigmoids(s);
      multiply(dv.x, dw.x, v.x, s[0], dX.x);
      multiply(dv.y, dw.y, v.y, s[1], dX.y);
      multiply(dv.z, dw.z, v.z, s[2], dX.z);
      multiply(dv.w, dw.w, v.w, s[3], dX.w);
    } else {
      dv = multiply_pairs<Element>(w, dX);
      dw = multiply_pairs<Element>(v, dX);
    }
  }

  __device__ static void multiply(std::uint32_t& dv, std::uint32_t& dw, std::uint32_t v, float2 s,
                                  std::uint32_t dX) {
    float2 const slope{fmaf(-s.x, s.x, s.x), fmaf(-s.y, s.y, s.y)};
    if constexpr (kHasFloatRange<Element>) {
      dv = multiply_pairs<Element>(pack<Element>(s.x, s.y), dX);
      dw = multiply_pairs<Element>(multiply_pairs<Element>(v, dX), pack<Element>(slope.x, slope.y));
    } else {
      float2 const v2 = unpack<Element>(v), dX2 = unpack<Element>(dX);
      dv = pack<Element>(s.x * dX2.x, s.y * dX2.y);
      dw = pack<Element>(v2.x * dX2.x * slope.x, v2.y * dX2.y * slope.y);
    }
  }
};

}  // namespace gdn2
