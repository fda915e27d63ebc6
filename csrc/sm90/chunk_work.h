// Where a chunk and gate head lie, for kernels that take all of them in some order, heads fastest.
#pragma once

#include <cutlass/fast_math.h>

#include "params.h"
#include "sm90/chunk_order.h"

namespace gdn2 {

// What places in a call are divided by.
struct ChunkDivisors {
  cutlass::FastDivmod gate_heads, gate_heads_of_head;
  DenseChunks chunks;

  ChunkDivisors(CallShape const& shape, int num_segments)
      : gate_heads(shape.num_gate_heads),
        gate_heads_of_head(shape.num_gate_heads / shape.num_heads),
        chunks(shape, num_segments) {}

  // The key head of the order-th of all, for what is asked for before it is found.
  __device__ int head(int order) const {
    int slot, gate_head;
    gate_heads(slot, gate_head, order);
    return gate_heads_of_head.div(gate_head);
  }
};

struct ChunkWork {
  int batch, first_token, num_rows;  // rows beyond num_rows belong to nobody here
  int slot, head, gate_head;
  std::int64_t tile;  // index of the slot and gate head

  // The order-th of all.
  template <ChunkOrder kOrder>
  __device__ void find(CallShape const& shape, PackedPlan const& plan, ChunkDivisors const& by, int order) {
    by.gate_heads(slot, gate_head, order);
    head = by.gate_heads_of_head.div(gate_head);
    if (plan.slots != nullptr) {
      ChunkSlot const at = plan.slots[slot];
      batch = 0;
      first_token = at.first_token;
      num_rows = at.num_rows;
    } else {
      int chunk;
      slot = by.chunks.find<kOrder>(slot, batch, chunk);
      first_token = chunk * kChunk;
      num_rows = min(kChunk, shape.seqlen - first_token);
    }
    tile = static_cast<std::int64_t>(slot) * shape.num_gate_heads + gate_head;
  }
};

}  // namespace gdn2
