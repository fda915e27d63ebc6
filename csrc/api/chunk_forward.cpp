#include "api/chunk_forward.h"

#include "api/sequence_split.h"

namespace gdn2 {

void chunk_forward(ChunkForwardParams const& params, cudaStream_t stream) {
  ChunkCall const& call = params.call;
  bool const split = call.num_segments > 1;
  // Where the walk has few CTAs prepare may run beside it on the other SMs.
  int const num_sms = params.chunk_states == nullptr && !split ? sms_beside_scan(split_choice(call)) : 0;
  int const num_kept = num_sms > 0 ? 0
                                   : num_kept_forward(call.shape, call.cu_seqlens != nullptr,
                                                      call.num_segments, params.chunk_states != nullptr);
  plan_and_prepare(call,
                   {.num_sms = num_sms,
                    .row_norms = params.row_norms,
                    .num_kept = split ? 0 : num_kept * call.shape.num_sequences * call.shape.num_gate_heads},
                   stream);
  if (split) {
    run_segment_maps({.shape = call.shape,
                      .v = call.v,
                      .w = call.w,
                      .gates = call.gates,
                      .plan = call.plan,
                      .tiles = call.tiles,
                      .initial_state = call.initial_state,
                      .state_v_first = call.state_v_first,
                      .num_segments = call.num_segments,
                      .num_kept = num_kept,
                      .M = params.segment_M,
                      .N = params.segment_N},
                     stream);
  }
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
            .ready = num_sms > 0 ? call.ready : nullptr,
            .num_segments = call.num_segments,
            .segment_M = params.segment_M,
            .segment_N = params.segment_N,
            .segment_states = params.segment_states,
            .state_v_first = call.state_v_first,
            .num_kept = num_kept,
            .num_sms = call.gpu.num_sms},
           stream);
}

}  // namespace gdn2
