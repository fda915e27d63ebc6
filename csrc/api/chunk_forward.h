// The chunk forward: plan (packed calls), prepare and scan, one after the other on a stream of the current
// device.
#pragma once

#include <cuda_runtime_api.h>

#include "api/chunk_call.h"
#include "params.h"

namespace gdn2 {

struct ChunkForwardParams {
  ChunkCall call;
  void* o;
  float* final_state;
  float* chunk_states;
  float* row_norms;  // see PrepareParams; or null
  bool keeps_tiles;  // for the backward: call.tiles have memory of their own, and prepare does not run again
  // Room where num_segments > 1: see SegmentMapsParams and, null where they are not kept, ScanParams.
  float *segment_M, *segment_N, *segment_states;
};

// Launches only: arguments are the caller's business. std::runtime_error names the CUDA error of a failed
// launch.
void chunk_forward(ChunkForwardParams const& params, cudaStream_t stream);

// The last stage, csrc/sm90.
void run_scan(ScanParams const& params, cudaStream_t stream);

}  // namespace gdn2
