// recurrent_stream: the step of recurrent.cu where there are many states. One token of every sequence; K = V = 128.
//
// Grid: one CTA an SM, which takes every so many-th matrix of a value head and a sequence.
// Roles: 4 slices of 128 threads, each with 32 value columns of the matrix, and a thread of one warp more, which copies.
// A matrix travels whole, as contiguous bytes, both ways by bulk copies: what is in flight does not depend on threads.
// Registers: 544 threads of at most 112. Shared memory: 3 matrices of 64 KB, and the tokens' channels: 219 KB.
//
//     copying thread  states c+3 in (when c is out) |      ..      | state c out
//     slices          channels of c | inputs of c+1 asked for | state c in registers | step | state c back
//
// A state of 64 KB takes its SM's share of the memory 4 microseconds both ways; the slices need half of that.
#include <cutlass/arch/barrier.h>

#include "api/cuda_error.h"
#include "sm90/recurrent_step.cuh"
#include "sm90/recurrent_stream.h"
#include "tile/launch_order.cuh"
#include "tile/pipeline.cuh"
#include "tile/tma.cuh"

namespace gdn2 {
namespace {

using namespace recurrent;

constexpr int kDim = 128;  // K and V
constexpr int kStages = 3;
constexpr int kMatricesPerSm = 4;  // with fewer, filling and draining the ring counts

template <class State, bool kVFirst>
using StreamConfig = Config<State, kVFirst, kDim, 32, false, true, kDim / 32>;

template <class Cfg>
struct StreamStorage {
  static constexpr int kMatrixBytes = kDim * kDim * sizeof(typename Cfg::State);
  alignas(128) std::uint8_t states[kStages][kMatrixBytes];
  SharedStorage<Cfg> slices[Cfg::kSlices];
  RingBarriers<kStages> ring;  // full: the state has arrived; empty: the slices have put the new one there
};

// A matrix of the call: a value head of a sequence.
struct Matrix {
  int sequence, value_head;

  __device__ Matrix(RecurrentParams const& params, int index)
      : sequence(index / params.shape.num_value_heads), value_head(index % params.shape.num_value_heads) {}
};

__device__ int num_matrices(RecurrentParams const& params) {
  return params.shape.num_sequences * params.shape.num_value_heads;
}

// The slot of a sequence, or kNoSlot; of states without a pool, the sequence.
__device__ int load_slot(RecurrentParams const& params, int sequence) {
  return params.state_indices.data == nullptr ? sequence
                                              : slot_of_index(params, load_start_index(params, sequence));
}

__device__ std::uint8_t* matrix_address(StateTensor const& x, int slot, int value_head) {
  return x.data + slot * x.stride_slot + wide_product(value_head, x.stride_head);
}

// One thread. State c+kStages is asked for once state c has left its stage.
template <class Cfg>
__device__ void copy_states(StreamStorage<Cfg>& smem, RecurrentParams const& params) {
  constexpr int kBytes = StreamStorage<Cfg>::kMatrixBytes;
  int const end = num_matrices(params);
  auto load = [&](int index, int slot, int stage) {
    if (slot == kNoSlot) {
      smem.ring.full[stage].arrive();
      return;
    }
    smem.ring.full[stage].arrive_and_expect_tx(kBytes);
    bulk_load(smem.states[stage], matrix_address(params.states, slot, Matrix(params, index).value_head),
              kBytes, smem.ring.full[stage]);
  };
  int slots[kStages];
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    int const index = blockIdx.x + stage * gridDim.x;
    slots[stage] = index < end ? load_slot(params, Matrix(params, index).sequence) : kNoSlot;
    if (index < end) {
      load(index, slots[stage], stage);
    }
  }
  std::uint32_t parity = 0;
  for (int first = blockIdx.x; first < end; first += kStages * gridDim.x) {
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      int const index = first + stage * gridDim.x, next = index + kStages * gridDim.x;
      if (index >= end) {
        break;
      }
      int const next_slot = next < end ? load_slot(params, Matrix(params, next).sequence) : kNoSlot;
      smem.ring.empty[stage].wait(parity);
      if (slots[stage] != kNoSlot) {
        Matrix const matrix(params, index);
        auto* const target = params.inplace
                                 ? matrix_address(params.states, slots[stage], matrix.value_head)
                                 : matrix_address(params.final_state, matrix.sequence, matrix.value_head);
        cute::SM90_BULK_COPY_S2G::copy(smem.states[stage], target, kBytes);
        cute::tma_store_arrive();
        cute::tma_store_wait<0>();  // the state has been read
      }
      slots[stage] = next_slot;
      if (next < end) {
        load(next, next_slot, stage);
      }
    }
    parity ^= 1;
  }
}

template <class Cfg>
struct Token {
  Work work;
  RawToken raw;
  DecayRate decay;

  __device__ Token(RecurrentParams const& params, int index)
      : work(find(params, index)),
        raw(load_token<Cfg>(TokenAddresses(params, work, thread_of_slice<Cfg>()), params, work, 0)),
        decay(params, work, thread_of_slice<Cfg>()) {
    work.slot = load_slot(params, work.sequence);
  }

