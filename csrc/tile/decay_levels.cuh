// The decays between the tokens of a chunk, for a warp that holds 16 channels as product fragments do: lane l
// has channels l/4 and l/4 + 8, and of every group j of 8 tokens the neighbours 8*j + 2*(l%4) and the next.
//
// exp(G[r]-G[s]) is D[r] U[s], split at the first row of the later of two neighbouring blocks of h rows (h =
// 1, 2, 4, .., 32): both are products of alpha = exp(g) over rows inside the pair, in [0, 1] for any g <= 0.
// Inside a group of eight they are products over neighbouring lanes, F and B below; beyond, those times
// products over whole groups.
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

// Sums over the lanes of the four behind this one (kForward: before it), this one left out; `all` gets the
// whole sum.
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

// Decay of a channel over a whole group of eight: alpha of its first token, and the product over the others.
struct GroupDecay {
  float first, rest;
};

// From the chunk's start up to and with the group's first token, and from the group's last token to the
// chunk's end.
struct GroupPlace {
  float before, after;
};

// Of a lane's two tokens of a group and one channel, alpha0 and alpha1 theirs.
struct LaneDecay {
  float F;  // from the group's first token to the lane's first
  float B;  // from the lane's second token to the group's last
};

__device__ inline LaneDecay scan_lane_decays(float alpha0, float alpha1) {
  int const q = lane_index() % 4;
  float const before = from_neighbor(alpha1, -1), after0 = from_neighbor(alpha0, 1),
              after1 = from_neighbor(alpha1, 1);
  float F = q >= 1 ? before * alpha0 : 1.f;  // from the last lane's first token to this one's
  float B = q <= 2 ? after0 * after1 : 1.f;  // from this lane's second token to the next one's
  float const F1 = from_neighbor(F, -1), B1 = from_neighbor(B, 1);
  F *= q >= 1 ? F1 : 1.f;
  B *= q <= 2 ? B1 : 1.f;
  float const F2 = from_neighbor(F, -2), B2 = from_neighbor(B, 2);
  F *= q >= 2 ? F2 : 1.f;
  B *= q <= 1 ? B2 : 1.f;
  return {F, B};
}

}  // namespace gdn2
