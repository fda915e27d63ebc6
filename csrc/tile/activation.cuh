// The functions that make gates and decays of raw projections, by the special function unit.
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

__device__ inline float sigmoid(float x) {
  return __fdividef(1.f, 1.f + exp2_approx(-kLog2E * x));
}

// ln(1 + exp(x)) without overflow; for small exp(-|x|), where 1 + exp(-|x|) would lose it, by its series.
__device__ inline float softplus(float x) {
  float const t = exp2_approx(-kLog2E * fabsf(x));
  float const log1p = t < 1e-3f ? t * (1.f - 0.5f * t) : __log2f(1.f + t) * kLn2;
  return fmaxf(x, 0.f) + log1p;
}

}  // namespace gdn2
