// The schedule of a call's walks: into how many segments its sequences are cut, and whether prepare runs
// beside scan where they stay whole. Segments are walked side by side (docs/kernels.md), which pays where the
// walks of whole sequences leave most of the GPU without work. It costs a second walk, of all segments but
// the last, that makes their affine maps.
#include "api/sequence_split.h"

#include <algorithm>
#include <tuple>
#include <utility>

namespace gdn2 {
namespace {

constexpr std::int64_t kColumns = 64;  // value columns of a walk
constexpr std::int64_t kMostSegments = 64;
// In microseconds, fitted to calls with every number of segments, and with prepare before and beside scan, on
// an H100 (docs/kernels.md). What waits for the memory is given for an H200's.
constexpr double kMemoryBandwidth = 4917;                   // of an H200, GB/s by its clock and bus
constexpr double kCallTime = 14.5, kBesideCallTime = 22.2;  // of what does not depend on the shape
// Of a chunk and head, on one SM: no less than its share of the memory.
constexpr double kPrepareTime = 6.6, kPrepareShare = 4.7;
// Of a chunk of a walk: no less than the share of all walks at the same time.
constexpr double kScanTime = 0.845, kScanShare = 0.0114;
constexpr double kMapsTime = 0.872, kMapsShare = 0.004;  // the same of the walks that make maps
constexpr double kSplitTime = 2.5;                       // of what only a split needs
constexpr double kStateTime = 1.27;                      // of every segment's first state
// Beside each other: of a chunk of a walk, and what every chunk and head of prepare adds to it; of a chunk
// and head of prepare, on one SM, where the walks wait for it: no less than its share of the memory, which is
// more the more SMs ask for it.
constexpr double kBesideScanTime = 0.871, kBesideTileTime = 0.0108, kBesidePrepareTime = 5.96;
constexpr double kBesidePrepareShare = 2.6, kBesidePrepareShareOfSm = 0.033;
// On how many SMs prepare keeps just ahead of the walks: some, and these for every head. On more it would run
// so far ahead that its tiles have left the L2 cache when the walks take them.
constexpr std::int64_t kBesideSms = 16, kBesideSmsOfHead = 4;

// In chunks and heads, whose tiles are 60 KB each: how many fit an L2 cache of 50 MB; and how many are kept
// there, from prepare to scan, from segment_maps to scan with v and w, and from reverse walks from zero to
// the others (docs/kernels.md).
constexpr int kTilesOfCache = 800, kKeptForScan = 512, kKeptForSegments = 640, kKeptForReverse = 384;

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
        heads_(call.num_sequences * call.num_gate_heads),
        matrices_(heads_ * ceil_div(call.dim_k, kColumns)),
        tiles_(static_cast<double>(heads_) * static_cast<double>(chunks_)),
        memory_time_(call.gpu.memory_bandwidth > 0 ? kMemoryBandwidth / call.gpu.memory_bandwidth : 1.0) {}

  std::int64_t chunks() const { return chunks_; }

  // Of a schedule, in microseconds.
  double split(std::int64_t segments) const {
    // The first segment starts in one state only.
    std::int64_t const number = (segments - 1) * walks_ + (segments - 2) * matrices_;
    return prepare_then_scan(segments) + walk(number, segments, kMapsTime, kMapsShare) + kSplitTime +
           kStateTime * static_cast<double>(segments - 1);
  }
  double whole() const { return sms_beside_scan() > 0 ? beside() : prepare_then_scan(1); }

  int sms_beside_scan() const {
    return may_run_beside() && beside() < 0.99 * prepare_then_scan(1) ? other_sms() : 0;
  }

 private:
  SplitChoice const& call_;
  std::int64_t chunks_, walks_, heads_, matrices_;
  double tiles_;
  double memory_time_;  // of a byte, an H200's is 1

  // Lengths of packed sequences are not known here.
  bool may_run_beside() const { return !call_.packed && chunks_ > 0 && 2 * walks_ <= call_.gpu.num_sms; }
  int other_sms() const {
    return static_cast<int>(std::min(call_.gpu.num_sms - walks_, kBesideSms + kBesideSmsOfHead * heads_));
  }

