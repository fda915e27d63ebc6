// The pair products of the backward, one half of a chunk's tokens a warpgroup and 16 channels a warp:
//
//     later tokens r:      dq[r] += D[r] sum_s dP[r,s] k[s] U[s]     dE[r] += D[r] sum_s dT[r,s] k[s] U[s]
//     earlier tokens s:    dk[s] += U[s] sum_r (dP[r,s] q[r] D[r] + dT[r,s] E[r] D[r])
//
// (with -dT, -E and -dE for dT, E and dE, which is the same) for the six levels of blocks. Levels 1, 2 and 4
// lie inside a group of eight tokens, an 8x8 block of dP or dT on the diagonal: of levels 1 and 2 its entries
// have blocks of their own (see store_matrix), those of level 4 and of tokens with themselves are masked where
// they are read. Levels 8 and 16 are whole blocks inside a half, and level 32 is between the halves: the
// first one computes dk, the second dq and dE, a warpgroup's products and not a warp's. The rounded factors
// k*U, E*D and q*D are operands where they are built, in the registers of the lanes that need them again for
// dG: what is added at r and taken away at s has the same operands, and cancels behind both.
#pragma once

#include "sm90/gradients_parts.cuh"
#include "tile/convert.cuh"
#include "tile/mma.cuh"
#include "tile/wgmma.cuh"

namespace gdn2 {

// Matrices of 8x8 16-bit elements from the shared addresses that the lanes name, eight a matrix; see
// load_matrices.
template <bool kTransposed, int kCount>
__device__ void load_8x8(std::uint32_t (&r)[kCount], std::uint32_t address) {
  static_assert(kCount == 2 || kCount == 4);
  if constexpr (kCount == 4 && kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kCount == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  }
}

// Where a lane reads a tile of tokens and channels: of its warp's channels, the first group of its half.
// Groups follow each other at kGroupBytes.
constexpr int kGroupBytes = kGroup * kBoxRowBytes;
__device__ inline std::uint32_t lane_address(GradientsPlace const& place, std::uint8_t const* tile) {
  int const lane = place.lane;
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(tile)) +
         swizzled_offset(lane % 8, 2 * place.warp + lane / 8 % 2) +
         (kHalfGroups * place.half_of_chunk + lane / 16) * kGroupBytes;
}

// q, k, b or E of the warp's channels and one or two groups: [2 * group + half], two tokens each; of two
// groups a fragment of A. first_group: from the first of the half on, which lane_address has.
template <int kNumber>
struct Groups {
  std::uint32_t pairs[2 * kNumber];

  __device__ Groups(std::uint32_t lane_address, int first_group) {
    load_8x8<true>(pairs, lane_address + first_group * kGroupBytes);
  }
};
using GroupTokens = Groups<1>;
using GroupPair = Groups<2>;

// How a lane reads what is there of its channels. Groups are counted from the first of the warpgroup's half:
// those of the other half are 4 to 7, or -4 to -1. Of arrays and tiles that lie alike a lane's place in one
// is its place in all: a register for all addresses.
struct LaneReader {
  GradientsStorage& smem;
  GradientsPlace place;
  int num_rows;
  std::uint32_t q_lane, k_lane, E_lane;
  int in_lanes, in_groups, in_pairs;

  __device__ explicit LaneReader(GradientsStorage& smem_)
      : smem(smem_), num_rows(uniform(smem.work.num_rows)) {
    q_lane = lane_address(place, smem.tokens().q);
    k_lane = q_lane + offsetof(GradientsStorage::Tokens, k) - offsetof(GradientsStorage::Tokens, q);
    E_lane = lane_address(place, smem.scratch().E);
    int const first = kHalfGroups * place.half_of_chunk;
    in_lanes = 2 * first * kWarpgroupThreads + place.thread % kWarpgroupThreads;
    in_groups = first * kChannels + place.channel(0);
    in_pairs = place.lane / 2;
  }

  // Group i lies behind the chunk's last row. (Asking between levels also keeps ptxas from mixing one's loads
  // into another's work, which costs more registers than there are.)
  __device__ bool has_no_tokens(int i) const {
    return num_rows - kHalfTokens * place.half_of_chunk <= kGroup * i;
  }

