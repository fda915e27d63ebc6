// The recurrent kernel for batches that fill the chip: one token of every sequence.
#pragma once

#include "api/recurrent.h"

namespace gdn2 {

// Whether the kernel takes the call: one token a sequence, K = V = 128, states that are read and written in
// one element type, whole matrices contiguous, and enough of them.
bool takes_recurrent_stream(RecurrentParams const& params);

void run_recurrent_stream(RecurrentParams const& params, cudaStream_t stream);

}  // namespace gdn2
