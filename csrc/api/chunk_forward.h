// The chunk forward: plan (packed calls), prepare and scan, one after the other on a stream of the current device.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace gdn2 {

struct ChunkForwardParams {
  CallShape shape;
  TokenTensor q, k, g, b;  // see PrepareParams
  TokenTensor v, w;        // see ScanParams
  ElementType gate_element;
  GateParams gates;
  float scale;
  void const* cu_seqlens;  // [num_sequences + 1] int32 or int64, or null: dense
  bool offsets_are_64_bit;
  PackedPlan plan;  // room for it where cu_seqlens is given
  ChunkTiles tiles;
  void* o;
  float const* initial_state;
  float* final_state;
  float* chunk_states;
  bool state_v_first;
};

// Launches only: arguments are the caller's business. std::runtime_error names the CUDA error of a failed launch.
void chunk_forward(ChunkForwardParams const& params, cudaStream_t stream);

// The stages, csrc/sm90.
void run_plan(PlanParams const& params, cudaStream_t stream);
void run_prepare(PrepareParams const& params, cudaStream_t stream);
void run_scan(ScanParams const& params, cudaStream_t stream);

}  // namespace gdn2