  __device__ GroupDecay group_decay(int i, int half) const {
    return (&smem.scratch().groups[0][0])[in_groups + i * kChannels + 8 * half];
  }
  __device__ GroupPlace group_place(int i, int half) const {
    return (&smem.scratch().places[0][0])[in_groups + i * kChannels + 8 * half];
  }
  __device__ float of_lane(GradientsStorage::OfLanes const& all, int i, int half) const {
    return (&all[0][0])[in_lanes + (2 * i + half) * kWarpgroupThreads];
  }
  // See GradientsStorage.
  __device__ float alpha1(int i, int half) const { return of_lane(smem.alpha1, i, half); }
  __device__ float level4(int i, int half) const { return of_lane(smem.level4, i, half); }
  __device__ float F(int i, int half) const { return of_lane(smem.scratch().F, i, half); }
  __device__ float B(int i, int half) const { return of_lane(smem.scratch().B, i, half); }
  __device__ float level2(int i, int half) const {
    return smem.scratch().of_warps[place.thread / kWarpThreads].level2[2 * i + half][in_pairs];
  }
};

template <class Element>
struct PairGradients : LaneReader {
  HalfAccumulators &dq, &dE, &dk, &dG;

  __device__ PairGradients(GradientsStorage& smem, HalfAccumulators& dq_, HalfAccumulators& dE_,
                           HalfAccumulators& dk_, HalfAccumulators& dG_)
      : LaneReader(smem), dq(dq_), dE(dE_), dk(dk_), dG(dG_) {}

  // Blocks of dP or dT, [row, column] or transposed; groups, of this lane's eight.
  template <bool kTransposed, int kCount>
  __device__ void load_blocks(std::uint32_t (&r)[kCount], std::uint8_t const* tile, int row_group,
                              int column_group) const {
    int const lane = place.lane;
    load_8x8<kTransposed>(
        r, static_cast<std::uint32_t>(__cvta_generic_to_shared(tile)) +
               swizzled_offset(kGroup * place.group(row_group) + lane % 8, place.group(column_group)));
  }

  // All but pairs inside a group.
  __device__ void outer_pairs() {
    level8();
    level16();
    if (num_rows > kHalfTokens) {
      place.half_of_chunk == 0 ? across_earlier() : across_later();
    }
  }

  // ---- one product's share --------------------------------------------------------------------------------

  // dE += D*acc and dq likewise of the two tokens of index n, and their share of dG. D rounded with E and q:
  // E_D, q_D; or of those what they are as float32.
  __device__ void add_later(int n, float D0, float D1, float const* dE_acc, float const* dq_acc,
                            std::uint32_t E_D, std::uint32_t q_D) {
    add_later(n, D0, D1, dE_acc, dq_acc, unpack<Element>(E_D), unpack<Element>(q_D));
  }
  __device__ void add_later(int n, float D0, float D1, float const* dE_acc, float const* dq_acc, float2 E2,
                            float2 q2) {
    dE[n] += D0 * dE_acc[0];
    dE[n + 1] += D1 * dE_acc[1];
    dq[n] += D0 * dq_acc[0];
    dq[n + 1] += D1 * dq_acc[1];
    // One after the other: a sum of two products costs an instruction more.
    dG[n] += E2.x * dE_acc[0];
    dG[n] += q2.x * dq_acc[0];
    dG[n + 1] += E2.y * dE_acc[1];
    dG[n + 1] += q2.y * dq_acc[1];
  }

  __device__ void add_earlier(int n, float U0, float U1, float const* dk_acc, std::uint32_t k_U) {
    float2 const k2 = unpack<Element>(k_U);
    dk[n] += U0 * dk_acc[0];
    dk[n + 1] += U1 * dk_acc[1];
    dG[n] -= k2.x * dk_acc[0];
    dG[n + 1] -= k2.y * dk_acc[1];
  }

  __device__ static std::uint32_t times(std::uint32_t a, std::uint32_t b) {
    return multiply_pairs<Element>(a, b);
  }

