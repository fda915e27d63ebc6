#include "api/chunk_forward.h"

namespace gdn2 {

void chunk_forward(ChunkForwardParams const& params, cudaStream_t stream) {
  ChunkCall const& call = params.call;
  plan_and_prepare(call, /*factors_only=*/false, /*row_norms=*/nullptr, stream);
  run_scan({.shape = call.shape,
            .v = call.v,
            .w = call.w,
            .o = params.o,
            .gates = call.gates,
            .plan = call.plan,
            .tiles = call.tiles,
            .initial_state = call.initial_state,
            .final_state = params.final_state,
            .chunk_states = params.chunk_states,
            .state_v_first = call.state_v_first},
           stream);
}

}  // namespace gdn2
