// What choices between schedules go by: measured on an H200, in microseconds.
#pragma once

namespace gdn2 {

constexpr double kPrepareTime = 5.8;  // of a chunk and head, on one SM
constexpr double kScanTime = 1.08;    // of a chunk of a walk
constexpr double kBeside = 1.25;      // what prepare and the walk cost each other at the same time

}  // namespace gdn2
