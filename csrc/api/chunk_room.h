// The memory that the kernels of a chunk call use among themselves, carved out of one workspace.
#pragma once

#include <algorithm>
#include <cstdint>

#include "api/chunk_backward.h"
#include "api/chunk_forward.h"
#include "tile/triangle.h"

namespace gdn2 {

constexpr std::int64_t kSlice = 64;           // value columns
constexpr std::int64_t kRoomAlignment = 256;  // bytes, of what is carved out
constexpr std::int64_t kElementBytes = 2;     // of q, and of all tiles
// Of the tensor that a forward keeps, float32: as 16-bit elements its float32 parts would have NaNs among
// them.
constexpr std::int64_t kKeptBytes = 4;

// Carves room out of one allocation. Without an address it only counts.
class Workspace {
 public:
  explicit Workspace(std::uint8_t* first) : first_(first) {}

  template <class T = void>
  T* take(std::int64_t bytes) {
    std::int64_t const at = size_;
    size_ += (bytes + kRoomAlignment - 1) / kRoomAlignment * kRoomAlignment;
    return reinterpret_cast<T*>(first_ == nullptr ? nullptr : first_ + at);
  }
  std::int64_t size() const { return size_; }

 private:
  std::uint8_t* first_;
  std::int64_t size_ = 0;
};

inline std::int64_t padded_k(CallShape const& shape) {
  return shape.dim_k <= 64 ? 64 : 128;
}

inline std::int64_t num_slices(CallShape const& shape) {
  return (shape.dim_v + kSlice - 1) / kSlice;
}

inline std::int64_t num_slots(std::int64_t batch, std::int64_t seqlen, std::int64_t num_sequences,
                              bool packed) {
  return packed ? seqlen / kChunk + num_sequences : batch * ((seqlen + kChunk - 1) / kChunk);
}

// Chunk slots and gate heads: what prepare makes tiles of. All sizes of tiles and states are multiples of
// kRoomAlignment bytes: taken one after the other they have no gaps.
inline std::int64_t num_gate_tiles(CallShape const& shape) {
  return std::int64_t{shape.num_slots} * shape.num_gate_heads;
}

// In floats: what prepare leaves for the walks of a call, but for A - I and P.
struct TileSizes {
  std::int64_t factors, gamma_last;

  explicit TileSizes(ChunkCall const& call) {
    std::int64_t const tiles = num_gate_tiles(call.shape), k = padded_k(call.shape);
    factors = tiles * 3 * kChunk * k * kElementBytes / static_cast<std::int64_t>(sizeof(float));
    gamma_last = tiles * k;
  }
};

// In floats: M of the segments between the first and the last, and the states that all but the first start
// from. Room of the second size is what each direction needs for N, of whose parts in reverse each has a
// flag. Nothing where there is one segment.
struct SplitSizes {
  std::int64_t M = 0, states = 0, flags = 0;

