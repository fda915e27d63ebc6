#include "api/chunk_backward.h"

#include <algorithm>
#include <atomic>
#include <random>

#include "api/chunk_room.h"
#include "api/device.h"
#include "api/sequence_split.h"

namespace gdn2 {
namespace {

// How many segments' recomputation is beside the reverse walks from zero: as many as find SMs. None where the
// reverse walks alone have more CTAs than there are SMs. (Two slices share a CTA there, and SMs may stay
// idle; no call that is split by itself is like that.)
int recomputed_first(ChunkCall const& call) {
  CallShape const& shape = call.shape;
  std::int64_t const ctas = std::int64_t{shape.num_sequences} * shape.num_value_heads * num_slices(shape);
  std::int64_t const reverse_walks = call.num_segments - 1;
  return static_cast<int>(std::clamp<std::int64_t>(
      call.gpu.num_sms / std::max<std::int64_t>(ctas, 1) - reverse_walks, 0, call.num_segments));
}

// What a call sets its flags to, in memory that nobody has cleared: a number that is not 0, that no other
// call has, and memory by chance only, of 2^-64.
std::uint64_t call_number() {
  static std::atomic<std::uint64_t> next = [] {
    std::random_device random;
    return std::uint64_t{random()} << 32 | random() | 1;
  }();
  return next.fetch_add(2, std::memory_order_relaxed);
}

}  // namespace

void chunk_backward(ChunkBackwardParams const& params, cudaStream_t stream) {
  ChunkCall const& call = params.call;
  bool const split = call.num_segments > 1;
  int const num_flags = split ? static_cast<int>(SplitSizes(call.shape, call.num_segments).flags) : 0;
  bool const prepares = !params.has_tiles && call.shape.seqlen > 0;
  if (prepares) {
    plan_and_prepare(call,
                     {.factors_only = true,
                      .row_norms = params.row_norms,
                      .cleared = params.N_ready,
                      .num_cleared = num_flags},
                     stream);
  } else {
    plan(call, stream);
    // All replays of a graph have one number.
    if (num_flags > 0 && is_capturing(stream)) {
      throw_on_error(cudaMemsetAsync(params.N_ready, 0, num_flags * sizeof(*params.N_ready), stream),
                     "chunk_backward");
    }
  }
  bool const only_initial_state = !params.dq && !params.dk && !params.dv && !params.dg && !params.db &&
                                  !params.dw && !params.dA_log && !params.d_dt_bias;
  run_scan_backward({.shape = call.shape,
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
                     .follows_prepare = prepares,
                     .segment_M = params.segment_M,
                     .segment_states = params.segment_states,
                     .segment_N = params.segment_N,
                     .N_ready = params.N_ready,
                     .call_number = split ? call_number() : 0,
                     .num_kept = num_kept_backward(call.shape, call.num_segments),
                     .num_recomputed = only_initial_state ? 0 : call.num_segments,
                     .num_recomputed_first = only_initial_state || !split ? 0 : recomputed_first(call),
                     .num_sms = call.gpu.num_sms},
                    stream);
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
