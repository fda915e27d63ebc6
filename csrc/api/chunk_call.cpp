#include "api/chunk_call.h"

namespace gdn2 {

void plan_and_prepare(ChunkCall const& call, bool factors_only, float* row_norms, cudaStream_t stream) {
  if (call.cu_seqlens != nullptr) {
    run_plan({.cu_seqlens = call.cu_seqlens,
              .offsets_are_64_bit = call.offsets_are_64_bit,
              .num_sequences = call.shape.num_sequences,
              .seqlen = call.shape.seqlen,
              .num_slots = call.shape.num_slots,
              .plan = call.plan},
             stream);
  }
  run_prepare({.shape = call.shape,
               .q = call.q,
               .k = call.k,
               .g = call.g,
               .b = call.b,
               .gate_element = call.gate_element,
               .gates = call.gates,
               .scale = call.scale,
               .plan = call.plan,
               .tiles = call.tiles,
               .row_norms = row_norms,
               .factors_only = factors_only},
              stream);
}

}  // namespace gdn2
