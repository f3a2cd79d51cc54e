// What the worker process calls around a kernel: it allocates the arrays in global memory and fetches them afterwards.
// gpu_worker_api.cu has the same functions for a real device.
#include <cuda_runtime_api.h>

#include <cstring>
#include <utility>

#include "memory.h"
#include "race_check.h"
#include "scheduler.h"

extern "C" {

void* worker_allocate(size_t bytes, const char* name) { return cusim::global_memory().allocate(bytes, name); }
void worker_write(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
void worker_read(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
void worker_set_order(unsigned order) { cusim::set_order(order); }
int worker_wait() { return 0; }
// Launches, copies and fills since the last call.
int64_t worker_launches() { return std::exchange(cusim::launches, 0); }
void worker_release() { cusim::global_memory().clear(); }

// The part of the CUDA runtime that launchers use.
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  ++cusim::launches;
  cusim::race::begin_launch();
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  ++cusim::launches;
  cusim::race::begin_launch();
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
}
