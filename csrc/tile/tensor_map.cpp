#include "tile/tensor_map.h"

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "api/cuda_error.h"

namespace gdn2 {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

EncodeTiled encode_tiled() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  throw_on_error(
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
      "tensor map");
  if (found != cudaDriverEntryPointSuccess) {
    throw std::runtime_error(
        "tensor map: this driver has no cuTensorMapEncodeTiled (CUDA 12.0 or newer is needed)");
  }
  return reinterpret_cast<EncodeTiled>(entry);
}

}  // namespace

CUtensorMap make_tensor_map(void const* base, CUtensorMapDataType type, int rank, std::uint64_t const* extent,
                            std::uint64_t const* stride_bytes, std::uint32_t const* box) {
  static EncodeTiled const encode = encode_tiled();
  constexpr std::uint32_t kUnitStrides[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  auto const encode_map = [&] {
    return encode(&map, type, static_cast<cuuint32_t>(rank), const_cast<void*>(base), extent, stride_bytes,
                  box, kUnitStrides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult status = encode_map();
  if (status == CUDA_ERROR_INVALID_CONTEXT) {
    // A thread, as of autograd, that has made no call of the runtime yet has no context.
    int device = 0;
    throw_on_error(cudaGetDevice(&device), "tensor map");
    throw_on_error(cudaSetDevice(device), "tensor map");
    status = encode_map();
  }
  if (status != CUDA_SUCCESS) {
    std::string shape;
    for (int i = 0; i < rank; ++i) {
      shape += " " + std::to_string(extent[i]) + "/" + std::to_string(box[i]);
    }
    throw std::runtime_error("tensor map: the driver refused extents/boxes" + shape + " (CUresult " +
                             std::to_string(static_cast<int>(status)) + ")");
  }
  return map;
}

}  // namespace gdn2
