// The functions that make gates and decays of raw projections, by the special function unit: few of its instructions, for
// it takes one of a warp every eight cycles.
#pragma once

#include "tile/arch.cuh"

namespace gdn2 {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// sigmoid(u), x = u / ln(2)
__device__ inline float sigmoid_log2(float x) {
  return reciprocal_approx(1.f + exp2_approx(-x));
}
// sigmoid(x) / divisor, which is a power of two
__device__ inline float sigmoid_over(float x, float divisor) {
  return reciprocal_approx(fmaf(divisor, exp2_approx(-kLog2E * x), divisor));
}
__device__ inline float sigmoid(float x) {
  return sigmoid_log2(kLog2E * x);
}
__device__ inline float2 sigmoid(float2 x) {
  return {sigmoid(x.x), sigmoid(x.y)};
}

// log2(1 + t) for t in [0, 1], within 1.5e-6 of its own size however small t is.
__device__ inline float log2_1p(float t) {
  float p = 0.020401183515787125f;
  p = fmaf(p, t, -0.09579755365848541f);
  p = fmaf(p, t, 0.2152845710515976f);
  p = fmaf(p, t, -0.3390890657901764f);
  p = fmaf(p, t, 0.4776684045791626f);
  p = fmaf(p, t, -0.7211594581604004f);
  p = fmaf(p, t, 1.4426932334899902f);
  return p * t;
}

// softplus(u) / ln(2) = log2(1 + 2^x), x = u / ln(2), without overflow.
__device__ inline float softplus_log2(float x) {
  return fmaxf(x, 0.f) + log2_1p(exp2_approx(-fabsf(x)));
}

}  // namespace gdn2
