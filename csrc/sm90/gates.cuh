// The decay gate and the sigmoid of b: functions of values.
#pragma once

#include <cmath>
#include <type_traits>

#include "params.h"
#include "tile/activation.cuh"
#include "tile/convert.cuh"

namespace gdn2 {

// What a kernel makes of its inputs itself, known where it is compiled: branches over what is not asked for,
// and its code between the other, cost the call up to 3%. kAny: one of the others, or a g that may have 16
// bits.
template <bool kAny_, DecayGate kGate_ = DecayGate::kNone, bool kNormalize_ = false, bool kSigmoid_ = false>
struct Extras {
  static constexpr bool kAny = kAny_;
  static constexpr DecayGate kGate = kGate_;
  static constexpr bool kIsGated = kGate != DecayGate::kNone;
  static constexpr bool kNormalize = kNormalize_;  // the L2 norms of q and k
  static constexpr bool kSigmoid = kSigmoid_;      // of b and w
};

// f(Extras) of those that are asked for.
template <class F>
void with_extras(GateParams const& gates, ElementType gate_element, F f) {
  if (!gates.use_qk_l2norm && !gates.use_gate_sigmoid && gates.decay_gate == DecayGate::kNone &&
      gate_element == ElementType::kFloat32) {
    return f(Extras<false>{});
  }
  auto const with_gate = [&](auto normalize, auto sigmoid) {
    switch (gates.decay_gate) {
      case DecayGate::kNone:
        return f(Extras<true, DecayGate::kNone, normalize, sigmoid>{});
      case DecayGate::kSoftplus:
        return f(Extras<true, DecayGate::kSoftplus, normalize, sigmoid>{});
      case DecayGate::kLowerBound:
        return f(Extras<true, DecayGate::kLowerBound, normalize, sigmoid>{});
    }
  };
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (gates.use_qk_l2norm) {
    gates.use_gate_sigmoid ? with_gate(yes, yes) : with_gate(yes, no);
  } else {
    gates.use_gate_sigmoid ? with_gate(no, yes) : with_gate(no, no);
  }
}

// A gate of a key head: from the raw projection g to alpha, and back, as Element's factors need it. Between
// them lies the activation, which the way back starts from: softplus(u) / ln(2); where there is a lower bound
// u / ln(2); without a gate g / ln(2). u = g + dt_bias.
template <class Element, DecayGate kGate>
struct DecayFunction {
  float rate, lower_bound;

  __device__ DecayFunction(GateParams const& gates, float A_log)
      : rate(exp2_approx(kLog2E * A_log)), lower_bound(gates.lower_bound) {}

  __device__ float activation(float g, float bias_log2) const {
    float const u_log2 = fmaf(kLog2E, g, bias_log2);
    return kGate == DecayGate::kSoftplus ? softplus_log2<Element>(u_log2) : u_log2;
  }

  __device__ float alpha(float activation) const {
    if constexpr (kGate == DecayGate::kSoftplus) {
      return exp2_approx(-rate * activation);
    } else if constexpr (kGate == DecayGate::kLowerBound) {
      return exp2_approx(kLog2E * lower_bound * sigmoid_log2(rate * activation));
    } else {
      return exp2_approx(activation);
    }
  }

  // The gradient of the raw projection is slope times that of the decay, dg; and dA_log is made of a sum of
  // weight times dg. A weight may be infinite or NaN where g is infinite.
  __device__ void backward(float activation, float& slope, float& weight) const {
    static_assert(kGate != DecayGate::kNone);
    if constexpr (kGate == DecayGate::kSoftplus) {
      slope = times_sigmoid_of_softplus(-fminf(rate, kLargest), activation);
      weight = activation;
    } else {
      float const s = sigmoid_log2(rate * activation), of_sigmoid = fmaf(-s, s, s);
      slope = lower_bound * rate * of_sigmoid;
      weight = of_sigmoid * activation;
    }
  }

  // weight times dg where that is finite, of slope times dg. Nothing where the decay is infinite, whose dg is
  // zero but for rounding, nor where there is no slope.
  __device__ float finite_term(float activation, float slope_dg) const {
    float slope, weight;
    if (kGate == DecayGate::kSoftplus && activation > kLargest) {
      return 0.f * slope_dg;
    }
    // NaN stays what it is.
    backward(activation > kLargest    ? kLargest
             : activation < -kLargest ? -kLargest
                                      : activation,
             slope, weight);
    return slope == 0.f ? 0.f * slope_dg : weight * __fdividef(slope_dg, slope);
  }

  // dA_log, of a sum over tokens and channels.
  __device__ float dA_log(float sum) const {
    return kGate == DecayGate::kSoftplus ? -rate * kLn2 * sum : lower_bound * rate * kLn2 * sum;
  }

 private:
  static constexpr float kLargest = 3.4e38f;
};

// b through its sigmoid, rounded: two neighbours of a row.
template <class Element>
__device__ std::uint32_t activate_erase(GateParams const& gates, std::uint32_t b) {
  float const divisor = gates.erase_scale == 2.f ? 0.5f : 1.f;
  float2 const b2 = unpack<Element>(b);
  return pack<Element>(sigmoid_over(b2.x, divisor), sigmoid_over(b2.y, divisor));
}

}  // namespace gdn2