  // ---- levels 1, 2 and 4 ----------------------------------------------------------------------------------

  // From a level's middle: D for later tokens, U for earlier ones, [half][token].
  using Factors = float[2][2];
  // q, k and E with them, rounded: operands.
  struct Rounded {
    std::uint32_t E_D[2], q_D[2], k_U[2];

    __device__ Rounded(Factors const& D, Factors const& U, GroupTokens const& q, GroupTokens const& k,
                       GroupTokens const& E) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        std::uint32_t const d = pack<Element>(D[half][0], D[half][1]),
                            u = pack<Element>(U[half][0], U[half][1]);
        E_D[half] = times(E.pairs[half], d);
        q_D[half] = times(q.pairs[half], d);
        k_U[half] = times(k.pairs[half], u);
      }
    }
  };

  // Of group i the blocks of levels 1 and 2, in the order in which they are multiplied: of dT, then of dP;
  // transposed of level 1, then of level 2.
  template <bool kTransposed>
  __device__ void load_low_levels(std::uint32_t (&r)[4], int i) const {
    int const lane = place.lane, first = lane / 8 % 2, second = lane / 16;
    int const level = kTransposed ? second : first, matrix = kTransposed ? first : second;
    load_8x8<kTransposed>(
        r, static_cast<std::uint32_t>(__cvta_generic_to_shared(matrix ? smem.dP : smem.dT)) +
               swizzled_offset(lane % 8, kHalfGroups + 2 * place.half_of_chunk + level) + i * kGroupBytes);
  }

  // Level 1, a lane's second token and its first one, and level 2. D is from the lane's first token on for
  // both, so that one product has both; U is 1 for level 1. Where a block has no entry of the level, D and U
  // may be anything.
  __device__ void low_levels(int i, float const (&alpha1)[2], GroupTokens const& q, GroupTokens const& k,
                             GroupTokens const& E) {
    Factors D, U;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      D[half][0] = 1.f;
      D[half][1] = alpha1[half];
      U[half][1] = level2(i, half);
      U[half][0] = U[half][1] * alpha1[half];
    }
    Rounded const x(D, U, q, k, E);
    float later_E[4] = {}, later_q[4] = {}, earlier2[4] = {}, earlier1[4] = {};
    std::uint32_t m[4];
    load_low_levels<false>(m, i);
    mma_16x8x16<Element>(later_E, {k.pairs[0], k.pairs[1], x.k_U[0], x.k_U[1]}, m[0], m[1]);
    mma_16x8x16<Element>(later_q, {k.pairs[0], k.pairs[1], x.k_U[0], x.k_U[1]}, m[2], m[3]);
    load_low_levels<true>(m, i);
    mma_16x8x16<Element>(earlier1, {x.E_D[0], x.E_D[1], x.q_D[0], x.q_D[1]}, m[0], m[1]);
    mma_16x8x16<Element>(earlier2, {x.E_D[0], x.E_D[1], x.q_D[0], x.q_D[1]}, m[2], m[3]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const n = 4 * i + 2 * half;
      // D of the first token is one.
      float2 const E2{unpack<Element>(E.pairs[half]).x, unpack<Element>(x.E_D[half]).y},
          q2{unpack<Element>(q.pairs[half]).x, unpack<Element>(x.q_D[half]).y};
      add_later(n, D[half][0], D[half][1], &later_E[2 * half], &later_q[2 * half], E2, q2);
      add_earlier(n, U[half][0], U[half][1], &earlier2[2 * half], x.k_U[half]);
      dk[n] += earlier1[2 * half];
      dG[n] -= unpack<Element>(k.pairs[half]).x * earlier1[2 * half];
    }
  }

  // Level 4, and each token with itself, where there is no decay. Where a token is not in the level's later
  // or earlier half, D or U may be anything: entries that are not the level's are masked.
  __device__ void level4_and_own(int i, float const (&alpha1)[2], GroupTokens const& q, GroupTokens const& k,
                                 GroupTokens const& E) {
    Factors D, U;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      D[half][0] = U[half][1] = level4(i, half);
      D[half][1] = U[half][0] = D[half][0] * alpha1[half];
    }
    Rounded const x(D, U, q, k, E);
    std::uint8_t const* const matrix = place.row / 2 % 2 ? smem.dP : smem.dT;  // lanes 0-7, 8-15
    std::uint32_t m[2], m_t[2];
    load_blocks<false>(m, matrix, i, i);
    load_blocks<true>(m_t, matrix, i, i);
    // Of the lane's two entries, (row, 2*quad + c): the one on the diagonal; and both, where the row is later
    // and the columns are earlier, and transposed.
    std::uint32_t const own = place.row / 2 != place.quad ? 0u
                              : place.row % 2 == 0        ? 0x0000ffffu
                                                          : 0xffff0000u,
                        level = place.row / 4 == 1 && place.quad / 2 == 0 ? 0xffffffffu : 0u,
                        level_t = place.row / 4 == 0 && place.quad / 2 == 1 ? 0xffffffffu : 0u;
    float later_E[4] = {}, later_q[4] = {}, earlier[4] = {};
    mma_16x8x8<Element>(later_E, x.k_U, m[0] & level);
    mma_16x8x8<Element>(later_q, x.k_U, m[1] & level);
    mma_16x8x16<Element>(earlier, {x.E_D[0], x.E_D[1], x.q_D[0], x.q_D[1]}, m_t[0] & level_t,
                         m_t[1] & level_t);
    mma_16x8x8<Element>(group_of(dq, i), k.pairs, m[1] & own);
    mma_16x8x8<Element>(group_of(dk, i), q.pairs, m[1] & own);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const n = 4 * i + 2 * half;
      add_later(n, D[half][0], D[half][1], &later_E[2 * half], &later_q[2 * half], x.E_D[half], x.q_D[half]);
      add_earlier(n, U[half][0], U[half][1], &earlier[2 * half], x.k_U[half]);
    }
  }

  // All pairs inside group i, whose q, k and E the caller has read.
  __device__ void inner_pairs(int i, float const (&alpha1)[2], GroupTokens const& q, GroupTokens const& k,
                              GroupTokens const& E) {
    low_levels(i, alpha1, q, k, E);
    level4_and_own(i, alpha1, q, k, E);
  }

  // ---- levels 8 and 16 ------------------------------------------------------------------------------------

  // D of whole groups goes up from 1 at the later block's first group j; U down from the earlier block's
  // last.
  __device__ void next_D(int j, float (&D)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      D[half] *= group_decay(j, half).rest * group_decay(j + 1, half).first;
    }
  }
  __device__ void first_U(int first_later, float (&U)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      U[half] = group_decay(first_later, half).first;
    }
  }
  __device__ void next_U(int j, float (&U)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      GroupDecay const group = group_decay(j, half);
      U[half] *= group.first * group.rest;
    }
  }

  // Factors of the lane's two tokens of group j, given those of the whole group.
  struct LaneFactors {
    float x0, x1;
    __device__ std::uint32_t rounded() const { return pack<Element>(x0, x1); }
  };
  __device__ LaneFactors later_factors(int j, int half, float D) const {
    float const D0 = D * F(j, half);
    return {D0, D0 * alpha1(j, half)};
  }
  __device__ LaneFactors earlier_factors(int j, int half, float U) const {
    float const U1 = U * B(j, half);
    return {U1 * alpha1(j, half), U1};
  }

  // Group 1 after group 0, and 3 after 2: both in one run of instructions. Groups behind the chunk's last row
  // have zeros.
  __device__ void level8() {
    if (has_no_tokens(1)) {
      return;
    }
    int const of_block = place.lane / 16;  // eight lanes each of two matrices of block 0, then of block 1
    std::uint32_t const apart = of_block * kGroupBytes;  // a fragment's groups do not follow each other
    GroupPair const E(E_lane + apart, 1), q(q_lane + apart, 1), k(k_lane + apart, 0);
    LaneFactors D[4], U[4];  // [2*block + half]
    std::uint32_t E_D[4], q_D[4], k_U[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      int const earlier = m / 2 * 2, half = m % 2;
      D[m] = later_factors(earlier + 1, half, 1.f);
      U[m] = earlier_factors(earlier, half, group_decay(earlier + 1, half).first);
      std::uint32_t const d = D[m].rounded(), u = U[m].rounded();
      E_D[m] = times(E.pairs[m], d);
      q_D[m] = times(q.pairs[m], d);
      k_U[m] = times(k.pairs[m], u);
    }
    std::uint8_t const* const matrix = place.row / 2 % 2 ? smem.dP : smem.dT;
    std::uint32_t m[4], m_t[4];  // of dT, then of dP
    load_blocks<false>(m, matrix, 2 * of_block + 1, 2 * of_block);
    load_blocks<true>(m_t, matrix, 2 * of_block + 1, 2 * of_block);
    float later_E[2][4] = {}, later_q[2][4] = {}, earlier[2][4] = {};
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      int const i = 2 * block;
      mma_16x8x8<Element>(later_E[block], {k_U[i], k_U[i + 1]}, m[i]);
      mma_16x8x8<Element>(later_q[block], {k_U[i], k_U[i + 1]}, m[i + 1]);
      mma_16x8x16<Element>(earlier[block], {E_D[i], E_D[i + 1], q_D[i], q_D[i + 1]}, m_t[i], m_t[i + 1]);
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      int const block = m / 2, half = m % 2, n = 8 * block + 2 * half;
      add_later(n + 4, D[m].x0, D[m].x1, &later_E[block][2 * half], &later_q[block][2 * half], E_D[m],
                q_D[m]);
      add_earlier(n, U[m].x0, U[m].x1, &earlier[block][2 * half], k_U[m]);
    }
  }

  // Groups 2 and 3 after groups 0 and 1.
  __device__ void level16() {
    if (has_no_tokens(2)) {
      return;
    }
    LaneFactors D[4], U[4];  // [2*(group of the block) + half]
    FragmentA E_D, q_D, k_U;
    {
      GroupPair const E(E_lane, 2), q(q_lane, 2), k(k_lane, 0);
      float of_later[2] = {1.f, 1.f}, of_earlier[2];
      first_U(2, of_earlier);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int const later = 2 * i + half, earlier = 2 * (1 - i) + half;
          D[later] = later_factors(2 + i, half, of_later[half]);
          std::uint32_t const d = D[later].rounded();
          E_D.pairs[later] = times(E.pairs[later], d);
          q_D.pairs[later] = times(q.pairs[later], d);
          U[earlier] = earlier_factors(1 - i, half, of_earlier[half]);
          k_U.pairs[earlier] = times(k.pairs[earlier], U[earlier].rounded());
        }
        if (i == 0) {
          next_D(2, of_later);
          next_U(1, of_earlier);
        }
      }
    }
    // Two blocks of dT, then of dP: eight lanes each.
    std::uint8_t const* const matrix = place.row / 4 % 2 ? smem.dP : smem.dT;
    int const lane_block = place.row / 2 % 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float later_E[4] = {}, later_q[4] = {};
      std::uint32_t m[4];
      load_blocks<false>(m, matrix, 2 + i, lane_block);
      mma_16x8x16<Element>(later_E, k_U.pairs, m[0], m[1]);
      mma_16x8x16<Element>(later_q, k_U.pairs, m[2], m[3]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const of = 2 * i + half;
        add_later(4 * (2 + i) + 2 * half, D[of].x0, D[of].x1, &later_E[2 * half], &later_q[2 * half],
                  E_D.pairs[of], q_D.pairs[of]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float earlier[4] = {};
      std::uint32_t m[4];
      load_blocks<true>(m, matrix, 2 + lane_block, i);
      mma_16x8x16<Element>(earlier, E_D.pairs, m[0], m[1]);
      mma_16x8x16<Element>(earlier, q_D.pairs, m[2], m[3]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const of = 2 * i + half;
        add_earlier(4 * i + 2 * half, U[of].x0, U[of].x1, &earlier[2 * half], k_U.pairs[of]);
      }
    }
  }

  // ---- level 32 -------------------------------------------------------------------------------------------

  // By wgmma, for which all of a warpgroup has the same num_rows: a block of dT or dP is read once for all
  // warps. The products of all groups are on their way together, but for dq, of which two groups are.

  // dk of the first half, from E*D and q*D of the second.
  __device__ void across_earlier() {
    FragmentA E_D[2], q_D[2];
    float D[2] = {1.f, 1.f};
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      GroupPair const E(E_lane, kHalfGroups + 2 * pair), q(q_lane, kHalfGroups + 2 * pair);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        int const j = kHalfGroups + 2 * pair + m / 2, half = m % 2;
        std::uint32_t const d = later_factors(j, half, D[half]).rounded();
        E_D[pair].pairs[m] = times(E.pairs[m], d);
        q_D[pair].pairs[m] = times(q.pairs[m], d);
        if (half == 1 && j + 1 < kGroups) {
          next_D(j, D);
        }
      }
    }
    float U[2];
    first_U(kHalfGroups, U);
    HalfAccumulators earlier;
    auto const dT = shared_descriptor<Major::MN>(smem.dT + kHalfTokens * kBoxRowBytes),
               dP = shared_descriptor<Major::MN>(smem.dP + kHalfTokens * kBoxRowBytes);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      int const rows = step * 16 * kBoxRowBytes >> 4;
      wgmma<Element, Major::MN>(earlier, E_D[step], dT + rows, step > 0);
      wgmma<Element, Major::MN>(earlier, q_D[step], dP + rows, true);
    }
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int pair = 1; pair >= 0; --pair) {
      GroupPair const k(k_lane, 2 * pair);
#pragma unroll
      for (int m = 3; m >= 0; --m) {
        int const i = 2 * pair + m / 2, half = m % 2, n = 4 * i + 2 * half;
        LaneFactors const u = earlier_factors(i, half, U[half]);
        add_earlier(n, u.x0, u.x1, &earlier[n], times(k.pairs[m], u.rounded()));
        if (half == 0 && i > 0) {
          next_U(i, U);
        }
      }
    }
  }

  // dq and dE of the second half, from k*U of the first.
  __device__ void across_later() {
    FragmentA k_U[2];
    float U[2];
    first_U(0, U);
#pragma unroll
    for (int pair = 1; pair >= 0; --pair) {
      GroupPair const k(k_lane, 2 * pair - kHalfGroups);
#pragma unroll
      for (int in_pair = 1; in_pair >= 0; --in_pair) {
        int const i = 2 * pair + in_pair - kHalfGroups;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int const m = 2 * in_pair + half;
          k_U[pair].pairs[m] = times(k.pairs[m], earlier_factors(i, half, U[half]).rounded());
        }
        if (i > -kHalfGroups) {
          next_U(i, U);
        }
      }
    }
    float D[2] = {1.f, 1.f};
    HalfAccumulators later_E;
    auto const dT = shared_descriptor<Major::K>(smem.dT + kHalfTokens * kBoxRowBytes),
               dP = shared_descriptor<Major::K>(smem.dP + kHalfTokens * kBoxRowBytes);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      float later_q[8];
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        int const columns = step * 32 >> 4, rows = pair * 16 * kBoxRowBytes >> 4;
        if (pair == 0) {
          wgmma<Element, Major::K>(later_E, k_U[step], dT + columns, step > 0);
        }
        wgmma<Element, Major::K>(later_q, k_U[step], dP + columns + rows, step > 0);
      }
      wgmma_commit();
      GroupPair const E(E_lane, 2 * pair), q(q_lane, 2 * pair);
      wgmma_wait<0>();
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        int const i = 2 * pair + m / 2, half = m % 2, n = 4 * i + 2 * half;
        LaneFactors const d = later_factors(i, half, D[half]);
        std::uint32_t const rounded = d.rounded();
        add_later(n, d.x0, d.x1, &later_E[n], &later_q[2 * m], times(E.pairs[m], rounded),
                  times(q.pairs[m], rounded));
        if (half == 1 && i + 1 < kHalfGroups) {
          next_D(i, D);
        }
      }
    }
  }
};

}  // namespace gdn2
