// Weights within a class: sigmoids that cannot vanish together, sums by class that do not depend on the order.
#pragma once

#include "common/cuda/warp.cuh"

namespace pixcontrast::cuda {

// sigma(logit) / e^shift. With shift_of(largest logit of the class), the largest score of a class is at least a half.
__device__ __forceinline__ float score(float logit, float shift) {
  return expf(fminf(logit, 0.0f) - shift) / (1.0f + expf(-fabsf(logit)));
}
__device__ __forceinline__ float shift_of(float largest) { return fminf(largest, 0.0f); }

// Integers in the order of the floats, for atomicMax; NaN orders above every other value.
__device__ __forceinline__ int order_key(float x) {
  const int bits = __float_as_int(x != x ? fabsf(x) : x);
  return bits >= 0 ? bits : bits ^ 0x7fffffff;
}
__device__ __forceinline__ float from_order_key(int key) { return __int_as_float(key >= 0 ? key : key ^ 0x7fffffff); }
constexpr int kLeastKey = -0x7f800001;  // of minus infinity

// Sums in fixed point, because integers add up to the same in any order. A float of at least 2^(24 - bits) is exact.
template <int Bits>
__device__ __forceinline__ void add_fixed(unsigned long long* sum, float x) {
  atomicAdd(sum, static_cast<unsigned long long>(static_cast<long long>(x * static_cast<float>(1ull << Bits))));
}
template <int Bits>
__device__ __forceinline__ float from_fixed(unsigned long long sum) {
  return static_cast<float>(static_cast<double>(static_cast<long long>(sum)) / static_cast<double>(1ull << Bits));
}

// body(c, members) for each class c >= 0 among the lanes' own, once; the whole warp calls it. Neighbouring pixels are
// mostly of one class, so that a warp adds to a sum once instead of 32 times.
template <class Body>
__device__ __forceinline__ void for_classes(int own, const Body& body) {
  unsigned left = __ballot_sync(kAllLanes, own >= 0);
  while (left != 0) {
    const int c = __shfl_sync(kAllLanes, own, __ffs(left) - 1);
    const unsigned members = __ballot_sync(kAllLanes, own == c);
    body(c, members);
    left &= ~members;
  }
}

}  // namespace pixcontrast::cuda
