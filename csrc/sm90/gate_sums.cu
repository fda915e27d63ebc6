// gate_sums: the gradients of the decay gate's parameters, from what `gradients` left of every slot.
//
//     dA_log[h] = sum over slots, the head's gate heads and channels
//     d_dt_bias[h, i] = sum over slots and gate heads
//
// in a fixed order, so that two calls agree bit for bit.
//
// Grid: one CTA for a key head and 32 channels of d_dt_bias, and one for its dA_log; 32 x 32 threads: each
// sums every 32nd row, then 32 of them in turn.
#include <cutlass/fast_math.h>

#include "api/chunk_backward.h"
#include "tile/launch.h"
#include "tile/launch_order.cuh"

namespace gdn2 {
namespace {

constexpr int kChannels = 32, kParts = 32;
constexpr int kBoxChannels = 64;  // of a CTA of gradients

// The sum over a key head's rows of column `column` of x [num_slots, num_gate_heads, width]. Of all threads
// with the same `channel`.
__device__ float sum_rows(float const* x, int width, int column, int num_rows,
                          cutlass::FastDivmod const& by_group, int num_gate_heads, int head) {
  __shared__ float parts[kParts][kChannels + 1];
  int const channel = threadIdx.x % kChannels, part = threadIdx.x / kChannels;
  float sum = 0.f;
  if (column < width) {
#pragma unroll 8
    for (int row = part; row < num_rows; row += kParts) {
      int slot, in_group;
      by_group(slot, in_group, row);
      std::int64_t const gate_head =
          static_cast<std::int64_t>(slot) * num_gate_heads + head * by_group.divisor + in_group;
      sum += x[gate_head * width + column];
    }
  }
  parts[part][channel] = sum;
  __syncthreads();
  float all = 0.f;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    all += parts[i][channel];
  }
  return all;
}

__global__ void __launch_bounds__(kChannels* kParts)
    gate_sums_kernel(GateSumsParams const params, cutlass::FastDivmod const by_group) {
  CallShape const& shape = params.shape;
  int const head = blockIdx.x;
  int const num_rows = shape.seqlen > 0 ? shape.num_slots * by_group.divisor : 0;
  bool const of_A_log = blockIdx.y == gridDim.y - 1;
  int const boxes = shape.dim_k > kBoxChannels ? 2 : 1;
  int const width = of_A_log ? boxes : shape.dim_k,
            column = (of_A_log ? 0 : blockIdx.y * kChannels) + threadIdx.x % kChannels;
  if ((of_A_log ? params.dA_log : params.d_dt_bias) == nullptr) {
    return;
  }
  wait_for_earlier_kernels();  // gradients
  float sum = sum_rows(of_A_log ? params.dA_log_of_slots : params.d_dt_bias_of_slots, width, column, num_rows,
                       by_group, shape.num_gate_heads, head);
  if (of_A_log) {
    sum += __shfl_down_sync(0xffffffff, sum, 1);  // zero where there is no second box
    if (threadIdx.x == 0) {
      params.dA_log[head] = sum;
    }
  } else if (threadIdx.x < kChannels && column < width) {
    params.d_dt_bias[static_cast<std::int64_t>(head) * width + column] = sum;
  }
}

}  // namespace

void run_gate_sums(GateSumsParams const& params, cudaStream_t stream) {
  if (params.dA_log == nullptr && params.d_dt_bias == nullptr) {
    return;
  }
  CallShape const& shape = params.shape;
  launch_kernel<gate_sums_kernel>(
      {.name = "gate_sums",
       .grid = dim3(shape.num_heads, (shape.dim_k + kChannels - 1) / kChannels + 1),
       .num_threads = kChannels * kParts,
       .stream = stream,
       .overlaps = true},
      params, cutlass::FastDivmod(shape.num_gate_heads / shape.num_heads));
}

}  // namespace gdn2
