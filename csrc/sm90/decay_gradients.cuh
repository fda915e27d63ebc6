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
  HalfAccumulators& dG;  // terms of the reads, writes and pairs
  float later[2] = {0.f, 0.f};

  // Sums dG from the end of the half, a pair of groups at a time, the last one first; behind a barrier
  // add_other_half makes dg of it.
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
  }
  __device__ void store_sums_of_half() const {
    GradientsPlace const place;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (place.half_of_chunk == 1 && place.quad == 0) {
        smem.scratch().second_reads[place.channel(half)] = later[half];
      }
    }
  }

  __device__ void add_other_half(GradientsPlace const& place) {
    auto const& scratch = smem.scratch();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const ch = place.channel(half);
      float const other = place.half_of_chunk == 0 ? scratch.second_reads[ch] : scratch.first_writes[ch];
#pragma unroll
      for (int i = 0; i < kHalfGroups; ++i) {
        dG[4 * i + 2 * half] += other;
        dG[4 * i + 2 * half + 1] += other;
      }
    }
  }

  // dg to its tile, as g is.
  __device__ void store(GradientsPlace const& place) const {
    is_wide() ? store_wide(place) : store_tile<Element>(smem.scratch().dg.boxes[0], dG, place);
  }

  // Back through the decay gate; and the sums of what that adds to d_dt_bias and dA_log.
  __device__ void pass_gate(GradientsPlace const& place, int num_rows) {
    Decay const decay(params.gates, smem.gate.A_log);
    OwnValues const activations(smem.tokens().activations, place);
    if (num_rows < kChunk) {
#pragma unroll
      for (int n = 0; n < 4 * kHalfGroups; ++n) {
        if (place.token(n / 4, n % 2) >= num_rows) {
          dG[n] = 0.f;
        }
      }
    }
    HalfAccumulators x;
    float dA_log = 0.f;
#pragma unroll
    for (int n = 0; n < 4 * kHalfGroups; ++n) {
      x[n] = activations[n];
      dA_log = decay.add_term(x[n], dG[n], dA_log);
    }
    if (!isfinite(dA_log)) {
      dA_log = finite_sum(place, activations, decay);
    }
    smem.sums.dA_log[place.thread] = dA_log;
    float d_bias[2] = {0.f, 0.f};
#pragma unroll
    for (int n = 0; n < 4 * kHalfGroups; ++n) {
      dG[n] = decay.backward(x[n], dG[n]);
      d_bias[n / 2 % 2] += dG[n];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float const sum = sum_over_quad(d_bias[half]);
      if (place.quad == 0) {
        smem.sums.d_dt_bias[place.half_of_chunk][place.channel(half)] = sum;
      }
    }
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

  // What the lane's tokens and channels add to dA_log where g is not finite somewhere. One at a time: code
  // that is seldom needed shall be short.
  __device__ float finite_sum(GradientsPlace const& place, OwnValues const& activations,
                              Decay const& decay) const {
    OwnValues const dg(smem.dg_of_threads, place);
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
