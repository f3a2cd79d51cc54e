// Matrix products C [M, N] = A [M, K] B [N, K]^T, a tile of 128 x 128 elements a block, for operands that have to be
// gathered. K, the depth, goes by in steps of 64 bytes: each step is loaded into registers while the one before, in
// shared memory, is multiplied, so that a step may be put together from single elements as well as from 16-byte packs.
//
// Two buffers of both operands take 40 KB. A step of 16-bit elements is 128 x 128 x 32 products, 850 cycles of the
// tensor cores of a multiprocessor of an H100 at 60 % of their rate, and two blocks share it: the 1700 cycles between
// loads cover the latency of memory (about 800). A step of float, 128 x 128 x 16 products, takes its FMA units 2048
// cycles.
#pragma once

#include <type_traits>

#include "common/cuda/warp.cuh"

namespace pixcontrast::cuda {

constexpr int kTile = 128;     // rows of A and of B that a block works on
constexpr int kThreads = 256;  // 8 warps of 64 x 32 elements of C: 2 along M, 4 along N
constexpr int kWarpM = 64, kWarpN = 32;

template <class T>
constexpr int kDepth = 64 / static_cast<int>(sizeof(T));  // of a step

// 128 rows of an operand in shared memory, for one step. Elements that are neighbours in memory stay neighbours: along
// the depth, or, the other way round, along the rows. The padding lets every read below find its elements in different
// banks.
template <class T, bool kAlongDepth>
struct OperandTile {
  static constexpr int kStride = kAlongDepth ? kDepth<T> + kPack<T> : kTile + 8;
  static constexpr int kElements = kStride * (kAlongDepth ? kTile : kDepth<T>);

  static __device__ __forceinline__ int place(int row, int depth) {
    return kAlongDepth ? row * kStride + depth : depth * kStride + row;
  }
};

// Two buffers of both operands; those along the depth are the larger ones.
template <class T>
constexpr size_t kSharedBytes = 2 * 2 * OperandTile<T, true>::kElements * sizeof(T);

// ---- two ways to multiply: every product in float32, or by tensor cores

// A thread has 8 x 8 elements of C and reads 4 of one operand at a time, 2 packs of each operand for 64 products.
template <class T>
class ExactProduct {
 public:
  using Element = T;
  static constexpr int kBlocks = 1;  // of a multiprocessor, 256 registers a thread

  static __device__ __forceinline__ T prepare(T x) { return x; }

  template <class TileA, class TileB>
  __device__ __forceinline__ void add(const T* a, const T* b) {
    CU_UNROLL for (int depth = 0; depth < kDepth<T>; depth += 4) {
      float rows[8][4], columns[8][4];
      load<TileA, 8>(rows, a, first_row(), lane_row(), depth);
      load<TileB, 4>(columns, b, first_column(), lane_column(), depth);
      CU_UNROLL for (int k = 0; k < 4; ++k) {
        CU_UNROLL for (int i = 0; i < 8; ++i) {
          CU_UNROLL for (int j = 0; j < 8; ++j) sums_[i][j] += rows[i][k] * columns[j][k];
        }
      }
    }
  }

  // body(row, column, element) for the elements of this thread.
  template <class TileA, class TileB, class Body>
  __device__ __forceinline__ void for_each(const Body& body) const {
    CU_UNROLL for (int i = 0; i < 8; ++i) {
      CU_UNROLL for (int j = 0; j < 8; ++j) {
        body(first_row() + row_of<TileA, 8>(lane_row(), i), first_column() + row_of<TileB, 4>(lane_column(), j),
             sums_[i][j]);
      }
    }
  }

 private:
  struct __align__(4 * sizeof(T)) Four {
    T x[4];
  };

  static __device__ __forceinline__ int first_row() { return threadIdx.x / 128 * kWarpM; }
  static __device__ __forceinline__ int first_column() { return threadIdx.x / 32 % 4 * kWarpN; }
  static __device__ __forceinline__ int lane_row() { return threadIdx.x % 32 / 4; }
  static __device__ __forceinline__ int lane_column() { return threadIdx.x % 4; }

