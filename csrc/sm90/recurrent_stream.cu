// recurrent_stream: the step of recurrent.cu where there are many float32 states. One token of every
// sequence; K = V = 128.
//
// Grid: value head x sequence, a CTA a matrix; three CTAs an SM.
// Roles: two groups of 128 threads, each with 32 value columns at a time. One thread copies. A matrix travels
// whole, as contiguous bytes, both ways by bulk copies: what is in flight does not depend on threads, and the
// CTAs of an SM load, step and store at different times. Registers: 80. Shared memory: the matrix, 64 KB, and
// the tokens' channels.
//
//     state in ............. | slice: state to registers, step, back | next slice .. | state out
//     inputs, channels .. |
#include <cutlass/arch/barrier.h>

#include "api/device.h"
#include "sm90/recurrent_step.cuh"
#include "sm90/recurrent_stream.h"
#include "tile/launch.h"
#include "tile/launch_order.cuh"
#include "tile/pipeline.cuh"
#include "tile/tma.cuh"

namespace gdn2 {
namespace {

using namespace recurrent;

constexpr int kDim = 128;  // K and V
constexpr int kColumns = 32;
constexpr int kMatricesPerSm =
    20;  // with fewer, small CTAs for parts of matrices are better spread over the SMs

template <bool kVFirst>
using StreamConfig = Config<float, kVFirst, kDim, kColumns, false, true, 2>;

template <class Cfg>
struct StreamStorage {
  static constexpr int kMatrixBytes = kDim * kDim * sizeof(float);
  alignas(128) std::uint8_t state[kMatrixBytes];
  SharedStorage<Cfg> groups[Cfg::kSlices];
  FullBarrier state_full;
};

constexpr int kCtasPerSm = 3;
template <class Cfg>
constexpr int kCtaThreads = Cfg::kSlices * Cfg::kThreads;

// The slot of a sequence, or kNoSlot; of states without a pool, the sequence.
__device__ int load_slot(RecurrentParams const& params, int sequence) {
  return params.state_indices.data == nullptr ? sequence
                                              : slot_of_index(params, load_start_index(params, sequence));
}

__device__ std::uint8_t* matrix_address(StateTensor const& x, int slot, int value_head) {
  return x.data + slot * x.stride_slot + wide_product(value_head, x.stride_head);
}

// The token as a thread reads it for one slice.
template <class Cfg>
struct Token {
  Work work;
  RawToken raw;

  __device__ Token(RecurrentParams const& params, int sequence, int value_head, int first_column)
      : work(find_work(params, sequence, value_head, first_column)),
        raw(load_token<Cfg>(TokenAddresses(params, work, thread_of_slice<Cfg>()), params, work, 0)) {}
};

template <class Cfg>
__global__ void __launch_bounds__(kCtaThreads<Cfg>, kCtasPerSm)
    recurrent_stream_kernel(__grid_constant__ RecurrentParams const params) {
  extern __shared__ __align__(128) std::uint8_t smem_bytes[];
  auto& smem = *reinterpret_cast<StreamStorage<Cfg>*>(smem_bytes);
  constexpr int kBytes = StreamStorage<Cfg>::kMatrixBytes;
  int const value_head = blockIdx.x % params.shape.num_value_heads,
            sequence = blockIdx.x / params.shape.num_value_heads;
  bool const copies = threadIdx.x == 0;
  if (copies) {
    smem.state_full.init(1);
    cutlass::arch::fence_barrier_init();
  }
  wait_for_earlier_kernels();
  let_next_kernel_start();
  int const slot = load_slot(params, sequence);
  if (copies && slot != kNoSlot) {
    smem.state_full.arrive_and_expect_tx(kBytes);
    // Kept longer than what is written meanwhile.
    bulk_load(smem.state, matrix_address(params.states, slot, value_head), kBytes, smem.state_full,
              CacheHint::EVICT_LAST);
  }

  int const group = threadIdx.x / Cfg::kThreads;
  auto& own = smem.groups[group];
  Token<Cfg> token(params, sequence, value_head, group * kColumns);
  DecayRate const decay(params, token.work, thread_of_slice<Cfg>());
  __syncthreads();  // the barrier can be waited at
#pragma unroll 1
  for (int first = 0, buffer = 0; first < kDim; first += Cfg::kSlices * kColumns, buffer ^= 1) {
    Work const work = token.work;
    publish(own.tokens[buffer], token.raw, decay, params);
    // Orders the token's channels before their reads, and the reads of the last sums before the writes that
    // follow.
    sync_slice<Cfg>();
    int const next_column = work.first_column + Cfg::kSlices * kColumns;
    if (next_column < kDim) {
      token = Token<Cfg>(params, sequence, value_head, next_column);
    }
    if (slot != kNoSlot) {
      smem.state_full.wait(0);
    }
    StateSlice<Cfg> state;
    state.read_tile(smem.state, work.first_column);
    Step<Cfg> step{own, own.tokens[buffer], state, TokenScales(own.tokens[buffer], params)};
    step.run([&](int column, float o) { store_output(params, work, 0, column, slot == kNoSlot ? 0.f : o); });
    state.write_tile(smem.state, work.first_column);
  }
  cutlass::arch::fence_view_async_shared();  // before the copy engine reads it
  __syncthreads();
  if (copies && slot != kNoSlot) {
    auto* const target = params.inplace ? matrix_address(params.states, slot, value_head)
                                        : matrix_address(params.final_state, sequence, value_head);
    cute::SM90_BULK_COPY_S2G::copy(smem.state, target, kBytes);
    cute::tma_store_arrive();
    cute::tma_store_wait<0>();  // the state has been read
  }
}

template <class Cfg>
void launch(RecurrentParams const& params, cudaStream_t stream) {
  constexpr int kSmemBytes = sizeof(StreamStorage<Cfg>);
  static_assert(kCtasPerSm * (kSmemBytes + 1024) <= 228 * 1024);
  launch_kernel<recurrent_stream_kernel<Cfg>>(
      {.name = "recurrent_stream",
       .grid = dim3(params.shape.num_sequences * params.shape.num_value_heads),
       .num_threads = kCtaThreads<Cfg>,
       .shared_bytes = kSmemBytes,
       .stream = stream,
       .overlaps = true},
      params);
}

// Matrices of kDim x kDim elements one after the other, at addresses that bulk copies take.
bool has_whole_matrices(StateTensor const& x) {
  return reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && x.stride_row == kDim * sizeof(float) &&
         x.stride_head % 16 == 0 && x.stride_slot % 16 == 0;
}

}  // namespace

bool takes_recurrent_stream(RecurrentParams const& params) {
  CallShape const& shape = params.shape;
  bool const one_token = shape.seqlen == 1 && params.cu_seqlens.data == nullptr && params.index_columns == 0;
  bool const in_and_out =
      params.states.data != nullptr && params.inplace != (params.final_state.data != nullptr);
  return params.state_element == ElementType::kFloat32 && shape.dim_k == kDim && shape.dim_v == kDim &&
         one_token && in_and_out && has_whole_matrices(params.states) &&
         (params.inplace || has_whole_matrices(params.final_state)) &&
         std::int64_t{shape.num_sequences} * shape.num_value_heads < INT32_MAX / 2 &&
         shape.num_sequences * shape.num_value_heads >= kMatricesPerSm * num_multiprocessors();
}

void run_recurrent_stream(RecurrentParams const& params, cudaStream_t stream) {
  params.state_v_first ? launch<StreamConfig<true>>(params, stream)
                       : launch<StreamConfig<false>>(params, stream);
}

}  // namespace gdn2
