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

// A gate of a key head: from the raw projection g to alpha, and back, as Element's factors need it.
// u = g + dt_bias.
template <class Element, DecayGate kGate>
struct DecayFunction {
  float rate, inverse_rate, rate_log2, lower_bound;

  __device__ DecayFunction(GateParams const& gates, float A_log)
      : rate(exp2_approx(kLog2E * A_log)),
        inverse_rate(fminf(fmaxf(exp2_approx(-kLog2E * A_log), kSmallest), kLargest)),
        rate_log2(kLog2E * A_log),
        lower_bound(gates.lower_bound) {}

  __device__ float alpha(float g, float bias_log2) const {
    float const u_log2 = fmaf(kLog2E, g, bias_log2);
    if constexpr (kGate == DecayGate::kSoftplus) {
      return exp2_approx(-rate * softplus_log2<Element>(u_log2));
    } else if constexpr (kGate == DecayGate::kLowerBound) {
      return exp2_approx(kLog2E * lower_bound * sigmoid_log2(rate * u_log2));
    } else {
      return exp2_approx(kLog2E * g);
    }
  }

  // What dA_log is a sum of, over some values of g.
  struct Sum {
    float all = 0.f;
    float most = 0.f;  // softplus: the largest softplus(u) / ln(2)

    // Else it is to be a sum of exact_term: of slow gates, and where some are infinite.
    __device__ bool is_exact() const {
      constexpr float kEnough = 2e-3f;  // a thousand times what backward's are off by
      return isfinite(all) && (kGate != DecayGate::kSoftplus || most >= kEnough);
    }
  };

  // dt_bias as backward takes it.
  __device__ float shifted(float bias_log2) const {
    return kGate == DecayGate::kSoftplus ? bias_log2 + rate_log2 : bias_log2;
  }

  // The gradient of the raw projection of that of the decay dg.
  __device__ float backward(float g, float shifted_bias, float dg, Sum& sum) const {
    static_assert(kGate != DecayGate::kNone);
    float const x = fmaf(kLog2E, g, shifted_bias);
    if constexpr (kGate == DecayGate::kSoftplus) {
      // (1 + exp(-u)) / rate has both: 1 / slope, and softplus(u) = u + log(1 + exp(-u)).
      float const y = inverse_rate + exp2_approx(-x), softplus = x + log2_approx(y);
      sum.most = fmaxf(sum.most, softplus);
      sum.all = fmaf(dg, softplus, sum.all);
      return -reciprocal_approx(y) * dg;
    } else {
      float const s = sigmoid_log2(rate * x), slope = fmaf(-s, s, s) * dg;
      sum.all = fmaf(slope, x, sum.all);
      return lower_bound * rate * slope;
    }
  }

  // What is added to Sum::all; nothing where the decay is infinite, whose dg is zero but for rounding.
  __device__ float exact_term(float g, float bias_log2, float dg) const {
    // NaN stays what it is.
    float u = fmaf(kLog2E, g, bias_log2);
    u = u < -kLargest ? -kLargest : u > kLargest ? kLargest : u;
    if constexpr (kGate == DecayGate::kSoftplus) {
      return u == kLargest ? 0.f * dg : dg * softplus_log2<Element>(u);
    } else {
      float const s = sigmoid_log2(rate * u);
      return fmaf(-s, s, s) * dg * u;
    }
  }

  // dA_log, of a sum over tokens and channels.
  __device__ float dA_log(float sum) const {
    return kGate == DecayGate::kSoftplus ? -rate * kLn2 * sum : lower_bound * rate * kLn2 * sum;
  }

 private:
  static constexpr float kSmallest = 1.2e-38f, kLargest = 3.4e38f;
};

// b through its sigmoid, rounded: two neighbours of a row.
template <class Element>
__device__ std::uint32_t activate_erase(GateParams const& gates, std::uint32_t b) {
  float const divisor = gates.erase_scale == 2.f ? 0.5f : 1.f;
  float2 const b2 = unpack<Element>(b);
  return pack<Element>(sigmoid_over(b2.x, divisor), sigmoid_over(b2.y, divisor));
}

}  // namespace gdn2
