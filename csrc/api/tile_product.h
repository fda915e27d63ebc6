// C [rows, 128] = A [rows, depth] times B, one tile product a CTA: shows that what is built here launches on
// the caller's stream and is right.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "params.h"

namespace gdn2 {

// Checks the arguments (std::invalid_argument names the one that is wrong), fills the params and launches on
// the current device. Addresses and the stream come as integers, as torch's Tensor.data_ptr() and
// Stream.cuda_stream hand them out. std::runtime_error names the CUDA error of a failed launch.
void tile_product(std::uintptr_t a, std::uintptr_t b, std::uintptr_t c, std::int64_t rows, std::int64_t depth,
                  bool b_is_mn_major, std::uintptr_t stream);

// The launcher, csrc/sm90/tile_product.cu.
void run_tile_product(TileProductParams const& params, cudaStream_t stream);

}  // namespace gdn2
