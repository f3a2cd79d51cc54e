#include "fiber.h"

#include <sys/mman.h>

#include "report.h"
#ifdef CUSIM_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cusim {
namespace {

constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 64 << 10;

unsigned char* new_stack() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0)
    fail("no memory for the stack of a thread");
  return static_cast<unsigned char*>(memory) + kGuardBytes;
}

}  // namespace

#ifdef __x86_64__
// swapcontext would save the signal mask as well, by a system call: five times as slow.
extern "C" void cusim_swap_stacks(void** from, void* to);
asm(R"(
.text
.type cusim_swap_stacks, @function
cusim_swap_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cusim_swap_stacks, .-cusim_swap_stacks
)");
#endif

void Fiber::prepare(void (*entry)()) {
  if (!stack_) stack_ = new_stack();
  sanitizer_state_ = nullptr;
#ifdef CUSIM_ASAN
  __asan_unpoison_memory_region(stack_, kStackBytes);  // what the last entry left behind
#endif
#ifdef __x86_64__
  constexpr int kSavedRegisters = 6;
  auto** top = reinterpret_cast<void**>(stack_ + kStackBytes);
  *--top = nullptr;  // in place of a return address, which also aligns the stack as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  stack_pointer_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
}

void Fiber::switch_to(Fiber& to, [[maybe_unused]] bool last) {
#ifdef CUSIM_ASAN
  __sanitizer_start_switch_fiber(last ? nullptr : &sanitizer_state_, to.stack_, to.stack_ ? kStackBytes : 0);
#endif
#ifdef __x86_64__
  cusim_swap_stacks(&stack_pointer_, to.stack_pointer_);
#else
  swapcontext(&context_, &to.context_);
#endif
#ifdef CUSIM_ASAN
  __sanitizer_finish_switch_fiber(sanitizer_state_, nullptr, nullptr);
#endif
}

void Fiber::arrived() {
#ifdef CUSIM_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

}  // namespace cusim
