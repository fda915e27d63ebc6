// What the phases of `gradients` share: where a CTA and a thread work, and what lies in shared and in global
// memory.
#pragma once

#include <cutlass/arch/barrier.h>

#include "params.h"
#include "sm90/chunk_work.h"
#include "tile/activation.cuh"
#include "tile/convert.cuh"
#include "tile/decay_levels.cuh"
#include "tile/mma.cuh"
#include "tile/pipeline.cuh"
#include "tile/tma.cuh"

namespace gdn2 {

constexpr int kChannels = 64;  // of a CTA
constexpr int kColumns = 64;   // value columns of a slice
constexpr int kHalves = 2;     // of a chunk's tokens: a warpgroup each
constexpr int kHalfTokens = kChunk / kHalves;
constexpr int kHalfGroups = kGroups / kHalves;
constexpr int kThreads = kHalves * kWarpgroupThreads;
constexpr int kBoxBytes = kChunk * kBoxRowBytes;
constexpr int kStages = 2;

// And slices, how many boxes there are, how many value heads share a gate head.
struct GradientsDivisors : ChunkDivisors {
  cutlass::FastDivmod slices;
  int num_boxes, heads_per_gate;

  explicit GradientsDivisors(GradientsParams const& params)
      : ChunkDivisors(params.shape, params.plan, params.num_segments),
        slices((params.shape.dim_v + kColumns - 1) / kColumns),
        num_boxes(params.shape.dim_k > kChannels ? 2 : 1),
        heads_per_gate(params.shape.num_value_heads / params.shape.num_gate_heads) {}
};

// Of the inputs and, where they are asked for and a box has whole pieces of 16 bytes, the gradients.
struct GradientsMaps {
  CUtensorMap q, k, b, g, v, w, dO;
  CUtensorMap dq, dk, db, dg, dv, dw;
};

// What one CTA works on.
struct GradientsWork : ChunkWork {
  int box, first_channel, num_boxes;

  GradientsWork() = default;

  __device__ GradientsWork(GradientsParams const& params, GradientsDivisors const& by) {
    int const x = static_cast<int>(blockIdx.x);
    num_boxes = by.num_boxes;
    box = x & (num_boxes - 1);
    first_channel = box * kChannels;
    // The walks before have ended at both ends.
    find_in_grid<ChunkOrder::kInwards>(params.shape, params.plan, by, x >> (num_boxes - 1));
  }

  __device__ bool has_other_box() const { return num_boxes == 2; }

  // By a converged warp, for loads: what they are asked for with is known to ptxas to be the same in all
  // lanes. Otherwise each copy becomes a loop over lanes.
  __device__ GradientsWork for_loads() const {
    GradientsWork work = *this;
    work.batch = uniform(batch);
    work.first_token = uniform(first_token);
    work.slot = uniform(slot);
    work.head = uniform(head);
    work.gate_head = uniform(gate_head);
    work.box = uniform(box);
    work.num_boxes = uniform(num_boxes);
    work.first_channel = work.box * kChannels;
    return work;
  }

  // Of the chunk's first token among all.
  __device__ std::int64_t token(CallShape const& shape) const {
    return static_cast<std::int64_t>(batch) * shape.seqlen + first_token;
  }
};

// In which order a CTA takes the slices. Of two, that of the first channels begins with the second one, that
// of the others with the first. Each makes dv and dw of the second of two that it takes, while the tokens are
// on their way; of a last one without a second, the CTA of the first channels; of all where there is no
// other.
struct SliceOrder {
  int number, num_boxes, box;

  __device__ explicit SliceOrder(GradientsDivisors const& by)
      : number(by.heads_per_gate * by.slices.divisor),
        num_boxes(by.num_boxes),
        box(static_cast<int>(blockIdx.x) & (num_boxes - 1)) {}

  __device__ int slice(int index) const {
    int const slice = index ^ (num_boxes - 1 - box);
    return slice < number ? slice : index;
  }
  __device__ bool has_values(int index) const {
    return index < number && (slice(index) & (num_boxes - 1)) == box;
  }
  // Of the slices with values, the first one from `index` on, if there is one: of two in a row one has them.
  __device__ int with_values(int index) const { return has_values(index) ? index : index + 1; }
  // Of the slices with values, how many come before the index-th.
  __device__ int num_values_before(int index) const { return index >> (num_boxes - 1); }
};

// What the decay gate of a key head has, in shared memory.
struct GateParameters {
  float bias[kChannels];  // dt_bias, zero where there is none
  float A_log;

