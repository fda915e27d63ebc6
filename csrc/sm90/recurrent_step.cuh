// One token of a slice of the state: what the threads of the slice do together, by whichever kernel holds the
// state.
#pragma once

#include "sm90/recurrent_state.cuh"
#include "sm90/recurrent_token.cuh"

namespace gdn2::recurrent {

template <class Cfg>
struct SharedStorage {
  // Even and odd tokens: with a buffer each, one barrier a token orders writes and reads.
  TokenStorage<Cfg> tokens[Cfg::kOneToken ? 1 : 2];
  // K first: r and p over a warp's channels.
  float sums[Cfg::kVFirst ? 1 : Cfg::kWarps][2][Cfg::kColumns];
};

// r (kind 0) or p (1) of kCount columns over all warps, which hold a part of the channels each: K first.
template <int kCount, class Cfg>
__device__ void sum_over_warps(float (&sums)[kCount], SharedStorage<Cfg> const& smem, int kind, int column) {
  static_assert(Cfg::kWarps == 2 || Cfg::kWarps == 4);
#pragma unroll
  for (int warp = 0; warp < Cfg::kWarps; warp += 2) {
    float x[kCount], y[kCount];
    read_floats(x, &smem.sums[warp][kind][column]);
    read_floats(y, &smem.sums[warp + 1][kind][column]);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      sums[i] = warp == 0 ? x[i] + y[i] : sums[i] + (x[i] + y[i]);
    }
  }
}

template <class Cfg>
struct Step {
  static constexpr int kOwnColumns = Cfg::kOwnColumns, kPieceChannels = Cfg::kVFirst ? Cfg::kVector : 1;

  SharedStorage<Cfg>& smem;
  TokenStorage<Cfg> const& token;
  StateSlice<Cfg>& state;
  TokenScales const scales;

  // Of this thread's i-th channel, and its c-th column.
  __device__ int channel(int i) const {
    return Cfg::kVFirst ? state.piece() * Cfg::kVector + i : state.first_row() + i * Cfg::kRowsAtOnce;
  }
  __device__ int column(int c) const {
    return Cfg::kVFirst ? state.first_row() + c * Cfg::kRowsAtOnce : state.piece() * Cfg::kVector + c;
  }

  // alpha, E, q or k (row 0, 1, 2, 3) of the thread's own channels, for its piece j. V first they are
  // neighbours, lie in one row and are the same for all pieces; K first a piece has one channel, whose four
  // values lie together.
  __device__ void read_channels(float (&x)[kPieceChannels], int row, int j) const {
    auto const* const rows = reinterpret_cast<float const*>(token.channels);
    if constexpr (Cfg::kVFirst) {
      read_floats(x, rows + row * Cfg::kDimK + channel(0));
    } else {
      x[0] = rows[4 * channel(j) + row];
    }
  }

  // S = Diag(alpha) S, and r = S^T E, p = S^T q over the thread's own channels
  __device__ void decay_and_read(float (&sums)[Cfg::kSums]) {
#pragma unroll
    for (float& sum : sums) {
      sum = 0.f;
    }
#pragma unroll
    for (int j = 0; j < Cfg::kVectors; ++j) {
      float alpha[kPieceChannels], E[kPieceChannels], q[kPieceChannels], S[Cfg::kVector];
      read_channels(alpha, 0, j);
      read_channels(E, 1, j);
      read_channels(q, 2, j);
      state.get(S, j);
      if constexpr (Cfg::kVFirst) {
        // The sums of four channels each, as four lanes' would be.
#pragma unroll
        for (int e = 0; e < Cfg::kVector; e += 4) {
          float r4 = 0.f, p4 = 0.f;
#pragma unroll
          for (int i = e; i < e + 4; ++i) {
            S[i] *= alpha[i];
            r4 = fmaf(S[i], E[i], r4);
            p4 = fmaf(S[i], q[i], p4);
          }
          sums[j] += r4;
          sums[kOwnColumns + j] += p4;
        }
      } else {
#pragma unroll
        for (int c = 0; c < kOwnColumns; ++c) {
          S[c] *= alpha[0];
          sums[c] = fmaf(S[c], E[0], sums[c]);
          sums[kOwnColumns + c] = fmaf(S[c], q[0], sums[kOwnColumns + c]);
        }
      }
      if constexpr (!Cfg::kPacked) {
        state.set(j, S);
      }
    }
  }

