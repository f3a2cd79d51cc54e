// What a warp works with: elements as they are stored (float, __nv_bfloat16, __half) and as they are computed with
// (float), sums over lanes, and rows of a feature matrix in registers.
#pragma once

#include "common/cuda/device.cuh"
#include "common/layout.h"

namespace pixcontrast::cuda {

// ---- elements, one by one and 16 bytes at a time

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

inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// ---- sums over lanes

constexpr unsigned kAllLanes = 0xffffffffu;

// Sum and maximum over kLanes neighbouring lanes. The whole warp takes part; every lane gets the result, and always
// adds in the same order.
template <int kLanes = 32, class A>
__device__ __forceinline__ A warp_sum(A x) {
  CU_UNROLL for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
template <int kLanes = 32, class A>
__device__ __forceinline__ A warp_max(A x) {
  CU_UNROLL for (int step = kLanes / 2; step > 0; step /= 2) x = max(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// The sum of x over this lane and those before it.
template <class A>
__device__ __forceinline__ A warp_scan(A x) {
  const int lane = threadIdx.x % 32;
  CU_UNROLL for (int step = 1; step < 32; step *= 2) {
    const A before = __shfl_up_sync(kAllLanes, x, step);
    if (lane >= step) x += before;
  }
  return x;
}

// The sum of x over a block of kWarps warps, for every thread. `scratch` [kWarps] lies in shared memory and may be used
// again afterwards.
template <int kWarps, class A>
__device__ __forceinline__ A block_sum(A x, A* scratch) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  A sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += scratch[warp];
  __syncthreads();
  return sum;
}

// The sum of x over this thread and those before it, and in `sum`, unless it is null, over all; `scratch` as above.
template <int kWarps, class A>
__device__ __forceinline__ A block_scan(A x, A* scratch, A* sum = nullptr) {
  const int own = threadIdx.x / 32;
  x = warp_scan(x);
  if (threadIdx.x % 32 == 31) scratch[own] = x;
  __syncthreads();
  for (int warp = 0; warp < own; ++warp) x += scratch[warp];
  if (sum != nullptr) {
    *sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) *sum += scratch[warp];
  }
  __syncthreads();
  return x;
}

// ---- rows. A lane keeps 32 elements at a time, of one long row or of several short ones: 4 KB in flight a warp in
// float32, so that 10 warps are enough for the 40 KB a multiprocessor of an H100 needs to keep its memory busy.

constexpr int kLaneElements = 32;

template <class T, int Width>
struct Few {
  T x[Width];
};

// Width neighbours, 16 bytes at a time where Width allows; then the address must be a multiple of 16.
template <int Width, class T>
__device__ __forceinline__ Few<T, Width> load_few(const T* from) {
  Few<T, Width> few;
  if constexpr (Width % kPack<T> == 0) {
    CU_UNROLL for (int start = 0; start < Width; start += kPack<T>) {
      const Pack<T> pack = load_pack(from + start);
      CU_UNROLL for (int i = 0; i < kPack<T>; ++i) few.x[start + i] = pack.x[i];
    }
  } else {
    CU_UNROLL for (int i = 0; i < Width; ++i) few.x[i] = from[i];
  }
  return few;
}

template <class T, int Width>
__device__ __forceinline__ void store_few(T* to, const Few<T, Width>& few) {
  if constexpr (Width % kPack<T> == 0) {
    CU_UNROLL for (int start = 0; start < Width; start += kPack<T>) {
      Pack<T> pack;
      CU_UNROLL for (int i = 0; i < kPack<T>; ++i) pack.x[i] = few.x[start + i];
      store_pack(to + start, pack);
    }
  } else {
    CU_UNROLL for (int i = 0; i < Width; ++i) to[i] = few.x[i];
  }
}

// To global memory. The compiler is not free to split these stores, as it did with plain ones in the larger kernels.
template <class T, int Width>
__device__ __forceinline__ void write_few(T* to, const Few<T, Width>& few) {
  if constexpr (Width == kPack<T>) {
    union {
      uint4 bits;
      Few<T, Width> elements;
    };
    elements = few;
    __stcg(reinterpret_cast<uint4*>(to), bits);
  } else {
    store_few(to, few);
  }
}

// How a warp lays out rows: lane l holds, in slot k, Width elements from column Width (32 k + l) of a chunk on.
template <int Width_, int Slots_>
struct RowShape {
  static constexpr int kWidth = Width_, kSlots = Slots_;
  static constexpr int kColumns = 32 * kWidth * kSlots;  // of a chunk
  // Rows that a warp keeps at a time. Where rows may be longer than a chunk, it is one.
  static constexpr int kRows = kWidth == 1 ? 1 : kLaneElements / (kWidth * kSlots);

  // body(slot, column) for the lane's share of the chunk that starts at column `first` of `dim`.
  template <class Body>
  static __device__ __forceinline__ void for_columns(int first, int dim, const Body& body) {
    const int lane = threadIdx.x % 32;
    CU_UNROLL for (int slot = 0; slot < kSlots; ++slot) {
      const int column = first + (slot * 32 + lane) * kWidth;
      if (column < dim) body(slot, column);
    }
  }
};

// A chunk of one row x, from column `first` of `dim` on. The other row y [dim] is dense; `stride` is the distance from
// one element of x to the next in memory, which must be 1 if Width is more than 1.
template <class T, class Shape>
struct RowChunk {
  static constexpr int kWidth = Shape::kWidth;
  Few<T, kWidth> x[Shape::kSlots];

  __device__ __forceinline__ void load(const T* row, int64_t stride, int first, int dim) {
    Shape::for_columns(first, dim, [&](int slot, int column) { x[slot] = load_few<kWidth>(at(row, stride, column)); });
  }

  // Adds the lane's part of <x, x>, and of <x, y> unless y is null.
  __device__ __forceinline__ void add_products(const float* y, int first, int dim, float* square,
                                               float* product) const {
    Shape::for_columns(first, dim, [&](int slot, int column) {
      CU_UNROLL for (int i = 0; i < kWidth; ++i) {
        const float element = to_float(x[slot].x[i]);
        *square += element * element;
      }
      if (y == nullptr) return;
      const auto other = load_few<kWidth>(y + column);
      CU_UNROLL for (int i = 0; i < kWidth; ++i)* product += to_float(x[slot].x[i]) * other.x[i];
    });
  }

  // out = alpha x + beta y
  template <class Out>
  __device__ __forceinline__ void store_combination(float alpha, float beta, const float* y, int first, int dim,
                                                    Out* out, int64_t stride) const {
    Shape::for_columns(first, dim, [&](int slot, int column) {
      const auto other = load_few<kWidth>(y + column);
      Few<Out, kWidth> result;
      CU_UNROLL for (int i = 0; i < kWidth; ++i) {
        result.x[i] = from_float<Out>(alpha * to_float(x[slot].x[i]) + beta * other.x[i]);
      }
      write_few(at(out, stride, column), result);
    });
  }

  template <class Out>
  static __device__ __forceinline__ void store_zeros(int first, int dim, Out* out, int64_t stride) {
    Shape::for_columns(first, dim, [&](int, int column) { write_few(at(out, stride, column), Few<Out, kWidth>{}); });
  }

  // out = alpha x, dense.
  __device__ __forceinline__ void store_scaled(float alpha, int first, int dim, float* out) const {
    Shape::for_columns(first, dim, [&](int slot, int column) {
      Few<float, kWidth> result;
      CU_UNROLL for (int i = 0; i < kWidth; ++i) result.x[i] = alpha * to_float(x[slot].x[i]);
      store_few(out + column, result);
    });
  }

 private:
  template <class U>
  static __device__ __forceinline__ U* at(U* row, int64_t stride, int column) {
    return row + (kWidth == 1 ? column * stride : column);
  }
};

// Calls body with the shape for rows of `dim` elements of T. `aligned`: every row starts at a multiple of 16 bytes and
// its elements lie side by side. Rows of more than 1024 elements (512 if not aligned) are worked on in chunks and read
// twice.
template <class T, class Body>
auto with_row_shape(int64_t dim, bool aligned, const Body& body) {
  constexpr int width = kPack<T>;
  if (!aligned) return body(RowShape<1, kLaneElements / 2>());
  if (dim <= 256) return body(RowShape<width, 8 / width>());
  if (dim <= 512) return body(RowShape<width, 16 / width>());
  return body(RowShape<width, kLaneElements / width>());
}

}  // namespace pixcontrast::cuda
