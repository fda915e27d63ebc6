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

  __device__ ValueGradients(GradientsParams const& params_, GradientsDivisors const& by,
                            GradientsWork const& work_, int index)
      : params(params_), work(work_), at(params_.shape, by, work_, index) {}

  // Asked anew every time: there are no registers for what follows from it.
  __device__ static int thread() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
  }
  __device__ int first_row() const { return thread() / 8; }
  __device__ int column() const { return at.slice * kColumns + thread() % 8 * 8; }
  __device__ Element const* first_row_of(TokenTensor const& x) const {
    return static_cast<Element const*>(x.data) + work.batch * x.stride_batch +
           (work.first_token + first_row()) * x.stride_token + at.value_head * x.stride_head + column();
  }

  // Before the slice is waited for.
  __device__ void load(Inputs (&x)[kRows]) const {
    Element const *v = first_row_of(params.v), *w = first_row_of(params.w);
    int const row = first_row(), count = params.shape.dim_v - column();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      x[i] = {};
      if (row + i * kRowStep < work.num_rows && count > 0) {
        x[i] = {load_piece(v, count), load_piece(w, count)};
      }
      v += kRowStep * params.v.stride_token;
      w += kRowStep * params.w.stride_token;
    }
  }

  // With the sigmoid a loop, so that both rows run what has been fetched once.
  __device__ void store(Inputs (&x)[kRows], std::uint8_t const* dX_tile) const {
    if constexpr (Cfg::kSigmoid) {
#pragma unroll 1
      for (int step = 0; step < kChunk; step += kRowStep) {
        store(step, x[0], dX_tile);
        x[0] = x[1];
      }
    } else {
      store(0, x[0], dX_tile);
      store(kRowStep, x[1], dX_tile);
    }
  }

 private:
  __device__ static void multiply(std::uint32_t (&dv)[4], std::uint32_t (&dw)[4], std::uint32_t const (&v)[4],
                                  std::uint32_t const (&w)[4], std::uint32_t const (&dX)[4]) {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      if constexpr (Cfg::kSigmoid) {
        float2 const v2 = unpack<Element>(v[p]), dX2 = unpack<Element>(dX[p]),
                     w2 = sigmoid(unpack<Element>(w[p])), dv2{w2.x * dX2.x, w2.y * dX2.y},
                     v_dv{v2.x * dv2.x, v2.y * dv2.y};
        dv[p] = pack<Element>(dv2.x, dv2.y);
        dw[p] = pack<Element>(fmaf(-v_dv.x, w2.x, v_dv.x), fmaf(-v_dv.y, w2.y, v_dv.y));
      } else {
        dv[p] = multiply_pairs<Element>(w[p], dX[p]);
        dw[p] = multiply_pairs<Element>(v[p], dX[p]);
      }
    }
  }

  // The row `step` behind the thread's first one.
  __device__ void store(int step, Inputs const& x, std::uint8_t const* dX_tile) const {
    CallShape const& shape = params.shape;
    int const row = first_row() + step;
    if (row >= work.num_rows || column() >= shape.dim_v) {
      return;
    }
    uint4 const dX8 = *reinterpret_cast<uint4 const*>(dX_tile + swizzled_offset(row, thread() % 8));
    std::uint32_t const v[4] = {x.v.x, x.v.y, x.v.z, x.v.w}, w[4] = {x.w.x, x.w.y, x.w.z, x.w.w},
                        dX[4] = {dX8.x, dX8.y, dX8.z, dX8.w};
    std::uint32_t dv[4], dw[4];
    multiply(dv, dw, v, w, dX);
    std::int64_t const token = work.token(shape) + first_row() + step,
                       place = (token * shape.num_value_heads + at.value_head) * shape.dim_v + column();
    int const count = shape.dim_v - column();
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
