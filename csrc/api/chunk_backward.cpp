#include "api/chunk_backward.h"

#include <algorithm>

#include "api/chunk_room.h"
#include "api/sequence_split.h"

namespace gdn2 {
namespace {

// How many segments' recomputation runs beside the reverse walks from zero: as many as find SMs. None where
// the reverse walks alone have more CTAs than there are SMs. (Two slices share a CTA there, and SMs may stay
// idle; no call that is split by itself is like that.)
int recomputed_at_first(ChunkCall const& call) {
  CallShape const& shape = call.shape;
  std::int64_t const ctas = std::int64_t{shape.num_sequences} * shape.num_value_heads * num_slices(shape);
  std::int64_t const reverse_walks = call.num_segments - 1;
  return static_cast<int>(std::clamp<std::int64_t>(
      call.gpu.num_sms / std::max<std::int64_t>(ctas, 1) - reverse_walks, 0, call.num_segments));
}

}  // namespace

void chunk_backward(ChunkBackwardParams const& params, cudaStream_t stream) {
  ChunkCall const& call = params.call;
  if (params.has_tiles) {
    plan(call, stream);
  } else {
    plan_and_prepare(call, {.factors_only = true, .row_norms = params.row_norms}, stream);
  }
  bool const only_initial_state = !params.dq && !params.dk && !params.dv && !params.dg && !params.db &&
                                  !params.dw && !params.dA_log && !params.d_dt_bias;
  ScanBackwardParams walks{.shape = call.shape,
                           .v = call.v,
                           .w = call.w,
                           .dO = params.dO,
                           .gates = call.gates,
                           .plan = call.plan,
                           .tiles = call.tiles,
                           .out = params.tiles,
                           .initial_state = call.initial_state,
                           .d_final_state = params.d_final_state,
                           .d_initial_state = params.d_initial_state,
                           .state_v_first = call.state_v_first,
                           .num_segments = call.num_segments,
                           .follows_prepare = !params.has_tiles,
                           .segment_M = params.segment_M,
                           .segment_states = params.segment_states,
                           .makes_N = call.num_segments > 1,
                           .segment_N = params.segment_N,
                           .first_recomputed = 0,
                           .num_recomputed = only_initial_state ? 0 : call.num_segments,
                           .num_sms = call.gpu.num_sms};
  if (call.num_segments > 1) {
    walks.num_recomputed = only_initial_state ? 0 : recomputed_at_first(call);
    run_scan_backward(walks, stream);
    walks.makes_N = false;
    walks.follows_prepare = true;
    walks.first_recomputed = walks.num_recomputed;
    walks.num_recomputed = only_initial_state ? 0 : call.num_segments - walks.first_recomputed;
  }
  run_scan_backward(walks, stream);
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
