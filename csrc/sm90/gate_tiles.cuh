// The decay gate on tiles of g in shared memory, in pieces of four channels and short loops, which cost
// neither the registers nor the instruction cache of what follows.
#pragma once

#include <cmath>

#include "params.h"
#include "tile/activation.cuh"
#include "tile/convert.cuh"
#include "tile/tma.cuh"

namespace gdn2 {

// Whether g and b are anything but the decay in float32 and the gate: then alpha and E are made in their
// tiles first.
__host__ __device__ inline bool needs_activation(GateParams const& gates, ElementType gate_element) {
  return gates.decay_gate != DecayGate::kNone || gates.use_gate_sigmoid ||
         gate_element != ElementType::kFloat32;
}

// Whether anything is asked for that the plain kernels do not make.
inline bool is_fused(GateParams const& gates, ElementType gate_element) {
  return gates.use_qk_l2norm || needs_activation(gates, gate_element);
}

// What the gate of a key head has, from global memory: loaded before it is needed. Zero where there is none.
__device__ inline float load_A_log(GateParams const& gates, int head) {
  return gates.A_log != nullptr ? gates.A_log[head] : 0.f;
}
// dt_bias / ln(2); zero behind the last channel too.
__device__ inline float load_bias_log2(GateParams const& gates, int head, int channel, int dim_k) {
  bool const exists = gates.dt_bias != nullptr && channel < dim_k;
  return exists ? kLog2E * gates.dt_bias[static_cast<std::int64_t>(head) * dim_k + channel] : 0.f;
}

// The same for four channels.
struct GateChannels {
  float A_log;
  float4 bias_log2;
};

__device__ inline GateChannels load_gate_channels(GateParams const& gates, int head, int channel, int dim_k) {
  auto const bias = [&](int c) { return load_bias_log2(gates, head, channel + c, dim_k); };
  return {load_A_log(gates, head), {bias(0), bias(1), bias(2), bias(3)}};
}

// A gate of a key head: from the raw projection g to alpha, and back. u = g + dt_bias.
template <DecayGate kGate>
struct DecayFunction {
  static constexpr bool kIsGate = kGate != DecayGate::kNone;
  float rate, opposite_rate, lower_bound;

  __device__ DecayFunction(GateParams const& gates, float A_log)
      : rate(exp2_approx(kLog2E * A_log)), opposite_rate(-rate), lower_bound(gates.lower_bound) {}

  __device__ float alpha(float g, float bias_log2) const {
    float const u_log2 = fmaf(kLog2E, g, bias_log2);
    if constexpr (kGate == DecayGate::kSoftplus) {
      return exp2_approx(-rate * softplus_log2(u_log2));
    } else if constexpr (kGate == DecayGate::kLowerBound) {
      return exp2_approx(kLog2E * lower_bound * sigmoid_log2(rate * u_log2));
    } else {
      return exp2_approx(kLog2E * g);
    }
  }

  // The gradient of the raw projection of that of the decay dg; adds to `sum` what dA_log is made of. Zero
  // where nothing moves any more.
  __device__ float backward(float g, float bias_log2, float dg, float& sum) const {
    static_assert(kIsGate);
    float const u_log2 = fmaf(kLog2E, g, bias_log2);
    if constexpr (kGate == DecayGate::kSoftplus) {
      float const t = exp2_approx(-fabsf(u_log2)), larger = reciprocal_approx(1.f + t);
      float const decay = fmaxf(u_log2, 0.f) + log2_1p(t);
      // An infinite decay has a dg of zero but for rounding, and so shall the product be.
      sum = fmaf(dg, isinf(decay) ? 0.f : decay, sum);
      return opposite_rate * dg * (u_log2 < 0.f ? t * larger : larger);
    } else {
      float const s = sigmoid_log2(rate * u_log2);
      float const slope = fmaf(-s, s, s) * dg;
      sum = fmaf(slope, fmaxf(fminf(u_log2, kLargest), -kLargest), sum);
      return lower_bound * rate * slope;
    }
  }

  // dA_log, of a sum over tokens and channels.
  __device__ float dA_log(float sum) const {
    return kGate == DecayGate::kSoftplus ? -rate * kLn2 * sum : lower_bound * rate * kLn2 * sum;
  }

