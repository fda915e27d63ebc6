// From the inputs' tiles to a thread's registers in `prepare`: alpha, q, k and E, through gates, sigmoids and
// norms where they are asked for.
#pragma once

#include <cstddef>

#include "sm90/gates.cuh"
#include "sm90/prepare_parts.cuh"
#include "tile/activation.cuh"
#include "tile/convert.cuh"
#include "tile/row_dots.cuh"

namespace gdn2::prepare {

// What scales a thread's rows from first_row on, when it goes through them: read 16 bytes at a time.
template <class Scale>
struct RowScales {
  static constexpr int kCount = 16 / sizeof(Scale);
  alignas(16) Scale some[kCount];

  __device__ Scale const& of(Scale const (&scales)[kChunk], int first_row, int i) {
    if (i % kCount == 0) {
      *reinterpret_cast<uint4*>(some) = *reinterpret_cast<uint4 const*>(&scales[first_row + i]);
    }
    return some[i % kCount];
  }
};

// What the decay gate of a thread's two channels is made with, from global memory.
struct GateOfThread {
  float bias[2] = {0.f, 0.f}, A_log = 0.f;

  __device__ GateOfThread(PrepareParams const& params, int head, int channel) {
    GateParams const& gates = params.gates;
    int const dim_k = params.shape.dim_k;
    if (gates.dt_bias != nullptr) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (channel + c < dim_k) {
          bias[c] = gates.dt_bias[static_cast<std::int64_t>(head) * dim_k + channel + c];
        }
      }
    }
    if (gates.A_log != nullptr) {
      A_log = gates.A_log[head];
    }
  }
};

// g of a thread's channels, as it came.
template <class Cfg>
__device__ void read_g(float (&g)[kBlock][2], SharedStorage<Cfg>& smem, ElementType gate_element) {
  ThreadPlace const at = thread_place<Cfg>();
  int const first_row = at.block * kBlock;
  auto const read = [&](auto g_of) {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      float2 const both = g_of(i);
      g[i][0] = both.x;
      g[i][1] = both.y;
    }
  };
  if (!Cfg::kAny || gate_element == ElementType::kFloat32) {
    LaneRows<std::uint32_t> const pairs{cute::cast_smem_ptr_to_uint(smem.in.g[2 * at.box + at.lane / 16]) +
                                        swizzled_offset(first_row, at.lane % 16 / 2) + at.lane % 2 * 8};
    read([&](int i) { return load_float2(pairs[i]); });
  } else {
    auto const pairs = pairs_of(smem.in.g[2 * at.box], first_row, at.lane);
    read([&](int i) { return unpack<typename Cfg::Element>(load_pair(pairs[i])); });
  }
}

// q, k over its norm where that is asked for, and E: 0 in rows that are not the sequence's. Where b goes
// through its sigmoid it stands for E until activate_erase_of.
template <class Cfg>
__device__ void read_pairs(ThreadInputs<Cfg>& x, SharedStorage<Cfg>& smem, int num_rows) {
  using Element = typename Cfg::Element;
  using In = decltype(smem.in);
  ThreadPlace const at = thread_place<Cfg>();
  int const first_row = at.block * kBlock;
  auto const pairs = pairs_of(smem.in.q[at.box], first_row, at.lane);
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    x.E[i] = load_pair(pairs[i] + (offsetof(In, b) - offsetof(In, q)));
  }
  RowScales<PairFactor<Element>> inverse_norms;
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    x.q[i] = load_pair(pairs[i]);
    x.k[i] = load_pair(pairs[i] + (offsetof(In, k) - offsetof(In, q)));
    if constexpr (Cfg::kNormalize) {
      x.k[i] = inverse_norms.of(smem.k_scale, first_row, i).times(x.k[i]);
    }
    if constexpr (!Cfg::kSigmoid) {
      x.E[i] = multiply_pairs<Element>(x.E[i], x.k[i]);
    }
  }
  if (first_row + kBlock > num_rows) {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      if (first_row + i >= num_rows) {
        x.q[i] = x.k[i] = x.E[i] = 0u;
      }
    }
  }
}

// E of token i, through the sigmoid of b: where it is first needed, among what else is made of it, for the
// special function unit is slower than the others.
template <class Cfg>
__device__ void activate_erase_of(ThreadInputs<Cfg>& x, GateParams const& gates, int i) {
  using Element = typename Cfg::Element;
  if constexpr (Cfg::kSigmoid) {
    x.E[i] = multiply_pairs<Element>(activate_erase<Element>(gates, x.E[i]), x.k[i]);
  }
}

