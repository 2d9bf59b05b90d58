// What both halves of the library need at run time: the choice of instruction set, thread teams, per-thread memory.
#pragma once

#include <omp.h>

#include <atomic>
#include <chrono>

#include "avx2.h"
#include "avx512.h"
#include "common.h"
#include "portable.h"

namespace trdq {
namespace {

enum Status : int { kOk = 0, kBadArgument = 1, kNoMemory = 2 };

constexpr int kAbiVersion = 5;
// 255 * 255 * depth must stay under 2^31: the exact integer result of one output.
constexpr int64_t kMaxDepth = 33000;
// One activation block plus one weight panel should share a second-level cache of 1 MiB or more.
constexpr int64_t kBlockBytes = 256 * 1024;
constexpr int64_t kTileBytes = 16 * 1024;
constexpr int64_t kRotatedTileBytes = 96 * 1024;
constexpr int64_t kGatheredBytes = 64 * 1024;
constexpr int64_t kLevelBytes = 4 * 1024 * 1024;
// Below this many element operations a second thread costs more than it brings.
constexpr int64_t kQuantizeGrain = 16 * 1024;
constexpr int64_t kProductGrain = 512 * 1024;

// What the kernels are written for, from the slowest to the fastest.
enum Path : int { kPortable = 0, kAvx2 = 1, kAvx512Vnni = 2 };

int highest_path = kAvx512Vnni;  // lowered by tests only

Path path() {
#ifdef TRDQ_X86
  static const Path found = avx512::supported() ? kAvx512Vnni : avx2::supported() ? kAvx2 : kPortable;
  return static_cast<Path>(std::min<int>(found, highest_path));
#else
  return kPortable;
#endif
}

const RowOps& row_ops() {
#ifdef TRDQ_X86
  if (path() == kAvx512Vnni) return avx512::kRowOps;
  if (path() == kAvx2) return avx2::kRowOps;
#endif
  return portable::kRowOps;
}

const PanelOps& panel_ops() {
#ifdef TRDQ_X86
  if (path() == kAvx512Vnni) return avx512::kPanelOps;
  if (path() == kAvx2) return avx2::kPanelOps;
#endif
  return portable::kPanelOps;
}

const HeadOps& head_ops() {
#ifdef TRDQ_X86
  if (path() == kAvx512Vnni) return avx512::kHeadOps;
  if (path() == kAvx2) return avx2::kHeadOps;
#endif
  return portable::kHeadOps;
}

const PeakOps& peak_ops() {
#ifdef TRDQ_X86
  if (path() == kAvx512Vnni) return avx512::kPeakOps;
  if (path() == kAvx2) return avx2::kPeakOps;
#endif
  return portable::kPeakOps;
}

// Where the time of calls goes, in nanoseconds of wall time; counted only while somebody measures.
enum Phase : int { kBefore = 0, kTransform = 1, kQuantize = 2, kMultiply = 3, kAttend = 4, kPhases = 5 };

std::atomic<bool> measuring{false};
std::atomic<int64_t> phase_time[kPhases];

// The wall time of one piece of work by a team, from here to the end of the scope. It is split between the phases as its
// threads report them, so their number does not matter, nor does it if one waits for another.
class Region {
 public:
  using Clock = std::chrono::steady_clock;

  Region() : on_(measuring.load(std::memory_order_relaxed)) {
    if (on_) begin_ = Clock::now();
  }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
  ~Region() {
    if (!on_) return;
    int64_t all = 0;
    for (const auto& part : parts_) all += part;
    if (all == 0) return;
    const double wall = static_cast<double>(nanoseconds(Clock::now() - begin_));
    for (int i = 0; i < kPhases; i++) {
      phase_time[i] += static_cast<int64_t>(wall * static_cast<double>(parts_[i]) / static_cast<double>(all));
    }
  }
  bool on() const { return on_; }
  void add(Phase phase, Clock::duration time) { parts_[phase] += nanoseconds(time); }

 private:
  static int64_t nanoseconds(Clock::duration time) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
  }
  bool on_;
  Clock::time_point begin_;
  std::atomic<int64_t> parts_[kPhases] = {};  // added up over the threads
};

class Stopwatch {
 public:
  explicit Stopwatch(Region& region) : region_(region) {
    if (region_.on()) last_ = Region::Clock::now();
  }
  // Adds the time since the last call, or since the beginning, to a phase.
  void add(Phase phase) {
    if (!region_.on()) return;
    const Region::Clock::time_point now = Region::Clock::now();
    region_.add(phase, now - last_);
    last_ = now;
  }

 private:
  Region& region_;
  Region::Clock::time_point last_;
};

thread_local Scratch tile_scratch, panel_scratch, rotation_scratch, level_scratch, head_scratch;

int team(int threads, int64_t work, int64_t grain, int64_t tasks) {
  const int64_t useful = std::min<int64_t>({threads, tasks, 1 + work / grain});
  return static_cast<int>(std::max<int64_t>(useful, 1));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace trdq
