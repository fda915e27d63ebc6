// What the forward and the backward of a call are given alike, and the stages that both begin with.
#pragma once

#include <cuda_runtime_api.h>

#include "api/sequence_split.h"
#include "params.h"

namespace gdn2 {

struct ChunkCall {
  CallShape shape;
  TokenTensor q, k, g, b;  // see PrepareParams
  TokenTensor v, w;        // see ScanParams
  ElementType gate_element;
  GateParams gates;
  float scale;
  void const* cu_seqlens;  // [num_sequences + 1] int32 or int64, or null: dense
  bool offsets_are_64_bit;
  PackedPlan plan;  // room for it where cu_seqlens is given, else null pointers
  ChunkTiles tiles;
  std::uint32_t* ready;  // room for PrepareParams::ready
  int num_segments;      // of a sequence, in the forward
  float const* initial_state;
  bool state_v_first;
  Gpu gpu;
};

SplitChoice split_choice(ChunkCall const& call);

struct Preparation {
  int num_sms = 0;  // of a prepare beside its walk, or 0: the walk comes after
  // See PrepareParams.
  bool factors_only = false;
  float* row_norms = nullptr;
  std::uint64_t* cleared = nullptr;
  int num_cleared = 0, num_kept = 0;
};
void plan_and_prepare(ChunkCall const& call, Preparation const& how, cudaStream_t stream);
void plan(ChunkCall const& call, cudaStream_t stream);  // alone

// The stages, csrc/sm90.
void run_plan(PlanParams const& params, cudaStream_t stream);
void run_prepare(PrepareParams const& params, cudaStream_t stream);

}  // namespace gdn2
