// The exact split of sequences into segments that are walked side by side: every segment is an affine map of
// the state, S' = M S + N. The maps one after the other give the states that the segments start from.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "api/device.h"
#include "params.h"

namespace gdn2 {

// kDimK is dim_k rounded up to 64 or 128, missing channels are zero, and so are missing value columns. M lies
// transposed, as the sum of two bfloat16, all larger parts before all smaller ones: of each
// [kDimK / 64 channels after, kDimK / 64 before] boxes of shared memory, channels before on the rows. N and
// states are float32 and lie as accumulators do (StateFragments in csrc/sm90/scan_parts.cuh). Segments are
// numbered along their sequence; the last one that has chunks and those behind it have no map.
struct SegmentMapsParams {
  CallShape shape;
  TokenTensor v, w;  // see ScanParams
  GateParams gates;
  PackedPlan plan;
  ChunkTiles tiles;            // read
  float const* initial_state;  // as in ScanParams
  bool state_v_first;          // of the initial state
  int num_segments;            // of every sequence, at least 2
  int num_kept;                // first chunks of a segment: see KeptChunks
  // [num_sequences, num_segments - 2, num_gate_heads, kDimK * kDimK], of segments 1, 2, ..
  float* M;
  float* N;  // [num_sequences, num_segments - 1, num_value_heads, ceil(dim_v / 64), 64 * kDimK]
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

// How many chunks of every segment (one: whole sequences, prepare before scan) the L2 cache keeps, of those
// that a walk reads first: in the forward, and in the backward from the reverse walks from zero to the
// others.
int num_kept_forward(CallShape const& shape, bool packed, int num_segments, bool stores_states);
int num_kept_backward(CallShape const& shape, int num_segments);

// Whether a forward keeps prepare's tiles for its backward though nobody asked it to: those of a split where
// they are few. Its backward then has a launch less, as its forward has one more.
constexpr int kMostTilesKept = 800;  // of chunks and gate heads: 40 MB
bool keeps_tiles(CallShape const& shape, int num_segments);

void run_segment_maps(SegmentMapsParams const& params, cudaStream_t stream);  // csrc/sm90/segment_maps.cu

}  // namespace gdn2
