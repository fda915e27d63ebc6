// Tensor maps for TMA, encoded through the driver that is found at run time: importing needs no libcuda.
#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>

namespace gdn2 {

template <int kRank>
struct TensorMapShape {
  std::array<std::uint64_t, kRank> extent;            // elements, innermost first
  std::array<std::uint64_t, kRank - 1> stride_bytes;  // of dimensions 1 and up; multiples of 16
  std::array<std::uint32_t, kRank> box;               // elements of one copy; box[0] fills at most 128 bytes
};

// `base` must be aligned to 16 bytes. Elements outside the extents read as zero. Throws std::runtime_error.
CUtensorMap make_tensor_map(void const* base, CUtensorMapDataType type, int rank, std::uint64_t const* extent,
                            std::uint64_t const* stride_bytes, std::uint32_t const* box);

template <int kRank>
CUtensorMap make_tensor_map(void const* base, CUtensorMapDataType type, TensorMapShape<kRank> const& shape) {
  return make_tensor_map(base, type, kRank, shape.extent.data(), shape.stride_bytes.data(), shape.box.data());
}

}  // namespace gdn2
