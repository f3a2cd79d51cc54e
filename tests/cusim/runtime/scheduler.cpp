#include "scheduler.h"

#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"
#include "instructions.h"
#include "memory.h"
#include "race_check.h"

namespace cusim {

Thread* current;
uint3 block_index;
int64_t launches = 0;
dim3 block_size, grid_size;

namespace {

constexpr int kLanes = 32, kMostThreads = 1024;
constexpr size_t kMostDynamicShared = 227 << 10;

enum class State { ready, at_block_barrier, in_warp_operation, exited };

struct Runner : Thread {
  Fiber fiber;
  State state;
  // Where the thread waits.
  const char* name;
  Site site;
  uint32_t mask;
  WarpOperation operation;
  void* operand;
};

struct Warp {
  uint32_t existing = 0, exited = 0, waiting = 0;
};

Fiber launcher;
std::vector<std::unique_ptr<Runner>> runners;
std::deque<Runner*> ready;
std::vector<Warp> warps;
int threads, exited;
int at_barrier, votes, counted;  // waiting now; of these, with a true vote; true votes at the last barrier
Runner* first_waiting;
unsigned order;
std::mt19937 random_numbers;
void (*kernel)(const void*);
const void* kernel_context;

Runner& self() { return *static_cast<Runner*>(current); }

void make_ready(Runner& runner) {
  runner.state = State::ready;
  ready.push_back(&runner);
}

// Goes on with another thread; back when the caller is ready again and chosen.
void run_next(Fiber& from, bool last = false) {
  Fiber* to = &launcher;
  current = nullptr;
  if (!ready.empty()) {
    if (order > 1) std::swap(ready.front(), ready[random_numbers() % ready.size()]);
    Runner* chosen = order == 1 ? ready.back() : ready.front();
    order == 1 ? ready.pop_back() : ready.pop_front();
    current = chosen;
    to = &chosen->fiber;
  }
  if (to != &from) from.switch_to(*to, last);
}

bool same_site(const Runner& a, const Runner& b) {
  return a.site.line == b.site.line && std::strcmp(a.site.file, b.site.file) == 0 && std::strcmp(a.name, b.name) == 0;
}

template <class Body>
void for_lanes(uint32_t lanes, int warp, const Body& body) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lanes >> lane & 1) body(*runners[warp * kLanes + lane], lane);
  }
}

// Does the operation of a mask if all its lanes have come.
void try_warp_operation(Warp& warp, Runner& last) {
  const uint32_t lanes = last.mask & warp.existing;
  if (lanes & warp.exited) {
    fail("%s at %s:%d waits for lanes %08x of warp %d, which have exited", last.name, last.site.file, last.site.line,
         lanes & warp.exited, last.warp);
  }
  if ((warp.waiting & lanes) != lanes) return;
  void* operands[kLanes] = {};
  bool complete = true;
  for_lanes(lanes, last.warp, [&](Runner& runner, int lane) {
    complete &= runner.mask == last.mask;  // else it has something else to do first
    operands[lane] = runner.operand;
  });
  if (!complete) return;
  for_lanes(lanes, last.warp, [&](Runner& runner, int) {
    if (same_site(runner, last)) return;
    fail("divergent warp operation: %s at %s:%d, but thread %d is in %s at %s:%d", last.name, last.site.file,
         last.site.line, runner.number, runner.name, runner.site.file, runner.site.line);
  });
  last.operation ? last.operation(operands, lanes) : race::warp_barrier(last.warp, lanes);
  warp.waiting &= ~lanes;
  for_lanes(lanes, last.warp, [](Runner& runner, int) { make_ready(runner); });
}

void exit_thread() {
  Runner& me = self();
  check_copies_are_done();
  if (at_barrier) {
    fail("exits while %d threads wait in %s at %s:%d", at_barrier, first_waiting->name, first_waiting->site.file,
         first_waiting->site.line);
  }
  Warp& warp = warps[me.warp];
  for_lanes(warp.waiting, me.warp, [&](Runner& other, int) {
    if (other.mask >> me.lane & 1)
      fail("exits while %s at %s:%d waits for it", other.name, other.site.file, other.site.line);
  });
  warp.exited |= 1u << me.lane;
  me.state = State::exited;
  ++exited;
}

void run_thread() {
  Fiber::arrived();
  kernel(kernel_context);
  exit_thread();
  run_next(self().fiber, true);
}

[[noreturn]] void fail_in_deadlock() {
  std::string waiting;
  for (int i = 0; i < threads;) {
    const Runner& first = *runners[i];
    int next = i;
    while (next < threads && runners[next]->state == first.state &&
           (first.state == State::exited || (same_site(first, *runners[next]) && first.mask == runners[next]->mask))) {
      ++next;
    }
    char line[400];
    const int length = std::snprintf(line, sizeof line, "\n  threads %d..%d ", i, next - 1);
    if (first.state == State::exited) {
      std::snprintf(line + length, sizeof line - length, "have exited");
    } else {
      std::snprintf(line + length, sizeof line - length, "wait in %s at %s:%d, mask %08x", first.name, first.site.file,
                    first.site.line, first.mask);
    }
    waiting += line;
    i = next;
  }
  fail("deadlock in block (%u, %u, %u)%s", block_index.x, block_index.y, block_index.z, waiting.c_str());
}

