// Sums and maxima over the 32 lanes of a warp, all of which must take part. Every lane gets the result, and always adds
// in the same order.
#pragma once

#include "common/cuda/device.cuh"

namespace pixcontrast::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

template <class A>
__device__ __forceinline__ A warp_sum(A x) {
  CU_UNROLL for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

template <class A>
__device__ __forceinline__ A warp_max(A x) {
  CU_UNROLL for (int step = 16; step > 0; step /= 2) {
    const A other = __shfl_xor_sync(kAllLanes, x, step);
    x = x > other ? x : other;
  }
  return x;
}

}  // namespace pixcontrast::cuda
