// What recurrent.cu needs of a token: where a CTA works, the token's inputs from memory to shared memory,
// outputs back.
#pragma once

#include <cutlass/arch/barrier.h>

#include "api/recurrent.h"
#include "tile/convert.cuh"
#include "tile/exact_activation.cuh"

namespace gdn2::recurrent {

constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kNoSlot = -1;

// The thread's index among those of its slice of value columns.
template <class Cfg>
__device__ int thread_of_slice() {
  return Cfg::kSlices == 1 ? threadIdx.x : threadIdx.x % Cfg::kThreads;
}

// A barrier of the threads of a slice.
template <class Cfg>
__device__ void sync_slice() {
  if constexpr (Cfg::kSlices == 1) {
    __syncthreads();
  } else {
    cutlass::arch::NamedBarrier::sync(Cfg::kThreads, threadIdx.x / Cfg::kThreads);
  }
}

// Where a slice's threads work. Tokens and slot come from memory, where sequences are packed or slots are
// given.
struct Work {
  int sequence, value_head, head, gate_head, first_column, batch;
  int first_token = 0, num_tokens = 0;
  int slot = kNoSlot;  // that the state comes from; without one no state is touched, and output rows are zero
};

// Two 32-bit factors: one instruction, the addition that follows included.
__device__ inline std::int64_t wide_product(int a, std::int32_t b) {
  return static_cast<std::int64_t>(a) * b;
}

__device__ inline std::int64_t load_index(IndexTensor const& x, int sequence, int position = 0) {
  auto const* const at =
      x.data + wide_product(sequence, x.stride_sequence) + wide_product(position, x.stride_position);
  return x.is_64_bit ? *reinterpret_cast<std::int64_t const*>(at)
                     : *reinterpret_cast<std::int32_t const*>(at);
}

__device__ inline int slot_of_index(RecurrentParams const& params, std::int64_t index) {
  return index >= 0 && index < params.shape.num_slots ? static_cast<int>(index) : kNoSlot;
}

// What follows from the parameters alone.
__device__ inline Work find_work(RecurrentParams const& params, int sequence, int value_head,
                                 int first_column) {
  CallShape const& shape = params.shape;
  Work work;
  work.first_column = first_column;
  work.value_head = value_head;
  work.sequence = sequence;
  bool const grouped = shape.num_heads != shape.num_value_heads;
  work.head = grouped ? work.value_head / (shape.num_value_heads / shape.num_heads) : work.value_head;
  work.gate_head = shape.num_gate_heads == shape.num_value_heads ? work.value_head : work.head;
  work.batch = params.cu_seqlens.data != nullptr ? 0 : work.sequence;
  return work;
}

__device__ inline void find_tokens(Work& work, RecurrentParams const& params) {
  if (params.cu_seqlens.data == nullptr) {
    work.num_tokens = params.shape.seqlen;
    return;
  }
  std::int64_t const begin = load_index(params.cu_seqlens, work.sequence);
  std::int64_t const end = load_index(params.cu_seqlens, work.sequence + 1);
  if (begin >= 0 && begin <= end && end <= params.shape.seqlen) {
    work.first_token = static_cast<int>(begin);
    work.num_tokens = static_cast<int>(end - begin);
  }
}

// The index of the slot that a sequence starts from.
__device__ inline std::int64_t load_start_index(RecurrentParams const& params, int sequence) {
  int position = 0;
  if (params.num_accepted_tokens.data != nullptr) {
    std::int64_t const accepted = load_index(params.num_accepted_tokens, sequence);
    position = accepted < 1 ? 0 : static_cast<int>(min(accepted, std::int64_t{params.index_columns})) - 1;
  }
  return load_index(params.state_indices, sequence, position);
}

// ---- packed sequences: offsets that nobody has checked ----------------------------------------------------

__device__ inline bool offsets_in_order(RecurrentParams const& params, int n) {
  std::int64_t const begin = load_index(params.cu_seqlens, n), end = load_index(params.cu_seqlens, n + 1);
  return begin <= end && end <= params.shape.seqlen && (n > 0 || begin == 0);
}

// Offsets count up to the first that is out of order or out of range. By all threads.
__device__ inline bool well_formed_up_to(RecurrentParams const& params, int sequence) {
  bool malformed = false;
  for (int n = threadIdx.x; n <= sequence; n += blockDim.x) {
    malformed = malformed || !offsets_in_order(params, n);
  }
  return __syncthreads_or(malformed) == 0;
}

// The end of the last sequence that is well-formed.
__device__ inline int well_formed_end(RecurrentParams const& params, bool all_well_formed) {
  int n = all_well_formed ? params.shape.num_sequences : 0;
  while (n < params.shape.num_sequences && offsets_in_order(params, n)) {
    ++n;
  }
  return n == 0 ? 0 : static_cast<int>(load_index(params.cu_seqlens, n));
}

// ---- tokens -----------------------------------------------------------------------------------------------

// Where a channel of a token and head lies.
__device__ inline std::uint8_t* address(StridedTokens const& x, int batch, int token, int head, int channel) {
  return x.data + batch * x.stride_batch + wide_product(token, x.stride_token) +
         wide_product(head, x.stride_head) + wide_product(channel, x.stride_channel);
}

__device__ inline float to_float(std::uint32_t bits, ElementType element) {
  return element == ElementType::kFloat32   ? __uint_as_float(bits)
         : element == ElementType::kFloat16 ? __half2float(__ushort_as_half(static_cast<std::uint16_t>(bits)))
                                            : __uint_as_float(bits << 16);
}

__device__ inline std::uint32_t load_16_bits(std::uint8_t const* address) {
  return __ldcg(reinterpret_cast<std::uint16_t const*>(address));
}

// Where a thread reads a token: its channel of q, k, b and g, its column of v and w.
struct TokenAddresses {
  std::uint8_t *q, *k, *b, *g, *v, *w;