 private:
  __device__ static Work find(RecurrentParams const& params, int index) {
    Matrix const matrix(params, index);
    return find_work(params, matrix.sequence, matrix.value_head, threadIdx.x / Cfg::kThreads * Cfg::kColumns);
  }
};

template <class Cfg>
__device__ void run_slice(StreamStorage<Cfg>& smem, RecurrentParams const& params) {
  auto& own = smem.slices[threadIdx.x / Cfg::kThreads];
  int const end = num_matrices(params);
  Token<Cfg> token(params, blockIdx.x);
  RingPosition<kStages> at;
  int buffer = 0;
  for (int index = blockIdx.x; index < end; index += gridDim.x) {
    Work const work = token.work;
    publish(own.tokens[buffer], token.raw, token.decay, params);
    // Orders the token's channels before their reads, and the reads of the token before last and of the last sums
    // before the writes that follow.
    sync_slice<Cfg>();
    if (index + gridDim.x < end) {
      token = Token<Cfg>(params, index + gridDim.x);
    }
    smem.ring.wait_full(at);
    StateSlice<Cfg> state;
    state.read_tile(smem.states[at.stage], work.first_column);
    Step<Cfg> step{own, own.tokens[buffer], state, TokenScales(own.tokens[buffer], params)};
    step.run(
        [&](int column, float o) { store_output(params, work, 0, column, work.slot == kNoSlot ? 0.f : o); });
    state.write_tile(smem.states[at.stage], work.first_column);
    cutlass::arch::fence_view_async_shared();  // before the copy engine reads it
    smem.ring.release(at);
    at.advance();
    buffer ^= 1;
  }
}

template <class Cfg>
constexpr int kSliceThreads = Cfg::kSlices * Cfg::kThreads;

template <class Cfg>
__global__ void __launch_bounds__(kSliceThreads<Cfg> + kWarpThreads, 1)
    recurrent_stream_kernel(__grid_constant__ RecurrentParams const params) {
  extern __shared__ __align__(128) std::uint8_t smem_bytes[];
  auto& smem = *reinterpret_cast<StreamStorage<Cfg>*>(smem_bytes);
  if (threadIdx.x == 0) {
    smem.ring.init(1, kSliceThreads<Cfg> / kWarpThreads);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  wait_for_earlier_kernels();
  let_next_kernel_start();
  if (threadIdx.x >= kSliceThreads<Cfg>) {
    if (threadIdx.x == kSliceThreads<Cfg>) {
      copy_states(smem, params);
    }
  } else {
    run_slice(smem, params);
  }
}

int num_multiprocessors() {
  int device = 0, count = 0;
  throw_on_error(cudaGetDevice(&device), "recurrent_stream");
  throw_on_error(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "recurrent_stream");
  return count;
}

template <class Cfg>
void launch(RecurrentParams const& params, cudaStream_t stream) {
  cudaLaunchAttribute overlap = overlapping_launch();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(num_multiprocessors());
  config.blockDim = dim3(kSliceThreads<Cfg> + kWarpThreads);
  config.dynamicSmemBytes = sizeof(StreamStorage<Cfg>);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  auto* const kernel = recurrent_stream_kernel<Cfg>;
  throw_on_error(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, config.dynamicSmemBytes),
      "recurrent_stream: shared memory");
  throw_on_error(cudaLaunchKernelEx(&config, kernel, params), "recurrent_stream: launch");
}

template <class State>
void dispatch(RecurrentParams const& params, cudaStream_t stream) {
  params.state_v_first ? launch<StreamConfig<State, true>>(params, stream)
                       : launch<StreamConfig<State, false>>(params, stream);
}

// Matrices of kDim x kDim elements one after the other, at addresses that bulk copies take.
bool has_whole_matrices(StateTensor const& x, int element_bytes) {
  return reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && x.stride_row == kDim * element_bytes &&
         x.stride_head % 16 == 0 && x.stride_slot % 16 == 0;
}

}  // namespace

bool takes_recurrent_stream(RecurrentParams const& params) {
  CallShape const& shape = params.shape;
  bool const wide = params.state_element == ElementType::kFloat32;
  int const element_bytes = wide ? 4 : 2;
  bool const one_token = shape.seqlen == 1 && params.cu_seqlens.data == nullptr && params.index_columns == 0;
  bool const in_and_out =
      params.states.data != nullptr && params.inplace != (params.final_state.data != nullptr);
  return shape.dim_k == kDim && shape.dim_v == kDim && one_token && in_and_out && (params.inplace || wide) &&
         has_whole_matrices(params.states, element_bytes) &&
         (params.inplace || has_whole_matrices(params.final_state, element_bytes)) &&
         std::int64_t{shape.num_sequences} * shape.num_value_heads < INT32_MAX / 2 &&
         shape.num_sequences * shape.num_value_heads >= kMatricesPerSm * num_multiprocessors();
}

void run_recurrent_stream(RecurrentParams const& params, cudaStream_t stream) {
  params.state_element == ElementType::kBFloat16 ? dispatch<__nv_bfloat16>(params, stream)
                                                 : dispatch<float>(params, stream);
}

}  // namespace gdn2
