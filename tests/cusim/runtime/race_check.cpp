#include "race_check.h"

#ifdef CUSIM_RACE

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <string>
#include <unordered_map>
#include <vector>

#include "memory.h"
#include "scheduler.h"

namespace cusim::race {
namespace {

constexpr int kLanes = 32;
using Clocks = std::array<uint32_t, kLanes>;

// An access to a byte, and when it was: which block since the process began (0: never), after how many block barriers,
// and at which clock of the thread.
struct Touch {
  uint32_t block, epoch, clock;
  uint16_t thread;
  Access access;
  const void* pc;
};

// Of many accesses: the last, one of another lane of its warp, and one of another warp. So whichever thread comes next,
// it meets an access of some other thread if there was one.
struct History {
  Touch last, other_lane, other_warp;
};

// What is kept of a byte: the last plain write, and what came after it.
struct Byte {
  Touch write;
  History reads, atomics;
};

// A thread has passed a fence and then an atomic operation: what it did itself, and what its block did before that
// epoch, is visible to those who see the result.
struct Release {
  uint32_t block, epoch;
  uint16_t thread;
};
struct Acquisition {
  Release release;
  uint32_t epoch;
  uint16_t thread;
};

uint32_t block, first_block, epoch;    // the running one, the first of the launch, barriers in this one
std::vector<Clocks> seen;              // [thread][lane]: the last clock of that lane that the thread is ordered after
std::vector<uint32_t> epoch_of_fence;  // [thread], 0: none
std::unordered_map<const void*, std::vector<Release>> releases;       // by the address of the atomic operation
std::unordered_map<uint32_t, std::vector<Acquisition>> acquisitions;  // of the running block, by the other block

Byte* bytes_of(const Memory& memory) {
  static const auto reserve = [](const Memory& memory) {
    void* bytes = mmap(nullptr, memory.capacity() * sizeof(Byte), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (bytes == MAP_FAILED) fail("no room for the race checker");
    return static_cast<Byte*>(bytes);
  };
  static Byte* const shared = reserve(shared_memory());
  static Byte* const global = reserve(global_memory());
  return &memory == &shared_memory() ? shared : global;
}

// For kernels.py, which knows how to find the source line.
std::string place(const void* pc) {
  Dl_info info;
  if (!dladdr(pc, &info)) return "?";
  const auto call = reinterpret_cast<uintptr_t>(pc) - reinterpret_cast<uintptr_t>(info.dli_fbase) - 1;
  char text[32];
  std::snprintf(text, sizeof text, "{0x%zx}", static_cast<size_t>(call));
  return text;
}

bool acquired(const Touch& before, const Touch& now) {
  const auto found = acquisitions.find(before.block);
  if (found == acquisitions.end()) return false;
  return std::any_of(found->second.begin(), found->second.end(), [&](const Acquisition& acquisition) {
    const Release& release = acquisition.release;
    return (before.thread == release.thread || before.epoch < release.epoch) &&
           (now.thread == acquisition.thread || acquisition.epoch < now.epoch);
  });
}

bool ordered(const Touch& before, const Touch& now) {
  if (before.block < first_block) return true;
  if (before.block != now.block) return acquired(before, now);
  if (before.thread == now.thread || before.epoch != now.epoch) return true;
  return before.thread / kLanes == now.thread / kLanes && seen[now.thread][before.thread % kLanes] >= before.clock;
}

// "read at FILE:LINE"
std::string description(const Touch& touch) {
  const char* verb = touch.access == Access::read         ? "read"
                     : touch.access == Access::write      ? "written"
                     : touch.access == Access::start_copy ? "target of a copy that begins"
                                                          : "changed atomically";
  return verb + (" at " + place(touch.pc));
}

[[noreturn]] void fail_at(const char* what, const void* address, const Touch& now, const std::string& more = "") {
  const Memory& memory = shared_memory().holds(address) ? shared_memory() : global_memory();
  const Memory::Region& region = memory.region(address);
  fail("%s: %s memory, byte %td of %s, which has %zu: %s%s", what, memory.name(),
       static_cast<const unsigned char*>(address) - region.begin, region.name.c_str(), region.size,
       description(now).c_str(), more.c_str());
}

[[noreturn]] void fail_in_race(const void* address, const Touch& now, const Touch& before) {
  fail_at("race", address, now,
          ", with nothing to order it after thread " + std::to_string(before.thread) +
              (before.block == now.block ? "" : " of another block") + ", for which it was " + description(before));
}

void remember(History& history, const Touch& now) {
  const Touch& last = history.last;
  if (last.block != now.block || last.thread != now.thread) {
    const bool same_warp = last.block == now.block && last.thread / kLanes == now.thread / kLanes;
    (same_warp ? history.other_lane : history.other_warp) = last;
  }
  history.last = now;
}

void check_byte(Byte& byte, const void* address, const Touch& now, bool shared) {
  const auto check = [&](const Touch& before) {
    if (!ordered(before, now)) fail_in_race(address, now, before);
  };
  const auto check_all = [&](const History& history) {
    for (const Touch* before : {&history.last, &history.other_lane, &history.other_warp}) check(*before);
  };
  if (shared && byte.write.block != block) byte = {};  // what another block did with its shared memory
  const bool reads = now.access == Access::read || now.access == Access::atomic;
  if (shared && reads && byte.write.block == 0) fail_at("uninitialised", address, now);
  check(byte.write);
  if (reads && byte.write.access == Access::start_copy) fail_in_race(address, now, byte.write);
  if (now.access != Access::atomic) check_all(byte.atomics);
  if (now.access != Access::read) check_all(byte.reads);
  if (now.access == Access::read) {
    remember(byte.reads, now);
  } else if (now.access == Access::atomic) {
    remember(byte.atomics, now);
  } else {
    byte = {now, {}, {}};
  }
}

void synchronise_by(const void* address, const Touch& now) {
  auto& releases_here = releases[address];
  for (const Release& release : releases_here) {
    if (release.block != block) acquisitions[release.block].push_back({release, epoch, now.thread});
  }
  if (const uint32_t fence = epoch_of_fence[now.thread]) releases_here.push_back({block, fence, now.thread});
}

}  // namespace

void note(Access access, const void* address, size_t size, const void* pc) {
  const bool shared = shared_memory().holds(address);
  if (!shared && !global_memory().holds(address)) return;
  if (!current) fail("code of the host uses memory of the device at %s", place(pc).c_str());
  const auto thread = static_cast<uint16_t>(current->number);
  const Touch now{block, epoch, seen[thread][thread % kLanes], thread, access, pc};
  const Memory& memory = shared ? shared_memory() : global_memory();
  const Memory::Region& region = memory.region(address);
  const auto* at = static_cast<const unsigned char*>(address);
  if (at < region.begin || at + size > region.begin + region.size) fail_at("out of bounds", address, now);
  Byte* byte = bytes_of(memory) + memory.offset(address);
  for (const auto* end = at + size; at < end; ++at, ++byte) check_byte(*byte, at, now, shared);
  if (access == Access::atomic && !shared) synchronise_by(address, now);
}

void note_fence() { epoch_of_fence[current->number] = epoch; }

void begin_launch() {
  first_block = block + 1;
  releases.clear();
}

void begin_block(int threads) {
  ++block;
  epoch = 1;
  acquisitions.clear();
  epoch_of_fence.assign(threads, 0);
  seen.assign(threads, {});
  for (int thread = 0; thread < threads; ++thread) seen[thread][thread % kLanes] = 1;
}

void block_barrier() { ++epoch; }

void warp_barrier(int warp, uint32_t lanes) {
  Clocks joined{};
  const auto for_lanes = [&](const auto& body) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (lanes >> lane & 1) body(lane, seen[warp * kLanes + lane]);
    }
  };
  for_lanes([&](int, const Clocks& clocks) {
    for (int lane = 0; lane < kLanes; ++lane) joined[lane] = std::max(joined[lane], clocks[lane]);
  });
  for_lanes([&](int lane, Clocks& clocks) {
    clocks = joined;
    ++clocks[lane];
  });
}

}  // namespace cusim::race

#endif
