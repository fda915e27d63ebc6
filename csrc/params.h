// Arguments of the launchers in csrc/sm90: plain structs, a shape beside every pointer. No torch and no
// Python types, so that one wheel serves every torch version.
#pragma once

#include <cstdint>

namespace gdn2 {

constexpr int kChunk = 64;  // tokens of a chunk

// C = A B with B [depth, 128], or C = A B^T with B [128, depth]: the two ways in which the scan's products
// read their right operand.
struct TileProductParams {
  void const* a;       // A [rows, depth] bf16, row-major
  void const* b;       // B [128, depth] bf16 (K-major), or [depth, 128] bf16 where b_is_mn_major; row-major
  float* c;            // C [rows, 128] float32, row-major
  std::int64_t rows;   // a multiple of 64
  std::int64_t depth;  // a multiple of 64
  bool b_is_mn_major;
};

enum class ElementType { kBFloat16, kFloat16, kFloat32 };

// [batch, seqlen, heads, channels] with contiguous channels; strides in elements. Address and strides are
// multiples of 16 bytes.
struct TokenTensor {
  void const* data;
  std::int64_t stride_batch, stride_token, stride_head;
};

// Where a chunk of packed sequences lies; slots beyond the last chunk have no rows.
struct ChunkSlot {
  std::int32_t first_token;
  std::int32_t num_rows;
};

// Where a packed sequence lies. num_tokens is -1 for malformed offsets, and first_token is then where they
// begin.
struct SequenceSpan {
  std::int32_t first_token;
  std::int32_t num_tokens;
  std::int32_t first_slot;
};

// The packed sequences of a call, written by `plan_packed` on the device.
struct PackedPlan {
  ChunkSlot* slots;         // [num_slots]
  SequenceSpan* spans;      // [num_sequences]
  std::int32_t* sequences;  // [num_sequences]: longer ones first, for walks that do not all run at once
};

struct PlanParams {
  void const* cu_seqlens;  // [num_sequences + 1] int32 or int64
  bool offsets_are_64_bit;
  std::int32_t num_sequences, seqlen, num_slots;
  PackedPlan plan;
};

enum class DecayGate { kNone, kSoftplus, kLowerBound };

// What the kernels apply to raw projections.
struct GateParams {
  bool use_qk_l2norm;
  DecayGate decay_gate;
  float lower_bound;
  bool use_gate_sigmoid;
  float erase_scale;     // 1 or 2
  float const* A_log;    // [num_heads] or null
  float const* dt_bias;  // [num_heads, dim_k] or null
};

// The dimensions of a call. Slots: `batch * ceil(seqlen / 64)` chunks, or the slots of the packed plan.
struct CallShape {
  ElementType element;
  std::int32_t batch, seqlen, num_sequences;  // seqlen: of a dense sequence, or of all packed tokens
  std::int32_t num_heads, num_gate_heads, num_value_heads;  // of q and k; of g and b; of v and w
  std::int32_t dim_k, dim_v;
  std::int32_t num_slots;
};

// Chunk tiles are images of shared memory: boxes [64, 64] of 16-bit elements, 128 bytes a row, the 16-byte
// pieces of row r permuted by piece ^ (r % 8); but A - I and P, which are triangles. kDimK is dim_k rounded
// up to 64 or 128, missing channels are zero.
struct ChunkTiles {
  void* factors;      // [num_slots, num_gate_heads, 3, kDimK / 64, 64, 64]: scale*gamma*q, Kt, gamma*E
  float* gamma_last;  // [num_slots, num_gate_heads, kDimK]: gamma[C-1]
  void* A_minus_I;    // [num_slots, num_gate_heads, 10, 16 * 16]: tile/triangle.h
  void* P;            // the same
};

constexpr std::uint32_t kTileReady = 1;

struct PrepareParams {
  CallShape shape;
  TokenTensor q, k;          // [batch, seqlen, num_heads, dim_k]
  TokenTensor g, b;          // [batch, seqlen, num_gate_heads, dim_k]
  ElementType gate_element;  // of g: float32, or as q
  GateParams gates;
  float scale;
  PackedPlan plan;   // null pointers: dense
  int num_segments;  // of a sequence, that the walk after it or before it is cut into
  ChunkTiles tiles;  // for the backward A_minus_I and P are inputs of the later stages, and not written
  // [num_slots, num_gate_heads, 2, 64]: 1 / norm of the rows of q and of k. Written where there is room, and
  // read for the backward.
  float* row_norms;
  bool factors_only;  // for the backward: neither T, A nor P
  // For a walk beside it: [num_slots, num_gate_heads], kTileReady where a chunk's tiles are written; and how
  // many SMs prepare takes. Null where the walk comes after.
  std::uint32_t* ready;
  int num_sms;
  // Flags of the kernel behind it, which become 0 before that one starts.
  std::uint64_t* cleared;
  int num_cleared;
  // How many of the last chunks and heads the L2 cache keeps the factors of, for the walk: see KeptChunks.
  int num_kept;
};

struct ScanParams {
  CallShape shape;
  TokenTensor v, w;  // [batch, seqlen, num_value_heads, dim_v]
  void* o;           // [batch, seqlen, num_value_heads, dim_v], contiguous
  GateParams gates;
  PackedPlan plan;
  ChunkTiles tiles;
  // States float32: [num_sequences, num_value_heads, dim_k, dim_v], or [.., dim_v, dim_k] where
  // state_v_first.
  float const* initial_state;  // or null: zero
  float* final_state;          // or null
  float* chunk_states;         // [num_slots, num_value_heads, dim_k, dim_v] (or V, K), or null
  std::uint32_t const* ready;  // as in PrepareParams
  int num_segments;            // of a sequence, walked side by side
  // What segment_maps makes (see SegmentMapsParams); and room for where segments 1, 2, .. start, of the size
  // of N, for a backward, or null. Not used where there is one segment.
  float const *segment_M, *segment_N;
  float* segment_states;
  bool state_v_first;
  int num_kept;  // first chunks of a segment: see KeptChunks
  int num_sms;   // of the GPU
};

// Between the kernels of the backward: images of shared memory as in ChunkTiles, for 64 value columns each.
// The last slice's columns beyond dim_v are zero. Slots without rows are not written.
struct BackwardTiles {
  // [num_slots, num_value_heads, slices, kDimK / 64, 64, 64], value columns on rows: S^T at the chunk's
  // start, and the gradient of the state after the chunk.
  void *S, *dS;
  void *R, *dX;  // [num_slots, num_value_heads, slices, 64, 64]: tokens on rows
};

struct ScanBackwardParams {
  CallShape shape;
  TokenTensor v, w, dO;  // [batch, seqlen, num_value_heads, dim_v]
  GateParams gates;
  PackedPlan plan;
  ChunkTiles tiles;  // read
  BackwardTiles out;
  // States as in ScanParams; each may be null: zero, or not wanted.
  float const* initial_state;
  float const* d_final_state;
  float* d_initial_state;
  bool state_v_first;
  int num_segments;      // of a sequence, walked side by side
  bool follows_prepare;  // on the stream: what else is read was there before that
  // Of a sequence in several segments: as in ScanParams; and room for what those from a gradient of zero make
  // for the other walks, the gradients of the first states of segments 1, 2, .., as in SegmentMapsParams,
  // with a flag each: [num_sequences, num_segments - 1, num_value_heads, slices of 64 value columns], the
  // call's number when it is made and anything else until then.
  float const *segment_M, *segment_states;
  float* segment_N;
  std::uint64_t* N_ready;
  std::uint64_t call_number;
  int num_kept;  // last chunks of a segment: see KeptChunks
  // The segments that are walked forwards too: the first ones beside the reverse walks from zero.
  int num_recomputed, num_recomputed_first;
  int num_sms;  // of the GPU
};

struct GradientsParams {
  CallShape shape;
  TokenTensor q, k;      // [batch, seqlen, num_heads, dim_k]
  TokenTensor g, b;      // [batch, seqlen, num_gate_heads, dim_k]
  TokenTensor v, w, dO;  // [batch, seqlen, num_value_heads, dim_v]
  ElementType gate_element;
  GateParams gates;
  float scale;
  PackedPlan plan;
  int num_segments;        // as in PrepareParams
  BackwardTiles tiles;     // read
  float const* row_norms;  // as in PrepareParams; read where norms are asked for
  // Gradients, contiguous in the shapes of their inputs; null where nobody asked. dq and dk are float32 and
  // [batch, seqlen, num_gate_heads, dim_k], for somebody to sum, where num_gate_heads is not num_heads.
  void *dq, *dk, *dg, *db, *dv, *dw;
  // Sums over the tokens of a slot, for gate_sums to sum on: [num_slots, num_gate_heads, boxes of 64
  // channels], and [num_slots, num_gate_heads, dim_k]; or null.
  float *dA_log_of_slots, *d_dt_bias_of_slots;
};

struct GateSumsParams {
  CallShape shape;
  float const *dA_log_of_slots, *d_dt_bias_of_slots;  // as in GradientsParams
  float *dA_log, *d_dt_bias;  // [num_heads], [num_heads, dim_k]; null where nobody asked
};

}  // namespace gdn2