void start_thread(int number) {
  Runner& runner = *runners[number];
  runner.number = number;
  runner.lane = number % kLanes;
  runner.warp = number / kLanes;
  const unsigned n = number;
  runner.index = {n % block_size.x, n / block_size.x % block_size.y, n / block_size.x / block_size.y};
  warps[runner.warp].existing |= 1u << runner.lane;
  runner.fiber.prepare(run_thread);
  make_ready(runner);
}

void run_block(size_t number, size_t shared_bytes) {
  const unsigned x = number % grid_size.x, rest = number / grid_size.x;
  block_index = {x, rest % grid_size.y, rest / grid_size.y};
  begin_shared_memory(shared_bytes);
  race::begin_block(threads);
  exited = at_barrier = votes = 0;
  warps.assign((threads + kLanes - 1) / kLanes, Warp());
  for (int i = 0; i < threads; ++i) start_thread(i);
  run_next(launcher);
  if (exited < threads) fail_in_deadlock();
  end_shared_memory();
}

}  // namespace

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "cusim: ");
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  if (current) {
    std::fprintf(stderr, "\n  in block (%u, %u, %u), thread (%u, %u, %u)", block_index.x, block_index.y, block_index.z,
                 current->index.x, current->index.y, current->index.z);
    const Runner& me = self();
    if (me.state == State::in_warp_operation) {
      std::fprintf(stderr, ", in %s at %s:%d", me.name, me.site.file, me.site.line);
    }
  }
  std::fprintf(stderr, "\n");
  std::fflush(stderr);
  _exit(1);
}

void set_order(unsigned wish) { order = wish; }

cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*), const void* context) {
  const size_t size = size_t{block.x} * block.y * block.z;
  if (size == 0 || size > kMostThreads || block.z > 64 || grid.x == 0 || grid.x > INT32_MAX || grid.y == 0 ||
      grid.y > UINT16_MAX || grid.z == 0 || grid.z > UINT16_MAX) {
    return cudaErrorInvalidConfiguration;
  }
  if (shared_bytes > kMostDynamicShared) return cudaErrorInvalidValue;
  grid_size = grid;
  block_size = block;
  kernel = body;
  kernel_context = context;
  threads = static_cast<int>(size);
  while (runners.size() < size) runners.push_back(std::make_unique<Runner>());
  random_numbers.seed(order);
  std::vector<size_t> blocks(size_t{grid.x} * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (order == 1) std::reverse(blocks.begin(), blocks.end());
  if (order > 1) std::shuffle(blocks.begin(), blocks.end(), random_numbers);
  ++launches;
  race::begin_launch();
  for (size_t number : blocks) run_block(number, shared_bytes);
  return cudaSuccess;
}

int block_barrier(Count count, bool vote, const char* name, Site site) {
  Runner& me = self();
  me.name = name;
  me.site = site;
  me.mask = ~0u;
  if (exited) fail("%s at %s:%d: %d threads of the block have exited", name, site.file, site.line, exited);
  if (at_barrier == 0) first_waiting = &me;
  if (!same_site(me, *first_waiting)) {
    fail("divergent barrier: %s at %s:%d, but thread %d waits in %s at %s:%d", name, site.file, site.line,
         first_waiting->number, first_waiting->name, first_waiting->site.file, first_waiting->site.line);
  }
  votes += vote;
  me.state = State::at_block_barrier;
  if (++at_barrier == threads) {
    race::block_barrier();
    counted = votes;
    at_barrier = votes = 0;
    for (int i = 0; i < threads; ++i) make_ready(*runners[i]);
  }
  run_next(me.fiber);
  return count == Count::sum ? counted : count == Count::all ? counted == threads : counted > 0;
}

void warp_operation(uint32_t mask, WarpOperation operation, void* operand, const char* name, Site site) {
  Runner& me = self();
  if (!(mask >> me.lane & 1))
    fail("%s at %s:%d: the mask %08x leaves out the caller", name, site.file, site.line, mask);
  me.name = name;
  me.site = site;
  me.mask = mask;
  me.operation = operation;
  me.operand = operand;
  me.state = State::in_warp_operation;
  warps[me.warp].waiting |= 1u << me.lane;
  try_warp_operation(warps[me.warp], me);
  run_next(me.fiber);
}

void warp_barrier(uint32_t mask, const char* name, Site site) { warp_operation(mask, nullptr, nullptr, name, site); }

}  // namespace cusim
