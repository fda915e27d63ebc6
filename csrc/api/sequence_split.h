// The exact split of sequences into segments that are walked side by side: every segment is an affine map of
// the state, S' = M S + N. The maps one after the other give the states that the segments start from.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "api/device.h"
#include "params.h"

namespace gdn2 {

// Float32; M, N and states lie transposed, kDimK channels of a column together: dim_k rounded up to 64 or
// 128, missing channels are zero. Segments are numbered along their sequence; the last one of a sequence has
// no map.
struct SegmentMapsParams {
  CallShape shape;
  TokenTensor v, w;  // see ScanParams
  GateParams gates;
  PackedPlan plan;
  ChunkTiles tiles;            // read
  float const* initial_state;  // as in ScanParams
  bool state_v_first;          // of the initial state
  int num_segments;            // of every sequence, at least 2
  // [num_sequences, num_segments - 2, num_gate_heads, kDimK, kDimK], each map as place_in_map has it: of
  // segments 1, 2, ..
  float* M;
  float* N;  // [num_sequences, num_segments - 1, num_value_heads, dim_v, kDimK]
};

// Where [channel, column] of N or of a state lies: channels side by side.
__host__ __device__ constexpr int place_in_state(int channel, int column, int dim_k) {
  return column * dim_k + channel;
}

// And of M: the same but for a permutation of a column's pieces of four channels, among those of 32, so that
// what segment_states reads at the same time, along either, has banks of its own.
__host__ __device__ constexpr int place_in_map(int channel, int column, int dim_k) {
  int const permutation = (column / 4 % 4 * 2) ^ (column / 2 % 2 * 4);
  return column * dim_k + (channel / 4 ^ permutation) * 4 + channel % 4;
}

struct SegmentStatesParams {
  CallShape shape;
  int num_segments;
  float const *M, *N;  // N of where the first step begins is a state
  bool reverse;        // the adjoint: gradients, from the last segment to the first
  // [num_sequences, num_segments - 1, num_value_heads, dim_v, kDimK]. Forwards N is that of segments 0, 1, ..
  // and states are where segments 1, 2, .. start; in reverse N is that of segments 1, 2, .., and states are
  // what segments 0, 1, .. end in.
  float* states;
};

// What the schedule of a call's walks is chosen by.
struct SplitChoice {
  std::int64_t seqlen;  // of a dense sequence, or of all packed ones
  std::int64_t num_sequences, num_gate_heads, num_value_heads, dim_k, dim_v;
  bool packed;
  Gpu gpu;
};

// The quickest; 1 for sequences that stay whole.
int num_segments(SplitChoice const& call);

// Of whole sequences: on how many SMs prepare runs beside scan; 0 where one after the other is quicker.
int sms_beside_scan(SplitChoice const& call);

void run_segment_maps(SegmentMapsParams const& params, cudaStream_t stream);  // csrc/sm90/segment_maps.cu
void run_segment_states(SegmentStatesParams const& params,
                        cudaStream_t stream);  // csrc/sm90/segment_states.cu

}  // namespace gdn2