  // S += k u^T, with u of the thread's own columns
  __device__ void write(float const (&u)[kOwnColumns]) {
    state.unpack_again();
#pragma unroll
    for (int j = 0; j < Cfg::kVectors; ++j) {
      float alpha[kPieceChannels], k[kPieceChannels], S[Cfg::kVector];
      read_channels(k, 3, j);
      state.get(S, j);
      if constexpr (Cfg::kPacked) {
        read_channels(alpha, 0, j);
      }
#pragma unroll
      for (int e = 0; e < Cfg::kVector; ++e) {
        int const i = Cfg::kVFirst ? e : 0, c = Cfg::kVFirst ? j : e;
        S[e] = fmaf(k[i], u[c], Cfg::kPacked ? alpha[i] * S[e] : S[e]);
      }
      state.set(j, S);
    }
  }

  // u = w*v - r, as a factor of the raw k
  __device__ float residual(float z, float r) const { return scales.k * fmaf(-scales.k, r, z); }
  __device__ float output(float p, float u) const { return scales.q * fmaf(scales.qk, u, p); }

  // The whole token; body(column, o) is called by one thread for every column of the slice.
  template <class Body>
  __device__ void run(Body body) {
    float sums[Cfg::kSums];
    decay_and_read(sums);
    float u[kOwnColumns];
    if constexpr (Cfg::kVFirst) {
      find_u_in_lanes(u, sums, body);
    } else {
      find_u_in_warps(u, sums, body);
    }
    write(u);
  }

  // V first: all channels of a column are in kSumLanes lanes. Even ones end up with sums r, odd ones with
  // sums p.
  template <class Body>
  __device__ void find_u_in_lanes(float (&u)[kOwnColumns], float (&sums)[Cfg::kSums], Body body) {
    using Spread = SpreadSum<Cfg::kSums, Cfg::kSumLanes, 1>;
    Spread::run(sums);
    int const lane = lane_index(), index = Spread::index(lane);
    bool const has_p = index >= kOwnColumns, writes = has_p && Spread::is_first(lane);
    float own_u[Spread::kLeft];
#pragma unroll
    for (int i = 0; i < Spread::kLeft; ++i) {
      int const own_column = column(index % kOwnColumns + i);
      own_u[i] = residual(token.z[own_column], sums[i]);
      float const u_of_p = __shfl_xor_sync(kAllLanes, own_u[i], 1);
      if (writes) {
        body(own_column, output(sums[i], u_of_p));
      }
    }
#pragma unroll
    for (int c = 0; c < kOwnColumns; ++c) {
      int const source = lane / Spread::kLanes * Spread::kLanes + Spread::lane_of(c);
      u[c] = __shfl_sync(kAllLanes, own_u[c % Spread::kLeft], source);
    }
  }

  // K first: the lanes of a warp that share columns add up, then the warps.
  template <class Body>
  __device__ void find_u_in_warps(float (&u)[kOwnColumns], float (&sums)[Cfg::kSums], Body body) {
    using Spread = SpreadSum<Cfg::kSums, Cfg::kSumLanes, Cfg::kPieces>;
    Spread::run(sums);
    int const index = Spread::index(lane_index());
    auto& out = smem.sums[thread_of_slice<Cfg>() / kWarpThreads][index / kOwnColumns];
#pragma unroll
    for (int i = 0; i < Spread::kLeft; ++i) {
      out[column(index % kOwnColumns + i)] = sums[i];
    }
    sync_slice<Cfg>();
    float z[kOwnColumns], r[kOwnColumns];
    read_floats(z, token.z + column(0));
    sum_over_warps(r, smem, 0, column(0));
#pragma unroll
    for (int c = 0; c < kOwnColumns; ++c) {
      u[c] = residual(z[c], r[c]);
    }
    int const out_column = thread_of_slice<Cfg>();
    if (out_column < Cfg::kColumns) {
      float out_r[1], out_p[1];
      sum_over_warps(out_r, smem, 0, out_column);
      sum_over_warps(out_p, smem, 1, out_column);
      body(out_column, output(out_p[0], residual(token.z[out_column], out_r[0])));
    }
  }
};

}  // namespace gdn2::recurrent
