// Lower triangles [64, 64] (tile/triangle.h) from global memory, and as right operands of wgmma. Rows of
// strips that are above their blocks on the diagonal no load writes: they are cleared once before.
#pragma once

#include "tile/tma.cuh"
#include "tile/triangle.h"
#include "tile/wgmma.cuh"

namespace gdn2 {

// By `num_threads` threads: what no load writes.
__device__ inline void clear_above_triangle(std::uint8_t* image, int thread, int num_threads) {
#pragma unroll
  for (int strip = 1; strip < kTriangleStrips; ++strip) {
    for (int i = thread; i < strip * kPiecesOfTriangleBlock; i += num_threads) {
      reinterpret_cast<uint4*>(image + strip * kStripBytes)[i] = uint4{};
    }
  }
  cutlass::arch::fence_view_async_shared();  // ordinary stores, which wgmma reads
}

// Calls copy(where in the image, where in global memory, bytes) for the strips whose bits are set.
template <class Copy>
__device__ void for_strips(std::uint8_t* image, std::uint8_t const* global, std::uint32_t strips, Copy copy) {
#pragma unroll
  for (int strip = 0; strip < kTriangleStrips; ++strip) {
    if ((strips >> strip & 1) != 0) {
      copy(image + strip * (kStripBytes + kTriangleBlockBytes),
           global + first_block_of(strip) * kTriangleBlockBytes,
           (kTriangleStrips - strip) * kTriangleBlockBytes);
    }
  }
}

namespace detail {

template <Major kMajorB>
__device__ std::uint64_t strip_descriptor(std::uint8_t const* image) {
  std::uint64_t const start = static_cast<std::uint64_t>(__cvta_generic_to_shared(image)) >> 4;
  constexpr std::uint64_t kLeading = kMajorB == Major::K ? 1 : kStripBytes >> 4;
  constexpr std::uint64_t kStride = 8 * kTriangleRowBytes >> 4;
  constexpr std::uint64_t kSwizzle32B = 3;
  return (start & 0x3fff) | (kLeading << 16) | (kStride << 32) | (kSwizzle32B << 62);
}

}  // namespace detail

// acc (+)= A B^T for a triangle B. Issued and committed, not waited for.
template <class Element>
__device__ void multiply_triangle_transposed(float (&acc)[32], FragmentA const (&a)[4],
                                             std::uint8_t const* image, bool accumulate) {
  auto const descriptor = detail::strip_descriptor<Major::K>(image);
#pragma unroll
  for (int step = 0; step < kTriangleStrips; ++step) {
    wgmma<Element, Major::K>(acc, a[step], descriptor + (step * kStripBytes >> 4), accumulate || step > 0);
  }
  wgmma_commit();
}

// acc (+)= A B, likewise.
template <class Element>
__device__ void multiply_triangle(float (&acc)[32], FragmentA const (&a)[4], std::uint8_t const* image,
                                  bool accumulate) {
  auto const descriptor = detail::strip_descriptor<Major::MN>(image);
#pragma unroll
  for (int step = 0; step < kTriangleStrips; ++step) {
    wgmma<Element, Major::MN>(acc, a[step], descriptor + (step * kTriangleBlockBytes >> 4),
                              accumulate || step > 0);
  }
  wgmma_commit();
}

}  // namespace gdn2
