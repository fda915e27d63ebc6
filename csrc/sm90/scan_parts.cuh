// What the walks along a sequence's chunks share: where a CTA works, the order of accumulators, and the
// products of the register chain. Everything is transposed, value columns on the rows of the accumulators
// (see scan.cu).
#pragma once

#include <cute/arch/cluster_sm90.hpp>

#include "params.h"
#include "sm90/token_map.h"
#include "tile/activation.cuh"
#include "tile/convert.cuh"
#include "tile/mma.cuh"
#include "tile/pipeline.cuh"
#include "tile/tma.cuh"
#include "tile/triangle.cuh"
#include "tile/wgmma.cuh"

namespace gdn2 {

constexpr int kColumns = 64;  // value columns of a warpgroup
__host__ __device__ constexpr int num_slices(int columns) {
  return (columns + kColumns - 1) / kColumns;
}

constexpr int kBoxBytes = kChunk * kBoxRowBytes;

// What one CTA works on.
struct Work {
  int batch, first_token, num_tokens, num_chunks;
  int sequence, value_head, first_column;
  std::int64_t first_tile;  // among the chunk tiles; the next chunk's is tile_stride further
  int tile_stride, first_slot;
  int last_segment;  // of the sequence that has chunks: see take_segment
  bool malformed;
};

// All chunks of a sequence and value head.
__device__ inline Work find_work(CallShape const& shape, PackedPlan const& plan, int sequence, int value_head,
                                 int first_column) {
  Work work;
  work.value_head = value_head;
  work.sequence = sequence;
  work.first_column = first_column;
  work.malformed = false;
  if (plan.spans != nullptr) {
    SequenceSpan const span = plan.spans[work.sequence];
    work.batch = 0;
    work.first_token = span.first_token;
    work.num_tokens = max(span.num_tokens, 0);
    work.first_slot = span.first_slot;
    work.malformed = span.num_tokens < 0;
  } else {
    work.batch = work.sequence;
    work.first_token = 0;
    work.num_tokens = shape.seqlen;
    work.first_slot = work.sequence * (shape.num_slots / shape.batch);
  }
  work.num_chunks = (work.num_tokens + kChunk - 1) / kChunk;
  int const gate_head = work.value_head / (shape.num_value_heads / shape.num_gate_heads);
  work.first_tile = static_cast<std::int64_t>(work.first_slot) * shape.num_gate_heads + gate_head;
  work.tile_stride = shape.num_gate_heads;
  return work;
}

// The walks of a call (segments, directions), a CTA for kColumnsPerCta value columns of a head: the walks of
// a sequence one after the other, longer sequences first; within a walk heads, of each its value columns.
template <int kColumnsPerCta>
struct WalkCtas {
  unsigned of_head, of_walk;

  __host__ __device__ explicit WalkCtas(CallShape const& shape)
      : of_head((shape.dim_v + kColumnsPerCta - 1) / kColumnsPerCta),
        of_walk(shape.num_value_heads * of_head) {}

  // Which of its sequence's num_walks walks the cta-th CTA's is.
  __device__ int find_walk(unsigned cta, int num_walks) const { return cta / of_walk % num_walks; }

