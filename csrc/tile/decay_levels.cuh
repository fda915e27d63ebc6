// The decays between the tokens of a chunk, for a warp that holds 16 channels as product fragments do: lane l
// has channels l/4 and l/4 + 8, and of every group j of 8 tokens the neighbours 8*j + 2*(l%4) and the next.
//
// exp(G[r]-G[s]) is D[r] U[s], split at the first row of the later of two neighbouring blocks of h rows (h =
// 1, 2, 4, .., 32): both are products of alpha = exp(g) over rows inside the pair, in [0, 1] for any g <= 0.
// Inside a group of eight they are products over a few tokens; beyond, those times products over whole
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

// Over the four lanes.
__device__ inline float sum_over_quad(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// Sums over the lanes of the four behind this one, this one left out; `all` gets the whole sum.
__device__ inline float sum_behind(float x, float& all) {
  int const q = lane_index() % 4;
  float const neighbor = __shfl_xor_sync(0xffffffff, x, 1), own_pair = x + neighbor;
  float const other_pair = __shfl_xor_sync(0xffffffff, own_pair, 2);
  all = own_pair + other_pair;
  return (q % 2 == 0 ? neighbor : 0.f) + (q / 2 == 0 ? other_pair : 0.f);
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

}  // namespace gdn2
