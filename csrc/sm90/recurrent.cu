// recurrent: the recurrence token by token, for decoding.
//
//     S = Diag(alpha) S                E = b*k
//     r = S^T E      p = S^T q         both reads of the decayed state in one pass, one sum over channels
//     u = w*v - r    S = S + k u^T
//     o = scale (p + (q.k) u)          which is scale S^T q of the new state
//
// Norms of q and k are taken out of the sums: k stays raw, u is divided by the norm of k, o by that of q.
//
// Grid: one CTA for a slice of value columns, a value head and a sequence, slices fastest. Its slice of the
// state [kDimK, kColumns] is read once, stays in registers over all tokens of the sequence, and is written
// once (or after every token, where every position has a slot of its own).
// Roles: none. A thread owns 32 elements of a wide slice, in pieces of 16 bytes (64 of a packed one), and
// besides makes alpha, E and its part of q.k and of the norms for one channel, and w*v for one value column.
// Registers: 80 (one token), 96 (packed) or 128 (any number of tokens) of 128 threads; 6, 5 or 4 CTAs an SM.
// Shared memory: the channels of a token, or of two in turn, and the sums of warps: 2 to 6 KB.
//
// One token:
//     addresses | earlier kernels end | indices | state and inputs asked for | next kernel may start |
//     channels | barrier | decay, r and p | sums over lanes (K first: barrier, sums over warps) | u, o, S |
//     state out
// Bytes in flight are what counts: all of a CTA's state is asked for before anything is computed with it, and
// an SM has 96 KB of float32 state under way (80 KB of packed bfloat16).
#include <cuda_runtime.h>

#include "api/device.h"
#include "api/recurrent.h"
#include "sm90/recurrent_step.cuh"
#include "sm90/recurrent_stream.h"
#include "tile/launch.h"
#include "tile/launch_order.cuh"

