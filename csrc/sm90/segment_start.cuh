// The state that a segment of a sequence starts from, and the gradient of the state that it ends in, from the
// maps of the segments before it or behind it, one after the other, in the registers of the walk that needs
// it:
//
//     forwards   S of segment 1 = N of 0, then S' = M S + N
//     reverse    dS of the end of the last but one = N of the last, then dS' = M^T dS + N
//
// M and S are sums of two bfloat16 in the products, and the product of the two smaller parts is left out:
// with what rounding them loses, 2^-15 of M S. What is added up is float32. Infinity becomes NaN.
//
// Maps come in pieces to where the walk's factors will be: M by 64 channels before (in reverse, after), its
// larger part first, and N by halves of a warpgroup's. CTAs of a pair need the same M and load a half of
// every piece of it for both.
#pragma once

#include "sm90/scan_parts.cuh"

namespace gdn2 {

// How many pieces fit to where factors will be, of those that two steps need.
template <int kDimK, int kWarpgroups>
constexpr int num_map_pieces(int factor_bytes) {
  int const fit = factor_bytes / (kDimK / kBoxColumns * kBoxBytes),
            useful = 2 * (2 * (kDimK / kBoxColumns) + 2 * kWarpgroups);
  return fit < useful ? fit : useful;
}

// What a walk's shared memory has for it.
template <class Cfg>
struct StartBarriers {
  RingBarriers<Cfg::kMapPieces> ring;
  RingBarriers<1> start;  // empty when the maps' memory is free

  __device__ void init() {
    ring.init(1, kFactorReaders<Cfg>);
    start.init(1, kFactorReaders<Cfg>);
  }
};

// The maps that lead to a walk's first state: forwards those of segments 1 to segment - 1, in reverse those
// of the last but one with chunks down to segment + 1.
template <bool kReverse>
struct MapsToStart {
  int number;        // none where not positive
  int first_N;       // row of the first state
  int num_segments;  // that rows are counted by

  __device__ int segment_of(int step) const { return kReverse ? first_N - step : first_N + 1 + step; }
  // Row of what is added in a step.
  __device__ int N_of(int step) const { return kReverse ? segment_of(step) - 1 : segment_of(step); }
};

// By the thread that loads factors.
template <class Cfg, bool kReverse>
__device__ void load_maps(StartBarriers<Cfg>& barriers, std::uint8_t* pieces, float const* M, float const* N,
                          CallShape const& shape, Work const& work, MapsToStart<kReverse> const& maps) {
  constexpr int kBoxes = Cfg::kDimK / kBoxColumns, kPartBytes = Cfg::kDimK * Cfg::kDimK * 2;
  int const gate_head = work.value_head / (shape.num_value_heads / shape.num_gate_heads);
  RingPosition<Cfg::kMapPieces> at;
  for (int step = 0; step < maps.number; ++step) {
    std::int64_t const row = segment_row(work, maps.segment_of(step) - 1, maps.num_segments - 1);
    auto const* const map =
        reinterpret_cast<std::uint8_t const*>(M) + (row * shape.num_gate_heads + gate_head) * 2 * kPartBytes;
    for (int piece = 0; piece < 2 * kBoxes; ++piece) {
      auto const* const part = map + piece / kBoxes * kPartBytes;
      FullBarrier& full = barriers.ring.begin_fill(at, Cfg::kTileBytes);
      for (int box = 0; box < kBoxes; ++box) {
        int const after = kReverse ? piece % kBoxes : box, before = kReverse ? box : piece % kBoxes;
        load_factors<Cfg>(pieces + at.stage * Cfg::kTileBytes + box * kBoxBytes,
                          part + (after * kBoxes + before) * kBoxBytes, kBoxBytes, full);
      }
      at.advance();
    }
    for (int half = 0; half < 2 * Cfg::kWarpgroups; ++half) {
      // The last warpgroup may have no value columns.
      int const slice = min(work.first_column + half / 2 * kColumns, shape.dim_v - 1) / kColumns;
      std::int64_t const state = segment_state_index(
          shape, segment_row(work, maps.N_of(step), maps.num_segments), work.value_head, slice);
      FullBarrier& full = barriers.ring.begin_fill(at, Cfg::kTileBytes);
      bulk_load(pieces + at.stage * Cfg::kTileBytes,
                reinterpret_cast<std::uint8_t const*>(N) + (2 * state + half % 2) * Cfg::kTileBytes,
                Cfg::kTileBytes, full);
      at.advance();
    }
  }
}

// By the same, before it loads what lies where maps have been.
template <class Cfg>
__device__ void wait_for_start(StartBarriers<Cfg>& barriers) {
  RingPosition<1> at;
  at.advance();
  barriers.start.wait_empty(at);
}

// Accumulators as fragments of two bfloat16 whose sum they are, but for the last bits.
template <int kRegisters>
__device__ void split_fragments(FragmentA (&larger)[kRegisters / 8], FragmentA (&smaller)[kRegisters / 8],
                                float const (&acc)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters / 2; ++i) {
    float const x = acc[2 * i], y = acc[2 * i + 1];
    std::uint32_t const rounded = pack<__nv_bfloat16>(x, y);
    float2 const back = unpack<__nv_bfloat16>(rounded);
    larger[i / 4].pairs[i % 4] = rounded;
    smaller[i / 4].pairs[i % 4] = pack<__nv_bfloat16>(x - back.x, y - back.y);
  }
}

