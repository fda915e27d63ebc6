// Into how many segments the sequences of a call are cut. Segments are walked side by side (docs/kernels.md), which pays
// where the walks of whole sequences leave most of the GPU without work. It costs a second walk, of all segments but the
// last, that makes their affine maps.
#include "api/sequence_split.h"

#include <algorithm>

namespace gdn2 {
namespace {

constexpr std::int64_t kChunk = 64, kColumns = 64;  // tokens of a chunk, value columns of a walk
constexpr std::int64_t kMostSegments = 64;
// In microseconds, fitted to what calls with every number of segments took on an H100 (docs/kernels.md). What kernels
// take from each other by their bytes is in them: a chunk of a walk takes longer by what every walk at that time adds.
constexpr double kCallTime = 15.0;                             // of what does not depend on the shape
constexpr double kPrepareTime = 10.1;                          // of a chunk and head, on one SM
constexpr double kScanTime = 0.855, kScanShared = 0.0094;      // of a chunk of a walk
constexpr double kMapsTime = 0.6, kMapsShared = 0.0073;        // the same of the walks that make maps
constexpr double kBesideTime = 0.937, kBesideShared = 0.0195;  // of a chunk of a walk beside prepare
constexpr double kSplitTime = 3.3;                             // of what only a split needs
constexpr double kStateTime = 2.0;                             // of every segment's first state

std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

class Estimate {
 public:
  explicit Estimate(SplitChoice const& call)
      : call_(call),
        chunks_(ceil_div(
            call.packed ? call.seqlen / std::max<std::int64_t>(call.num_sequences, 1) : call.seqlen, kChunk)),
        walks_(call.num_sequences * call.num_value_heads * ceil_div(call.dim_v, kColumns)),
        matrices_(call.num_sequences * call.num_gate_heads * ceil_div(call.dim_k, kColumns)),
        prepare_(kPrepareTime * static_cast<double>(call.num_sequences) * static_cast<double>(chunks_) *
                 static_cast<double>(call.num_gate_heads)) {}

  std::int64_t chunks() const { return chunks_; }

  double microseconds(std::int64_t segments) const {
    double const first = kCallTime + prepare_ / call_.num_sms;
    double const scan = walk(segments * walks_, segments, kScanTime, kScanShared);
    if (segments > 1) {
      // The first segment starts in one state only.
      std::int64_t const number = (segments - 1) * walks_ + (segments - 2) * matrices_;
      double const maps = walk(number, segments, kMapsTime, kMapsShared);
      return first + maps + kSplitTime + kStateTime * static_cast<double>(segments - 1) + scan;
    }
    if (call_.packed || 2 * walks_ > call_.num_sms) {  // as in csrc/api/chunk_forward.cpp
      return first + scan;
    }
    double const chunk = kBesideTime + kBesideShared * static_cast<double>(walks_);
    double const beside = std::max(prepare_ / static_cast<double>(call_.num_sms - walks_),
                                   static_cast<double>(chunks_) * chunk);
    return std::min(first + scan, kCallTime + beside);
  }

 private:
  SplitChoice const& call_;
  std::int64_t chunks_, walks_, matrices_;
  double prepare_;

  double walk(std::int64_t number, std::int64_t segments, double chunk, double shared) const {
    std::int64_t const steps = ceil_div(number, call_.num_sms) * ceil_div(chunks_, segments);
    std::int64_t const at_once = std::min<std::int64_t>(number, call_.num_sms);
    return static_cast<double>(steps) * std::max(chunk, shared * static_cast<double>(at_once));
  }
};

}  // namespace

int num_segments(SplitChoice const& call) {
  Estimate const estimate(call);
  double const whole = estimate.microseconds(1);
  double least = whole;
  std::int64_t best = 1;
  for (std::int64_t segments = 2; segments <= std::min(kMostSegments, estimate.chunks()); ++segments) {
    double const time = estimate.microseconds(segments);
    if (time < least) {
      least = time;
      best = segments;
    }
  }
  // Where it would save less than such an estimate is good for, none.
  return least < 0.95 * whole ? static_cast<int>(best) : 1;
}

}  // namespace gdn2
