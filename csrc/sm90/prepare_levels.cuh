// T and P in `prepare`, level by level: operands from a thread's registers to shared memory, products, and
// the entries of matching pairs.
#pragma once

#include "sm90/prepare_parts.cuh"
#include "tile/convert.cuh"
#include "tile/mma.cuh"
#include "tile/wgmma.cuh"

namespace gdn2::prepare {

// The index of a row among the 32 later (or earlier) rows of level h: the bit h taken out.
__host__ __device__ constexpr int compressed_row(int row, int h) {
  return row / (2 * h) * h + row % h;
}
__host__ __device__ constexpr int later_row(int index, int h) {
  return index / h * 2 * h + h + index % h;
}
__host__ __device__ constexpr int earlier_row(int index, int h) {
  return index / h * 2 * h + index % h;
}

// Where a lane has its channels of a level, from a row on.
struct LevelRows {
  LaneRows<std::uint32_t> later, earlier;

  template <class Cfg>
  __device__ LevelRows(LevelOperands<Cfg> const& operands, ThreadPlace at, int first_row)
      : later(pairs_of(operands.later[at.box], first_row, at.lane)),
        earlier(pairs_of(operands.earlier[at.box], first_row, at.lane)) {}
};

// E*D and q*D of token i, to row `index` of the later halves. The factor is rounded once for both: that costs
// less accuracy than the rounding of P does, and saves a third of the level's instructions.
template <class Cfg>
__device__ void store_later(LevelRows const& out, ThreadInputs<Cfg> const& x, int i, int index,
                            float const (&D)[2]) {
  using Element = typename Cfg::Element;
  std::uint32_t const factor = pack<Element>(D[0], D[1]);
  store_pair(out.later[index], multiply_pairs<Element>(x.E[i], factor));
  store_pair(out.later[32 + index], multiply_pairs<Element>(x.q[i], factor));
}

template <class Cfg>
__device__ void store_earlier(LevelRows const& out, ThreadInputs<Cfg> const& x, int i, int index,
                              float const (&U)[2]) {
  using Element = typename Cfg::Element;
  store_pair(out.earlier[index], multiply_pairs<Element>(x.k[i], pack<Element>(U[0], U[1])));
}

// Levels whose pairs lie inside a thread's 16 tokens.
template <int h, class Cfg>
__device__ void build_inner_level(LevelRows const& out, ThreadInputs<Cfg> const& x) {
  static_assert(2 * h <= kBlock);
#pragma unroll
  for (int first = 0; first < kBlock; first += 2 * h) {
    int const index = first / 2;
    store_pair(out.later[index], x.E[first + h]);  // D = 1
    store_pair(out.later[32 + index], x.q[first + h]);
    float D[2] = {1.f, 1.f};
#pragma unroll
    for (int i = 1; i < h; ++i) {
      D[0] *= x.alpha[first + h + i][0];
      D[1] *= x.alpha[first + h + i][1];
      store_later(out, x, first + h + i, index + i, D);
    }
    float U[2] = {1.f, 1.f};
#pragma unroll
    for (int i = h - 1; i >= 0; --i) {
      U[0] *= x.alpha[first + i + 1][0];
      U[1] *= x.alpha[first + i + 1][1];
      store_earlier(out, x, first + i, index + i, U);
    }
  }
}

// Decay over whole blocks, per channel: alpha of a block's first token, and the product over its other 15.
template <class Cfg>
struct BlockProducts {
  float2 first[kNumBlocks], rest[kNumBlocks];

  __device__ BlockProducts(SharedStorage<Cfg> const& smem, int channel) {
#pragma unroll
    for (int block = 0; block < kNumBlocks; ++block) {
      first[block] = *reinterpret_cast<float2 const*>(&smem.block_first[block][channel]);
      rest[block] = *reinterpret_cast<float2 const*>(&smem.block_rest[block][channel]);
    }
  }
};

// Levels 16 and 32: a block is later or earlier as a whole. `carry` is the decay between this block and the
// pair's middle: from the later half's first row to this block's first, or from this block's last row to it.
template <class Cfg>
__device__ void build_outer_level(LevelRows const& out, ThreadInputs<Cfg> const& x, bool later,
                                  float2 carry) {
  float F[2] = {carry.x, carry.y};
  if (later) {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      if (i > 0) {
        F[0] *= x.alpha[i][0];
        F[1] *= x.alpha[i][1];
      }
      store_later(out, x, i, i, F);
    }
  } else {
#pragma unroll
    for (int i = kBlock - 1; i >= 0; --i) {
      if (i < kBlock - 1) {
        F[0] *= x.alpha[i + 1][0];
        F[1] *= x.alpha[i + 1][1];
      }
      store_earlier(out, x, i, i, F);
    }
  }
}

