#include "api/chunk_call.h"

namespace gdn2 {

SplitChoice split_choice(ChunkCall const& call) {
  return {.seqlen = call.shape.seqlen,
          .num_sequences = call.shape.num_sequences,
          .num_gate_heads = call.shape.num_gate_heads,
          .num_value_heads = call.shape.num_value_heads,
          .dim_k = call.shape.dim_k,
          .dim_v = call.shape.dim_v,
          .packed = call.cu_seqlens != nullptr,
          .gpu = call.gpu};
}

void plan(ChunkCall const& call, cudaStream_t stream) {
  if (call.cu_seqlens != nullptr) {
    run_plan({.cu_seqlens = call.cu_seqlens,
              .offsets_are_64_bit = call.offsets_are_64_bit,
              .num_sequences = call.shape.num_sequences,
              .seqlen = call.shape.seqlen,
              .num_slots = call.shape.num_slots,
              .plan = call.plan},
             stream);
  }
}

void plan_and_prepare(ChunkCall const& call, Preparation const& how, cudaStream_t stream) {
  plan(call, stream);
  run_prepare({.shape = call.shape,
               .q = call.q,
               .k = call.k,
               .g = call.g,
               .b = call.b,
               .gate_element = call.gate_element,
               .gates = call.gates,
               .scale = call.scale,
               .plan = call.plan,
               .num_segments = call.num_segments,
               .tiles = call.tiles,
               .row_norms = how.row_norms,
               .factors_only = how.factors_only,
               .ready = how.num_sms > 0 ? call.ready : nullptr,
               .num_sms = how.num_sms,
               .cleared = how.cleared,
               .num_cleared = how.num_cleared,
               .num_kept = how.num_kept},
              stream);
}

}  // namespace gdn2
