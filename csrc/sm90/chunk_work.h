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
  int are_whole;  // see grid; int, which is compared where it lies, among the parameters

  ChunkDivisors(CallShape const& shape, PackedPlan const& plan, int num_segments)
      : gate_heads(shape.num_gate_heads),
        gate_heads_of_head(shape.num_gate_heads / shape.num_heads),
        chunks(shape, num_segments),
        are_whole(plan.slots == nullptr && chunks.are_whole() && shape.batch <= kMaxGrid &&
                  chunks.num_chunks() <= kMaxGrid) {}

  // A CTA for each chunk and gate head, or as many side by side. Of whole sequences the place of one is found
  // without divisions: gate heads, sequences and ranks of their chunks, which is the order of all.
  dim3 grid(CallShape const& shape, int ctas_of_gate_head = 1) const {
    unsigned const x = ctas_of_gate_head * shape.num_gate_heads;
    return are_whole ? dim3(x, shape.batch, chunks.num_chunks()) : dim3(x * shape.num_slots);
  }

  // The key head of a CTA of a grid with one each, for what is asked for before its place is found.
  __device__ int head_of_cta() const {
    int slot, gate_head = static_cast<int>(blockIdx.x);
    if (are_whole == 0) {
      gate_heads(slot, gate_head, gate_head);
    }
    return gate_heads_of_head.div(gate_head);
  }

 private:
  static constexpr int kMaxGrid = 65535;  // but for x
};

// Of a grid's CTAs, all of them in a row.
__device__ inline int cta_index() {
  return static_cast<int>(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
}

struct ChunkWork {
  int batch, first_token, num_rows;  // rows beyond num_rows belong to nobody here
  int slot, head, gate_head;
  std::int64_t tile;  // index of the slot and gate head

  // The order-th of all.
  template <ChunkOrder kOrder>
  __device__ void find(CallShape const& shape, PackedPlan const& plan, ChunkDivisors const& by, int order) {
    by.gate_heads(slot, gate_head, order);
    if (plan.slots != nullptr) {
      ChunkSlot const at = plan.slots[slot];
      batch = 0;
      first_token = at.first_token;
      num_rows = at.num_rows;
    } else {
      int chunk;
      slot = by.chunks.find<kOrder>(slot, batch, chunk);
      take_chunk(shape, chunk);
    }
    take_head(shape, by);
  }

  // That of a CTA of the grid, x: blockIdx.x without what is side by side.
  template <ChunkOrder kOrder>
  __device__ void find_in_grid(CallShape const& shape, PackedPlan const& plan, ChunkDivisors const& by,
                               int x) {
    if (by.are_whole == 0) {
      find<kOrder>(shape, plan, by, x);
      return;
    }
    gate_head = x;
    batch = static_cast<int>(blockIdx.y);
    int const chunk = by.chunks.chunk_of_rank<kOrder>(static_cast<int>(blockIdx.z));
    slot = batch * by.chunks.num_chunks() + chunk;
    take_chunk(shape, chunk);
    take_head(shape, by);
  }

 private:
  __device__ void take_chunk(CallShape const& shape, int chunk) {
    first_token = chunk * kChunk;
    num_rows = min(kChunk, shape.seqlen - first_token);
  }
  __device__ void take_head(CallShape const& shape, ChunkDivisors const& by) {
    head = by.gate_heads_of_head.div(gate_head);
    tile = static_cast<std::int64_t>(slot) * shape.num_gate_heads + gate_head;
  }
};

}  // namespace gdn2
