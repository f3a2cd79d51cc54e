#include <algorithm>

#include "cuda/launch.h"
#include "cuda/numbers.cuh"
#include "scale_cuda.h"

namespace pixcontrast {
namespace cuda {

constexpr int kScaleThreads = 256;

// Thread t of n takes packs t, t + n, ...; the numbers before `aligned` and from `tail` on are taken one by one.
template <class T>
__global__ void scale(T* numbers, int64_t aligned, int64_t tail, int64_t count, const float* factor) {
  const float f = *factor;
  if (f == 1.0f) return;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kScaleThreads;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kScaleThreads + threadIdx.x;
  for (int64_t i = aligned + thread * kPack<T>; i < tail; i += threads * kPack<T>) {
    Pack<T> pack = load_pack(numbers + i);
    CU_UNROLL for (int k = 0; k < kPack<T>; ++k) pack.x[k] = from_float<T>(f * to_float(pack.x[k]));
    store_pack(numbers + i, pack);
  }
  for (int64_t i = thread; i < aligned + (count - tail); i += threads) {
    T& number = numbers[i < aligned ? i : tail + i - aligned];
    number = from_float<T>(f * to_float(number));
  }
}

}  // namespace cuda

template <class T>
cudaError_t scale_cuda(T* numbers, int64_t count, const float* factor, int sm_count, cudaStream_t stream) {
  using namespace cuda;
  if (count == 0) return cudaSuccess;
  const auto misplaced = static_cast<int64_t>(reinterpret_cast<uintptr_t>(numbers) % 16 / sizeof(T));
  const int64_t aligned = std::min(count, misplaced == 0 ? 0 : kPack<T> - misplaced);
  const int64_t tail = aligned + (count - aligned) / kPack<T> * kPack<T>;
  const unsigned blocks = std::min(blocks_for(count, int64_t{kScaleThreads} * kPack<T>), 8u * sm_count);
  return cu_launch(scale<T>, dim3(blocks), dim3(kScaleThreads), 0, stream, numbers, aligned, tail, count, factor);
}

template cudaError_t scale_cuda(float*, int64_t, const float*, int, cudaStream_t);
template cudaError_t scale_cuda(__nv_bfloat16*, int64_t, const float*, int, cudaStream_t);
template cudaError_t scale_cuda(__half*, int64_t, const float*, int, cudaStream_t);

}  // namespace pixcontrast