  // From global memory, by kChannels threads; wait_for_copies follows.
  __device__ void load(GateParams const& gates, int head, int first_channel, int dim_k, int thread) {
    int const channel = first_channel + thread;
    bool const has_bias = gates.dt_bias != nullptr && channel < dim_k;
    copy_word(&bias[thread],
              gates.dt_bias + (has_bias ? static_cast<std::int64_t>(head) * dim_k + channel : 0), has_bias);
    if (thread == 0) {
      copy_word(&A_log, gates.A_log + (gates.A_log != nullptr ? head : 0), gates.A_log != nullptr);
    }
  }
};

struct GradientsStorage {
  struct Slice {
    std::uint8_t S[kBoxBytes], dS[kBoxBytes], dO[kBoxBytes], R[kBoxBytes], dX[kBoxBytes];
  };
  struct Values {  // of a slice that this CTA makes dv and dw of, and their gradients
    std::uint8_t v[kBoxBytes], w[kBoxBytes];
  };
  struct Gates {  // g or dg: float32 in two boxes of 32 channels, or 16-bit in the first one
    std::uint8_t boxes[2][kBoxBytes];
  };
  // Of group j: [2*j + channel `half`][thread of the warpgroup].
  using OfLanes = float[2 * kGroups][kWarpgroupThreads];
  // Of the chunk's tokens and the CTA's channels, a lane's two tokens c.
  using OfThreads = OfLanes[2];
  struct Tokens {
    std::uint8_t q[kBoxBytes], k[kBoxBytes], b[kBoxBytes];  // b, or its sides: see sigmoid_and_side
    union {
      Gates g;
      OfThreads activations;  // of a decay gate, after g: see DecayFunction
    };
  };
  struct Scratch {              // in the stage that no slice and no tokens need
    std::uint8_t E[kBoxBytes];  // -E
    union {
      OfLanes F;  // from the group's first token to a lane's first
      // After the pair products, of a warp's tokens, of q and of k: what times a row its norm takes from the
      // gradient.
      union {
        float2 factors[kHalfTokens];
        // Of a token's column of a diagonal matrix (see kHasDiagonals) its own pair of rows: of q high and
        // low, of k high and low. And zeros, which all other pairs are.
        uint4 diagonal[kHalfGroups][kGroup + 1];
      } norm_factors[kThreads / kWarpThreads];
    };
    union {
      struct {
        OfLanes B;  // from a lane's second token to the group's last
        GroupDecay groups[kGroups][kChannels];
        GroupPlace places[kGroups][kChannels];
      };
      Gates dg;  // after the pair products
    };
    // Of the warp that reads level2, and later writes dots.
    union OfWarp {
      // For level 2, of the groups of its half: from the second token of the earlier two lanes of a block to
      // the first one of the later ones, [2*i + half][pair of lanes].
      float level2[2 * kHalfGroups][kWarpThreads / 2];
      // After the pair products, of the rows of q and of k: products with dq and dk / norm over its channels.
      float2 dots[kHalfTokens];
    };
    OfWarp of_warps[kThreads / kWarpThreads];
    float2 other_dots[kChannels / kWarpChannels][kChunk];  // over those of the CTA of the other channels
    // Of a channel: all writes of the first half, and all other terms of the second.
    float first_writes[kChannels], second_reads[kChannels];
    float S_dS[kChannels];       // rowsum(S*dS')
    float query_scales[kChunk];  // scale / norm, see kRawQueries
  };
  union alignas(kSwizzleAtomBytes) Stage {
    Slice slice;
    Tokens tokens;
    Scratch scratch;
  };
  Stage stages[kStages];
  union {
    Values values;
    struct {
      // After the slices: scale*dP, its rows over q's norms where kRawQueries, and -dT; rounded, rows r. See
      // store_matrix for what lies above the diagonal.
      std::uint8_t dP[kBoxBytes], dT[kBoxBytes];
    };
    // After the pair products: what the chunk adds to d_dt_bias, over a half's tokens, and to dA_log, over a
    // thread's tokens and channels.
    struct {
      float d_dt_bias[kHalves][kChannels], dA_log[kThreads];
    } sums;
  };
  union {
    Values d_values;
    struct {           // after the slices
      OfLanes alpha1;  // of a lane's second token
      // For level 4: from the second token of an earlier lane to the block's middle, and from there to the
      // first token of a later lane.
      OfLanes level4;
    };
    OfThreads dg_of_threads;  // after the pair products, seldom: see finite_sum
  };
  float inverse_norms[2][kChunk];                     // of q and of k: 1 / norm
  FullBarrier full[kStages], values_full, dots_full;  // dots_full: other_dots have come
  GradientsWork work;
  GateParameters gate;

