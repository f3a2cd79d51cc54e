#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <utility>

#include "common/cpu/work.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pixcontrast::cpu {
namespace {

constexpr size_t kLeastBytes = size_t{8} << 20;  // of a block that is worth keeping

// Fewer pages to take from the system.
void use_large_pages(void* block, size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const auto start = (reinterpret_cast<uintptr_t>(block) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(block) + bytes) / kPage * kPage;
  if (start < end) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);  // a wish: it may fail
#endif
}

class KeptMemory : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kLeastBytes) return system()->allocate(bytes);
    auto block = std::make_unique<Block>(take(bytes));
    if (!block->memory) {
      block->memory = system()->allocate(bytes);
      use_large_pages(block->memory.get(), bytes);
    }
    auto* const lent = block.release();
    return {lent->memory.get(), lent, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }  // what is lent is not the memory itself

  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  void release() {
    const std::lock_guard<std::mutex> guard(lock_);
    kept_.clear();
    kept_bytes_ = 0;
    most_bytes_ = used_bytes_;
  }

  static KeptMemory& instance() {
    static auto* const only = new KeptMemory();  // never destroyed: tensors may outlive everything static
    return *only;
  }

 private:
  struct Block {
    c10::DataPtr memory;
    size_t bytes;
  };

  static c10::Allocator* system() { return c10::GetDefaultCPUAllocator(); }

  static void give_back(void* lent) {
    auto* const block = static_cast<Block*>(lent);
    auto& own = instance();
    const std::lock_guard<std::mutex> guard(own.lock_);
    own.used_bytes_ -= block->bytes;
    own.kept_bytes_ += block->bytes;
    own.kept_.push_back(std::move(*block));
    delete block;
  }

  // The smallest kept block that is large enough and at most half as large again: so batches of two sizes, taking
  // turns, do not drive out each other's blocks. If there is none, a block without memory, for which the oldest ones
  // have made room.
  Block take(size_t bytes) {
    const std::lock_guard<std::mutex> guard(lock_);
    auto best = kept_.end();
    for (auto block = kept_.begin(); block != kept_.end(); ++block) {
      const bool fits = bytes <= block->bytes && block->bytes <= bytes + bytes / 2;
      if (fits && (best == kept_.end() || block->bytes < best->bytes)) best = block;
    }
    Block taken{{}, bytes};
    if (best != kept_.end()) {
      taken = std::move(*best);
      kept_.erase(best);
      kept_bytes_ -= taken.bytes;
    }
    used_bytes_ += taken.bytes;
    most_bytes_ = std::max(most_bytes_, used_bytes_);
    while (used_bytes_ + kept_bytes_ > most_bytes_) {
      kept_bytes_ -= kept_.front().bytes;
      kept_.pop_front();
    }
    return taken;
  }

  std::mutex lock_;
  std::deque<Block> kept_;  // those freed first come first
  size_t kept_bytes_ = 0, used_bytes_ = 0, most_bytes_ = 0;
};

}  // namespace

c10::Allocator* kept_memory() { return &KeptMemory::instance(); }

void release_kept_memory() { KeptMemory::instance().release(); }

}  // namespace pixcontrast::cpu