  // thread: of the slice
  __device__ TokenAddresses(RecurrentParams const& params, Work const& work, int thread)
      : q(address(params.q, work.batch, 0, work.head, thread)),
        k(address(params.k, work.batch, 0, work.head, thread)),
        b(address(params.b, work.batch, 0, work.gate_head, thread)),
        g(address(params.g, work.batch, 0, work.gate_head, thread)),
        v(address(params.v, work.batch, 0, work.value_head, work.first_column + thread)),
        w(address(params.w, work.batch, 0, work.value_head, work.first_column + thread)) {}

  __device__ void advance(RecurrentParams const& params, int num_tokens) {
    q += wide_product(num_tokens, params.q.stride_token);
    k += wide_product(num_tokens, params.k.stride_token);
    b += wide_product(num_tokens, params.b.stride_token);
    g += wide_product(num_tokens, params.g.stride_token);
    v += wide_product(num_tokens, params.v.stride_token);
    w += wide_product(num_tokens, params.w.stride_token);
  }
};

// A thread's part of a token as it lies in memory: asked for one token ahead.
struct RawToken {
  std::uint32_t q = 0, k = 0, b = 0, g = 0, v = 0, w = 0;
  int slot = kNoSlot;  // where the state after this token goes, if every position has a slot of its own
};

// Token t of the sequence.
template <class Cfg>
__device__ RawToken load_token(TokenAddresses const& at, RecurrentParams const& params, Work const& work,
                               int t) {
  RawToken raw;
  int const channel = thread_of_slice<Cfg>(), column = channel;
  if (channel < params.shape.dim_k) {
    raw.q = load_16_bits(at.q);
    raw.k = load_16_bits(at.k);
    raw.b = load_16_bits(at.b);
    bool const wide = params.gate_element == ElementType::kFloat32;
    raw.g = wide ? __ldcg(reinterpret_cast<std::uint32_t const*>(at.g)) : load_16_bits(at.g);
  }
  if (column < Cfg::kColumns && work.first_column + column < params.shape.dim_v) {
    raw.v = load_16_bits(at.v);
    raw.w = load_16_bits(at.w);
  }
  if (t < params.index_columns) {
    raw.slot = slot_of_index(params, load_index(params.state_indices, work.sequence, t));
  }
  return raw;
}

// The decay gate of a thread's channel. What does not change with the token is read once.
struct DecayRate {
  float rate = 1.f, bias = 0.f;

  __device__ DecayRate(RecurrentParams const& params, Work const& work, int channel) {
    GateParams const& gates = params.gates;
    if (gates.decay_gate == DecayGate::kNone || channel >= params.shape.dim_k) {
      return;
    }
    if (gates.A_log != nullptr) {
      rate = expf(gates.A_log[work.head]);
    }
    if (gates.dt_bias != nullptr) {
      bias = gates.dt_bias[work.head * params.shape.dim_k + channel];
    }
  }

