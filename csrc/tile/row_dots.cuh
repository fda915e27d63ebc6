// Products of rows with themselves and each other, on the tensor cores of one warp.
#pragma once

#include "tile/mma.cuh"

namespace gdn2 {

// Of rows l/4 and l/4 + 8 of a warp's 16, where the lane has them: x.x in `self` and x.y in `other`.
struct RowDots {
  float self[2], other[2];
};

__device__ inline bool has_rows(int lane) {
  return lane / 8 == lane % 4;
}

// Rows [first_row, first_row + 16) of tiles of kBoxes boxes [64, 64]; y lies y_from_x bytes behind x, a
// multiple of kSwizzleAtomBytes. A row meets itself on the diagonal of the product of all: the left operand's
// registers of eight rows are those rows as right operand. A box has sums of its own, or each product would
// wait for the one before.
template <class Element, int kBoxes, bool kSelf, bool kOther>
__device__ RowDots row_dots(void const* x, int y_from_x, int first_row) {
  static_assert(kSelf || kOther);
  std::uint32_t const left = matrix_address<false>(x, first_row, 0),
                      right = matrix_address<true>(x, first_row, 0) + y_from_x;
  float self[kBoxes][2][4] = {}, other[kBoxes][2][4] = {};
#pragma unroll
  for (int box = 0; box < kBoxes; ++box) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      int const in_row = step * 32, at_box = box * 64 * kBoxRowBytes;
      std::uint32_t a[4];
      load_matrices(a, (left ^ in_row) + at_box);
      if constexpr (kSelf) {
        mma_16x8x8<Element>(self[box][0], {a[0], a[1]}, a[0]);
        mma_16x8x8<Element>(self[box][1], {a[0], a[1]}, a[1]);
        mma_16x8x8<Element>(self[box][0], {a[2], a[3]}, a[2]);
        mma_16x8x8<Element>(self[box][1], {a[2], a[3]}, a[3]);
      }
      if constexpr (kOther) {
        std::uint32_t b[4];
        load_matrices(b, (right ^ in_row) + at_box);
        mma_16x8x16<Element>(other[box][0], a, b[0], b[1]);
        mma_16x8x16<Element>(other[box][1], a, b[2], b[3]);
      }
    }
  }
  // Row l/4 + 8*half is column l/4 of the half's eight: there 2*(l%4) + c = l/4.
  bool const second = lane_index() / 4 % 2 == 1;
  auto const own = [&](float const(&products)[kBoxes][2][4], int half) {
    float sum = 0.f;
#pragma unroll
    for (auto const& of_box : products) {
      sum += second ? of_box[half][2 * half + 1] : of_box[half][2 * half];
    }
    return sum;
  };
  return {{own(self, 0), own(self, 1)}, {own(other, 0), own(other, 1)}};
}

}  // namespace gdn2
