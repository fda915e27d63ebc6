// How lower triangles [64, 64] of 16-bit elements, zero above the diagonal, are kept: four strips of 16 columns,
// 32 bytes a row, 16-byte pieces by the 32-byte swizzle. In global memory a strip begins at its block on the
// diagonal, and strips follow each other: ten of 16 blocks. In shared memory all strips have 64 rows.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace gdn2 {

constexpr int kTriangleBlock = 16, kTriangleStrips = 4;
constexpr int kTriangleRows = kTriangleBlock * kTriangleStrips;
constexpr int kTriangleBlockElements = kTriangleBlock * kTriangleBlock;
constexpr int kTriangleRowBytes = 32;
constexpr int kStripBytes = kTriangleRows * kTriangleRowBytes;
constexpr int kTriangleBlockBytes = kTriangleBlock * kTriangleRowBytes;
constexpr int kTriangleBlocks = kTriangleStrips * (kTriangleStrips + 1) / 2;
constexpr int kTriangleBytes = kTriangleBlocks * kTriangleBlockBytes;       // in global memory
constexpr int kTriangleImageBytes = kTriangleStrips * kStripBytes;          // in shared memory

// The first block of a strip, among those in global memory.
__host__ __device__ constexpr int first_block_of(int strip) {
  return strip * (2 * kTriangleStrips + 1 - strip) / 2;
}

// Byte offset, in the form of global memory, of the 16-byte piece `piece` of `row`.
__host__ __device__ constexpr std::uint32_t triangle_offset(int row, int piece) {
  int const strip = piece / 2;
  return (first_block_of(strip) - strip) * kTriangleBlockBytes + row * kTriangleRowBytes +
         (((piece ^ (row >> 2)) & 1) << 4);
}

}  // namespace gdn2
