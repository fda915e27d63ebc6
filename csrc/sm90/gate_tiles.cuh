// Gates and norms on tiles of g, k and b in shared memory, in passes over pieces of 16 bytes, which do not
// take the registers of what follows.
#pragma once

#include <cmath>
#include <type_traits>

#include "params.h"
#include "tile/activation.cuh"
#include "tile/convert.cuh"
#include "tile/mma.cuh"
#include "tile/tma.cuh"

namespace gdn2 {

// Whether g is anything but the decay in float32.
__host__ __device__ inline bool needs_activation(GateParams const& gates, ElementType gate_element) {
  return gates.decay_gate != DecayGate::kNone || gate_element != ElementType::kFloat32;
}

// Whether anything is asked for that the plain kernels do not make.
inline bool is_fused(GateParams const& gates, ElementType gate_element) {
  return gates.use_qk_l2norm || gates.use_gate_sigmoid || needs_activation(gates, gate_element);
}

// What the decay gate of a key head has, in shared memory.
template <int kChannels>
struct GateParameters {
  alignas(16) float bias_log2[kChannels];  // dt_bias / ln(2), zero where there is none
  float A_log;

  // Of four neighbours.
  __device__ float4 bias_of(int channel) const {
    return *reinterpret_cast<float4 const*>(&bias_log2[channel]);
  }
};

// A thread's share of them on its way there.
template <int kChannels>
struct GateParameterLoad {
  float bias, A_log;

  __device__ void load(GateParams const& gates, int head, int first_channel, int dim_k, int thread) {
    int const channel = first_channel + thread;
    bool const has_bias = gates.dt_bias != nullptr && thread < kChannels && channel < dim_k;
    bias = has_bias ? gates.dt_bias[static_cast<std::int64_t>(head) * dim_k + channel] : 0.f;
    A_log = gates.A_log != nullptr && thread == 0 ? gates.A_log[head] : 0.f;
  }
  __device__ void store(GateParameters<kChannels>& to, int thread) const {
    if (thread < kChannels) {
      to.bias_log2[thread] = kLog2E * bias;
    }
    if (thread == 0) {
      to.A_log = A_log;
    }
  }
};

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

// Eight neighbours of a row.
struct KeyPiece {
  uint4 k, E;
};

// k over its norm and E = b*k, through the sigmoid of b: of what is asked for.
template <class Element, bool kNormalize, bool kSigmoid>
__device__ KeyPiece make_key_piece(GateParams const& gates, uint4 k8, uint4 b8, float inverse_norm) {
  if constexpr (!kNormalize && !kSigmoid) {
    return {k8, multiply_pairs<Element>(b8, k8)};
  }
  float const divisor = gates.erase_scale == 2.f ? 0.5f : 1.f;
  std::uint32_t const b[4] = {b8.x, b8.y, b8.z, b8.w};
  std::uint32_t k[4] = {k8.x, k8.y, k8.z, k8.w}, E[4];
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    float2 k2 = unpack<Element>(k[p]);
    if constexpr (kNormalize) {
      k2 = {k2.x * inverse_norm, k2.y * inverse_norm};
      k[p] = pack<Element>(k2.x, k2.y);
    }
    if constexpr (kSigmoid) {
      float2 const b2 = unpack<Element>(b[p]);
      E[p] = pack<Element>(sigmoid_over(b2.x, divisor) * k2.x, sigmoid_over(b2.y, divisor) * k2.y);
    } else {
      E[p] = multiply_pairs<Element>(b[p], k[p]);
    }
  }
  return {{k[0], k[1], k[2], k[3]}, {E[0], E[1], E[2], E[3]}};
}

// f(whether rows are normalised, whether b has a sigmoid), as constants: one branch, and none a piece.
template <class F>
__device__ void with_key_options(GateParams const& gates, F f) {
  if (gates.use_qk_l2norm) {
    gates.use_gate_sigmoid ? f(std::true_type{}, std::true_type{}) : f(std::true_type{}, std::false_type{});
  } else {
    gates.use_gate_sigmoid ? f(std::false_type{}, std::true_type{}) : f(std::false_type{}, std::false_type{});
  }
}

// g of 16 tokens and 64 channels becomes alpha: by a warp, for itself. float32 lies in two boxes of 32
// channels, 16-bit g in the first of them. A lane has a row of eight, and of each box two pieces of four
// channels. kUnroll of the two rounds are one.
template <class Element, int kUnroll, int kChannels>
__device__ void activate_rows(std::uint8_t* boxes, int first_row, GateParams const& gates,
                              GateParameters<kChannels> const& parameters, int first_channel,
                              ElementType element) {
  constexpr int kBytes = kChunk * kBoxRowBytes;  // of a box
  constexpr int kPieces = 4;                     // of a lane in a row: two of either box
  int const lane = lane_index(), row = first_row + lane % 8;
  std::uint32_t const wide = swizzled_offset(row, lane / 8), narrow = swizzled_offset(row, lane / 16);
  float4 bias[kPieces];
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    bias[p] = parameters.bias_of(first_channel + 16 * p + lane / 8 * 4);
  }
  with_decay_function(gates, parameters.A_log, [&](auto decay) {
#pragma unroll kUnroll
    for (int i = 0; i < 2; ++i, boxes += 8 * kBoxRowBytes) {
      // The swizzle is a ^ of bits that are zero in where a box begins.
      auto const wide_piece = [&](int p) {
        return reinterpret_cast<float4*>(boxes + p / 2 * kBytes + (wide ^ p % 2 * 64));
      };
      float4 g[kPieces];
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        if (element == ElementType::kFloat32) {
          g[p] = *wide_piece(p);
        } else {
          g[p] =
              unpack<Element>(*reinterpret_cast<uint2 const*>(boxes + (narrow ^ p * 32) + lane / 8 % 2 * 8));
        }
      }
      __syncwarp();  // alpha of a row comes to lie where its 16-bit g is
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        *wide_piece(p) = {decay.alpha(g[p].x, bias[p].x), decay.alpha(g[p].y, bias[p].y),
                          decay.alpha(g[p].z, bias[p].z), decay.alpha(g[p].w, bias[p].w)};
      }
    }
  });
}

// A thread's pieces of a tile of g [64 tokens, 64 channels], float32 or 16-bit as in activate_rows: the same
// four channels of every kRows-th token.
template <class Element, int kThreads>
struct GatePieces {
  static constexpr int kPieces = kBoxColumns / 4, kRows = kThreads / kPieces;
  static_assert(kRows % 8 == 0);  // so that the pieces lie in the same place of their rows

  int first_row, channel;
  std::uint8_t const *wide, *narrow;  // float32 and 16-bit

  template <class Boxes>
  __device__ GatePieces(Boxes const& boxes, unsigned thread) {
    int const piece = static_cast<int>(thread % kPieces);
    first_row = static_cast<int>(thread / kPieces);
    channel = 4 * piece;
    wide = boxes[piece / 8] + swizzled_offset(first_row, piece % 8);
    narrow = boxes[0] + swizzled_offset(first_row, piece / 2) + piece % 2 * 8;
  }

  // Of token first_row + i * kRows.
  __device__ float4 read(int i, bool is_wide) const {
    if (is_wide) {
      return *reinterpret_cast<float4 const*>(wide + i * kRows * kBoxRowBytes);
    }
    return unpack<Element>(*reinterpret_cast<uint2 const*>(narrow + i * kRows * kBoxRowBytes));
  }
};

}  // namespace gdn2
