// The functions that make gates, decays and norms of raw projections, by the special function unit: few of
// its instructions, for it takes one of a warp every eight cycles.
#pragma once

#include <type_traits>

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

__device__ inline float reciprocal_sqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
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
// Of all side by side: given one after the other, each waits for the one before where registers are short.
template <int kCount>
__device__ void make_sigmoids(float2 (&x)[kCount]) {
#pragma unroll
  for (float2& y : x) {
    y = {1.f + exp2_approx(-kLog2E * y.x), 1.f + exp2_approx(-kLog2E * y.y)};
  }
#pragma unroll
  for (float2& y : x) {
    y = {reciprocal_approx(y.x), reciprocal_approx(y.y)};
  }
}

// log2(1 + t) for t in [0, 1], within 6e-5 of its own size however small t is; 4e-4 for bfloat16. A factor
// exp(G) is off by up to 2e-5 or 1.5e-4 then (|G| exp(G) < 0.37): a tenth of what rounding takes from factors
// near 1.
template <class Element>
__device__ float log2_1p(float t) {
  float p;
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    p = -0.10725444f;
    p = fmaf(p, t, 0.36648068f);
    p = fmaf(p, t, -0.70174731f);
    p = fmaf(p, t, 1.4421281f);
  } else {
    p = 0.05965154990553856f;
    p = fmaf(p, t, -0.22711944580078125f);
    p = fmaf(p, t, 0.44189882278442383f);
    p = fmaf(p, t, -0.7169874310493469f);
    p = fmaf(p, t, 1.4426132440567017f);
  }
  return p * t;
}

// softplus(u) / ln(2) = log2(1 + 2^x), x = u / ln(2), without overflow.
template <class Element>
__device__ float softplus_log2(float x) {
  return fmaxf(x, 0.f) + log2_1p<Element>(exp2_approx(-fabsf(x)));
}

// factor * sigmoid(u) of y = softplus(u) / ln(2), factor <= 0: 1 - 2^-y, or the first two terms of its series
// where that would leave rounding only. The series is less than the function, and so is the difference, which
// has more taken from it than exp2_approx is off: the greater of both is within 5e-5 of its size.
__device__ inline float times_sigmoid_of_softplus(float factor, float y) {
  constexpr float kMargin = 0x1p-21f;
  float const difference = fmaf(-factor, exp2_approx(-y), (1.f - kMargin) * factor);
  float const series = y * fmaf(-0.5f * kLn2 * kLn2 * factor, y, kLn2 * factor);
  return fminf(difference, series);
}

}  // namespace gdn2
