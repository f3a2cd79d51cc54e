// The race checker: every access of a kernel to shared and global memory, against those that came before it.
//
// Two accesses to a byte, at least one of them a write and not both atomic, are a race unless something orders them: a
// block barrier between them, __syncwarp, or the end of a launch. Shuffles and the like order nothing. Blocks are
// ordered only by a fence and an atomic operation on both sides ("the last block adds up").
#pragma once

#include <cstddef>
#include <cstdint>

namespace cusim::race {

// start_copy: an asynchronous copy to here begins; what lies here is undefined until it is written.
enum class Access { read, write, atomic, start_copy };

#ifdef CUSIM_RACE
// The running thread touches `bytes` from `address` on; `pc`: where in the kernel.
void note(Access access, const void* address, size_t bytes, const void* pc);
void note_fence();
void begin_launch();
void begin_block(int threads);
void block_barrier();
void warp_barrier(int warp, uint32_t lanes);
#else
inline void note(Access, const void*, size_t, const void*) {}
inline void note_fence() {}
inline void begin_launch() {}
inline void begin_block(int) {}
inline void block_barrier() {}
inline void warp_barrier(int, uint32_t) {}
#endif

}  // namespace cusim::race
