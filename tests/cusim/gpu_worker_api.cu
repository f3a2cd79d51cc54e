// runtime/worker_api.cpp for a real device: the same tests then run on it.
#include <cuda_runtime.h>

#include <vector>

namespace {

std::vector<void*> arrays;
cudaError_t first_error = cudaSuccess;  // of the functions here since the last wait

void note(cudaError_t status) {
  if (first_error == cudaSuccess) first_error = status;
}

}  // namespace

extern "C" {

void* worker_allocate(size_t bytes, const char*) {
  void* array = nullptr;
  note(cudaMalloc(&array, bytes ? bytes : 1));
  if (array) arrays.push_back(array);
  return array;
}
void worker_write(void* to, const void* from, size_t bytes) { note(cudaMemcpy(to, from, bytes, cudaMemcpyDefault)); }
void worker_read(void* to, const void* from, size_t bytes) { note(cudaMemcpy(to, from, bytes, cudaMemcpyDefault)); }
void worker_set_order(unsigned) {}
int worker_wait() {
  note(cudaDeviceSynchronize());
  const auto status = first_error;
  first_error = cudaSuccess;
  return status;
}
void worker_release() {
  for (void* array : arrays) cudaFree(array);
  arrays.clear();
}
const char* worker_meaning(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }
}
