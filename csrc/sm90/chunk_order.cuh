// In which order a kernel takes the chunks of dense sequences. What a kernel writes last is still in the L2 cache when the
// next one starts: it should be what that one reads first. Walks start at the ends of sequences, or of their segments.
#pragma once

#include <cutlass/fast_math.h>

#include <algorithm>

#include "params.h"
#include "tile/arch.cuh"

namespace gdn2 {

enum class ChunkOrder { kUp, kDown, kInwards, kOutwards };  // the same chunk of all segments at a time

class DenseChunks {
 public:
  DenseChunks(CallShape const& shape, int num_segments)
      : num_chunks_(shape.num_slots / shape.batch),
        segment_chunks_(num_chunks_ / num_segments),
        num_left_((num_chunks_ - num_segments * segment_chunks_) * shape.batch),
        left_(std::max(num_left_ / shape.batch, 1)),
        walks_(shape.batch * num_segments),
        segments_(num_segments) {}

  // The index-th of all; returns its slot.
  template <ChunkOrder kOrder>
  __device__ int find(int index, int& batch, int& chunk) const {
    if (index < num_left_) {  // of segments that are not equally long
      left_(batch, chunk, index);
      chunk += num_chunks_ - left_.divisor;
    } else {
      int rank, walk, segment;
      walks_(rank, walk, index - num_left_);
      segments_(batch, segment, walk);
      chunk = segment * segment_chunks_ + place<kOrder>(rank);
    }
    return batch * num_chunks_ + chunk;
  }

 private:
  int num_chunks_, segment_chunks_, num_left_;
  cutlass::FastDivmod left_, walks_, segments_;

  template <ChunkOrder kOrder>
  __device__ int place(int rank) const {
    int const last = segment_chunks_ - 1;
    if constexpr (kOrder == ChunkOrder::kUp) {
      return rank;
    } else if constexpr (kOrder == ChunkOrder::kDown) {
      return last - rank;
    } else {
      int const inwards = kOrder == ChunkOrder::kInwards ? rank : last - rank;
      return inwards % 2 == 0 ? inwards / 2 : last - inwards / 2;
    }
  }
};

}  // namespace gdn2
