// What the phases of `prepare` share: where a team and a thread work, what lies in shared memory, and how it
// comes there.
#pragma once

#include <cutlass/arch/barrier.h>

#include "params.h"
#include "sm90/chunk_work.h"
#include "tile/convert.cuh"
#include "tile/pipeline.cuh"
#include "tile/tma.cuh"
#include "tile/triangle.h"
#include "tile/triangular_inverse.cuh"

namespace gdn2::prepare {

constexpr int kBlock = 16;  // tokens that a thread owns
constexpr int kNumBlocks = kChunk / kBlock;
constexpr int kBoxBytes = kChunk * kBoxRowBytes;

template <class Element_, int kDimK_, class Extras_, bool kFactorsOnly_, bool kWholeSm_>
struct Config : Extras_ {
  using Element = Element_;
  static constexpr int kDimK = kDimK_;
  static constexpr bool kFactorsOnly = kFactorsOnly_;  // for the backward, to which A - I and P are known
  static constexpr int kBoxes = kDimK / kBoxColumns;
  static constexpr int kWarpgroups = kBoxes;
  // A team works on a chunk. With kWholeSm the teams of an SM are one CTA, which stays: others find SMs
  // without any.
  static constexpr int kTeamThreads = kWarpgroups * kWarpgroupThreads;
  static constexpr int kTeamsPerSm = kDimK == 64 ? 3 : 2;
  static constexpr bool kStays = kWholeSm_;
  // What the walk after it begins with comes last; beside it, first. That of the backward begins at both
  // ends.
  static constexpr ChunkOrder kOrder = kStays         ? ChunkOrder::kUp
                                       : kFactorsOnly ? ChunkOrder::kOutwards
                                                      : ChunkOrder::kDown;
  static constexpr int kTeams = kWholeSm_ ? kTeamsPerSm : 1;
  static constexpr int kThreads = kTeams * kTeamThreads;
  static constexpr int kCtasPerSm = kTeamsPerSm / kTeams;
  static constexpr int kTileBytes = kBoxes * kBoxBytes;
  static constexpr bool kReadsNorms = Extras_::kNormalize && kFactorsOnly;  // which the forward has kept
  static constexpr int kGateColumns = kBoxRowBytes / sizeof(float);         // of a box of float32 g
  // Where ptxas runs out of registers, in a loop over chunks above all. Then it is given smaller phases.
  static constexpr bool kCrowded = kStays || (Extras_::kAny && kFactorsOnly);
  static constexpr int kGroup = kCrowded ? 4 : kBlock;  // tokens of a thread that are looked at together
};

// Operands of one level: rows 0-31 E*D and 32-63 q*D of the later halves, and k*U of the earlier halves.
template <class Cfg>
struct LevelOperands {
  std::uint8_t later[Cfg::kBoxes][kBoxBytes];
  std::uint8_t earlier[Cfg::kBoxes][kBoxBytes / 2];
};

// What a CTA works on at a time.
struct Work : ChunkWork {
  int order;  // in which it comes
};

template <class Cfg>
struct SharedStorage {
  union alignas(kSwizzleAtomBytes) {
    struct {
      std::uint8_t q[Cfg::kBoxes][kBoxBytes], k[Cfg::kBoxes][kBoxBytes], b[Cfg::kBoxes][kBoxBytes];
      std::uint8_t g[2 * Cfg::kBoxes][kBoxBytes];
    } in;
    LevelOperands<Cfg> operands[3];  // when the inputs are in registers
  };
  std::uint8_t P[kBoxBytes];
  float T[kChunk * TriangularMatrix::kStride];
  // Of every block of 16 tokens and channel: alpha of its first token, and the product over the others.
  float block_first[kNumBlocks][Cfg::kDimK], block_rest[kNumBlocks][Cfg::kDimK];
  alignas(16) float q_scale[kChunk];                              // scale / norm for q
  alignas(16) PairFactor<typename Cfg::Element> k_scale[kChunk];  // 1 / norm for k, where it is asked for
  float diagonal[kChunk];                                         // of q k^T
  // The CTA's chunk and head in this round, the next one and the ones before, which some threads may not have
  // left yet. Here, since all registers are needed elsewhere.
  Work work[4];
  FullBarrier rows_full, g_full, b_full;  // rows: of q and k
};

struct TensorMaps {
  CUtensorMap q, k, b, g;
};

// ---- teams ------------------------------------------------------------------------------------------------

template <class Cfg>
__device__ int team_index() {
  return Cfg::kTeams == 1 ? 0 : threadIdx.x / Cfg::kTeamThreads;
}
template <class Cfg>
__device__ int thread_of_team() {
  return Cfg::kTeams == 1 ? threadIdx.x : threadIdx.x % Cfg::kTeamThreads;
}

enum class TeamBarrier { kAll, kInverse, kTilesOut };
// Of a CTA of one team, one for every block of rows.
constexpr int kFirstBlockBarrier = static_cast<int>(TeamBarrier::kTilesOut) + 1;
static_assert(kFirstBlockBarrier + kNumBlocks <= 16 - 8);
template <class Cfg>
__device__ std::uint32_t barrier_id(TeamBarrier barrier) {
  constexpr int kNumber = Cfg::kWarpgroups == 1 ? 1 : 3;  // a team of one warpgroup meets at one barrier
  static_assert(Cfg::kTeams * kNumber <= 16 - 8);         // 8 are CUTLASS's own
  return team_index<Cfg>() * kNumber + (kNumber == 1 ? 0 : static_cast<int>(barrier));
}

template <class Cfg>
__device__ void sync_team() {
  if constexpr (Cfg::kTeams == 1) {
    __syncthreads();
  } else {
    cutlass::arch::NamedBarrier::sync(Cfg::kTeamThreads, barrier_id<Cfg>(TeamBarrier::kAll));
  }
}

// The warps of a block of rows meet.
template <class Cfg>
__device__ void sync_block(int block) {
  if constexpr (Cfg::kBoxes == 1) {
    __syncwarp();
  } else if constexpr (Cfg::kTeams == 1) {
    cutlass::arch::NamedBarrier::sync(Cfg::kBoxes * kWarpThreads,
                                      static_cast<std::uint32_t>(kFirstBlockBarrier + block));
  } else {
    sync_team<Cfg>();  // there are not barriers for all blocks
  }
}

// ---- where a team works -----------------------------------------------------------------------------------

__device__ inline bool has_order(PrepareParams const& params, int order) {
  return order < params.shape.num_slots * params.shape.num_gate_heads;
}

template <class Cfg>
__device__ Work find_work(PrepareParams const& params, ChunkDivisors const& by, int order) {
  Work work;
  work.find<Cfg::kOrder>(params.shape, params.plan, by, order);
  work.order = order;
  return work;
}

template <class Cfg>
__device__ Work find_work_of_cta(PrepareParams const& params, ChunkDivisors const& by) {
  Work work;
  work.find_in_grid<Cfg::kOrder>(params.shape, params.plan, by, static_cast<int>(blockIdx.x));
  work.order = 0;  // nobody asks
  return work;
}

// The loads of a chunk's inputs, by one thread, in the order in which they are needed.
template <class Cfg>
struct InputLoads {
  SharedStorage<Cfg>& smem;
  TensorMaps const& maps;
  ElementType gate_element;

