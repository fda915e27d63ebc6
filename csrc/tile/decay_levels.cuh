// The decays between the tokens of a chunk, for a warp that holds 16 channels as product fragments do: lane l
// has channels l/4 and l/4 + 8, and of every group j of 8 tokens the neighbours 8*j + 2*(l%4) and the next.
//
// exp(G[r]-G[s]) is D[r] U[s], split at the first row of the later of two neighbouring blocks of h rows (h =
// 1, 2, 4, .., 32): both are products of alpha = exp(g) over rows inside the pair, in [0, 1] for any g <= 0.
// Inside a group of eight they are products over a few tokens; beyond, those times products over whole
// groups.
#pragma once

#include "tile/arch.cuh"

namespace gdn2 {

constexpr int kGroup = 8;   // tokens
constexpr int kGroups = 8;  // of a chunk
constexpr int kWarpChannels = 16;

// Over the four lanes.
__device__ inline float sum_over_quad(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// `after` and what lies behind a lane of the four: x of those that follow it.
struct QuadSums {
  float neighbor, pair;  // one where the neighbor of the lane's pair, or the other pair, is behind; else zero

  __device__ explicit QuadSums(int quad)
      : neighbor(quad % 2 == 0 ? 1.f : 0.f), pair(quad / 2 == 0 ? 1.f : 0.f) {}

  // `all` gets the sum over the four.
  __device__ float behind(float x, float after, float& all) const {
    float const of_neighbor = __shfl_xor_sync(0xffffffff, x, 1), own_pair = x + of_neighbor;
    float const other_pair = __shfl_xor_sync(0xffffffff, own_pair, 2);
    all = own_pair + other_pair;
    return fmaf(other_pair, pair, fmaf(of_neighbor, neighbor, after));
  }
};

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
