// What goes wrong in a kernel, and where.
#pragma once

namespace cusim {

// A place in the source. As a default argument, Site::here() is where the function was called.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Prints the message and the running block and thread, and ends the process: after an error nothing that a kernel
// computes means anything.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace cusim
