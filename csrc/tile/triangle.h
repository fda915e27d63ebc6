// How lower triangles [64, 64] of 16-bit elements, zero above the diagonal, are kept: four strips of 16
// columns, 32 bytes a row, 16-byte pieces by the 32-byte swizzle. In global memory a strip begins at its
// block on the diagonal, and strips follow each other: ten of 16 blocks. In shared memory all strips have
// 64 rows.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace gdn2 {

constexpr int kTriangleBlock = 16, kTriangleStrips = 4;
constexpr int kTriangleRows = kTriangleBlock * kTriangleStrips;
constexpr int kTriangleRowBytes = 32;
constexpr int kStripBytes = kTriangleRows * kTriangleRowBytes;
constexpr int kTriangleBlockBytes = kTriangleBlock * kTriangleRowBytes;
constexpr int kTriangleBlocks = kTriangleStrips * (kTriangleStrips + 1) / 2;
constexpr int kTriangleBytes = kTriangleBlocks * kTriangleBlockBytes;  // in global memory
constexpr int kTriangleImageBytes = kTriangleStrips * kStripBytes;     // in shared memory

// The first block of a strip, among those in global memory.
__host__ __device__ constexpr int first_block_of(int strip) {
  return strip * (2 * kTriangleStrips + 1 - strip) / 2;
}

// Where the index-th block in global memory lies in the triangle.
struct TriangleBlock {
  int row, strip;  // in blocks

  __host__ __device__ constexpr explicit TriangleBlock(int index)
      : row(0),
        strip((index >= first_block_of(1)) + (index >= first_block_of(2)) + (index >= first_block_of(3))) {
    row = index - first_block_of(strip) + strip;
  }
  __host__ __device__ constexpr bool is_on_diagonal() const { return row == strip; }
};

// The index-th 16-byte piece of a block holds eight columns of a row.
struct TrianglePiece {
  int row, first_column;

  __host__ __device__ constexpr explicit TrianglePiece(int index)
      : row(index / 2), first_column(((index ^ (row >> 2)) & 1) * 8) {}
};
constexpr int kPiecesOfTriangleBlock = kTriangleBlockBytes / 16;

}  // namespace gdn2
