// C = A B, tile by tile: the smallest kernel that runs the whole data path of the op's kernels.
//
//     C [rows, 128] (float32) = A [rows, depth] B, B stored [128, depth] (K-major) or [depth, 128] (MN-major)
//
// Grid: one CTA for 64 rows of C, walking the depth 64 steps at a time.
// Roles: warpgroup 0 computes (A from registers, 64 accumulators a thread); warp 4 loads by TMA.
// Shared memory: 3 stages of A 8 KB + B 16 KB, and barriers: 73 KB.
//
//     load     | A0 B0 | A1 B1 | A2 B2 | wait for empty 0 | A3 B3 ...
//     compute          | full 0: C += A0 B0, empty 0      | full 1: ...
#include "api/tile_product.h"
#include "tile/launch.h"
#include "tile/mma.cuh"
#include "tile/pipeline.cuh"
#include "tile/tensor_map.h"
#include "tile/tma.cuh"
#include "tile/wgmma.cuh"

namespace gdn2 {
namespace {

using Element = __nv_bfloat16;

struct Config {
  static constexpr int kRows = 64;
  static constexpr int kColumns = 128;
  static constexpr int kDepth = kBoxColumns;  // of one stage
  static constexpr int kStages = 3;
  static constexpr int kThreads = kWarpgroupThreads + kWarpThreads;
  static constexpr int kBytesA = kRows * kDepth * sizeof(Element);
  static constexpr int kBytesB = kColumns * kDepth * sizeof(Element);
};

struct SharedStorage {
  alignas(kSwizzleAtomBytes) Element A[Config::kStages][Config::kRows * Config::kDepth];
  // K-major: one box [128, 64]; MN-major: two boxes [64, 64], side by side in C's columns.
  alignas(kSwizzleAtomBytes) Element B[Config::kStages][Config::kColumns * Config::kDepth];
  RingBarriers<Config::kStages> ring;
};

using Position = RingPosition<Config::kStages>;

template <Major kMajorB>
__device__ void load(SharedStorage& smem, CUtensorMap const& map_A, CUtensorMap const& map_B, int first_row,
                     int num_steps) {
  Position at;
  for (int step = 0; step < num_steps; ++step, at.advance()) {
    int const depth = step * Config::kDepth;
    FullBarrier& full = smem.ring.begin_fill(at, Config::kBytesA + Config::kBytesB);
    tma_load(map_A, full, smem.A[at.stage], depth, first_row);
    if constexpr (kMajorB == Major::K) {
      tma_load(map_B, full, smem.B[at.stage], depth, 0);
    } else {
      tma_load(map_B, full, smem.B[at.stage], 0, depth);
      tma_load(map_B, full, smem.B[at.stage] + kBoxColumns * Config::kDepth, kBoxColumns, depth);
    }
  }
}

// C += A B for one stage.
template <Major kMajorB>
__device__ void multiply(float (&C)[Config::kColumns / 2], Element const* sA, Element const* sB) {
  constexpr int kSteps = Config::kDepth / 16;
  FragmentA a[kSteps];
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    load_matrices(a[k].pairs, sA, 16 * (threadIdx.x / kWarpThreads), 2 * k);
  }
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    if constexpr (kMajorB == Major::K) {
      wgmma<Element, kMajorB>(C, a[k], shared_descriptor<kMajorB>(sB + 16 * k), true);
    } else {
      constexpr int kBoxBytes = kBoxColumns * Config::kDepth * sizeof(Element);
      wgmma<Element, kMajorB>(C, a[k], shared_descriptor<kMajorB>(sB + 16 * k * kBoxColumns, kBoxBytes),
                              true);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
}

__device__ void store(float* gC, float const (&C)[Config::kColumns / 2]) {
  int const lane = threadIdx.x % kWarpThreads;
  int const row = 16 * (threadIdx.x / kWarpThreads) + lane / 4;
#pragma unroll
  for (int j = 0; j < Config::kColumns / 8; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float2 const pair{C[4 * j + 2 * half], C[4 * j + 2 * half + 1]};
      auto const offset =
          static_cast<std::int64_t>(row + 8 * half) * Config::kColumns + 8 * j + 2 * (lane % 4);
      *reinterpret_cast<float2*>(gC + offset) = pair;
    }
  }
}

template <Major kMajorB>
__global__ void __launch_bounds__(Config::kThreads, 1)
    tile_product_kernel(__grid_constant__ CUtensorMap const map_A, __grid_constant__ CUtensorMap const map_B,
                        float* C, int num_steps) {
  extern __shared__ char smem_bytes[];
  auto& smem = *reinterpret_cast<SharedStorage*>(smem_bytes);
  int const first_row = blockIdx.x * Config::kRows;
  if (threadIdx.x == 0) {
    smem.ring.init(/*num_producer_arrivals=*/1, /*num_consumer_arrivals=*/kWarpgroupWarps);
    cutlass::arch::fence_barrier_init();  // orders the inits before the copy engine's use of them
  }
  __syncthreads();

  if (warpgroup_index() == 1) {
    if (elect_one()) {
      prefetch_tensor_map(map_A);
      prefetch_tensor_map(map_B);
      load<kMajorB>(smem, map_A, map_B, first_row, num_steps);
    }
  } else {
    float accumulators[Config::kColumns / 2] = {};
    Position at;
    for (int step = 0; step < num_steps; ++step) {
      smem.ring.wait_full(at);
      multiply<kMajorB>(accumulators, smem.A[at.stage], smem.B[at.stage]);
      smem.ring.release(at);
    }
    store(C + static_cast<std::int64_t>(first_row) * Config::kColumns, accumulators);
  }
}

template <Major kMajorB>
void launch(TileProductParams const& params, cudaStream_t stream) {
  constexpr auto kType = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  auto const rows = static_cast<std::uint64_t>(params.rows);
  auto const depth = static_cast<std::uint64_t>(params.depth);
  auto const map_A = make_tensor_map<2>(
      params.a, kType,
      {.extent = {depth, rows}, .stride_bytes = {2 * depth}, .box = {kBoxColumns, Config::kRows}});
  constexpr std::uint64_t kColumns = Config::kColumns;
  auto const map_B = kMajorB == Major::K ? make_tensor_map<2>(params.b, kType,
                                                              {.extent = {depth, kColumns},
                                                               .stride_bytes = {2 * depth},
                                                               .box = {kBoxColumns, Config::kColumns}})
                                         : make_tensor_map<2>(params.b, kType,
                                                              {.extent = {kColumns, depth},
                                                               .stride_bytes = {2 * kColumns},
                                                               .box = {kBoxColumns, Config::kDepth}});
  launch_kernel<tile_product_kernel<kMajorB>>(
      {.name = "tile_product",
       .grid = dim3(static_cast<unsigned>(params.rows / Config::kRows)),
       .num_threads = Config::kThreads,
       .shared_bytes = sizeof(SharedStorage),
       .stream = stream},
      map_A, map_B, params.c, static_cast<int>(params.depth / Config::kDepth));
}

}  // namespace

void run_tile_product(TileProductParams const& params, cudaStream_t stream) {
  params.b_is_mn_major ? launch<Major::MN>(params, stream) : launch<Major::K>(params, stream);
}

}  // namespace gdn2
