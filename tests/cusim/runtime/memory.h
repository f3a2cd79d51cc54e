// The two memories of the device, shared and global, each with red zones around everything that lies in it. Whatever
// is not yet written is NaN as float, bfloat16 and half, and -1 as an integer.
#pragma once

#include <cstddef>
#include <map>
#include <string>

namespace cusim {

class Memory {
 public:
  struct Region {
    unsigned char* begin;
    size_t size;
    std::string name;
  };

  Memory(size_t capacity, size_t red_zone, const char* name);
  // `offset` bytes beyond a multiple of 256.
  void* allocate(size_t bytes, const std::string& name, size_t offset = 0);
  // Frees everything, after a look at the red zones.
  void clear();

  bool holds(const void* address) const { return base_ <= address && address < base_ + used_; }
  size_t offset(const void* address) const { return static_cast<const unsigned char*>(address) - base_; }
  // The region at or before the address; the first if there is none.
  const Region& region(const void* address) const;
  size_t capacity() const { return capacity_; }
  const char* name() const { return name_; }

 private:
  void check_red_zones() const;

  const size_t capacity_, red_zone_;
  const char* const name_;
  unsigned char* const base_;
  size_t used_ = 0;
  std::map<const void*, Region> regions_;
  mutable const Region* latest_ = nullptr;
};

Memory& shared_memory();
Memory& global_memory();

// The shared variable that `tag` stands for in the running block.
void* shared_variable(const void* tag, size_t bytes, const char* name);
void* dynamic_shared_memory();
void begin_shared_memory(size_t dynamic_bytes);
void end_shared_memory();

}  // namespace cusim
