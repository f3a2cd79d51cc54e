#include "gradient_memory.h"

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

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

class GradientMemory : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kLeastBytes) return system()->allocate(bytes);
    auto block = take(bytes);
    if (!block) {
      block = system()->allocate(bytes);
      use_large_pages(block.get(), bytes);
    }
    auto* const lent = new Block{std::move(block), bytes};
    return {lent->memory.get(), lent, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }  // what is lent is not the memory itself

  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  void release() {
    const std::lock_guard<std::mutex> guard(lock_);
    kept_.clear();
  }

  static GradientMemory& instance() {
    static auto* const only = new GradientMemory();  // never destroyed: tensors may outlive everything static
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
    auto& memory = instance();
    const std::lock_guard<std::mutex> guard(memory.lock_);
    memory.kept_.push_back(std::move(*block));
    delete block;
  }

  // A kept block of that size; if there is none, an empty pointer, and nothing is kept any more.
  c10::DataPtr take(size_t bytes) {
    const std::lock_guard<std::mutex> guard(lock_);
    const auto found = std::find_if(kept_.begin(), kept_.end(), [&](const Block& b) { return b.bytes == bytes; });
    if (found == kept_.end()) {
      kept_.clear();
      return {};
    }
    auto memory = std::move(found->memory);
    kept_.erase(found);
    return memory;
  }

  std::mutex lock_;
  std::vector<Block> kept_;
};

}  // namespace

c10::Allocator* gradient_memory() { return &GradientMemory::instance(); }

void release_gradient_memory() { GradientMemory::instance().release(); }

}  // namespace pixcontrast::cpu
