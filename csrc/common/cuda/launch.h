// What launchers need on the host: a workspace in parts, numbers of blocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace pixcontrast::cuda {

// Hands out a workspace array by array. On a null workspace it only counts the bytes.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<unsigned char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    unsigned char* const here = base_ ? base_ + used_ : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return reinterpret_cast<T*>(here);
  }

  size_t bytes() const { return used_; }

 private:
  unsigned char* base_;
  size_t used_ = 0;
};

// Blocks that take `size` items each.
inline unsigned blocks_for(int64_t items, int64_t size) { return static_cast<unsigned>((items + size - 1) / size); }

// What has to be set once for each kernel and device before a launch, because setting it costs more than a launch.
class LargestSharedMemory {
 public:
  // Calls set() unless a call for this kernel and device succeeded before with as many bytes or more.
  template <class Set>
  auto raise(const void* kernel, int device, size_t bytes, const Set& set) -> decltype(set()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t& largest = largest_[{kernel, device}];
    if (bytes <= largest) return {};
    const auto status = set();
    if (status == decltype(status){}) largest = bytes;
    return status;
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<const void*, int>, size_t> largest_;
};

}  // namespace pixcontrast::cuda
