#include "api/chunk_forward.h"

namespace gdn2 {

void chunk_forward(ChunkForwardParams const& params, cudaStream_t stream) {
  CallShape const& shape = params.shape;
  PackedPlan const plan = params.cu_seqlens != nullptr ? params.plan : PackedPlan{};
  if (params.cu_seqlens != nullptr) {
    run_plan({.cu_seqlens = params.cu_seqlens,
              .offsets_are_64_bit = params.offsets_are_64_bit,
              .num_sequences = shape.num_sequences,
              .seqlen = shape.seqlen,
              .num_slots = shape.num_slots,
              .plan = plan},
             stream);
  }
  run_prepare({.shape = shape,
               .q = params.q,
               .k = params.k,
               .g = params.g,
               .b = params.b,
               .gate_element = params.gate_element,
               .gates = params.gates,
               .scale = params.scale,
               .plan = plan,
               .tiles = params.tiles},
              stream);
  run_scan({.shape = shape,
            .v = params.v,
            .w = params.w,
            .o = params.o,
            .gates = params.gates,
            .plan = plan,
            .tiles = params.tiles,
            .initial_state = params.initial_state,
            .final_state = params.final_state,
            .chunk_states = params.chunk_states,
            .state_v_first = params.state_v_first},
           stream);
}

}  // namespace gdn2
