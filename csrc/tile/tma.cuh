// Copies between global and shared memory by the bulk tensor copy engine (TMA), one thread a copy.
//
// Every tile but triangles (tile/triangle.h) lies in shared memory as boxes of 64 16-bit columns: rows of 128
// bytes, their 16-byte pieces permuted by the 128-byte swizzle, which ldmatrix and wgmma read without bank
// conflicts.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/arch/copy_sm90_tma.hpp>

#include "tile/arch.cuh"

namespace gdn2 {

constexpr int kBoxColumns = 64;  // 16-bit columns of a box: the 128 bytes that the swizzle permutes
constexpr int kBoxRowBytes = 128;
constexpr int kSwizzleAtomBytes = 1024;  // 8 rows, after which the swizzle repeats; boxes are aligned to it

__device__ inline void prefetch_tensor_map(CUtensorMap const& map) {
  cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&map));
}

// Which of what lies in the L2 cache is first to go for something else, and which last.
using CacheHint = cute::TMA::CacheHintSm90;

// Loads the box whose first element has these coordinates (innermost first) and counts its bytes on the
// barrier.
template <class... Coordinates>
__device__ void tma_load(CUtensorMap const& map, cutlass::arch::ClusterTransactionBarrier& full,
                         CacheHint hint, void* smem, Coordinates... coordinates) {
  cute::SM90_TMA_LOAD::copy(&map, reinterpret_cast<std::uint64_t*>(&full), static_cast<std::uint64_t>(hint),
                            smem, static_cast<std::int32_t>(coordinates)...);
}
template <class... Coordinates>
__device__ void tma_load(CUtensorMap const& map, cutlass::arch::ClusterTransactionBarrier& full, void* smem,
                         Coordinates... coordinates) {
  tma_load(map, full, CacheHint::EVICT_NORMAL, smem, coordinates...);
}

// The same box, to the L2 cache alone.
template <class... Coordinates>
__device__ void tma_fetch(CUtensorMap const& map, Coordinates... coordinates) {
  cute::SM90_TMA_LOAD::PREFETCH::copy(&map, static_cast<std::int32_t>(coordinates)...);
}

// Makes the 128 bytes at an address the last to go.
__device__ inline void keep_in_cache(void const* global) {
  asm volatile("prefetch.global.L2::evict_last [%0];\n" ::"l"(global) : "memory");
}

// Copies contiguous bytes, a multiple of 16, from global to shared memory and counts them on the barrier.
__device__ inline void bulk_load(void* smem, void const* global, std::uint32_t bytes,
                                 cutlass::arch::ClusterTransactionBarrier& full,
                                 CacheHint hint = CacheHint::EVICT_NORMAL) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;\n" ::"r"(cute::cast_smem_ptr_to_uint(smem)),
      "l"(global), "r"(bytes), "r"(cute::cast_smem_ptr_to_uint(&full)), "l"(static_cast<std::uint64_t>(hint))
      : "memory");
}

// The same to this CTA of a cluster of two and to the other one, at the same place of both, counted on the
// barriers of both.
__device__ inline void bulk_load_to_pair(void* smem, void const* global, std::uint32_t bytes,
                                         cutlass::arch::ClusterTransactionBarrier& full, CacheHint hint) {
  constexpr std::uint16_t kBoth = 3;
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
      " [%0], [%1], %2, [%3], %4, %5;\n" ::"r"(cute::cast_smem_ptr_to_uint(smem)),
      "l"(global), "r"(bytes), "r"(cute::cast_smem_ptr_to_uint(&full)), "h"(kBoth),
      "l"(static_cast<std::uint64_t>(hint))
      : "memory");
}

// A copy by the thread itself that it does not wait for; zero, and nothing read, where there is nothing.
__device__ inline void copy_word(void* smem, void const* global, bool is_there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(cute::cast_smem_ptr_to_uint(smem)),
               "l"(global), "r"(is_there ? 4 : 0)
               : "memory");
}
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_all;\n" ::: "memory");
}

// Byte offset, inside a box that starts at a multiple of kSwizzleAtomBytes, of the 16-byte piece `piece` of
// `row`.
__host__ __device__ constexpr std::uint32_t swizzled_offset(int row, int piece) {
  return row * kBoxRowBytes + ((piece ^ (row & 7)) << 4);
}

}  // namespace gdn2