  // Slices alternate between the stages such that q, k, b and g follow the last one in stage 0.
  __device__ Tokens& tokens() { return stages[0].tokens; }
  __device__ Scratch& scratch() { return stages[1].scratch; }
};

// A lane's two channels, eight apart, of a tile of g or dg. One address is enough: the swizzle is a ^ of a
// row's last bits and a piece's, and what is added to them finds zeros there.
template <class Value>
struct GateLane {
  std::uint8_t* tile;
  std::uint32_t first;

  // channel: that of `half` 0, of the first or the last eight of 16. row: those of its last three bits that
  // `token` below has are zero.
  __device__ GateLane(GradientsStorage::Gates& gates, int row, int channel) : tile(gates.boxes[0]) {
    int const in_row = channel * sizeof(Value) % kBoxRowBytes;
    first =
        channel * sizeof(Value) / kBoxRowBytes * kBoxBytes + swizzled_offset(row, in_row / 16) + in_row % 16;
  }

  // Of row 8 * group + token further on.
  __device__ Value& at(int group, int token, int half) const {
    constexpr int kPieces = 8 * sizeof(Value) / 16;  // from channel to channel
    return *reinterpret_cast<Value*>(tile + (first ^ (16 * (token ^ kPieces * half))) +
                                     (kGroup * group + token) * kBoxRowBytes);
  }
};

__device__ inline int warp_anew() {
  return uniform(static_cast<int>(thread_anew() / kWarpThreads));
}

// A thread's place: its warpgroup has half of the tokens, its warp 16 channels of them. Every phase but the
// last ones finds it anew: what ptxas knows to be the same it keeps, with all addresses that follow from it,
// in registers that the phases do not have.
struct GradientsPlace {
  int thread, half_of_chunk, warp, lane, row, quad;

  __device__ GradientsPlace() {
    unsigned const id = thread_anew() % kThreads;  // which says that it is small
    thread = static_cast<int>(id);
    half_of_chunk = uniform(static_cast<int>(id / kWarpgroupThreads)) & 1;
    warp = static_cast<int>(id % kWarpgroupThreads / kWarpThreads);
    lane = static_cast<int>(id % kWarpThreads);
    row = lane / 4;
    quad = lane % 4;
  }

  // Of the CTA's channels: the lane's two, `half` 0 and 1.
  __device__ int channel(int half) const { return kWarpChannels * warp + row + 8 * half; }
  // Of the chunk, for group i of the half.
  __device__ int group(int i) const { return kHalfGroups * half_of_chunk + i; }
  // Of the chunk: the lane's tokens of group i of the half, c 0 and 1.
  __device__ int token(int i, int c) const { return kGroup * group(i) + 2 * quad + c; }
};

// acc[4*i + 2*half + c]: channel `half` of the lane, token c of group i of the half.
using HalfAccumulators = float[4 * kHalfGroups];

// Those of a product for group i.
__device__ inline float (&group_of(HalfAccumulators& x, int i))[4] {
  return *reinterpret_cast<float (*)[4]>(&x[4 * i]);
}

// A gradient as HalfAccumulators, rounded, over the warp's part of a tile.
template <class Element>
__device__ void store_tile(std::uint8_t* tile, HalfAccumulators const& acc, GradientsPlace const& place) {
#pragma unroll
  for (int pair = 0; pair < kHalfGroups / 2; ++pair) {
    std::uint32_t r[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      int const n = 4 * (2 * pair + m % 2) + 2 * (m / 2);
      r[m] = pack<Element>(acc[n], acc[n + 1]);
    }
    store_matrices_transposed(r, tile, kGroup * place.group(2 * pair), 2 * place.warp);
  }
}

}  // namespace gdn2