  __device__ Work find_work(CallShape const& shape, PackedPlan const& plan, unsigned cta,
                            int num_walks) const {
    int const in_order = cta / (of_walk * num_walks);
    int const sequence = plan.sequences != nullptr ? plan.sequences[in_order] : in_order;
    return gdn2::find_work(shape, plan, sequence, cta % of_walk / of_head, cta % of_head * kColumnsPerCta);
  }
};

// Narrows the work to a segment of its sequence. Segments have equally many chunks but for the last ones,
// which may have fewer or none. Those without chunks are nobody's work, but for the first one of a sequence
// that has none: it passes the state on.
__device__ inline void take_segment(Work& work, int segment, int num_segments) {
  int const chunks = (work.num_chunks + num_segments - 1) / num_segments;
  work.last_segment = work.num_chunks == 0 ? 0 : (work.num_chunks - 1) / chunks;
  int const first = min(segment * chunks, work.num_chunks),
            first_token = min(first * kChunk, work.num_tokens);
  work.first_token += first_token;
  work.num_tokens = min(work.num_tokens - first_token, chunks * kChunk);
  work.num_chunks = min(work.num_chunks - first, chunks);
  work.first_slot += first;
  work.first_tile += static_cast<std::int64_t>(first) * work.tile_stride;
}

// v, w, o or dO: a copy brings 64 value columns of a chunk.
inline CUtensorMap value_map(TokenTensor const& x, CallShape const& shape) {
  return token_map(x, shape, shape.num_value_heads, shape.dim_v, shape.element);
}

// Z of a chunk and warpgroup: four accumulators of every thread at a time.
using FragmentsZ = float4[kColumns * kChunk / 4 / kWarpgroupThreads][kWarpgroupThreads];

// Masks 16-bit numbers of two neighbouring rows, of which only the next rows_left count.
__device__ inline std::uint32_t mask_of_rows(int rows_left) {
  return rows_left >= 2 ? 0xffffffff : rows_left == 1 ? 0x0000ffff : 0;
}

// Z^T = (w*v)^T of 64 value columns, to where the math thread of the same index reads its accumulators;
// tokens beyond num_rows are zero, whatever lies there.
template <class Element>
__device__ void make_Z(FragmentsZ& Z, std::uint8_t const* v, std::uint8_t const* w, int num_rows,
                       bool use_gate_sigmoid) {
  int const thread = threadIdx.x % kWarpgroupThreads, warp = thread / kWarpThreads;
  int const token = 2 * (lane_index() % 4);
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    std::uint32_t v4[4], w4[4];
    load_matrices_transposed(v4, v, 16 * t, 2 * warp);
    load_matrices_transposed(w4, w, 16 * t, 2 * warp);
    // v4[i], w4[i]: tokens 16*t + 8*(i%2) + token and the next, value columns 8*(i/2) of the warp's 16
    if (num_rows < kChunk) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        std::uint32_t const own = mask_of_rows(num_rows - (16 * t + 8 * (i % 2) + token));
        v4[i] &= own;
        w4[i] &= own;
      }
    }
    float2 z[4], gate[4];
    // One branch for all, so that they are computed side by side.
    if (use_gate_sigmoid) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        gate[i] = sigmoid(unpack<Element>(w4[i]));
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        gate[i] = unpack<Element>(w4[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float2 const v2 = unpack<Element>(v4[i]);
      z[i] = {v2.x * gate[i].x, v2.y * gate[i].y};
    }
    Z[2 * t][thread] = float4{z[0].x, z[0].y, z[2].x, z[2].y};
    Z[2 * t + 1][thread] = float4{z[1].x, z[1].y, z[3].x, z[3].y};
  }
}

// The rings of v and w and of Z. Each math warpgroup has its own: what one has taken comes again while Z of
// the other is made.
template <class Cfg>
struct ValueRings {
  RingBarriers<Cfg::kStagesValues> values[Cfg::kWarpgroups];
  RingBarriers<Cfg::kStagesZ> Z[Cfg::kWarpgroups];

  __device__ void init() {
    constexpr int kCopyEngine = 1;
    for (int wg = 0; wg < Cfg::kWarpgroups; ++wg) {
      values[wg].init(kCopyEngine, kWarpgroupWarps);
      Z[wg].init(kWarpgroupWarps, kWarpgroupWarps);
    }
  }
};