  // The i-th row of the operand that belongs to a lane, of which there are Lanes.
  template <class Tile, int Lanes>
  static __device__ __forceinline__ int row_of(int lane, int i) {
    return Tile::place(0, 1) == 1 ? lane + Lanes * i : 4 * lane + i % 4 + 4 * Lanes * (i / 4);
  }

  template <class Tile, int Lanes>
  static __device__ __forceinline__ void load(float (&to)[8][4], const T* tile, int first, int lane, int depth) {
    if constexpr (std::is_same_v<Tile, OperandTile<T, true>>) {
      CU_UNROLL for (int i = 0; i < 8; ++i) {
        const Four four =
            *reinterpret_cast<const Four*>(tile + Tile::place(first + row_of<Tile, Lanes>(lane, i), depth));
        CU_UNROLL for (int k = 0; k < 4; ++k) to[i][k] = to_float(four.x[k]);
      }
    } else {
      CU_UNROLL for (int k = 0; k < 4; ++k) {
        CU_UNROLL for (int i = 0; i < 8; i += 4) {
          const int row = first + row_of<Tile, Lanes>(lane, i);
          const Four four = *reinterpret_cast<const Four*>(tile + Tile::place(row, depth + k));
          CU_UNROLL for (int q = 0; q < 4; ++q) to[i + q][k] = to_float(four.x[q]);
        }
      }
    }
  }

  float sums_[8][8] = {};
};

// A warp has 4 x 4 fragments of 16 x 8 elements; float is rounded to tf32. Compute capability 8.0 and up. Of the
// operands it loads 4 and 4 fragments for 16 multiplications; only those of float that lie along the rows need single
// loads.
template <class T>
class TensorProduct {
 public:
  using Element = T;
  static constexpr int kBlocks = 2;

  static __device__ __forceinline__ T prepare(T x) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    if constexpr (std::is_same_v<T, float>) return __uint_as_float(cu_to_tf32(x));
#endif
    return x;
  }

  template <class TileA, class TileB>
  __device__ __forceinline__ void add(const T* a, const T* b) {
    CU_UNROLL for (int depth = 0; depth < kDepth<T>; depth += 2 * kHalf) {
      uint32_t columns[4][2];
      CU_UNROLL for (int j = 0; j < 4; j += 2) load_columns<TileB>(columns[j], columns[j + 1], b, j, depth);
      CU_UNROLL for (int i = 0; i < 4; ++i) {
        uint32_t rows[4];
        load_rows<TileA>(rows, a, i, depth);
        CU_UNROLL for (int j = 0; j < 4; ++j) multiply(sums_[i][j], rows, columns[j]);
      }
    }
  }

  template <class TileA, class TileB, class Body>
  __device__ __forceinline__ void for_each(const Body& body) const {
    const int lane = threadIdx.x % 32;
    CU_UNROLL for (int i = 0; i < 4; ++i) {
      CU_UNROLL for (int j = 0; j < 4; ++j) {
        CU_UNROLL for (int q = 0; q < 4; ++q) {
          body(first_row() + 16 * i + lane / 4 + q / 2 * 8, first_column() + 8 * j + lane % 4 * 2 + q % 2,
               sums_[i][j][q]);
        }
      }
    }
  }

 private:
  static constexpr int kHalf = kPack<T>;  // half the depth of a multiplication: 16 bytes

