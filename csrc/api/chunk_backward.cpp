#include "api/chunk_backward.h"

#include "api/sequence_split.h"

namespace gdn2 {

void chunk_backward(ChunkBackwardParams const& params, cudaStream_t stream) {
  ChunkCall const& call = params.call;
  if (params.has_tiles) {
    plan(call, stream);
  } else {
    plan_and_prepare(call, {.factors_only = true, .row_norms = params.row_norms}, stream);
  }
  ScanBackwardParams walks{.shape = call.shape,
                           .v = call.v,
                           .w = call.w,
                           .dO = params.dO,
                           .gates = call.gates,
                           .plan = call.plan,
                           .tiles = call.tiles,
                           .initial_state = call.initial_state,
                           .d_final_state = params.d_final_state,
                           .state_v_first = call.state_v_first,
                           .num_segments = call.num_segments,
                           .follows_prepare = !params.has_tiles};
  if (call.num_segments > 1) {
    walks.segment_N = params.segment_N;
    run_scan_backward(walks, stream);
    run_segment_states({.shape = call.shape,
                        .num_segments = call.num_segments,
                        .M = params.segment_M,
                        .N = params.segment_N,
                        .reverse = true,
                        .states = params.segment_gradients},
                       stream);
    walks.segment_N = nullptr;
    walks.follows_prepare = true;
    walks.segment_states = params.segment_states;
    walks.segment_gradients = params.segment_gradients;
  }
  walks.out = params.tiles;
  walks.d_initial_state = params.d_initial_state;
  run_scan_backward(walks, stream);
  bool const only_initial_state = !params.dq && !params.dk && !params.dv && !params.dg && !params.db &&
                                  !params.dw && !params.dA_log && !params.d_dt_bias;
  if (only_initial_state) {
    return;
  }
  run_gradients({.shape = call.shape,
                 .q = call.q,
                 .k = call.k,
                 .g = call.g,
                 .b = call.b,
                 .v = call.v,
                 .w = call.w,
                 .dO = params.dO,
                 .gate_element = call.gate_element,
                 .gates = call.gates,
                 .scale = call.scale,
                 .plan = call.plan,
                 .num_segments = call.num_segments,
                 .tiles = params.tiles,
                 .row_norms = params.row_norms,
                 .dq = params.dq,
                 .dk = params.dk,
                 .dg = params.dg,
                 .db = params.db,
                 .dv = params.dv,
                 .dw = params.dw,
                 .dA_log_of_slots = params.dA_log != nullptr ? params.dA_log_of_slots : nullptr,
                 .d_dt_bias_of_slots = params.d_dt_bias != nullptr ? params.d_dt_bias_of_slots : nullptr},
                stream);
  run_gate_sums({.shape = call.shape,
                 .dA_log_of_slots = params.dA_log_of_slots,
                 .d_dt_bias_of_slots = params.d_dt_bias_of_slots,
                 .dA_log = params.dA_log,
                 .d_dt_bias = params.d_dt_bias},
                stream);
}

}  // namespace gdn2