// The role of one warpgroup: Z of every chunk, from the rings of v and w to those of Z.
template <class Cfg, class Storage>
__device__ void make_values(Storage& smem, GateParams const& gates, Work const& work) {
  RingPosition<Cfg::kStagesValues> at_values;
  RingPosition<Cfg::kStagesZ> at_Z;
  for (int chunk = 0; chunk < work.num_chunks; ++chunk, at_values.advance(), at_Z.advance()) {
    auto const& values = smem.values[at_values.stage];
    int const num_rows = work.num_tokens - chunk * kChunk;
#pragma unroll
    for (int wg = 0; wg < Cfg::kWarpgroups; ++wg) {
      smem.value_rings.values[wg].wait_full(at_values);
      smem.value_rings.Z[wg].wait_empty(at_Z);
      make_Z<typename Cfg::Element>(smem.Z[at_Z.stage][wg], values.v[wg], values.w[wg], num_rows,
                                    gates.use_gate_sigmoid);
      smem.value_rings.values[wg].release_at(at_values);
      smem.value_rings.Z[wg].publish_at(at_Z);
    }
  }
}

// The chunks that a walk reads first in a segment, where a kernel or walk before it has had the same: from
// there on they are the last to leave the L2 cache, and once read again the first.
struct KeptChunks {
  int number;
  bool again;  // this is the walk that they are kept for

  // rank: how many chunks of the segment the walk has read before.
  __device__ CacheHint hint(int rank) const {
    return rank >= number ? CacheHint::EVICT_NORMAL : again ? CacheHint::EVICT_FIRST : CacheHint::EVICT_LAST;
  }
};

// By one thread, and not the one that loads factors: that one waits for their rings, and v and w, which come
// from further away, must not wait with it; nor for earlier kernels, for they are inputs of the call. With
// kFetchesAhead the L2 cache has been asked for them a chunk before.
template <class Cfg, bool kFetchesAhead = false, class Storage, class Maps>
__device__ void load_values(Storage& smem, Maps const& maps, Work const& work, KeptChunks kept) {
  RingPosition<Cfg::kStagesValues> at;
  for (int chunk = 0; chunk < work.num_chunks; ++chunk, at.advance()) {
    auto& values = smem.values[at.stage];
    int const token = work.first_token + chunk * kChunk;
    if constexpr (kFetchesAhead) {
      static_assert(Cfg::kWarpgroups == 1);
      if (chunk + 1 < work.num_chunks) {
        tma_fetch(maps.v, work.first_column, work.value_head, token + kChunk, work.batch);
        tma_fetch(maps.w, work.first_column, work.value_head, token + kChunk, work.batch);
      }
    }
    CacheHint const hint = kept.hint(chunk);
    for (int wg = 0; wg < Cfg::kWarpgroups; ++wg) {
      FullBarrier& full = smem.value_rings.values[wg].begin_fill(at, 2 * kBoxBytes);
      int const column = work.first_column + wg * kColumns;
      tma_load(maps.v, full, hint, values.v[wg], column, work.value_head, token, work.batch);
      tma_load(maps.w, full, hint, values.w[wg], column, work.value_head, token, work.batch);
    }
  }
}

// ---- factors, which all value columns need: CTAs of two slices may be a pair ------------------------------

// A tile of factors: of two paired CTAs, each loads a half for both.
template <class Cfg>
__device__ void load_factors(void* smem, void const* global, int bytes, FullBarrier& full,
                             CacheHint hint = CacheHint::EVICT_NORMAL) {
  if constexpr (Cfg::kPaired) {
    int const half = bytes / 2, first = cute::block_rank_in_cluster() * half;
    bulk_load_to_pair(static_cast<std::uint8_t*>(smem) + first,
                      static_cast<std::uint8_t const*>(global) + first, half, full, hint);
  } else {
    bulk_load(smem, global, bytes, full, hint);
  }
}