template <int h, class Cfg>
__device__ void build_level(LevelOperands<Cfg>& out, SharedStorage<Cfg>& smem, ThreadInputs<Cfg> const& x,
                            ThreadPlace at) {
  if constexpr (2 * h <= kBlock) {
    build_inner_level<h>(LevelRows(out, at, at.block * (kBlock / 2)), x);
  } else {
    BlockProducts<Cfg> const blocks(smem, at.channel());
    float2 const one{1.f, 1.f};
    float2 carry;
    bool later;
    if constexpr (h == 16) {
      later = at.block % 2 == 1;
      carry = later ? one : (at.block == 0 ? blocks.first[1] : blocks.first[3]);
    } else {
      later = at.block >= 2;
      carry = at.block == 2   ? one
              : at.block == 3 ? blocks.rest[2] * blocks.first[3]
              : at.block == 1 ? blocks.first[2]
                              : blocks.first[1] * blocks.rest[1] * blocks.first[2];
    }
    build_outer_level(LevelRows(out, at, compressed_row(at.block * kBlock, h)), x, later, carry);
  }
}

// Where a lane has its first entry of a level, or its first two side by side: of what it has more is `half`
// by as many rows and columns further, and j by eight columns.
template <int h>
struct EntryPlace {
  static constexpr int kHalfRows = h > 8 ? 8 : 16, kHalfColumns = h > 8 ? 0 : 16;
  int row, column;

  // upper: of the later rows of the level the second 16.
  __device__ EntryPlace(int lane, int upper, int first_column) {
    int const r = lane / 4, s = 2 * (lane % 4);
    if constexpr (h == 32) {
      row = 32 + 16 * upper + r;
      column = first_column + s;
    } else {
      row = 32 * upper + later_row(r, h);
      column = 32 * upper + (h == 1 ? row % 32 - 1 : earlier_row(s, h));
    }
  }

  template <class Cfg>
  __device__ float& in_T(SharedStorage<Cfg>& smem, int half, int j) const {
    constexpr int kStride = TriangularMatrix::kStride;
    return smem.T[row * kStride + column + half * (kHalfRows * kStride + kHalfColumns) + 8 * j];
  }
  // The bits of column that `half` and j change are zero in it.
  template <class Cfg>
  __device__ void* in_P(SharedStorage<Cfg>& smem, int half, int j) const {
    using Element = typename Cfg::Element;
    std::uint32_t const first = swizzled_offset(row, column / 8) + column % 8 * sizeof(Element);
    return smem.P + (first ^ ((half * kHalfColumns / 8 + j) * 16)) + half * kHalfRows * kBoxRowBytes;
  }
};