  SplitSizes(CallShape const& shape, std::int64_t num_segments) {
    auto const rows = [&](std::int64_t of_a_sequence) {
      return shape.num_sequences * std::max<std::int64_t>(of_a_sequence, 0);
    };
    std::int64_t const k = padded_k(shape);
    M = rows(num_segments - 2) * shape.num_gate_heads * k * k;
    flags = rows(num_segments - 1) * shape.num_value_heads * num_slices(shape);
    states = flags * kSlice * k;
  }
};

// In bytes: A - I, or P.
inline std::int64_t matrix_size(CallShape const& shape) {
  return num_gate_tiles(shape) * kTriangleBytes;
}

// In bytes: 1 / norm of the rows of q and k, where the call has norms.
inline std::int64_t row_norms_size(ChunkCall const& call) {
  return call.gates.use_qk_l2norm
             ? num_gate_tiles(call.shape) * 2 * kChunk * static_cast<std::int64_t>(sizeof(float))
             : 0;
}

// What all forwards keep for their backwards, in bytes.
inline std::int64_t least_kept_size(ChunkCall const& call) {
  return 2 * matrix_size(call.shape) + row_norms_size(call);
}

inline void take_matrices(Workspace& room, ChunkCall& call) {
  call.tiles.A_minus_I = room.take(matrix_size(call.shape));
  call.tiles.P = room.take(matrix_size(call.shape));
}

inline void take_tiles(Workspace& room, ChunkCall& call) {
  TileSizes const sizes(call);
  call.tiles.factors = room.take<float>(sizes.factors * sizeof(float));
  call.tiles.gamma_last = room.take<float>(sizes.gamma_last * sizeof(float));
}

// The maps' constant parts, of either direction.
inline float* take_N(Workspace& room, ChunkCall const& call) {
  return room.take<float>(SplitSizes(call.shape, call.num_segments).states * sizeof(float));
}

// What a forward keeps for its backward: A - I and P, norms of rows where there are some, M and first states
// of segments where there are several, and with `tiles` what prepare makes. Then N of the forward lies there
// too, though the backward has its own: a dense split needs no workspace.
template <class Params>
void take_kept(Workspace& room, Params& params, bool tiles) {
  ChunkCall& call = params.call;
  take_matrices(room, call);
  if (call.gates.use_qk_l2norm) {
    params.row_norms = room.take<float>(row_norms_size(call));
  }
  if (call.num_segments > 1) {
    SplitSizes const sizes(call.shape, call.num_segments);
    params.segment_M = room.take<float>(sizes.M * sizeof(float));
    params.segment_states = room.take<float>(sizes.states * sizeof(float));
  }
  if (tiles) {
    take_tiles(room, call);
    params.segment_N = take_N(room, call);
  }
}

inline void take_call_room(Workspace& room, ChunkCall& call, bool packed, bool has_tiles) {
  CallShape const& shape = call.shape;
  if (!has_tiles) {
    take_tiles(room, call);
  }
  if (packed) {
    call.plan.slots = room.take<ChunkSlot>(shape.num_slots * sizeof(ChunkSlot));
    call.plan.spans = room.take<SequenceSpan>(shape.num_sequences * sizeof(SequenceSpan));
    call.plan.sequences = room.take<std::int32_t>(shape.num_sequences * sizeof(std::int32_t));
  }
}

// What a forward keeps has memory of its own.
inline void take_room(Workspace& room, ChunkForwardParams& params, bool packed, bool keeps) {
  ChunkCall& call = params.call;
  take_call_room(room, call, packed, params.keeps_tiles);
  if (!keeps) {
    take_matrices(room, call);
  }
  if (call.num_segments == 1) {
    call.ready = room.take<std::uint32_t>(num_gate_tiles(call.shape) * sizeof(std::uint32_t));
    return;
  }
  if (!params.keeps_tiles) {
    params.segment_N = take_N(room, call);
  }
  if (!keeps) {
    params.segment_M = room.take<float>(SplitSizes(call.shape, call.num_segments).M * sizeof(float));
  }
}

inline void take_room(Workspace& room, ChunkBackwardParams& params, bool packed) {
  ChunkCall& call = params.call;
  CallShape const& shape = call.shape;
  take_call_room(room, call, packed, params.has_tiles);
  std::int64_t const slices = std::int64_t{shape.num_slots} * shape.num_value_heads * num_slices(shape);
  std::int64_t const state = kSlice * padded_k(shape) * kElementBytes,
                     square = kChunk * kSlice * kElementBytes;
  params.tiles.S = room.take(slices * state);
  params.tiles.dS = room.take(slices * state);
  params.tiles.R = room.take(slices * square);
  params.tiles.dX = room.take(slices * square);
  params.dA_log_of_slots = room.take<float>(num_gate_tiles(shape) * padded_k(shape) / kSlice * sizeof(float));
  params.d_dt_bias_of_slots = room.take<float>(num_gate_tiles(shape) * shape.dim_k * sizeof(float));
  if (call.num_segments > 1) {
    params.segment_N = take_N(room, call);
    params.N_ready =
        room.take<std::uint64_t>(SplitSizes(shape, call.num_segments).flags * sizeof(std::uint64_t));
  }
}

}  // namespace gdn2
