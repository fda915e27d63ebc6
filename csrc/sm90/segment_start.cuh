// The state that a segment of a sequence starts from, and the gradient of the state that it ends in, from the
// maps of the segments before it or behind it, one after the other, in the registers of the walk that needs it:
//
//     forwards   S of segment 1 = N of 0, then S' = M S + N
//     reverse    dS of the end of the last but one = N of the last, then dS' = M^T dS + N
//
// M and S are sums of two bfloat16 in the products, and the product of the two smaller parts is left out: with
// what rounding them loses, 2^-15 of M S. What is added up is float32. Infinity becomes NaN.
//
// M comes in pieces of 64 channels before (all after), its larger part first, to where the walk's factors will
// be. CTAs of a pair need the same maps and load a half of every piece for both.
#pragma once

#include "sm90/scan_parts.cuh"

namespace gdn2 {

// How many pieces of maps fit to where factors will be; more than two maps' are not needed.
template <int kDimK>
constexpr int num_map_pieces(int factor_bytes) {
  int const fit = factor_bytes / (kDimK / kBoxColumns * kBoxBytes), useful = 4 * (kDimK / kBoxColumns);
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

// The maps that lead to a walk's first state: forwards those of segments 1 to segment - 1, in reverse those of
// the last but one down to segment + 1.
template <bool kReverse>
struct MapsToStart {
  int segment, num_segments;

  __device__ int number() const { return kReverse ? num_segments - 2 - segment : segment - 1; }
  __device__ int segment_of(int step) const { return kReverse ? num_segments - 2 - step : step + 1; }
  // Rows of N: the first state, and what is added in a step.
  __device__ int first_N() const { return kReverse ? num_segments - 2 : 0; }
  __device__ int N_of(int step) const { return kReverse ? segment_of(step) - 1 : segment_of(step); }
};

// By the thread that loads factors.
template <class Cfg, bool kReverse>
__device__ void load_maps(StartBarriers<Cfg>& barriers, std::uint8_t* pieces, float const* M,
                          CallShape const& shape, Work const& work, MapsToStart<kReverse> const& maps) {
  constexpr int kBoxes = Cfg::kDimK / kBoxColumns, kPartBytes = Cfg::kDimK * Cfg::kDimK * 2;
  int const gate_head = work.value_head / (shape.num_value_heads / shape.num_gate_heads);
  RingPosition<Cfg::kMapPieces> at;
  for (int step = 0; step < maps.number(); ++step) {
    std::int64_t const row = segment_row(work, maps.segment_of(step) - 1, maps.num_segments - 1);
    auto const* const map = reinterpret_cast<std::uint8_t const*>(M) +
                            (row * shape.num_gate_heads + gate_head) * 2 * kPartBytes;
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

// The first state of the warpgroup's walk. By math warpgroups; `clear` makes the maps' memory fit for factors.
template <class Cfg, bool kReverse, class Clear>
__device__ void find_start(float (&S)[Cfg::kDimK / 2], StartBarriers<Cfg>& barriers, std::uint8_t const* pieces,
                           float const* N, CallShape const& shape, Work const& work, int first_column,
                           MapsToStart<kReverse> const& maps, Clear clear) {
  constexpr int kBoxes = Cfg::kDimK / kBoxColumns, kSteps = Cfg::kDimK / 16;
  auto const read_N = [&](float(&x)[Cfg::kDimK / 2], int index) {
    read_segment_state<Cfg::kDimK>(x, N, shape, segment_row(work, index, maps.num_segments), work.value_head,
                                   first_column);
  };
  read_N(S, maps.first_N());
  if (maps.number() > 0) {
    RingPosition<Cfg::kMapPieces> at;
    for (int step = 0; step < maps.number(); ++step) {
      float added[Cfg::kDimK / 2];
      read_N(added, maps.N_of(step));
      FragmentA larger[kSteps], smaller[kSteps];
      split_fragments(larger, smaller, S);
#pragma unroll
      for (int i = 0; i < kSteps * 4; ++i) {  // not put off until after the fence
        cute::warpgroup_fence_operand(larger[i / 4].pairs[i % 4]);
        cute::warpgroup_fence_operand(smaller[i / 4].pairs[i % 4]);
      }
      RingPosition<Cfg::kMapPieces> first = at;
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
      }
      wgmma_wait<0>();
      for (int piece = 0; piece < 2 * kBoxes; ++piece) {
        release_factors<Cfg>(barriers.ring, first);
      }
#pragma unroll
      for (int i = 0; i < Cfg::kDimK / 2; ++i) {
        S[i] += added[i];
      }
    }
    cutlass::arch::NamedBarrier::sync(Cfg::kWarpgroups * kWarpgroupThreads, 0);  // all have read the maps
    clear();
    RingPosition<1> start;
    release_factors<Cfg>(barriers.start, start);
  }
}

}  // namespace gdn2
