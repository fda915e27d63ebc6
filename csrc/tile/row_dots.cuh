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
// multiple of kSwizzleAtomBytes. A row meets itself on the diagonal of the product of all.
template <class Element, int kBoxes, bool kSelf, bool kOther>
__device__ RowDots row_dots(void const* x, int y_from_x, int first_row) {
  static_assert(kSelf || kOther);
  std::uint32_t const left = matrix_address<false>(x, first_row, 0),
                      right = matrix_address<true>(x, first_row, 0);
  float self[2][4] = {}, other[2][4] = {};
#pragma unroll
  for (int step = 0; step < 4 * kBoxes; ++step) {
    int const in_row = step % 4 * 32, box = step / 4 * 64 * kBoxRowBytes;
    std::uint32_t a[4], b[4];
    load_matrices(a, (left ^ in_row) + box);
    if constexpr (kSelf) {
      load_matrices(b, (right ^ in_row) + box);
      mma_16x8x16<Element>(self[0], a, b[0], b[1]);
      mma_16x8x16<Element>(self[1], a, b[2], b[3]);
    }
    if constexpr (kOther) {
      load_matrices(b, (right ^ in_row) + box + y_from_x);
      mma_16x8x16<Element>(other[0], a, b[0], b[1]);
      mma_16x8x16<Element>(other[1], a, b[2], b[3]);
    }
  }
  // Row l/4 + 8*half is column l/4 of the half's eight: there 2*(l%4) + c = l/4.
  bool const second = lane_index() / 4 % 2 == 1;
  auto const own = [&](float const(&products)[2][4], int half) {
    return second ? products[half][2 * half + 1] : products[half][2 * half];
  };
  return {{own(self, 0), own(self, 1)}, {own(other, 0), own(other, 1)}};
}

}  // namespace gdn2