  __device__ void load(Work const& work) const {
    load_rows(work);
    load_g(work);
    load_b(work);
  }

 private:
  __device__ void load_rows(Work const& work) const {
    smem.rows_full.arrive_and_expect_tx(2 * Cfg::kTileBytes);
    load_boxes(maps.q, smem.rows_full, smem.in.q, work.head, work);
    load_boxes(maps.k, smem.rows_full, smem.in.k, work.head, work);
  }
  __device__ void load_g(Work const& work) const {
    FullBarrier& full = smem.g_full;
    bool const is_wide = gate_element == ElementType::kFloat32;
    full.arrive_and_expect_tx((is_wide ? 2 : 1) * Cfg::kTileBytes);
#pragma unroll
    for (int box = 0; box < 2 * Cfg::kBoxes; ++box) {
      // 16-bit g of 64 channels takes the first of the two boxes of float32.
      if (is_wide || box % 2 == 0) {
        load_box(maps.g, full, smem.in.g[box], box * Cfg::kGateColumns, work.gate_head, work);
      }
    }
  }
  __device__ void load_b(Work const& work) const {
    smem.b_full.arrive_and_expect_tx(Cfg::kTileBytes);
    load_boxes(maps.b, smem.b_full, smem.in.b, work.gate_head, work);
  }
  __device__ void load_boxes(CUtensorMap const& map, FullBarrier& full,
                             std::uint8_t (&boxes)[Cfg::kBoxes][kBoxBytes], int head,
                             Work const& work) const {
#pragma unroll
    for (int box = 0; box < Cfg::kBoxes; ++box) {
      load_box(map, full, boxes[box], box * kBoxColumns, head, work);
    }
  }
  __device__ void load_box(CUtensorMap const& map, FullBarrier& full, std::uint8_t* box, int channel,
                           int head, Work const& work) const {
    tma_load(map, full, box, channel, head, work.first_token, work.batch);
  }
};

// Two channels of 16 tokens: what a thread works on. E, q and k are pairs of Element.
template <class Cfg>
struct ThreadInputs {
  float alpha[kBlock][2];
  std::uint32_t E[kBlock], q[kBlock], k[kBlock];
};

// Where a thread works: channels 2*lane and the next of box `box`, tokens [16*block, 16*block + 16).
struct ThreadPlace {
  int box, block, lane;

