// Products of one warp: mma.sync on registers, for what is too small for a warpgroup.
//
// Accumulators of a 16x8 product: acc[2*half + c] is row l/4 + 8*half, column 2*(l%4) + c, for lane l.
#pragma once

#include <type_traits>

#include "tile/arch.cuh"
#include "tile/tma.cuh"

namespace gdn2 {

__device__ inline int lane_index() {
  return threadIdx.x % kWarpThreads;
}

// Where a lane names a row of the four matrices of load_matrices. Operands of products are neighbouring
// registers: where kByRows, r[1] and r[2] have changed places, so that r is two right operands, or transposed
// a left one. From an even piece, two pieces further is ^ 32.
template <bool kByRows>
__device__ std::uint32_t matrix_address(void const* smem_box, int row, int piece) {
  int const lane = lane_index(), row_of_lane = kByRows ? lane % 8 + lane / 16 * 8 : lane % 16;
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(smem_box)) +
         swizzled_offset(row + row_of_lane, piece + (kByRows ? lane / 8 % 2 : lane / 16));
}

__device__ inline void load_matrices(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Four 8x8 matrices of 16-bit elements from a swizzled box: rows [row, row+16), 16-byte pieces [piece,
// piece+2). r[0]: rows 0-7 of the first piece; r[1]: rows 8-15; r[2], r[3]: the same of the second piece.
// Lane l holds row l/4, columns 2*(l%4) and the next.
__device__ inline void load_matrices(std::uint32_t (&r)[4], void const* smem_box, int row, int piece) {
  load_matrices(r, matrix_address<false>(smem_box, row, piece));
}

// The same matrices transposed: lane l holds rows 2*(l%4) and the next, column l/4.
template <bool kByRows = false>
__device__ void load_matrices_transposed(std::uint32_t (&r)[4], void const* smem_box, int row, int piece) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(matrix_address<kByRows>(smem_box, row, piece))
               : "memory");
}

// The inverse of load_matrices; or by the address of the lane's row.
__device__ inline void store_matrices(std::uint32_t const (&r)[4], std::uint32_t address) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

__device__ inline void store_matrices(std::uint32_t const (&r)[4], void* smem_box, int row, int piece) {
  store_matrices(r, matrix_address<false>(smem_box, row, piece));
}

// The inverse of load_matrices_transposed; or by the address of the lane's row.
__device__ inline void store_matrices_transposed(std::uint32_t const (&r)[4], std::uint32_t address) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

__device__ inline void store_matrices_transposed(std::uint32_t const (&r)[4], void* smem_box, int row,
                                                 int piece) {
  store_matrices_transposed(r, matrix_address<false>(smem_box, row, piece));
}

// An 8x8 matrix of 16-bit elements, of which lane l has row l/4, columns 2*(l%4) and the next; transposed.
__device__ inline std::uint32_t transpose(std::uint32_t x) {
  std::uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(y) : "r"(x));
  return y;
}

// acc [16, 8] += A [16, 16] B [16, 8]; a as load_matrices gives it, b0 and b1 the rows 0-7 and 8-15 of B,
// transposed.
template <class Element>
__device__ void mma_16x8x16(float (&acc)[4], std::uint32_t const (&a)[4], std::uint32_t b0,
                            std::uint32_t b1) {
  if constexpr (std::is_same_v<Element, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// The same with eight steps: A [16, 8], a[0] the rows 0-7 and a[1] the rows 8-15; b the rows of B,
// transposed.
template <class Element>
__device__ void mma_16x8x8(float (&acc)[4], std::uint32_t const (&a)[2], std::uint32_t b) {
  if constexpr (std::is_same_v<Element, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
  }
}

// float32 as tf32, to nearest: the instruction itself cuts the last 13 bits, so half of what they hold is
// added first.
__device__ inline std::uint32_t to_tf32(float x) {
  return __float_as_uint(x) + 0x1000;
}

// -x likewise: the sign is the last bit that the sum reaches.
__device__ inline std::uint32_t to_negated_tf32(float x) {
  return __float_as_uint(x) + 0x80001000;
}

// acc [16, 8] += A [16, 8] B [8, 8] in tf32. a[0]: row l/4, step l%4; a[1]: row + 8; a[2], a[3]: the same,
// step + 4. b[0]: step l%4, column l/4; b[1]: step + 4.
__device__ inline void mma_16x8x8_tf32(float (&acc)[4], std::uint32_t const (&a)[4],
                                       std::uint32_t const (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace gdn2
