// runtime/worker_api.cpp for a real device: the same tests then run on it.
#include <cuda_runtime.h>

#include <vector>

namespace {

std::vector<void*> arrays;

}  // namespace

extern "C" {

void* worker_allocate(size_t bytes, const char*) {
  void* array = nullptr;
  cudaMalloc(&array, bytes ? bytes : 1);
  arrays.push_back(array);
  return array;
}
void worker_write(void* to, const void* from, size_t bytes) { cudaMemcpy(to, from, bytes, cudaMemcpyDefault); }
void worker_read(void* to, const void* from, size_t bytes) { cudaMemcpy(to, from, bytes, cudaMemcpyDefault); }
void worker_set_order(unsigned) {}
int worker_wait() { return cudaDeviceSynchronize(); }
void worker_release() {
  for (void* array : arrays) cudaFree(array);
  arrays.clear();
}
}
