// In which order a kernel takes the chunks of dense sequences. What a kernel writes last is still in the L2
// cache when the next one starts: it should be what that one reads first. Walks start at the ends of
// sequences, or of their segments.
#pragma once

#include <cutlass/fast_math.h>

#include "params.h"

namespace gdn2 {

enum class ChunkOrder { kUp, kDown, kInwards, kOutwards };

// Rank by rank, the same chunk of all segments of equal length at a time. The last segment may be shorter:
// its chunks come first, or last where ranks come towards the start.
class DenseChunks {
 public:
  // Of far more tiles than the cache holds, too few are found there for what jumps between segments cost.
  DenseChunks(CallShape const& shape, int num_segments)
      : DenseChunks(shape.batch, shape.num_slots / shape.batch,
                    shape.num_slots * shape.num_gate_heads <= kTilesForJumps ? num_segments : 1) {}
  DenseChunks(int batch, int num_chunks, int num_segments)
      : num_chunks_(num_chunks),
        segment_chunks_(num_chunks < 1 ? 1 : (num_chunks + num_segments - 1) / num_segments),
        num_equal_(batch * (num_chunks / segment_chunks_) * segment_chunks_),
        left_(num_chunks % segment_chunks_ == 0 ? 1 : num_chunks % segment_chunks_),
        walks_(num_chunks < 1 ? 1 : batch * (num_chunks / segment_chunks_)),
        segments_(num_chunks < 1 ? 1 : num_chunks / segment_chunks_),
        num_left_(batch * num_chunks - num_equal_) {}

  // The index-th of all; returns its slot.
  template <ChunkOrder kOrder>
  CUTLASS_HOST_DEVICE int find(int index, int& batch, int& chunk) const {
    constexpr bool kLeftFirst = kOrder == ChunkOrder::kUp || kOrder == ChunkOrder::kInwards;
    int const equal = kLeftFirst ? index - num_left_ : index;
    if (equal < 0 || equal >= num_equal_) {
      int rank;
      left_(batch, rank, kLeftFirst ? index : index - num_equal_);
      chunk = num_chunks_ - left_.divisor + place<kOrder>(rank, left_.divisor);
    } else {
      int rank, walk, segment;
      walks_(rank, walk, equal);
      segments_(batch, segment, walk);
      chunk = segment * segment_chunks_ + place<kOrder>(rank, segment_chunks_);
    }
    return batch * num_chunks_ + chunk;
  }

  // Where segments are whole sequences: walks are those of the batch, and a rank is a place in one.
  CUTLASS_HOST_DEVICE bool are_whole() const { return segment_chunks_ == num_chunks_; }
  CUTLASS_HOST_DEVICE int num_chunks() const { return num_chunks_; }
  template <ChunkOrder kOrder>
  CUTLASS_HOST_DEVICE int chunk_of_rank(int rank) const {
    return place<kOrder>(rank, num_chunks_);
  }

 private:
  static constexpr int kTilesForJumps = 2048;  // 123 MB

  int num_chunks_, segment_chunks_, num_equal_;
  cutlass::FastDivmod left_, walks_, segments_;
  int num_left_;

  template <ChunkOrder kOrder>
  CUTLASS_HOST_DEVICE static int place(int rank, int length) {
    int const last = length - 1;
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