// And a lower triangle, A - I or P: two of its strips each, half of the bytes.
template <class Cfg>
__device__ void load_triangle(std::uint8_t* image, void const* tiles, std::int64_t tile, FullBarrier& full,
                              CacheHint hint = CacheHint::EVICT_NORMAL) {
  auto const* const global = static_cast<std::uint8_t const*>(tiles) + tile * kTriangleBytes;
  if constexpr (Cfg::kPaired) {
    std::uint32_t const own = cute::block_rank_in_cluster() == 0 ? 0b1001 : 0b0110;
    for_strips(image, global, own, [&](std::uint8_t* to, std::uint8_t const* from, int bytes) {
      bulk_load_to_pair(to, from, bytes, full, hint);
    });
  } else {
    for_strips(image, global, 0b1111, [&](std::uint8_t* to, std::uint8_t const* from, int bytes) {
      bulk_load(to, from, bytes, full, hint);
    });
  }
}

template <class Cfg, class Ring, class Position>
__device__ void release_factors(Ring& ring, Position& at) {
  if constexpr (Cfg::kPaired) {
    ring.release_to_pair(at);
  } else {
    ring.release(at);
  }
}

// Warps that let go of a stage of factors.
template <class Cfg>
constexpr int kFactorReaders = (Cfg::kPaired ? 2 : 1) * Cfg::kWarpgroups * kWarpgroupWarps;

// Of all threads, once the barriers are there (and fence_barrier_init), before anybody uses them.
template <class Cfg>
__device__ void sync_before_loads() {
  __syncthreads();
  if constexpr (Cfg::kPaired) {
    cute::cluster_arrive_relaxed();  // no fence: nothing but the barriers is the other CTA's to see
    cute::cluster_wait();
  }
}

// Of all threads, last of all: neither of a pair goes while the other one may still write to it.
template <class Cfg>
__device__ void leave_together() {
  if constexpr (Cfg::kPaired) {
    __syncwarp();
    cute::cluster_arrive();
    cute::cluster_wait();
  }
}

// Where what is a math thread's own lies in shared memory, in bytes.
struct MathThread {
  std::uint32_t of_Z;       // of every piece of it
  std::uint32_t of_gamma;   // [C-1]
  std::uint32_t of_tokens;  // of a box with tokens on its rows

  __device__ MathThread() {
    int const thread = threadIdx.x % kWarpgroupThreads, lane = lane_index();
    of_Z = thread * sizeof(float4);
    of_gamma = lane % 4 * sizeof(float2);
    of_tokens = swizzled_offset(lane % 16, 2 * (thread / kWarpThreads) + lane / 16);
  }
  // Found here, and not again in every chunk.
  __device__ void pin() { asm volatile("" : "+r"(of_Z), "+r"(of_gamma), "+r"(of_tokens)); }
};

template <class T>
__device__ T const& at_offset(void const* shared, std::uint32_t offset) {
  return *reinterpret_cast<T const*>(static_cast<std::uint8_t const*>(shared) + offset);
}

// Z^T of the next chunk, this thread's accumulators of it, from the ring of Z.
template <class Storage, class Position>
__device__ void take_Z(float (&acc)[32], Storage& smem, Position& at, int wg, MathThread const& own = {}) {
  smem.value_rings.Z[wg].wait_full(at);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float4 const z = at_offset<float4>(smem.Z[at.stage][wg][i], own.of_Z);
    acc[4 * i] = z.x;
    acc[4 * i + 1] = z.y;
    acc[4 * i + 2] = z.z;
    acc[4 * i + 3] = z.w;
  }
  smem.value_rings.Z[wg].release(at);
}

// ---- math steps: one warpgroup, 64 value columns ----------------------------------------------------------

// Rounded accumulators as A fragments: 16 columns a fragment.
template <class Element, int kRegisters>
__device__ void round_fragments(FragmentA (&a)[kRegisters / 8], float const (&acc)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters / 8; ++i) {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      a[i].pairs[p] = pack<Element>(acc[8 * i + 2 * p], acc[8 * i + 2 * p + 1]);
    }
  }
}

