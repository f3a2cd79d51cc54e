// What launchers need on the host: a workspace in parts, numbers of blocks.
#pragma once

#include <cstddef>
#include <cstdint>

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

}  // namespace pixcontrast::cuda
