// Elements as they are stored (float, __nv_bfloat16, __half) and as they are computed with (float), one by one and 16
// bytes at a time.
#pragma once

#include "common/cuda/device.cuh"
#include "common/layout.h"

namespace pixcontrast::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half(x);
}

template <class T>
using GradOf = pixcontrast::GradOf<T, __half>;

// Elements of T in 16 bytes.
template <class T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

// 16 bytes of T, to be loaded and stored with one instruction each. The address must be a multiple of 16.
template <class T>
struct __align__(16) Pack {
  T x[kPack<T>];
};

template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* from) {
  union {
    uint4 bits;
    Pack<T> pack;
  };
  bits = *reinterpret_cast<const uint4*>(from);
  return pack;
}

template <class T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T>& elements) {
  union {
    uint4 bits;
    Pack<T> pack;
  };
  pack = elements;
  *reinterpret_cast<uint4*>(to) = bits;
}

}  // namespace pixcontrast::cuda
