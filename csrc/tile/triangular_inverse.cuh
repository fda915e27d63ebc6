// A = (I + T)^-1 for a strictly lower triangular T [64, 64] in float32, in place, by one warpgroup.
//
// Blocks of 16 on the diagonal by forward substitution in float32, half a warp each; then merged upward, for
// 16 and 32:
//     A21 = (A22 (-T21)) A11
// in tf32 with float32 accumulation. Below those blocks T holds -T, rounded to tf32 where it was made (see
// to_negated_tf32). The accumulators of A22 (-T21) are the left operand of the second product where they are:
// the order of the contraction is free, so step l%4 of an instruction is column 2*(l%4) and step l%4 + 4 the
// next.
#pragma once

#include <cutlass/arch/barrier.h>

#include "tile/mma.cuh"

namespace gdn2 {

struct TriangularMatrix {
  static constexpr int kSize = 64;
  static constexpr int kStride = 68;  // floats; rows 16-byte aligned, fragment reads free of bank conflicts

  float* data;

  __device__ float& at(int row, int column) const { return data[row * kStride + column]; }
};

namespace detail {

constexpr int kInverseBlock = 16;

// Two neighbours, from row `pair` on. Row by row: x[r] = e[r] - sum_{s<r} T[r, s] x[s]; lane l solves column
// l % 16 of the inverse of block l / 16.
__device__ inline void invert_diagonal_blocks(TriangularMatrix T, int pair) {
  int const column = lane_index() % kInverseBlock,
            first = pair + lane_index() / kInverseBlock * kInverseBlock;
  float x[kInverseBlock];
#pragma unroll
  for (int r = 0; r < kInverseBlock; ++r) {
    float sum = r == column ? 1.f : 0.f;
#pragma unroll
    for (int s4 = 0; s4 < r; s4 += 4) {
      float4 const t = *reinterpret_cast<float4 const*>(&T.at(first + r, first + s4));
      sum -= t.x * x[s4];
      if (s4 + 1 < r)
        sum -= t.y * x[s4 + 1];
      if (s4 + 2 < r)
        sum -= t.z * x[s4 + 2];
      if (s4 + 3 < r)
        sum -= t.w * x[s4 + 3];
    }
    x[r] = sum;
  }
  __syncwarp();  // every lane has read its block
#pragma unroll
  for (int r = 0; r < kInverseBlock; ++r) {
    T.at(first + r, first + column) = x[r];
  }
}

// W [16, kColumns] = A22[row.., first2..] (-T21): 16 rows of the product, over `kDepth` columns of A22.
template <int kColumns, int kDepth>
__device__ void multiply_A22_T21(float (&W)[kColumns / 8][4], TriangularMatrix M, int row, int first2,
                                 int first1) {
  int const group = lane_index() / 4, quad = lane_index() % 4;
#pragma unroll
  for (int k = 0; k < kDepth; k += 8) {
    std::uint32_t const a[4] = {to_tf32(M.at(row + group, first2 + k + quad)),
                                to_tf32(M.at(row + group + 8, first2 + k + quad)),
                                to_tf32(M.at(row + group, first2 + k + quad + 4)),
                                to_tf32(M.at(row + group + 8, first2 + k + quad + 4))};
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      std::uint32_t const b[2] = {__float_as_uint(M.at(first2 + k + quad, first1 + 8 * n + group)),
                                  __float_as_uint(M.at(first2 + k + quad + 4, first1 + 8 * n + group))};
      mma_16x8x8_tf32(W[n], a, b);
    }
  }
}

// A21 [16, kColumns] = W A11 for columns [column, column + kColumns), over the columns of W from kFirst on:
// those before meet zeros of A11.
template <int kColumns, int kFirst, int kDepthTiles>
__device__ void multiply_W_A11(float (&A21)[kColumns / 8][4], float const (&W)[kDepthTiles][4],
                               TriangularMatrix M, int first1, int column) {
  int const group = lane_index() / 4, quad = lane_index() % 4;
#pragma unroll
  for (int k = kFirst / 8; k < kDepthTiles; ++k) {
    std::uint32_t const a[4] = {to_tf32(W[k][0]), to_tf32(W[k][2]), to_tf32(W[k][1]), to_tf32(W[k][3])};
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      std::uint32_t const b[2] = {to_tf32(M.at(first1 + 8 * k + 2 * quad, column + 8 * n + group)),
                                  to_tf32(M.at(first1 + 8 * k + 2 * quad + 1, column + 8 * n + group))};
      mma_16x8x8_tf32(A21[n], a, b);
    }
  }
}

template <int kColumns>
__device__ void store_block(float const (&block)[kColumns / 8][4], TriangularMatrix M, int row, int column) {
  int const group = lane_index() / 4, quad = lane_index() % 4;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      *reinterpret_cast<float2*>(&M.at(row + group + 8 * half, column + 8 * n + 2 * quad)) =
          float2{block[n][2 * half], block[n][2 * half + 1]};
    }
  }
}

}  // namespace detail

// T becomes A, the unit diagonal included; nothing above the 16x16 diagonal blocks is read or written.
// `barrier` is a named barrier that these kWarpgroupThreads threads own; all of T must be visible to them on
// entry, A is on exit.
__device__ inline void invert_unit_lower(TriangularMatrix T, std::uint32_t barrier) {
  using cutlass::arch::NamedBarrier;
  int const warp = threadIdx.x % kWarpgroupThreads / kWarpThreads;
  if (warp < 2) {  // blocks 0, 1 and (1, 0), or 2, 3 and (3, 2)
    int const first1 = 32 * warp, first2 = first1 + 16;
    detail::invert_diagonal_blocks(T, first1);
    __syncwarp();
    float W[2][4] = {}, A21[2][4] = {};
    detail::multiply_A22_T21<16, 16>(W, T, first2, first2, first1);
    detail::multiply_W_A11<16, 0>(A21, W, T, first1, first1);
    __syncwarp();
    detail::store_block<16>(A21, T, first2, first1);
  }
  NamedBarrier::sync(kWarpgroupThreads, barrier);

  // Block [32:64, 0:32], a quarter a warp: rows 32 + 16*(warp/2), columns 16*(warp%2).
  int const row = 32 + 16 * (warp / 2), column = 16 * (warp % 2);
  float W[4][4] = {}, A21[2][4] = {};
  if (warp < 2) {
    detail::multiply_A22_T21<32, 16>(W, T, row, 32, 0);  // rows 32-47 of A22 end at column 47
  } else {
    detail::multiply_A22_T21<32, 32>(W, T, row, 32, 0);
  }
  if (column == 0) {
    detail::multiply_W_A11<16, 0>(A21, W, T, 0, column);
  } else {
    detail::multiply_W_A11<16, 16>(A21, W, T, 0, column);
  }
  NamedBarrier::sync(kWarpgroupThreads, barrier);  // every warp has read T21
  detail::store_block<16>(A21, T, row, column);
  NamedBarrier::sync(kWarpgroupThreads, barrier);
}

}  // namespace gdn2
