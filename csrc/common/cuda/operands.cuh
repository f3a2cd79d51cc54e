// Operands of product.cuh: each says how the threads of a block bring 128 rows of it, one step of the depth at a time,
// from memory (fetch: into registers) to shared memory (put). Whatever does not exist is zero and is not read.
#pragma once

#include "common/cuda/product.cuh"

namespace pixcontrast::cuda {

// The first `valid` elements from `from` on, at most a pack of them, in one load if `aligned`.
template <class T>
__device__ __forceinline__ Pack<T> load_some(const T* from, int valid, bool aligned) {
  if (aligned && valid >= kPack<T>) return load_pack(from);
  Pack<T> pack;
  CU_UNROLL for (int i = 0; i < kPack<T>; ++i) pack.x[i] = i < valid ? from[i] : from_float<T>(0.0f);
  return pack;
}

template <class Product, class T>
__device__ __forceinline__ void put_pack(T* to, Pack<T> pack) {
  CU_UNROLL for (int i = 0; i < kPack<T>; ++i) pack.x[i] = Product::prepare(pack.x[i]);
  store_pack(to, pack);
}

// Rows that lie along the depth, four threads a row. source(row, depth, valid) is the pack of the row that starts at
// that depth, of which `valid` elements are left.
template <class Product, class Source>
class DepthRows {
  using T = typename Product::Element;

 public:
  using Tile = OperandTile<T, true>;

  __device__ __forceinline__ DepthRows(int last, const Source& source) : last_(last), source_(source) {}

  __device__ __forceinline__ void fetch(int depth) {
    CU_UNROLL for (int i = 0; i < 2; ++i) pack_[i] = source_(row(i), depth + column(), last_ - depth - column());
  }
  __device__ __forceinline__ void put(T* tile) const {
    CU_UNROLL for (int i = 0; i < 2; ++i) put_pack<Product>(tile + Tile::place(row(i), column()), pack_[i]);
  }

 private:
  static __device__ __forceinline__ int row(int i) { return threadIdx.x / 4 + kTile / 2 * i; }
  static __device__ __forceinline__ int column() { return threadIdx.x % 4 * kPack<T>; }

  int last_;
  Source source_;
  Pack<T> pack_[2];
};

// Elements that lie along the rows: source(depth) is where those of that depth start; `rows` of them exist.
template <class Product, class Source>
class RowColumns {
  using T = typename Product::Element;
  static constexpr int kPacks = kTile / kPack<T>;  // of a depth

 public:
  using Tile = OperandTile<T, false>;

  __device__ __forceinline__ RowColumns(int last, int rows, bool aligned, const Source& source)
      : last_(last), left_(rows - row()), aligned_(aligned), source_(source) {}

  __device__ __forceinline__ void fetch(int depth) {
    CU_UNROLL for (int i = 0; i < 2; ++i) {
      const int k = depth + column(i);
      pack_[i] = load_some(k < last_ ? source_(k) + row() : nullptr, k < last_ ? left_ : 0, aligned_);
    }
  }
  __device__ __forceinline__ void put(T* tile) const {
    CU_UNROLL for (int i = 0; i < 2; ++i) put_pack<Product>(tile + Tile::place(row(), column(i)), pack_[i]);
  }

 private:
  static __device__ __forceinline__ int row() { return threadIdx.x % kPacks * kPack<T>; }
  static __device__ __forceinline__ int column(int i) { return threadIdx.x / kPacks + kThreads / kPacks * i; }

  int last_, left_;
  bool aligned_;
  Source source_;
  Pack<T> pack_[2];
};

// Whether all rows [., columns] start at multiples of 16 bytes.
template <class T>
bool aligned_rows(const T* rows, int64_t columns) {
  return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && columns % kPack<T> == 0;
}

template <class T, class Body>
cudaError_t with_product(bool tensor_cores, const Body& body) {
  return tensor_cores ? body(TensorProduct<T>()) : body(ExactProduct<T>());
}

}  // namespace pixcontrast::cuda
