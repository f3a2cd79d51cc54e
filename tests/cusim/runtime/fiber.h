// Stacks to switch between: one for each thread of a block, and the one that launched the kernel.
#pragma once

#include <cstddef>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace cusim {

class Fiber {
 public:
  // Makes the next switch to this fiber begin `entry`, which must never return.
  void prepare(void (*entry)());
  // Goes on in `to`; returns when something switches back here. With `last`, nothing will.
  void switch_to(Fiber& to, bool last = false);
  // To be called first thing by `entry`.
  static void arrived();

 private:
  unsigned char* stack_ = nullptr;  // none: the stack of the process
#ifdef __x86_64__
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  void* sanitizer_state_ = nullptr;
};

}  // namespace cusim
