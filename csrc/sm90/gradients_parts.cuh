// What the phases of `gradients` share: where a CTA and a thread work, and what lies in shared memory.
#pragma once

#include <cutlass/arch/barrier.h>

#include "params.h"
#include "tile/decay_levels.cuh"
#include "tile/pipeline.cuh"
#include "tile/tma.cuh"

namespace gdn2 {

constexpr int kChunk = 64;
constexpr int kChannels = 64;  // of a CTA
constexpr int kColumns = 64;   // value columns of a slice
constexpr int kHalves = 2;     // of a chunk's tokens: a warpgroup each
constexpr int kHalfTokens = kChunk / kHalves;
constexpr int kHalfGroups = kGroups / kHalves;
constexpr int kThreads = kHalves * kWarpgroupThreads;
constexpr int kBoxBytes = kChunk * kBoxRowBytes;
constexpr int kStages = 2;

// What one CTA works on.
struct GradientsWork {
  int batch, first_token, num_rows;  // rows beyond num_rows belong to nobody here
  int slot, box, first_channel;
  int head, gate_head, num_boxes;
  int heads_per_gate, num_slices;  // value heads that share the gate head; slices of each
  std::int64_t tile;               // index of the slot and gate head

  GradientsWork() = default;

  __device__ explicit GradientsWork(GradientsParams const& params) {
    CallShape const& shape = params.shape;
    num_boxes = shape.dim_k > kChannels ? 2 : 1;
    box = blockIdx.x % num_boxes;
    first_channel = box * kChannels;
    tile = blockIdx.x / num_boxes;
    slot = static_cast<int>(tile / shape.num_gate_heads);
    gate_head = static_cast<int>(tile % shape.num_gate_heads);
    head = gate_head / (shape.num_gate_heads / shape.num_heads);
    heads_per_gate = shape.num_value_heads / shape.num_gate_heads;
    num_slices = (shape.dim_v + kColumns - 1) / kColumns;
    if (params.plan.slots != nullptr) {
      ChunkSlot const at = params.plan.slots[slot];
      batch = 0;
      first_token = at.first_token;
      num_rows = at.num_rows;
    } else {
      int const chunks = shape.num_slots / shape.batch;
      batch = slot / chunks;
      first_token = slot % chunks * kChunk;
      num_rows = min(kChunk, shape.seqlen - first_token);
    }
  }

  // Of the chunk's first token among all.
  __device__ std::int64_t token(CallShape const& shape) const {
    return static_cast<std::int64_t>(batch) * shape.seqlen + first_token;
  }
};

struct GradientsStorage {
  struct Slice {
    std::uint8_t S[kBoxBytes], dS[kBoxBytes], dO[kBoxBytes], R[kBoxBytes], dX[kBoxBytes];
  };
  struct Tokens {
    std::uint8_t q[kBoxBytes], k[kBoxBytes], b[kBoxBytes];
    union {
      std::uint8_t g[2][kBoxBytes];                    // float32; the first one where g is 16 bits wide
      float alpha[2][2 * kGroups][kWarpgroupThreads];  // then alpha: [c][2*j + half][thread of the warpgroup]
    };
  };
  struct Scratch {  // in the stage that no slice and no tokens need
    std::uint8_t E[kBoxBytes];
    // LaneDecay of group j and channel `half`, [2*j + half][thread of the warpgroup].
    float F[2 * kGroups][kWarpgroupThreads], B[2 * kGroups][kWarpgroupThreads];
    GroupDecay groups[kGroups][kChannels];
    GroupPlace places[kGroups][kChannels];
  };
  union alignas(kSwizzleAtomBytes) Stage {
    Slice slice;
    Tokens tokens;
    Scratch scratch;
  };
  struct RowDots {  // of the rows of q and k with their gradients: over a warp's channels, over all
    float of_warp[kChannels / kWarpChannels][kChunk][2], all[kChunk][2];
  };

  Stage stages[kStages];
  union {
    struct {
      std::uint8_t dP[kBoxBytes], dT[kBoxBytes];  // scale*dP, and dT; rounded, rows r
    };
    RowDots dots;  // after the pair products
  };
  float dg_writes[4 * kHalfGroups]
                 [kThreads];  // what the writes to S' by earlier tokens of the half add to dg
  // Of a channel: all writes of the first half, and all other terms of the second.
  float first_writes[kChannels], second_reads[kChannels];
  float gate_bias[kChannels], gate_rate;  // of the decay gate
  FullBarrier full[kStages];
  GradientsWork work;

  // Slices alternate between the stages such that q, k, b and g follow the last one in stage 0.
  __device__ Tokens& tokens() { return stages[0].tokens; }
  __device__ Scratch& scratch() { return stages[1].scratch; }
};

// A value that all lanes of a warp have, known to ptxas as such: branches on it need no care for divergence.
__device__ inline int uniform(int x) {
  return __shfl_sync(0xffffffff, x, 0);
}

// A thread's place: its warpgroup has half of the tokens, its warp 16 channels of them. Every phase finds it anew: what
// ptxas knows to be the same it keeps, with all addresses that follow from it, in registers that the phases do not have.
struct GradientsPlace {
  int thread, half_of_chunk, warp, lane, row, quad;

  __device__ GradientsPlace() {
    unsigned id;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(id));
    id %= kThreads;  // which says that it is small
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

}  // namespace gdn2
