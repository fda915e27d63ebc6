// The recurrence token by token, for decoding: one launch on a stream of the current device.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace gdn2 {

// Strides of the tensors below are in bytes. The larger ones have 64 bits, the others 32: then a kernel needs
// one instruction for each of them, and adds up in 64 bits all the same.

// [batch, seqlen, heads, channels], as it lies in memory: nothing has to be contiguous or aligned.
struct StridedTokens {
  std::uint8_t* data;
  std::int64_t stride_batch;
  std::int32_t stride_token, stride_head, stride_channel;
};

// [slots, num_value_heads, dim_k, dim_v], or [.., dim_v, dim_k] where state_v_first, with contiguous rows.
struct StateTensor {
  std::uint8_t* data;  // or null
  std::int64_t stride_slot;
  std::int32_t stride_head, stride_row;
};

// int32 or int64 values.
struct IndexTensor {
  std::uint8_t const* data;  // or null
  std::int32_t stride_sequence, stride_position;
  bool is_64_bit;
};

struct RecurrentParams {
  CallShape shape;           // num_slots is that of the pool
  StridedTokens q, k;        // [batch, seqlen, num_heads, dim_k]
  StridedTokens g, b;        // [batch, seqlen, num_gate_heads, dim_k]
  StridedTokens v, w, o;     // [batch, seqlen, num_value_heads, dim_v]
  ElementType gate_element;  // of g: float32, or as q
  GateParams gates;
  float scale;
  IndexTensor cu_seqlens;  // [num_sequences + 1], or null: a sequence is a batch row
  bool state_v_first;
  // What sequences start from: row n of [num_sequences, ..], or a slot of a pool [num_slots, ..] where
  // state_indices is given; null: zero. Float32 or bfloat16.
  StateTensor states;
  ElementType state_element;
  IndexTensor state_indices;        // [num_sequences], or [num_sequences, index_columns]
  std::int32_t index_columns;       // 0: one slot a sequence
  IndexTensor num_accepted_tokens;  // [num_sequences] or null
  bool inplace;             // states go back to their slots, after every token where index_columns > 0
  StateTensor final_state;  // [num_sequences, ..] float32, or null
};

// Launches only: arguments are the caller's business. std::runtime_error names the CUDA error of a failed
// launch.
void run_recurrent(RecurrentParams const& params, cudaStream_t stream);  // csrc/sm90/recurrent.cu

}  // namespace gdn2
