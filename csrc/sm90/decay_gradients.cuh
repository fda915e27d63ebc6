// The gradient of the decay in `gradients`: sums over the chunk, and back through the decay gate.
#pragma once

#include <cmath>

#include "sm90/gates.cuh"
#include "sm90/gradients_parts.cuh"
#include "tile/convert.cuh"

namespace gdn2 {

// The gradient of the decay, of the tokens and channels that a lane's accumulators have.
template <class Cfg>
struct DecayGradients {
  using Element = typename Cfg::Element;
  using Decay = DecayFunction<Element, Cfg::kGate>;

  GradientsStorage& smem;
  GradientsParams const& params;
  HalfAccumulators& dG;         // terms of the reads, writes and pairs
  float later[2] = {0.f, 0.f};  // of the groups behind
  // Of a decay gate: its slopes; and sums over the lane's tokens, of what dA_log weighs dg with, for each
  // channel, and of that times what dg is without the other half.
  HalfAccumulators slopes;
  float weights[2] = {0.f, 0.f}, own_dA_log = 0.f;

  // Sums dG from the end of the half, a pair of groups at a time, the last one first, which leaves all for
  // the other half; behind a barrier add_other_half makes dg of it. Back through a decay gate, which is
  // linear in dg, before that: there is more to do beside.
  __device__ void sum_groups(int pair, GradientsPlace const& place) {
    QuadSums const sums(place.quad);
#pragma unroll
    for (int i = 2 * pair + 1; i >= 2 * pair; --i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const n = 4 * i + 2 * half;
        float all;
        float const both = dG[n] + dG[n + 1];
        float const after = sums.behind(both, later[half], all);
        later[half] += all;
        dG[n] = after + both;
        dG[n + 1] += after;
      }
    }
    if (pair == 0 && place.half_of_chunk == 1 && place.quad == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        smem.scratch().second_reads[place.channel(half)] = later[half];
      }
    }
    if constexpr (Cfg::kIsGated) {
      pass_gate(pair, place);
    }
  }

  __device__ void add_other_half(GradientsPlace const& place) {
    auto const& scratch = smem.scratch();
    if constexpr (Cfg::kGate == DecayGate::kLowerBound) {  // which has a slope where there are no tokens
      if (int const num_rows = uniform(smem.work.num_rows); num_rows < kChunk) {
#pragma unroll
        for (int n = 0; n < 4 * kHalfGroups; ++n) {
          bool const is_own = place.token(n / 4, n % 2) < num_rows;
          slopes[n] = is_own ? slopes[n] : 0.f;
          dG[n] = is_own ? dG[n] : 0.f;
        }
      }
    }
    float dA_log = own_dA_log;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const ch = place.channel(half);
      float const other = place.half_of_chunk == 0 ? scratch.second_reads[ch] : scratch.first_writes[ch];
      float d_bias = 0.f;
#pragma unroll
      for (int i = 0; i < kHalfGroups; ++i) {
#pragma unroll
        for (int n = 4 * i + 2 * half; n < 4 * i + 2 * half + 2; ++n) {
          dG[n] += Cfg::kIsGated ? slopes[n] * other : other;
          d_bias += dG[n];
        }
      }
      if constexpr (Cfg::kIsGated) {
        dA_log += weights[half] * other;
        float const sum = sum_over_quad(d_bias);
        if (place.quad == 0) {
          smem.sums.d_dt_bias[place.half_of_chunk][ch] = sum;
        }
      }
    }
    if constexpr (Cfg::kIsGated) {
      smem.sums.dA_log[place.thread] = isfinite(dA_log) ? dA_log : finite_sum(place);
    }
  }

  // dg to its tile, as g is.
  __device__ void store(GradientsPlace const& place) const {
    is_wide() ? store_wide(place) : store_tile<Element>(smem.scratch().dg.boxes[0], dG, place);
  }

  // Behind a barrier: the sums of the chunk, to where gate_sums sums on.
  __device__ void store_sums(GradientsWork const& work) const {
    int const thread = static_cast<int>(thread_anew()), warp = uniform(thread / kWarpThreads);
    if (warp < kChannels / kWarpThreads) {
      int const channel = work.first_channel + thread;
      if (params.d_dt_bias_of_slots != nullptr && channel < params.shape.dim_k) {
        params.d_dt_bias_of_slots[work.tile * params.shape.dim_k + channel] =
            smem.sums.d_dt_bias[0][thread] + smem.sums.d_dt_bias[1][thread];
      }
    } else if (warp == kThreads / kWarpThreads - 1 && params.dA_log_of_slots != nullptr) {
      int const lane = thread % kWarpThreads;
      float sum = 0.f;
#pragma unroll
      for (int first = 0; first < kThreads; first += kWarpThreads) {
        sum += smem.sums.dA_log[first + lane];
      }
      sum = sum_over_warp(sum);
      if (lane == 0) {
        Decay const decay(params.gates, smem.gate.A_log);
        params.dA_log_of_slots[work.tile * work.num_boxes + work.box] = decay.dA_log(sum);
      }
    }
  }

  __device__ bool is_wide() const { return !Cfg::kAny || params.gate_element == ElementType::kFloat32; }

 private:
  // dG of a pair of groups back through the decay gate.
  __device__ void pass_gate(int pair, GradientsPlace const& place) {
    Decay const decay(params.gates, smem.gate.A_log);
    OwnValues const activations(smem.tokens().activations, place);
#pragma unroll
    for (int n = 8 * pair; n < 8 * pair + 8; ++n) {
      float weight;
      decay.backward(activations[n], slopes[n], weight);
      own_dA_log += weight * dG[n];
      weights[n / 2 % 2] += weight;
    }
#pragma unroll
    for (int n = 8 * pair; n < 8 * pair + 8; ++n) {
      dG[n] *= slopes[n];
    }
  }

  __device__ void store_wide(GradientsPlace const& place) const {
    GateLane<float> const dg(smem.scratch().dg, place.token(0, 0), place.channel(0));
#pragma unroll
    for (int n = 0; n < 4 * kHalfGroups; ++n) {
      dg.at(n / 4, n % 2, n / 2 % 2) = dG[n];
    }
  }

  // A lane's own, as HalfAccumulators.
  struct OwnValues {
    float* first;

    __device__ OwnValues(GradientsStorage::OfThreads& of_threads, GradientsPlace const& place)
        : first(&of_threads[0][2 * place.group(0)][place.thread % kWarpgroupThreads]) {}

    __device__ float& operator[](int n) const {
      return first[(2 * kGroups * (n % 2) + n / 2) * kWarpgroupThreads];
    }
  };

  // What the lane's tokens and channels add to dA_log where g is not finite somewhere, of dg as it is behind
  // the gate. One at a time: code that is seldom needed shall be short.
  __device__ float finite_sum(GradientsPlace const& place) const {
    Decay const decay(params.gates, smem.gate.A_log);
    OwnValues const activations(smem.tokens().activations, place), dg(smem.dg_of_threads, place);
#pragma unroll
    for (int n = 0; n < 4 * kHalfGroups; ++n) {
      dg[n] = dG[n];
    }
    float sum = 0.f;
#pragma unroll 1
    for (int n = 0; n < 4 * kHalfGroups; ++n) {
      sum += decay.finite_term(activations[n], dg[n]);
    }
    return sum;
  }
};

}  // namespace gdn2