  double prepare_then_scan(std::int64_t segments) const {
    return kCallTime + std::max(kPrepareTime, kPrepareShare * memory_time_) * tiles_ / call_.gpu.num_sms +
           walk(segments * walks_, segments, kScanTime, kScanShare);
  }
  double beside() const {
    double const scan =
        kBesideScanTime * static_cast<double>(chunks_) + kBesideTileTime * memory_time_ * tiles_;
    double const share = memory_time_ * (kBesidePrepareShare + kBesidePrepareShareOfSm * other_sms());
    return kBesideCallTime + std::max(scan, std::max(kBesidePrepareTime, share) * tiles_ / other_sms());
  }
  double walk(std::int64_t number, std::int64_t segments, double chunk, double share) const {
    std::int64_t const steps = ceil_div(number, call_.gpu.num_sms) * ceil_div(chunks_, segments);
    std::int64_t const at_once = std::min<std::int64_t>(number, call_.gpu.num_sms);
    return static_cast<double>(steps) * std::max(chunk, share * memory_time_ * static_cast<double>(at_once));
  }
};

bool tiles_fit_cache(CallShape const& shape) {
  return std::int64_t{shape.num_slots} * shape.num_gate_heads <= kTilesOfCache;
}

// Whether one CTA, or one pair, of so many value columns reads a tile: the first of several readers would let
// go of it for the others.
bool have_one_reader(CallShape const& shape, std::int64_t columns) {
  return shape.num_value_heads == shape.num_gate_heads && shape.dim_v <= columns;
}

int quickest_number_of_segments(SplitChoice const& call) {
  Estimate const estimate(call);
  double const whole = estimate.whole();
  double least = whole;
  std::int64_t best = 1;
  for (std::int64_t segments = 2; segments <= std::min(kMostSegments, estimate.chunks()); ++segments) {
    double const time = estimate.split(segments);
    if (time < least) {
      least = time;
      best = segments;
    }
  }
  // Where it would save less than such an estimate is good for, none.
  return least < 0.95 * whole ? static_cast<int>(best) : 1;
}

}  // namespace

// What was chosen last is known: calls of a model have one shape.
int num_segments(SplitChoice const& call) {
  std::tuple const key(call.seqlen, call.num_sequences, call.num_gate_heads, call.num_value_heads, call.dim_k,
                       call.dim_v, call.packed, call.gpu.num_sms, call.gpu.memory_bandwidth);
  static thread_local std::pair last(key, quickest_number_of_segments(call));
  if (last.first != key) {
    last = {key, quickest_number_of_segments(call)};
  }
  return last.second;
}

int sms_beside_scan(SplitChoice const& call) {
  return Estimate(call).sms_beside_scan();
}

int num_kept_forward(CallShape const& shape, bool packed, int num_segments, bool stores_states) {
  if (!have_one_reader(shape, stores_states ? kColumns : 2 * kColumns)) {  // as scan has its value columns
    return 0;
  }
  int const heads = std::max(shape.num_sequences * shape.num_gate_heads, 1);
  if (num_segments > 1) {
    return kKeptForSegments / (heads * (num_segments - 1));
  }
  // Packed chunks do not come in the order of the walks.
  return packed || tiles_fit_cache(shape) ? 0 : kKeptForScan / heads;
}

int num_kept_backward(CallShape const& shape, int num_segments) {
  if (num_segments == 1 || tiles_fit_cache(shape) || !have_one_reader(shape, 2 * kColumns)) {
    return 0;
  }
  return kKeptForReverse / (shape.num_sequences * shape.num_gate_heads * (num_segments - 1));
}

bool keeps_tiles(CallShape const& shape, int num_segments) {
  return num_segments > 1 && std::int64_t{shape.num_slots} * shape.num_gate_heads <= kMostTilesKept;
}

}  // namespace gdn2
