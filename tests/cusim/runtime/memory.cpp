#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <iterator>

#include "report.h"
#ifdef CUSIM_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace cusim {
namespace {

constexpr int kUnwritten = 0xff;
constexpr size_t kAlignment = 256, kMostStaticShared = 48 << 10;

unsigned char* reserve(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("cannot reserve %zu bytes", bytes);
  return static_cast<unsigned char*>(memory);
}

size_t round_up(size_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

Memory::Memory(size_t capacity, size_t red_zone, const char* name)
    : capacity_(capacity), red_zone_(red_zone), name_(name), base_(reserve(capacity)) {}

void* Memory::allocate(size_t bytes, const std::string& name, size_t offset) {
  const size_t begin = round_up(used_ + red_zone_) + offset, end = begin + bytes;
  if (end + red_zone_ > capacity_)
    fail("%s memory is full: no room for the %zu bytes of %s", name_, bytes, name.c_str());
#ifdef CUSIM_ASAN
  __asan_poison_memory_region(base_ + used_, end + red_zone_ - used_);
  __asan_unpoison_memory_region(base_ + begin, bytes);
  std::memset(base_ + begin, kUnwritten, bytes);
#else
  std::memset(base_ + used_, kUnwritten, end + red_zone_ - used_);
#endif
  used_ = end + red_zone_;
  regions_[base_ + begin] = {base_ + begin, bytes, name};
  return base_ + begin;
}

void Memory::clear() {
  check_red_zones();
#ifdef CUSIM_ASAN
  __asan_poison_memory_region(base_, used_);
#endif
  used_ = 0;
  regions_.clear();
  latest_ = nullptr;
}

const Memory::Region& Memory::region(const void* address) const {
  if (latest_ && latest_->begin <= address && address < latest_->begin + latest_->size) return *latest_;
  auto after = regions_.upper_bound(address);
  latest_ = &(after == regions_.begin() ? after : std::prev(after))->second;
  return *latest_;
}

// Other builds see stray accesses as they happen.
void Memory::check_red_zones() const {
#ifndef CUSIM_ASAN
  const unsigned char* at = base_;
  const auto check = [&](const unsigned char* end) {
    const auto* stray = std::find_if(at, end, [](unsigned char byte) { return byte != kUnwritten; });
    if (stray == end) return;
    const Region& near = region(stray);
    fail("write out of bounds: %s memory, byte %td of %s, which has %zu", name_, stray - near.begin, near.name.c_str(),
         near.size);
  };
  for (const auto& [begin, region] : regions_) {
    check(region.begin);
    at = region.begin + region.size;
  }
  check(base_ + used_);
#endif
}

Memory& shared_memory() {
  static Memory memory(512 << 10, 256, "shared");
  return memory;
}

Memory& global_memory() {
  static Memory memory(128 << 20, 4096, "global");
  return memory;
}

namespace {

std::map<const void*, void*> shared_variables;
size_t static_shared;
void* dynamic_shared;

}  // namespace

void begin_shared_memory(size_t dynamic_bytes) {
  // A kernel may count on a multiple of 16 and no more.
  dynamic_shared = shared_memory().allocate(dynamic_bytes, "the dynamic shared memory", 16);
}

void end_shared_memory() {
  shared_memory().clear();
  shared_variables.clear();
  static_shared = 0;
}

void* dynamic_shared_memory() { return dynamic_shared; }

void* shared_variable(const void* tag, size_t bytes, const char* name) {
  void*& variable = shared_variables[tag];
  if (variable) return variable;
  static_shared += bytes;
  if (static_shared > kMostStaticShared) fail("%s: more than 48 KiB of static shared memory", name);
  return variable = shared_memory().allocate(bytes, name);
}

}  // namespace cusim