namespace gdn2 {
namespace {

using namespace recurrent;

// ---- the kernel -------------------------------------------------------------------------------------------

// Where the state after a token goes in the pool, if anywhere.
__device__ bool goes_to_pool(RecurrentParams const& params, Work const& work, int slot_of_position, int t) {
  return params.inplace &&
         (params.index_columns > 0 ? slot_of_position != kNoSlot : t == work.num_tokens - 1);
}

template <class Cfg>
__device__ void run_tokens(SharedStorage<Cfg>& smem, RecurrentParams const& params, Work const& work,
                           StateSlice<Cfg>& state, std::uint8_t* pool, TokenAddresses at, RawToken raw) {
  DecayRate const decay(params, work, threadIdx.x);
  bool const slot_per_position = params.index_columns > 0;
  int const num_tokens = Cfg::kOneToken ? min(work.num_tokens, 1) : work.num_tokens;
  for (int t = 0; t < num_tokens; ++t) {
    auto& token = smem.tokens[Cfg::kOneToken ? 0 : t % 2];
    publish(token, raw, decay, params);
    // Orders the token's channels before their reads, and the reads of the token before last and of the last
    // sums before the writes that follow.
    __syncthreads();
    int const slot = slot_per_position ? raw.slot : work.slot;
    if (!Cfg::kOneToken && t + 1 < num_tokens) {
      at.advance(params, 1);
      raw = load_token<Cfg>(at, params, work, t + 1);
    }
    Step<Cfg> step{smem, token, state, TokenScales(token, params)};
    step.run([&](int column, float o) {
      store_output(params, work, work.first_token + t, column, slot == kNoSlot ? 0.f : o);
    });
    if (goes_to_pool(params, work, slot, t)) {
      state.template store<typename Cfg::State>(pool + slot * params.states.stride_slot,
                                                params.states.stride_row, params.shape, work);
    }
  }
}

template <class Cfg>
__global__ void __launch_bounds__(Cfg::kThreads, Cfg::kCtasPerSm)
    recurrent_kernel(__grid_constant__ RecurrentParams const params, int first_sequence) {
  __shared__ SharedStorage<Cfg> smem;
  Work work = find_work(params, first_sequence + blockIdx.z, blockIdx.y, blockIdx.x * Cfg::kColumns);
  bool const packed = params.cu_seqlens.data != nullptr, pooled = params.state_indices.data != nullptr;
  StateSlice<Cfg> state;
  auto* states = state.template address<typename Cfg::State>(params.states, work);
  auto* final_state = state.template address<float>(params.final_state, work);
  TokenAddresses at(params, work, threadIdx.x);
  wait_for_earlier_kernels(states, final_state, at.q, at.k, at.b, at.g, at.v, at.w);

  std::int64_t const index = pooled ? load_start_index(params, work.sequence) : work.sequence;
  find_tokens(work, params);
  if (packed) {
    at.advance(params, work.first_token);
  }
  RawToken raw;
  if (pooled && work.num_tokens > 0) {  // while the index is on its way
    raw = load_token<Cfg>(at, params, work, 0);
  }
  work.slot = pooled ? slot_of_index(params, index) : work.sequence;
  if (params.states.data != nullptr && work.slot != kNoSlot) {
    state.load(states + work.slot * params.states.stride_slot, params.states.stride_row, params.shape, work);
  } else {
    state.fill(0.f);
  }
  if (!pooled && work.num_tokens > 0) {
    raw = load_token<Cfg>(at, params, work, 0);
  }
  let_next_kernel_start();

  bool const malformed = packed && !well_formed_up_to(params, work.sequence);
  if (malformed) {
    work.num_tokens = 0;
  }
  if (work.slot == kNoSlot) {
    fill_outputs<Cfg>(params, work, work.first_token, work.first_token + work.num_tokens, 0.f);
  } else {
    run_tokens(smem, params, work, state, states, at, raw);
  }
  float const nan = __int_as_float(0x7fffffff);
  if constexpr (!Cfg::kPacked) {
    if (params.final_state.data != nullptr) {
      if (malformed) {
        state.fill(nan);
      }
      state.template store<float>(final_state + work.sequence * params.final_state.stride_slot,
                                  params.final_state.stride_row, params.shape, work);
    }
  }
  if (packed && work.sequence == params.shape.num_sequences - 1) {
    // Rows that no sequence owns.
    fill_outputs<Cfg>(params, work, well_formed_end(params, !malformed), params.shape.seqlen, nan);
  }
}

// ---- launch -----------------------------------------------------------------------------------------------

template <class Cfg>
void launch(RecurrentParams const& params, cudaStream_t stream) {
  constexpr int kMaxGridZ = 65535;
  CallShape const& shape = params.shape;
  unsigned const slices = (shape.dim_v + Cfg::kColumns - 1) / Cfg::kColumns;
  for (int first = 0; first < shape.num_sequences; first += kMaxGridZ) {
    launch_kernel<recurrent_kernel<Cfg>>(
        {.name = "recurrent",
         .grid = dim3(slices, shape.num_value_heads, min(shape.num_sequences - first, kMaxGridZ)),
         .num_threads = Cfg::kThreads,
         .stream = stream,
         .overlaps = true},
        params, first);
  }
}

// Whether every row of the tensor is made of whole pieces of 16 bytes.
bool is_aligned(StateTensor const& x, int row_bytes) {
  return x.data == nullptr || (reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && row_bytes % 16 == 0 &&
                               x.stride_slot % 16 == 0 && x.stride_head % 16 == 0 && x.stride_row % 16 == 0);
}

// Slices of 16 columns where wider ones would leave SMs without work.
bool too_few_for_slices_of(int columns, CallShape const& shape) {
  std::int64_t const slices = (shape.dim_v + columns - 1) / columns;
  return shape.num_sequences * slices * shape.num_value_heads < 2 * num_multiprocessors();
}

// Wide slices have rows of 128 bytes in memory, or pieces of 16 bytes. bfloat16 states that are not packed
// take the tiles of float32.
template <class State, bool kVFirst, int kDimK>
void launch_aligned(RecurrentParams const& params, cudaStream_t stream) {
  constexpr int kNarrow = 16, kWide = 32, kWidePacked = sizeof(State) == sizeof(float) ? kWide : 64;
  bool const one_token =
      params.shape.seqlen <= 1 && (sizeof(State) == sizeof(float) || params.final_state.data == nullptr);
  bool const narrow = too_few_for_slices_of(kWide, params.shape);
  if (one_token) {
    narrow ? launch<Config<State, kVFirst, kDimK, kNarrow, true, true>>(params, stream)
           : launch<Config<State, kVFirst, kDimK, kWidePacked, true, true>>(params, stream);
  } else {
    narrow ? launch<Config<State, kVFirst, kDimK, kNarrow, false, true>>(params, stream)
           : launch<Config<State, kVFirst, kDimK, kWide, false, true>>(params, stream);
  }
}

template <class State, bool kVFirst>
void dispatch(RecurrentParams const& params, cudaStream_t stream) {
  CallShape const& shape = params.shape;
  int const row_length = kVFirst ? shape.dim_k : shape.dim_v;
  if (!is_aligned(params.states, row_length * sizeof(State)) ||
      !is_aligned(params.final_state, row_length * sizeof(float))) {
    launch<Config<State, kVFirst, 128, 32, false, false>>(params, stream);
  } else {
    shape.dim_k > 64 ? launch_aligned<State, kVFirst, 128>(params, stream)
                     : launch_aligned<State, kVFirst, 64>(params, stream);
  }
}

}  // namespace

void run_recurrent(RecurrentParams const& params, cudaStream_t stream) {
  if (params.shape.num_sequences == 0) {
    return;
  }
  if (takes_recurrent_stream(params)) {
    run_recurrent_stream(params, stream);
  } else if (params.state_element == ElementType::kBFloat16) {
    params.state_v_first ? dispatch<__nv_bfloat16, true>(params, stream)
                         : dispatch<__nv_bfloat16, false>(params, stream);
  } else {
    params.state_v_first ? dispatch<float, true>(params, stream) : dispatch<float, false>(params, stream);
  }
}

}  // namespace gdn2