  __device__ int channel() const { return box * kBoxColumns + 2 * lane; }
};

// Where ptxas runs out of registers it is asked for anew in every phase, so that no address is kept.
template <class Cfg>
__device__ ThreadPlace thread_place() {
  unsigned thread = Cfg::kCrowded || Cfg::kAny ? thread_anew() : threadIdx.x;
  thread = Cfg::kTeams == 1 ? thread : thread % Cfg::kTeamThreads;
  return {.box = static_cast<int>(thread / kWarpgroupThreads),
          .block = static_cast<int>(thread / kWarpThreads % kNumBlocks),
          .lane = static_cast<int>(thread % kWarpThreads)};
}

// Where a lane has its channels in the rows of a box, from a multiple of eight on. The swizzle is a ^ of bits
// that are zero in where a box begins: of the whole address then, one instruction, and what is left of `row`
// is known to the compiler.
template <class Address>
struct LaneRows {
  Address first;

  __device__ Address operator[](int row) const {
    return (first ^ static_cast<Address>(row % 8 * 16)) + row * kBoxRowBytes;
  }
};

// Pairs of channels: 128 bytes a warp, without bank conflicts.
__device__ inline LaneRows<std::uint32_t> pairs_of(void const* box, int first_row, int lane) {
  return {cute::cast_smem_ptr_to_uint(box) + swizzled_offset(first_row, lane / 4) + lane % 4 * 4};
}
// In global memory, in an image of a box at a multiple of 128 bytes.
__device__ inline LaneRows<std::uintptr_t> image_pairs_of(std::uint8_t* box, int first_row, int lane) {
  return {reinterpret_cast<std::uintptr_t>(box) + swizzled_offset(first_row, lane / 4) + lane % 4 * 4};
}

// Addresses in shared memory are integers here: "memory" keeps what goes through them in order with ordinary
// accesses.
__device__ inline std::uint32_t load_pair(std::uint32_t address) {
  std::uint32_t pair;
  asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(pair) : "r"(address) : "memory");
  return pair;
}
__device__ inline float2 load_float2(std::uint32_t address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}
__device__ inline void store_pair(std::uint32_t address, std::uint32_t pair) {
  asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(address), "r"(pair) : "memory");
}
// Told to be global memory, which the compiler does not see in an integer.
__device__ inline void store_pair(std::uintptr_t address, std::uint32_t pair) {
  __stwb(reinterpret_cast<std::uint32_t*>(address), pair);
}

// True, as nobody but the machine knows: a branch that ptxas moves nothing across.
__device__ inline bool phase_begins() {
  unsigned ctas;
  asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(ctas));
  return ctas > 0;
}
template <class Cfg>
__device__ bool phase_begins_if_crowded() {
  return !Cfg::kCrowded || phase_begins();
}

__device__ inline float2 operator*(float2 a, float2 b) {
  return {a.x * b.x, a.y * b.y};
}
__device__ inline float2 operator*(float a, float2 b) {
  return {a * b.x, a * b.y};
}

}  // namespace gdn2::prepare
