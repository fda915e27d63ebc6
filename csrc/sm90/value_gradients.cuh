// The gradients of v and w in `gradients`.
#pragma once

#include "sm90/gradients_parts.cuh"
#include "tile/activation.cuh"
#include "tile/convert.cuh"

namespace gdn2 {

// A slice: 64 columns of one of the value heads.
struct SliceIndex {
  int value_head, slice;
  std::int64_t tile;  // among the tiles of all slots, value heads and slices

  __device__ SliceIndex(CallShape const& shape, GradientsDivisors const& by, GradientsWork const& work,
                        int index) {
    by.slices(value_head, slice, index);
    value_head += work.gate_head * by.heads_per_gate;
    tile = (static_cast<std::int64_t>(work.slot) * shape.num_value_heads + value_head) * by.slices.divisor +
           slice;
  }
};

// Eight neighbouring elements of a row of which `count` exist.
template <class Element>
__device__ uint4 load_piece(Element const* row, int count) {
  if (count >= 8) {
    return __ldg(reinterpret_cast<uint4 const*>(row));
  }
  uint4 piece{};
  auto* const x = reinterpret_cast<Element*>(&piece);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) {
      x[i] = row[i];
    }
  }
  return piece;
}

// dv = w*dX and dw = v*dX of a slice, and through the sigmoid of w: a thread has a piece of 8 columns of two
// rows.
template <class Cfg>
struct ValueGradients {
  using Element = typename Cfg::Element;
  static constexpr int kRowStep = kThreads / 8, kRows = kChunk / kRowStep;
  static_assert(kRows == 2);

  struct Inputs {
    uint4 v, w;
  };

  GradientsParams const& params;
  GradientsWork const& work;
  SliceIndex at;
  int piece, column, count;  // `count` or fewer of the 8 columns exist

  __device__ ValueGradients(GradientsParams const& params_, GradientsDivisors const& by,
                            GradientsWork const& work_, int index)
      : params(params_), work(work_), at(params_.shape, by, work_, index), piece(threadIdx.x % 8) {
    column = at.slice * kColumns + 8 * piece;
    count = params.shape.dim_v - column;
  }

  __device__ int row(int i) const { return threadIdx.x / 8 + kRowStep * i; }
  __device__ bool is_mine(int i) const { return row(i) < work.num_rows && count > 0; }
  __device__ Element const* first_row(TokenTensor const& x) const {
    return static_cast<Element const*>(x.data) + work.batch * x.stride_batch +
           (work.first_token + row(0)) * x.stride_token + at.value_head * x.stride_head + column;
  }

  // Before the slice is waited for.
  __device__ void load(Inputs (&x)[kRows]) const {
    Element const *v = first_row(params.v), *w = first_row(params.w);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      x[i] = {};
      if (is_mine(i)) {
        x[i] = {load_piece(v, count), load_piece(w, count)};
      }
      v += kRowStep * params.v.stride_token;
      w += kRowStep * params.w.stride_token;
    }
  }

  template <bool kSigmoid>
  __device__ static void multiply(std::uint32_t (&dv)[4], std::uint32_t (&dw)[4], std::uint32_t const (&v)[4],
                                  std::uint32_t const (&w)[4], std::uint32_t const (&dX)[4]) {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      if constexpr (kSigmoid) {
        float2 const v2 = unpack<Element>(v[p]), dX2 = unpack<Element>(dX[p]),
                     w2 = sigmoid(unpack<Element>(w[p]));
        dv[p] = pack<Element>(w2.x * dX2.x, w2.y * dX2.y);
        dw[p] = pack<Element>(v2.x * dX2.x * fmaf(-w2.x, w2.x, w2.x), v2.y * dX2.y * fmaf(-w2.y, w2.y, w2.y));
      } else {
        dv[p] = multiply_pairs<Element>(w[p], dX[p]);
        dw[p] = multiply_pairs<Element>(v[p], dX[p]);
      }
    }
  }

  __device__ void store(int i, Inputs const& x, std::uint8_t const* dX_tile) const {
    if (!is_mine(i)) {
      return;
    }
    CallShape const& shape = params.shape;
    uint4 const dX8 = *reinterpret_cast<uint4 const*>(dX_tile + swizzled_offset(row(i), piece));
    std::uint32_t const v[4] = {x.v.x, x.v.y, x.v.z, x.v.w}, w[4] = {x.w.x, x.w.y, x.w.z, x.w.w},
                        dX[4] = {dX8.x, dX8.y, dX8.z, dX8.w};
    std::uint32_t dv[4], dw[4];
    bool const use_sigmoid = Cfg::kFused && params.gates.use_gate_sigmoid;
    use_sigmoid ? multiply<true>(dv, dw, v, w, dX) : multiply<false>(dv, dw, v, w, dX);
    std::int64_t const token_head = (work.token(shape) + row(i)) * shape.num_value_heads + at.value_head;
    std::int64_t const place = token_head * shape.dim_v + column;
    bool const aligned = shape.dim_v % 8 == 0;
    if (params.dv != nullptr) {
      store_piece(static_cast<Element*>(params.dv) + place, uint4{dv[0], dv[1], dv[2], dv[3]}, count,
                  aligned);
    }
    if (params.dw != nullptr) {
      store_piece(static_cast<Element*>(params.dw) + place, uint4{dw[0], dw[1], dw[2], dw[3]}, count,
                  aligned);
    }
  }
};

}  // namespace gdn2