// alpha: 1 in rows that are not the sequence's, whatever lies there.
template <class Cfg>
__device__ void read_decays(ThreadInputs<Cfg>& x, SharedStorage<Cfg>& smem, PrepareParams const& params,
                            GateOfThread const& gate, int num_rows) {
  using Element = typename Cfg::Element;
  read_g(x.alpha, smem, params.gate_element);
  DecayFunction<Element, Cfg::kGate> const decay(params.gates, gate.A_log);
  float const bias_log2[2] = {kLog2E * gate.bias[0], kLog2E * gate.bias[1]};
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      x.alpha[i][c] = decay.alpha(decay.activation(x.alpha[i][c], bias_log2[c]));
    }
  }
  int const first_row = thread_place<Cfg>().block * kBlock;
  if (first_row + kBlock > num_rows) {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      if (first_row + i >= num_rows) {
        x.alpha[i][0] = x.alpha[i][1] = 1.f;
      }
    }
  }
}

// f(row, index) of the rows whose products the lane has.
template <class F>
__device__ void for_rows_of_lane(ThreadPlace at, F f) {
  if (has_rows(at.lane)) {
    int const row = at.block * kBlock + at.lane / 4;
    f(row, 0);
    f(row + 8, 1);
  }
  __syncwarp();  // lanes without rows wait for the others
}

// 1 / norm of a row of q, or of k, whose product with itself is `dot`; zero if it is not the sequence's.
// num_rows is work.num_rows, not asked for again behind every store.
__device__ inline float inverse_norm(PrepareParams const& params, Work const& work, int num_rows, int row,
                                     float dot, bool is_k) {
  float const inverse = row < num_rows ? reciprocal_sqrt_approx(dot + 1e-6f) : 0.f;
  if (params.row_norms != nullptr) {
    params.row_norms[(2 * work.tile + is_k) * kChunk + row] = inverse;
  }
  return inverse;
}

// The scales of rows whose norms the forward has kept: of q by the first warpgroup, of k by the last.
template <class Cfg>
__device__ void read_norms(SharedStorage<Cfg>& smem, PrepareParams const& params, Work const& work) {
  ThreadPlace const at = thread_place<Cfg>();
  if (at.lane < kBlock) {
    int const row = at.block * kBlock + at.lane;
    float const* const norms = params.row_norms + work.tile * 2 * kChunk + row;
    if (at.box == 0) {
      smem.q_scale[row] = params.scale * norms[0];
    }
    if (at.box == Cfg::kBoxes - 1) {
      smem.k_scale[row] = PairFactor<typename Cfg::Element>(norms[kChunk]);
    }
  }
  __syncwarp();
}

// The scales of q's rows and the diagonal of q k^T, by the first warpgroup.
template <class Cfg>
__device__ void scale_q_rows(SharedStorage<Cfg>& smem, PrepareParams const& params, Work const& work) {
  using In = decltype(smem.in);
  constexpr int kFromQToK = offsetof(In, k) - offsetof(In, q);
  ThreadPlace const at = thread_place<Cfg>();
  int const num_rows = work.num_rows;
  RowDots const dots = row_dots<typename Cfg::Element, Cfg::kBoxes, Cfg::kNormalize, true>(
      smem.in.q, kFromQToK, at.block * kBlock);
  for_rows_of_lane(at, [&](int row, int i) {
    bool const is_own = row < num_rows;
    float const inverse = Cfg::kNormalize ? inverse_norm(params, work, num_rows, row, dots.self[i], false)
                          : is_own        ? 1.f
                                          : 0.f;
    smem.q_scale[row] = params.scale * inverse;
    smem.diagonal[row] = is_own ? dots.other[i] : 0.f;
  });
}

// 1 / norms of k's rows, by the last warpgroup.
template <class Cfg>
__device__ void scale_k_rows(SharedStorage<Cfg>& smem, PrepareParams const& params, Work const& work) {
  using Element = typename Cfg::Element;
  ThreadPlace const at = thread_place<Cfg>();
  int const num_rows = work.num_rows;
  RowDots const dots = row_dots<Element, Cfg::kBoxes, true, false>(smem.in.k, 0, at.block * kBlock);
  for_rows_of_lane(at, [&](int row, int i) {
    smem.k_scale[row] = PairFactor<Element>(inverse_norm(params, work, num_rows, row, dots.self[i], true));
  });
}

}  // namespace gdn2::prepare
