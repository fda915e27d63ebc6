// Between float32 and the 16-bit element types, in pairs of neighbours.
#pragma once

#include <type_traits>

#include "tile/arch.cuh"

namespace gdn2 {

// Whether Element has float32's range: bfloat16 has it, float16 has not.
template <class Element>
constexpr bool kHasFloatRange = std::is_same_v<Element, __nv_bfloat16>;

template <class Element>
struct Pair;  // the packed type of two Elements

template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};
template <>
struct Pair<__half> {
  using Type = __half2;
};

// Rounds to nearest even; lo goes to the lower address.
template <class Element>
__device__ std::uint32_t pack(float lo, float hi) {
  typename Pair<Element>::Type pair;
  if constexpr (std::is_same_v<Element, __half>) {
    pair = __floats2half2_rn(lo, hi);
  } else {
    pair = __floats2bfloat162_rn(lo, hi);
  }
  return *reinterpret_cast<std::uint32_t*>(&pair);
}

template <class Element>
__device__ float2 unpack(std::uint32_t bits) {
  if constexpr (std::is_same_v<Element, __half>) {
    return __half22float2(*reinterpret_cast<__half2*>(&bits));
  } else {
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000)};  // one instruction each
  }
}

template <class Element>
__device__ float4 unpack(uint2 bits) {
  float2 const low = unpack<Element>(bits.x), high = unpack<Element>(bits.y);
  return {low.x, low.y, high.x, high.y};
}

constexpr std::uint32_t kSignsOfPair = 0x80008000, kBfloat16Ones = 0x3f803f80;

__device__ inline uint4 negative_pairs(uint4 x) {
  return {x.x ^ kSignsOfPair, x.y ^ kSignsOfPair, x.z ^ kSignsOfPair, x.w ^ kSignsOfPair};
}

// All bits of what is negative of a pair, and none of the other. (__byte_perm takes no signs.)
__device__ inline std::uint32_t sign_masks(std::uint32_t pair) {
  std::uint32_t masks;
  asm("prmt.b32 %0, %1, 0, 0xbb99;\n" : "=r"(masks) : "r"(pair));
  return masks;
}

// Both products of two pairs, each rounded once.
template <class Element>
__device__ std::uint32_t multiply_pairs(std::uint32_t a, std::uint32_t b) {
  using Type = typename Pair<Element>::Type;
  Type const product = __hmul2(*reinterpret_cast<Type*>(&a), *reinterpret_cast<Type*>(&b));
  return *reinterpret_cast<std::uint32_t const*>(&product);
}

template <class Element>
__device__ uint4 multiply_pairs(uint4 a, uint4 b) {
  return {multiply_pairs<Element>(a.x, b.x), multiply_pairs<Element>(a.y, b.y),
          multiply_pairs<Element>(a.z, b.z), multiply_pairs<Element>(a.w, b.w)};
}

template <class Element>
__device__ std::uint32_t add_pairs(std::uint32_t a, std::uint32_t b) {
  using Type = typename Pair<Element>::Type;
  Type const sum = __hadd2(*reinterpret_cast<Type*>(&a), *reinterpret_cast<Type*>(&b));
  return *reinterpret_cast<std::uint32_t const*>(&sum);
}

// a*b + c of two pairs, rounded once.
template <class Element>
__device__ std::uint32_t multiply_add_pairs(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  using Type = typename Pair<Element>::Type;
  Type const sum =
      __hfma2(*reinterpret_cast<Type*>(&a), *reinterpret_cast<Type*>(&b), *reinterpret_cast<Type*>(&c));
  return *reinterpret_cast<std::uint32_t const*>(&sum);
}

// A float32 factor of pairs, whose products are within 2^-17 of once rounded.
//
// Of bfloat16, as a sum of two: two instructions a pair where it would be five through float32.
template <class Element>
struct alignas(8) PairFactor {
  std::uint32_t high, low;

  PairFactor() = default;
  __device__ explicit PairFactor(float x) : high(pack<Element>(x, x)) {
    float const rest = x - unpack<Element>(high).x;
    low = pack<Element>(rest, rest);
  }
  __device__ float value() const { return unpack<Element>(high).x + unpack<Element>(low).x; }
  __device__ std::uint32_t times(std::uint32_t pair) const {
    return multiply_add_pairs<Element>(pair, high, multiply_pairs<Element>(pair, low));
  }
};

// float16 has not the range for that.
template <>
struct PairFactor<__half> {
  float x;

  PairFactor() = default;
  __device__ explicit PairFactor(float x_) : x(x_) {}
  __device__ float value() const { return x; }
  __device__ std::uint32_t times(std::uint32_t pair) const {
    float2 const pair2 = unpack<__half>(pair);
    return pack<__half>(x * pair2.x, x * pair2.y);
  }
};

template <class Element>
__device__ uint4 multiply_pairs(uint4 a, PairFactor<Element> const& b) {
  return {b.times(a.x), b.times(a.y), b.times(a.z), b.times(a.w)};
}

template <class Element>
__device__ Element round_to(float x) {
  if constexpr (std::is_same_v<Element, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

}  // namespace gdn2
