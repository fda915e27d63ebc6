// The chunk backward: plan (packed calls), prepare, scan_backward, gradients and gate_sums, one after the
// other on a stream of the current device.
#pragma once

#include <cuda_runtime_api.h>

#include "api/chunk_call.h"
#include "params.h"

namespace gdn2 {

struct ChunkBackwardParams {
  ChunkCall call;  // of its tiles A_minus_I and P are those of the forward, the rest is room
  TokenTensor dO;  // [batch, seqlen, num_value_heads, dim_v]
  float const* d_final_state;
  BackwardTiles tiles;  // room
  float* row_norms;     // the forward's, see PrepareParams; null without the norms
  bool has_tiles;       // the forward's: call.tiles are filled in, and prepare has nothing to do
  // Where call.num_segments > 1: what the forward left, see ChunkForwardParams, and room for the reverse
  // walk's.
  float const *segment_M, *segment_states;
  float* segment_N;
  std::uint64_t* N_ready;  // see ScanBackwardParams
  // Gradients as in GradientsParams and ScanBackwardParams; null where nobody asked.
  void *dq, *dk, *dv, *dg, *db, *dw;
  float *dA_log, *d_dt_bias;  // [num_heads], [num_heads, dim_k]
  float* d_initial_state;
  float *dA_log_of_slots, *d_dt_bias_of_slots;  // room, see GradientsParams
};

// Launches only, and no more than the wanted gradients need: arguments are the caller's business.
// std::runtime_error names the CUDA error of a failed launch.
void chunk_backward(ChunkBackwardParams const& params, cudaStream_t stream);

// The stages, csrc/sm90.
void run_scan_backward(ScanBackwardParams const& params, cudaStream_t stream);
void run_gradients(GradientsParams const& params, cudaStream_t stream);
void run_gate_sums(GateSumsParams const& params, cudaStream_t stream);

}  // namespace gdn2