// The entries of matching pairs, from the accumulators of a warpgroup, columns [first_column, first_column +
// 2*kSize): its warps 0 and 1 hold rows of T, 2 and 3 of P.
template <int h, class Cfg, int kSize>
__device__ void store_level(SharedStorage<Cfg>& smem, float const (&acc)[kSize], int first_column) {
  using Element = typename Cfg::Element;
  constexpr bool kHalf = kSize == 8;  // of the 32 columns
  int const warp = threadIdx.x % kWarpgroupThreads / kWarpThreads, lane = lane_index();
  int const upper = warp % 2;  // later rows 16-31 meet columns from 16 on, the others those before
  // Eight later rows meet their own eight earlier ones, and among them row groups of h; a lane has both rows
  // and columns of a group of two.
  constexpr int kRowsOfGroup = h == 1 ? 2 : h;
  bool const has_pairs = h >= 8 || lane / 4 / kRowsOfGroup == 2 * (lane % 4) / kRowsOfGroup;
  bool const has_columns = h == 32 || !kHalf || first_column == 16 * upper;
  if (!has_pairs || !has_columns) {
    return;
  }
  EntryPlace<h> const place(lane, upper, first_column);
  auto const own = [&](int i) { return h < 32 && !kHalf && upper == 1 ? acc[(i + 8) % kSize] : acc[i]; };
  auto const for_entries = [&](auto put) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (h <= 8) {
        put(half, 0, own(6 * half), own(6 * half + 1));
      } else {
#pragma unroll
        for (int j = 0; j < (h == 32 ? kSize / 4 : 2); ++j) {
          put(half, j, own(4 * j + 2 * half), own(4 * j + 2 * half + 1));
        }
      }
    }
  };
  bool const second = lane / 4 % 2 == 1;  // of two single entries the lane has this one
  if (warp < 2) {
    for_entries([&](int half, int j, float x, float y) {
      float& to = place.in_T(smem, half, j);
      if constexpr (h == 1) {
        to = second ? y : x;
      } else if constexpr (h >= 16) {  // below the diagonal blocks: see triangular_inverse.cuh
        *reinterpret_cast<float2*>(&to) = {__uint_as_float(to_negated_tf32(x)),
                                           __uint_as_float(to_negated_tf32(y))};
      } else {
        *reinterpret_cast<float2*>(&to) = {x, y};
      }
    });
  } else {
    for_entries([&](int half, int j, float x, float y) {
      void* const to = place.in_P(smem, half, j);
      float const scale = smem.q_scale[place.row + half * place.kHalfRows];
      if constexpr (h == 1) {
        *static_cast<Element*>(to) = round_to<Element>(scale * (second ? y : x));
      } else {
        *static_cast<std::uint32_t*>(to) = pack<Element>(scale * x, scale * y);
      }
    });
  }
}

// [E*D; q*D] (k*U)^T of one level, 2*kSize columns from first_column on, by one warpgroup.
template <int kLevel, int kSize, class Cfg>
__device__ void multiply_level(SharedStorage<Cfg>& smem, int first_column) {
  LevelOperands<Cfg> const& operands = smem.operands[kLevel % 3];
  float acc[kSize];
  auto const later = shared_descriptor<Major::K>(operands.later);
  auto const earlier = shared_descriptor<Major::K>(operands.earlier[0] + first_column * kBoxRowBytes);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < Cfg::kDimK / 16; ++step) {
    int const piece = step % 4 * 32;
    wgmma_shared<typename Cfg::Element>(acc, later + ((step / 4 * kBoxBytes + piece) >> 4),
                                        earlier + ((step / 4 * kBoxBytes / 2 + piece) >> 4), step > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  store_level<1 << kLevel>(smem, acc, first_column);
}

// Every thread's operands of one level.
template <int kLevel, class Cfg>
__device__ void build(SharedStorage<Cfg>& smem, ThreadInputs<Cfg> const& x) {
  if (phase_begins_if_crowded<Cfg>()) {
    build_level<1 << kLevel>(smem.operands[kLevel % 3], smem, x, thread_place<Cfg>());
  }
}

// What has been built may be multiplied, and what has been multiplied may be overwritten.
template <class Cfg>
__device__ void meet_at_operands() {
  cutlass::arch::fence_view_async_shared();  // ordinary stores, which wgmma reads
  sync_team<Cfg>();
}

// The products of three levels: two warpgroups have one each and a half of the third one's columns.
template <int kLevel, class Cfg>
__device__ void multiply_three_levels(SharedStorage<Cfg>& smem) {
  if constexpr (Cfg::kWarpgroups == 1) {
    multiply_level<kLevel, 16>(smem, 0);
    multiply_level<kLevel + 1, 16>(smem, 0);
    multiply_level<kLevel + 2, 16>(smem, 0);
  } else {
    // The same register value in all lanes: descriptors are made of it.
    int const warpgroup = uniform(thread_of_team<Cfg>() / kWarpgroupThreads);
    if (warpgroup == 0) {
      multiply_level<kLevel, 16>(smem, 0);
    } else {
      multiply_level<kLevel + 1, 16>(smem, 0);
    }
    multiply_level<kLevel + 2, 8>(smem, 16 * warpgroup);
  }
}

}  // namespace gdn2::prepare