// S (+)= A times a piece of a map: forwards its rows are the channels before, in reverse those after.
template <bool kReverse, int kRegisters>
__device__ void multiply_by_piece(float (&S)[kRegisters], FragmentA const (&a)[kRegisters / 8], int first,
                                  std::uint8_t const* piece, bool accumulate) {
  constexpr Major kMajor = kReverse ? Major::K : Major::MN;
  auto const descriptor = shared_descriptor<kMajor>(piece, kBoxBytes);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    int const offset = kReverse ? step * 32 : step * 16 * kBoxRowBytes;
    wgmma<__nv_bfloat16, kMajor>(S, a[first + step], descriptor + (offset >> 4), accumulate || step > 0);
  }
  wgmma_commit();
}

// S += a half of N, a piece.
template <int kHalf, int kRegisters>
__device__ void add_half(float (&S)[kRegisters], std::uint8_t const* piece) {
  auto const* const N = reinterpret_cast<float4 const(*)[kWarpgroupThreads]>(piece);
#pragma unroll
  for (int i = 0; i < kRegisters / 8; ++i) {
    float4 const four = N[i][threadIdx.x % kWarpgroupThreads];
    int const at = kHalf * kRegisters / 2 + 4 * i;
    S[at] += four.x, S[at + 1] += four.y, S[at + 2] += four.z, S[at + 3] += four.w;
  }
}

// S' = M S + N
template <class Cfg, bool kReverse>
__device__ void apply_map(float (&S)[Cfg::kDimK / 2], StartBarriers<Cfg>& barriers,
                          std::uint8_t const* pieces, int wg, RingPosition<Cfg::kMapPieces>& at) {
  constexpr int kBoxes = Cfg::kDimK / kBoxColumns, kSteps = Cfg::kDimK / 16;
  FragmentA larger[kSteps], smaller[kSteps];
  split_fragments(larger, smaller, S);
#pragma unroll
  for (int i = 0; i < kSteps * 4; ++i) {  // not put off until after a fence
    cute::warpgroup_fence_operand(larger[i / 4].pairs[i % 4]);
    cute::warpgroup_fence_operand(smaller[i / 4].pairs[i % 4]);
  }
  RingPosition<Cfg::kMapPieces> done = at;
#pragma unroll
  for (int piece = 0; piece < 2 * kBoxes; ++piece) {
    barriers.ring.wait_full(at);
    wgmma_fence();
    auto const* const part = pieces + at.stage * Cfg::kTileBytes;
    int const fragment = piece % kBoxes * 4;
    multiply_by_piece<kReverse>(S, larger, fragment, part, piece > 0);
    if (piece < kBoxes) {
      multiply_by_piece<kReverse>(S, smaller, fragment, part, true);
    }
    at.advance();
    if (piece > 0) {
      piece < kBoxes ? wgmma_wait<2>() : wgmma_wait<1>();  // the piece before
      release_factors<Cfg>(barriers.ring, done);
    }
  }
  wgmma_wait<0>();
  release_factors<Cfg>(barriers.ring, done);
#pragma unroll
  for (int of = 0; of < Cfg::kWarpgroups; ++of) {
    barriers.ring.wait_full(at);
    if (of == wg) {
      add_half<0>(S, pieces + at.stage * Cfg::kTileBytes);
    }
    release_factors<Cfg>(barriers.ring, at);
    barriers.ring.wait_full(at);
    if (of == wg) {
      add_half<1>(S, pieces + at.stage * Cfg::kTileBytes);
    }
    release_factors<Cfg>(barriers.ring, at);
  }
}

// The first state of a warpgroup's walk. By all of math; `clear` makes the maps' memory fit for factors.
template <class Cfg, bool kReverse, class Clear>
__device__ void find_start(float (&S)[Cfg::kDimK / 2], StartBarriers<Cfg>& barriers,
                           std::uint8_t const* pieces, float const* N, CallShape const& shape,
                           Work const& work, int wg, MapsToStart<kReverse> const& maps, Clear clear) {
  read_segment_state<Cfg::kDimK>(S, N, shape, segment_row(work, maps.first_N, maps.num_segments),
                                 work.value_head, work.first_column + wg * kColumns);
  if (maps.number == 0) {
    return;
  }
  RingPosition<Cfg::kMapPieces> at;
  for (int step = 0; step < maps.number; ++step) {
    apply_map<Cfg, kReverse>(S, barriers, pieces, wg, at);
  }
  cutlass::arch::NamedBarrier::sync(Cfg::kWarpgroups * kWarpgroupThreads, 0);  // all have read the maps
  clear();
  RingPosition<1> start;
  release_factors<Cfg>(barriers.start, start);
}

}  // namespace gdn2
