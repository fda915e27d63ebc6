// The decays between the tokens of a chunk, for a warp that holds 16 channels x 64 tokens as product fragments do:
// lane l has channels l/4 and l/4 + 8, and of every group j of 8 tokens the neighbours 8*j + 2*(l%4) and the next.
//
// exp(G[r]-G[s]) is D[r] U[s], split at the first row of the later of two neighbouring blocks of h rows (h = 1, 2, 4,
// .., 32): both are products of alpha = exp(g) over rows inside the pair, in [0, 1] for any g <= 0. Inside a group of
// eight they are products over neighbouring lanes, kept as F and B below; beyond, those times products over whole
// groups.
#pragma once

#include "tile/mma.cuh"

namespace gdn2 {

constexpr int kGroup = 8;   // tokens
constexpr int kGroups = 8;  // of a chunk
constexpr int kWarpChannels = 16;

// What a lane gets from the lane `distance` further to the right (left, where negative) of its four.
__device__ inline float from_neighbor(float x, int distance) {
  return __shfl_sync(0xffffffff, x, (lane_index() & ~3) | ((lane_index() + distance) & 3));
}

// From lane `index` of the four.
__device__ inline float from_quad_lane(float x, int index) {
  return __shfl_sync(0xffffffff, x, index, 4);
}

// Sums over the lanes of the four behind this one (kForward: before it), this one left out; `all` gets the whole sum.
template <bool kForward>
__device__ float exclusive_sum(float x, float& all) {
  int const q = lane_index() % 4;
  int const place = kForward ? q : 3 - q;
  constexpr int kStep = kForward ? -1 : 1;
  float const one = from_neighbor(x, kStep);
  float inclusive = x + (place >= 1 ? one : 0.f);
  float const two = from_neighbor(inclusive, 2 * kStep);
  inclusive += place >= 2 ? two : 0.f;
  all = from_quad_lane(inclusive, kForward ? 3 : 0);
  float const exclusive = from_neighbor(inclusive, kStep);
  return place >= 1 ? exclusive : 0.f;
}

// Decay over a whole group of eight and channel: alpha of its first token, and the product over the others.
struct GroupDecay {
  float first, rest;
};

// From the chunk's start up to and with the group's first token, and from the group's last token to the chunk's end.
struct GroupPlace {
  float before, after;
};

// What a lane keeps of its channels' decays.
struct LaneDecays {
  float alpha1[2 * kGroups];  // [2*j + half]: alpha of the lane's second token

  // From alpha in the order of accumulators. Gives the caller what is needed less often: `store_first(j, half, alpha)`
  // and `store_rest(j, half, decay)` of a group, by one lane of four each; and `store(i, F, B)`: the decay from the
  // group's first token to the lane's first, and from the lane's second to the group's last.
  template <class StoreFirst, class StoreRest, class Store>
  __device__ void scan_groups(float const (&alpha)[4 * kGroups], StoreFirst store_first, StoreRest store_rest,
                              Store store) {
    int const q = lane_index() % 4;
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) {
      float const a0 = alpha[2 * i], a1 = alpha[2 * i + 1];
      alpha1[i] = a1;
      float const before = from_neighbor(a1, -1), after0 = from_neighbor(a0, 1),
                  after1 = from_neighbor(a1, 1);
      float f = q >= 1 ? before * a0 : 1.f;      // from the last lane's first token to this one's
      float b = q <= 2 ? after0 * after1 : 1.f;  // from this lane's second token to the next one's
      float const f1 = from_neighbor(f, -1), b1 = from_neighbor(b, 1);
      f *= q >= 1 ? f1 : 1.f;
      b *= q <= 2 ? b1 : 1.f;
      float const f2 = from_neighbor(f, -2), b2 = from_neighbor(b, 2);
      f *= q >= 2 ? f2 : 1.f;
      b *= q <= 1 ? b2 : 1.f;
      store(i, f, b);
      if (q == 0) {
        store_first(i / 2, i % 2, a0);
      }
      if (q == 3) {
        store_rest(i / 2, i % 2, f * a1);
      }
    }
  }
};

}  // namespace gdn2
