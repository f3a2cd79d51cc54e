// The functions that g++ -fsanitize=thread calls at each access, in place of those of its own thread sanitizer, which
// knows nothing of barriers and warps.
#include "race_check.h"

#ifdef CUSIM_RACE

using cusim::race::Access;
using cusim::race::note;

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_read_range(void* p, size_t size) { note(Access::read, p, size, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t size) { note(Access::write, p, size, __builtin_return_address(0)); }

#define CUSIM_CALLBACKS(size)                                                                             \
  void __tsan_read##size(void* p) { note(Access::read, p, size, __builtin_return_address(0)); }           \
  void __tsan_write##size(void* p) { note(Access::write, p, size, __builtin_return_address(0)); }         \
  void __tsan_unaligned_read##size(void* p) { note(Access::read, p, size, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##size(void* p) { note(Access::write, p, size, __builtin_return_address(0)); }
CUSIM_CALLBACKS(1)
CUSIM_CALLBACKS(2)
CUSIM_CALLBACKS(4)
CUSIM_CALLBACKS(8)
CUSIM_CALLBACKS(16)
}

#endif
