// Rows of a feature matrix in the registers of a warp. A lane keeps 32 elements at a time, of one long row or of
// several short ones: 4 KB in flight a warp in float32, so that 10 warps are enough for the 40 KB a multiprocessor of
// an H100 needs to keep its memory busy.
#pragma once

#include "common/cuda/elements.cuh"
#include "common/cuda/warp.cuh"

namespace pixcontrast::cuda {

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

inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace pixcontrast::cuda