// S^T Diag(gamma[C-1])
template <int kRegisters>
__device__ void decay_state(float (&S)[kRegisters], float const* gamma_last, MathThread const& own = {}) {
#pragma unroll
  for (int j = 0; j < kRegisters / 4; ++j) {
    float2 const gamma = at_offset<float2>(gamma_last + 8 * j, own.of_gamma);
    S[4 * j + 0] *= gamma.x;
    S[4 * j + 1] *= gamma.y;
    S[4 * j + 2] *= gamma.x;
    S[4 * j + 3] *= gamma.y;
  }
}

// acc (+)= +-A B^T for a B [64, 16 * kSteps] that lies in K-major boxes. Issued and committed, not waited
// for.
template <class Element, ScaleIn kSign, int kSteps>
__device__ void multiply_transposed(float (&acc)[32], FragmentA const (&a)[kSteps], std::uint8_t const* B,
                                    bool accumulate) {
  auto const descriptor = shared_descriptor<Major::K>(B);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    int const offset = step / 4 * kBoxBytes + step % 4 * 32;
    wgmma<Element, Major::K, kSign>(acc, a[step], descriptor + (offset >> 4), accumulate || step > 0);
  }
  wgmma_commit();
}

// acc (+)= +-A B for a B [64, columns] whose columns lie in boxes side by side. Issued and committed, not
// waited for.
template <class Element, ScaleIn kSign, int kRegisters>
__device__ void multiply(float (&acc)[kRegisters], FragmentA const (&a)[4], std::uint8_t const* B,
                         bool accumulate) {
  auto const descriptor = shared_descriptor<Major::MN>(B, kBoxBytes);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    wgmma<Element, Major::MN, kSign>(acc, a[step], descriptor + (step * 16 * kBoxRowBytes >> 4),
                                     accumulate || step > 0);
  }
  wgmma_commit();
}

// Rounded accumulators [value columns, channels] to a tile as they are: value columns on the rows of the
// boxes.
template <int kSteps>
__device__ void store_state_rows(FragmentA const (&a)[kSteps], std::uint8_t* boxes) {
  int const lane = lane_index(), row = 16 * (threadIdx.x % kWarpgroupThreads / kWarpThreads);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    // the fragment's four pairs are rows 0-7 and 8-15 of eight channels, then of the next eight
    std::uint32_t const(&p)[4] = a[step].pairs;
    auto const address = static_cast<std::uint32_t>(__cvta_generic_to_shared(boxes + step / 4 * kBoxBytes)) +
                         swizzled_offset(row + lane % 16, 2 * (step % 4) + lane / 16);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address),
                 "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3])
                 : "memory");
  }
}

// Rounded accumulators [value columns, tokens], transposed to a tile: tokens on the rows of the box.
__device__ inline void store_token_rows(FragmentA const (&a)[4], std::uint8_t* box,
                                        MathThread const& own = {}) {
  auto const address = static_cast<std::uint32_t>(__cvta_generic_to_shared(box)) + own.of_tokens;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    // tokens 16*t and 16*t + 8 of the warp's first eight value columns, then of its last eight
    std::uint32_t const(&p)[4] = a[t].pairs;
    std::uint32_t const r[4] = {p[0], p[2], p[1], p[3]};
    store_matrices_transposed(r, address + 16 * t * kBoxRowBytes);
  }
}

// ---- states -----------------------------------------------------------------------------------------------

// Calls body(element of S, channel, value column) for this thread's state.
template <int kDimK, class Body>
__device__ void for_each_element(int first_column, Body body) {
  int const lane = lane_index(), warp = threadIdx.x % kWarpgroupThreads / kWarpThreads;
#pragma unroll
  for (int acc = 0; acc < kDimK / 2; ++acc) {
    int const k = acc / 4 * 8 + 2 * (lane % 4) + acc % 2;
    body(acc, k, first_column + 16 * warp + lane / 4 + acc / 2 % 2 * 8);
  }
}