  __device__ float log_decay(float g, GateParams const& gates) const {
    if (gates.decay_gate == DecayGate::kSoftplus) {
      return -rate * exact_softplus(g + bias);
    }
    return gates.decay_gate == DecayGate::kLowerBound ? gates.lower_bound * exact_sigmoid(rate * (g + bias))
                                                      : g;
  }
};

// What the pass over the state needs of a token.
template <class Cfg>
struct TokenStorage {
  // alpha, E, q and k of every channel: side by side for each channel where a thread owns channels far apart
  // (K first), and one after the other where it owns neighbours.
  float4 channels[Cfg::kDimK];
  float z[Cfg::kColumns];        // w*v
  float4 products[Cfg::kWarps];  // q.k, q.q and k.k over a warp's channels
};

// alpha, E, q, k, w*v and the products of q and k to shared memory.
template <class Cfg>
__device__ void publish(TokenStorage<Cfg>& out, RawToken const& raw, DecayRate const& decay,
                        RecurrentParams const& params) {
  ElementType const element = params.shape.element;
  GateParams const& gates = params.gates;
  int const channel = thread_of_slice<Cfg>(), column = channel;
  float const q = to_float(raw.q, element), k = to_float(raw.k, element);
  float b = to_float(raw.b, element);
  if (gates.use_gate_sigmoid) {
    b = gates.erase_scale * exact_sigmoid(b);
  }
  float4 const x{decay_factor(decay.log_decay(to_float(raw.g, params.gate_element), gates)), b * k, q, k};
  if constexpr (Cfg::kVFirst) {
    auto* const rows = reinterpret_cast<float*>(out.channels);
    rows[channel] = x.x;
    rows[Cfg::kDimK + channel] = x.y;
    rows[2 * Cfg::kDimK + channel] = x.z;
    rows[3 * Cfg::kDimK + channel] = x.w;
  } else {
    out.channels[channel] = x;
  }
  float4 products{sum_over_warp(q * k), 0.f, 0.f, 0.f};
  if (gates.use_qk_l2norm) {
    products.y = sum_over_warp(q * q);
    products.z = sum_over_warp(k * k);
  }
  if (channel % kWarpThreads == 0) {
    out.products[channel / kWarpThreads] = products;
  }
  if (column < Cfg::kColumns) {
    float const w = to_float(raw.w, element);
    out.z[column] = to_float(raw.v, element) * (gates.use_gate_sigmoid ? exact_sigmoid(w) : w);
  }
}

// q.k, and what q and k are multiplied by: scale over the norm of q, one over the norm of k.
struct TokenScales {
  float qk, q, k;

  template <class Cfg>
  __device__ TokenScales(TokenStorage<Cfg> const& token, RecurrentParams const& params) {
    float4 sum = token.products[0];
#pragma unroll
    for (int warp = 1; warp < Cfg::kWarps; ++warp) {
      float4 const part = token.products[warp];
      sum = {sum.x + part.x, sum.y + part.y, sum.z + part.z, 0.f};
    }
    constexpr float kEps = 1e-6f;
    bool const normalize = params.gates.use_qk_l2norm;
    qk = sum.x;
    q = normalize ? params.scale * __frsqrt_rn(sum.y + kEps) : params.scale;
    k = normalize ? __frsqrt_rn(sum.z + kEps) : 1.f;
  }
};

__device__ inline std::uint16_t element_bits(float x, ElementType element) {
  return element == ElementType::kFloat16 ? __half_as_ushort(__float2half_rn(x))
                                          : __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

__device__ inline void store_output(RecurrentParams const& params, Work const& work, int token, int column,
                                    float value) {
  int const v = work.first_column + column;
  if (v < params.shape.dim_v) {
    auto* const o = address(params.o, work.batch, token, work.value_head, v);
    *reinterpret_cast<std::uint16_t*>(o) = element_bits(value, params.shape.element);
  }
}

// Rows [first, end) of o, in the CTA's columns.
template <class Cfg>
__device__ void fill_outputs(RecurrentParams const& params, Work const& work, int first, int end,
                             float value) {
  constexpr int kRows = Cfg::kThreads / Cfg::kColumns;
  for (int token = first + thread_of_slice<Cfg>() / Cfg::kColumns; token < end; token += kRows) {
    store_output(params, work, token, thread_of_slice<Cfg>() % Cfg::kColumns, value);
  }
}

}  // namespace gdn2::recurrent