 private:
  static constexpr float kLargest = 3.4e38f;
};

// f(DecayFunction) of the gate that is asked for: one branch, and none an element.
template <class F>
__device__ void with_decay_function(GateParams const& gates, float A_log, F f) {
  if (gates.decay_gate == DecayGate::kSoftplus) {
    f(DecayFunction<DecayGate::kSoftplus>(gates, A_log));
  } else if (gates.decay_gate == DecayGate::kLowerBound) {
    f(DecayFunction<DecayGate::kLowerBound>(gates, A_log));
  } else {
    f(DecayFunction<DecayGate::kNone>(gates, A_log));
  }
}

// E = b*k of eight neighbours, through the sigmoid of b where it is asked for.
template <class Element>
__device__ uint4 multiply_erase_gate(GateParams const& gates, uint4 b8, uint4 k8) {
  if (!gates.use_gate_sigmoid) {
    return multiply_pairs<Element>(b8, k8);
  }
  float const divisor = gates.erase_scale == 2.f ? 0.5f : 1.f;
  std::uint32_t const b[4] = {b8.x, b8.y, b8.z, b8.w}, k[4] = {k8.x, k8.y, k8.z, k8.w};
  std::uint32_t E[4];
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    float2 const b2 = unpack<Element>(b[p]), k2 = unpack<Element>(k[p]);
    E[p] = pack<Element>(sigmoid_over(b2.x, divisor) * k2.x, sigmoid_over(b2.y, divisor) * k2.y);
  }
  return {E[0], E[1], E[2], E[3]};
}

// A thread's pieces of a tile of g [64 tokens, kChannels], float32 in boxes of 32 channels: the same four
// channels of every kRows-th token. 16-bit g of 64 channels lies in the first of their two boxes. A row is
// read and written by one warp.
template <class Element, int kChannels, int kThreads>
struct GatePieces {
  static constexpr int kPieces = kChannels / 4, kRows = kThreads / kPieces;
  static_assert(kRows % 8 == 0);           // so that the pieces lie in the same place of their rows
  static_assert(kPieces <= kWarpThreads);  // a row is one warp's
  static_assert(kChunk % (2 * kRows) == 0);

  int first_row, channel;
  std::uint8_t *wide, *narrow;  // float32 and 16-bit

  template <class Boxes>
  __device__ GatePieces(Boxes& boxes, int thread) {
    int const piece = thread % kPieces;
    first_row = thread / kPieces;
    channel = 4 * piece;
    wide = boxes[piece / 8] + swizzled_offset(first_row, piece % 8);
    narrow = boxes[piece / 16 * 2] + swizzled_offset(first_row, piece % 16 / 2) + piece % 2 * 8;
  }

  // Of token first_row + i * kRows.
  __device__ float4 read(int i, ElementType element) const {
    if (element == ElementType::kFloat32) {
      return *reinterpret_cast<float4 const*>(wide + i * kRows * kBoxRowBytes);
    }
    uint2 const pairs = *reinterpret_cast<uint2 const*>(narrow + i * kRows * kBoxRowBytes);
    float2 const low = unpack<Element>(pairs.x), high = unpack<Element>(pairs.y);
    return {low.x, low.y, high.x, high.y};
  }

  // g becomes alpha.
  __device__ void activate(GateParams const& gates, GateChannels const& channels, ElementType element) const {
    float4 const bias = channels.bias_log2;
    with_decay_function(gates, channels.A_log, [&](auto decay) {
#pragma unroll 1
      for (int first = 0; first < kChunk / kRows; first += 2) {
        // Two at a time: a piece waits for the results of one instruction after the other.
        float4 const g[2] = {read(first, element), read(first + 1, element)};
        __syncwarp();  // alpha of a row comes to lie where its 16-bit g is
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          *reinterpret_cast<float4*>(wide + (first + i) * kRows * kBoxRowBytes) = {
              decay.alpha(g[i].x, bias.x), decay.alpha(g[i].y, bias.y), decay.alpha(g[i].z, bias.z),
              decay.alpha(g[i].w, bias.w)};
        }
      }
    });
  }
};

}  // namespace gdn2