// Calls body(element of S, index among [K, V] or [V, K]) for what of this thread's state lies inside.
template <int kDimK, class Body>
__device__ void for_each_state(CallShape const& shape, bool state_v_first, int first_column, Body body) {
  int const dim_k = shape.dim_k, dim_v = shape.dim_v;
  int const stride_k = state_v_first ? 1 : dim_v, stride_v = state_v_first ? dim_k : 1;
  for_each_element<kDimK>(first_column, [&](int acc, int k, int v) {
    if (k < dim_k && v < dim_v) {
      body(acc, k * stride_k + v * stride_v);
    }
  });
}

__device__ inline std::int64_t state_offset(CallShape const& shape, std::int64_t row, int value_head) {
  return (row * shape.num_value_heads + value_head) * shape.dim_k * shape.dim_v;
}

// S^T of the work's sequence from states that may be null: zero.
template <int kDimK>
__device__ void read_state(float (&S)[kDimK / 2], float const* states, CallShape const& shape,
                           bool state_v_first, Work const& work, int first_column) {
#pragma unroll
  for (float& s : S) {
    s = 0.f;
  }
  if (states != nullptr) {
    float const* const state = states + state_offset(shape, work.sequence, work.value_head);
    for_each_state<kDimK>(shape, state_v_first, first_column,
                          [&](int acc, int place) { S[acc] = state[place]; });
  }
}

// Which row of the states of segments a sequence's `index`-th is: those of all segments but one.
__device__ inline std::int64_t segment_row(Work const& work, int index, int num_segments) {
  return static_cast<std::int64_t>(work.sequence) * (num_segments - 1) + index;
}

// States of segments lie as accumulators do: [row, value head, slice of 64 value columns], four accumulators
// of every thread at a time.
template <int kDimK>
using StateFragments = float4[kDimK / 8][kWarpgroupThreads];

__device__ inline std::int64_t segment_state_index(CallShape const& shape, std::int64_t row, int value_head,
                                                   int slice) {
  return (row * shape.num_value_heads + value_head) * num_slices(shape.dim_v) + slice;
}

// S^T from and to one, where the warpgroup has value columns.
template <int kDimK>
__device__ void read_segment_state(float (&S)[kDimK / 2], float const* states, CallShape const& shape,
                                   std::int64_t row, int value_head, int first_column) {
  bool const exists = first_column < shape.dim_v;
  auto const& state = reinterpret_cast<StateFragments<kDimK> const*>(
      states)[segment_state_index(shape, row, value_head, exists ? first_column / kColumns : 0)];
#pragma unroll
  for (int i = 0; i < kDimK / 8; ++i) {
    float4 const four = state[i][threadIdx.x % kWarpgroupThreads];
    S[4 * i] = four.x, S[4 * i + 1] = four.y, S[4 * i + 2] = four.z, S[4 * i + 3] = four.w;
  }
}

template <int kDimK>
__device__ void write_segment_state(float const (&S)[kDimK / 2], float* states, CallShape const& shape,
                                    std::int64_t row, int value_head, int first_column) {
  if (first_column >= shape.dim_v) {
    return;
  }
  auto& state = reinterpret_cast<StateFragments<kDimK>*>(
      states)[segment_state_index(shape, row, value_head, first_column / kColumns)];
#pragma unroll
  for (int i = 0; i < kDimK / 8; ++i) {
    state[i][threadIdx.x % kWarpgroupThreads] = float4{S[4 * i], S[4 * i + 1], S[4 * i + 2], S[4 * i + 3]};
  }
}

// S^T to the work's sequence of states that may be null; NaN for a malformed sequence.
template <int kDimK>
__device__ void write_state(float const (&S)[kDimK / 2], float* states, CallShape const& shape,
                            bool state_v_first, Work const& work, int first_column) {
  if (states != nullptr) {
    float* const state = states + state_offset(shape, work.sequence, work.value_head);
    float const nan = __int_as_float(0x7fffffff);
    for_each_state<kDimK>(shape, state_v_first, first_column,
                          [&](int acc, int place) { state[place] = work.malformed ? nan : S[acc]; });
  }
}

}  // namespace gdn2
