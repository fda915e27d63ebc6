// The functions of activation.cuh to float32's own accuracy, where errors add up over thousands of tokens: a
// few more instructions a channel, and none a state element.
#pragma once

#include "tile/arch.cuh"

namespace gdn2 {

// exp(x) for a decay x <= 0, within 0.7 units in the last place and without the bias of ex2.approx, which a
// slowly decaying state would collect. exp(-inf) = 0; NaN stays NaN.
__device__ inline float decay_factor(float x) {
  float const j = rintf(x * 1.4426950408889634f);
  // f = x - j ln(2), |f| <= ln(2) / 2, with ln(2) in two parts
  float f = fmaf(j, -0.693145751953125f, x);
  f = fmaf(j, -1.428606765330187e-06f, f);
  // (exp(f) - 1) / f
  float p = 1.f / 5040.f;
  p = fmaf(p, f, 1.f / 720.f);
  p = fmaf(p, f, 1.f / 120.f);
  p = fmaf(p, f, 1.f / 24.f);
  p = fmaf(p, f, 1.f / 6.f);
  p = fmaf(p, f, 0.5f);
  p = fmaf(p, f, 1.f);
  float const power_of_two = __int_as_float((min(static_cast<int>(j), 128) + 127) << 23);
  return x < -87.f ? 0.f : fmaf(p, f, 1.f) * power_of_two;
}

__device__ inline float exact_sigmoid(float x) {
  return __frcp_rn(1.f + expf(-x));
}

// ln(1 + exp(x)) without overflow
__device__ inline float exact_softplus(float x) {
  return fmaxf(x, 0.f) + log1pf(expf(-fabsf(x)));
}

}  // namespace gdn2