  static __device__ __forceinline__ int first_row() { return threadIdx.x / 128 * kWarpM; }
  static __device__ __forceinline__ int first_column() { return threadIdx.x / 32 % 4 * kWarpN; }

  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    if constexpr (std::is_same_v<T, float>) {
      cu_mma_tf32_1688(d, a, b, d);
    } else if constexpr (std::is_same_v<T, __half>) {
      cu_mma_f16_16816(d, a, b, d);
    } else {
      cu_mma_bf16_16816(d, a, b, d);
    }
#endif
  }

  // Matrices 0 to 3 of a fragment of A: rows 0 and 8 of the first half of the depth, then of the second.
  template <class Tile>
  static __device__ __forceinline__ void load_rows(uint32_t (&to)[4], const T* tile, int i, int depth) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, row = first_row() + 16 * i + matrix % 2 * 8;
    if constexpr (std::is_same_v<Tile, OperandTile<T, true>>) {  // 16 bytes are 4 floats as well as 8 16-bit elements
      cu_ldmatrix<4, false>(to, tile + Tile::place(row + lane % 8, depth + matrix / 2 * kHalf));
    } else if constexpr (sizeof(T) == 2) {
      cu_ldmatrix<4, true>(to, tile + Tile::place(row, depth + matrix / 2 * kHalf + lane % 8));
    } else {
      CU_UNROLL for (int m = 0; m < 4; ++m) {
        to[m] = __float_as_uint(
            tile[Tile::place(first_row() + 16 * i + m % 2 * 8 + lane / 4, depth + m / 2 * kHalf + lane % 4)]);
      }
    }
  }

  // Both halves of the depth of fragments j and j + 1 of B.
  template <class Tile>
  static __device__ __forceinline__ void load_columns(uint32_t (&first)[2], uint32_t (&second)[2], const T* tile, int j,
                                                      int depth) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, column = first_column() + 8 * j + matrix / 2 * 8;
    uint32_t to[4];
    if constexpr (std::is_same_v<Tile, OperandTile<T, true>>) {
      cu_ldmatrix<4, false>(to, tile + Tile::place(column + lane % 8, depth + matrix % 2 * kHalf));
    } else if constexpr (sizeof(T) == 2) {
      cu_ldmatrix<4, true>(to, tile + Tile::place(column, depth + matrix % 2 * kHalf + lane % 8));
    } else {
      CU_UNROLL for (int m = 0; m < 4; ++m) {
        to[m] = __float_as_uint(
            tile[Tile::place(first_column() + 8 * j + m / 2 * 8 + lane / 4, depth + m % 2 * kHalf + lane % 4)]);
      }
    }
    first[0] = to[0], first[1] = to[1], second[0] = to[2], second[1] = to[3];
  }

  float sums_[4][4][4] = {};
};

// ---- the stream of steps

// Multiplies the operands over depths [0, last), then calls body(row, column, element) for all of the tile. `shared`
// has kSharedBytes<T>.
template <class Product, class A, class B, class Body>
__device__ __forceinline__ void multiply(A& a, B& b, int last, typename Product::Element* shared, const Body& body) {
  using T = typename Product::Element;
  constexpr int kBuffer = A::Tile::kElements + B::Tile::kElements;
  Product product;
  a.fetch(0);
  b.fetch(0);
  a.put(shared);
  b.put(shared + A::Tile::kElements);
  for (int depth = 0, buffer = 0; depth < last; depth += kDepth<T>, buffer = kBuffer - buffer) {
    __syncthreads();  // this step has arrived, and everyone has left the other buffer
    const T* const here = shared + buffer;
    T* const next = shared + kBuffer - buffer;
    const bool more = last - depth > kDepth<T>;
    if (more) {
      a.fetch(depth + kDepth<T>);
      b.fetch(depth + kDepth<T>);
    }
    product.template add<typename A::Tile, typename B::Tile>(here, here + A::Tile::kElements);
    if (more) {
      a.put(next);
      b.put(next + A::Tile::kElements);
    }
  }
  product.template for_each<typename A::Tile, typename B::Tile>(body);
}

// ---- operands: each says how the threads of a block bring 128 rows of it, one step of the depth at a time, from
// memory (fetch: into registers) to shared memory (put). Whatever does not exist is zero and is not read.

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
  return aligned16(rows) && columns % kPack<T> == 0;
}

template <class T, class Body>
cudaError_t with_product(bool tensor_cores, const Body& body) {
  return tensor_cores ? body(TensorProduct<T>()) : body(ExactProduct<T>());
}

}  // namespace pixcontrast::cuda
