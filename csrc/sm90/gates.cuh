// The decay gate and the sigmoid of b: functions of values.
#pragma once

#include <cmath>

#include "params.h"
#include "tile/activation.cuh"
#include "tile/convert.cuh"

namespace gdn2 {

// Whether anything is asked for that the plain kernels do not make.
inline bool is_fused(GateParams const& gates, ElementType gate_element) {
  return gates.use_qk_l2norm || gates.use_gate_sigmoid || gates.decay_gate != DecayGate::kNone ||
         gate_element != ElementType::kFloat32;
}

// A gate of a key head: from the raw projection g to alpha, and back. u = g + dt_bias.
template <DecayGate kGate>
struct DecayFunction {
  static constexpr bool kIsGate = kGate != DecayGate::kNone;
  float rate, inverse_rate, lower_bound;

  __device__ DecayFunction(GateParams const& gates, float A_log)
      : rate(exp2_approx(kLog2E * A_log)),
        inverse_rate(fminf(fmaxf(exp2_approx(-kLog2E * A_log), kSmallest), kLargest)),
        lower_bound(gates.lower_bound) {}

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

  // The gradient of the raw projection of that of the decay dg; adds to `sum` what dA_log is made of, which
  // is not finite where g is not: then it is a sum of finite_term.
  __device__ float backward(float g, float bias_log2, float dg, float& sum) const {
    return backward(fmaf(kLog2E, g, bias_log2), dg, sum);
  }

  // What is added to `sum`; nothing where the decay is infinite, whose dg is zero but for rounding.
  __device__ float finite_term(float g, float bias_log2, float dg) const {
    float sum = 0.f;
    float const u_log2 = fmaf(kLog2E, g, bias_log2);
    // NaN stays what it is.
    backward(u_log2 > kLargest ? kLargest : u_log2 < -kLargest ? -kLargest : u_log2, dg, sum);
    return kGate == DecayGate::kSoftplus && u_log2 > kLargest ? 0.f * dg : sum;
  }

  // dA_log, of a sum over tokens and channels.
  __device__ float dA_log(float sum) const {
    return kGate == DecayGate::kSoftplus ? -rate * kLn2 * sum : lower_bound * rate * kLn2 * sum;
  }

 private:
  static constexpr float kSmallest = 1.2e-38f, kLargest = 3.4e38f;

  __device__ float backward(float u_log2, float dg, float& sum) const {
    static_assert(kIsGate);
    if constexpr (kGate == DecayGate::kSoftplus) {
      float const t = exp2_approx(-fabsf(u_log2));
      sum = fmaf(dg, fmaxf(u_log2, 0.f) + log2_1p(t), sum);
      float slope = reciprocal_approx(fmaf(-inverse_rate, t, -inverse_rate));  // -rate / (1 + t)
      if (u_log2 < 0.f) {
        slope *= t;
      }
      return slope * dg;
    } else {
      float const s = sigmoid_log2(rate * u_log2), slope = fmaf(-s, s, s) * dg;
      sum = fmaf(slope, u_log2, sum);
      return lower_bound * rate * slope;
    }
  }
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

// b through its sigmoid, rounded: two neighbours of a row.
template <class Element>
__device__ std::uint32_t activate_erase(GateParams const& gates, std::uint32_t b) {
  float const divisor = gates.erase_scale == 2.f ? 0.5f : 1.f;
  float2 const b2 = unpack<Element>(b);
  return pack<Element>(sigmoid_over(b2.x, divisor), sigmoid_over(b2.y, divisor));
}

}  // namespace gdn2
