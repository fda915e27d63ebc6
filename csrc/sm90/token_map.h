// Tensor maps of token tensors: a copy brings one chunk of one head, as boxes of 128 bytes of channels.
#pragma once

#include "params.h"
#include "tile/tensor_map.h"

namespace gdn2 {

// x [batch, seqlen, heads, channels] of `element`; boxes [64 tokens][64 channels], or 32 channels of float32.
inline CUtensorMap token_map(TokenTensor const& x, CallShape const& shape, int heads, int channels,
                             ElementType element) {
  bool const wide = element == ElementType::kFloat32;
  auto const type = wide                                ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                    : element == ElementType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                        : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  std::uint64_t const size = wide ? 4 : 2;
  auto const bytes = [size](std::int64_t stride) { return static_cast<std::uint64_t>(stride) * size; };
  constexpr std::uint32_t kBoxRowBytes = 128;
  return make_tensor_map<4>(
      x.data, type,
      {.extent = {static_cast<std::uint64_t>(channels), static_cast<std::uint64_t>(heads),
                  static_cast<std::uint64_t>(shape.seqlen), static_cast<std::uint64_t>(shape.batch)},
       .stride_bytes = {bytes(x.stride_head), bytes(x.stride_token), bytes(x.stride_batch)},
       .box = {static_cast<std::uint32_t>(kBoxRowBytes / size), 1, kChunk, 1}});
}

}  // namespace gdn2
