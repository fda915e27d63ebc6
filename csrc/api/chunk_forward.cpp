#include "api/chunk_forward.h"

#include <algorithm>

#include "api/sequence_split.h"

namespace gdn2 {
namespace {

// In microseconds, as measured on an H200.
constexpr double kPrepareTime = 5.8;  // of a chunk and head, on one SM
constexpr double kScanTime = 1.08;    // of a chunk of a walk
constexpr double kBeside = 1.25;      // what prepare and the walk cost each other at the same time

// Where the walk has few CTAs it takes as long as its chunks take one after the other, and prepare may run beside it on
// the other SMs. How many of them, or 0 where one after the other is quicker; from shapes alone.
int sms_beside_scan(ChunkCall const& call) {
  CallShape const& shape = call.shape;
  if (call.cu_seqlens != nullptr || shape.seqlen == 0) {
    return 0;  // lengths are not known here
  }
  constexpr int kColumns = 64;
  std::int64_t const walks =
      std::int64_t{shape.num_sequences} * shape.num_value_heads * ((shape.dim_v + kColumns - 1) / kColumns);
  if (2 * walks > call.num_sms) {
    return 0;
  }
  int const others = call.num_sms - static_cast<int>(walks);
  double const prepare = kPrepareTime * shape.num_slots * shape.num_gate_heads;
  double const walk = kScanTime * (shape.num_slots / shape.batch);
  return kBeside * std::max(prepare / others, walk) < prepare / call.num_sms + walk ? others : 0;
}

}  // namespace

void chunk_forward(ChunkForwardParams const& params, cudaStream_t stream) {
  ChunkCall const& call = params.call;
  bool const split = call.num_segments > 1;
  int const num_sms = params.chunk_states == nullptr && !split ? sms_beside_scan(call) : 0;
  plan_and_prepare(call, {.row_norms = params.row_norms, .num_sms = num_sms}, stream);
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
                      .M = params.segment_M,
                      .N = params.segment_N},
                     stream);
    run_segment_states({.shape = call.shape,
                        .num_segments = call.num_segments,
                        .M = params.segment_M,
                        .N = params.segment_N,
                        .reverse = false,
                        .states = params.segment_states},
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
            .segment_states = params.segment_states,
            .state_v_first = call.state_v_first},
           stream);
}

}  // namespace gdn2
