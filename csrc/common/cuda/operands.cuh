// Operands of product.cuh: each says how the threads of a block bring 128 rows of it, one step of the depth at a time,
// from memory (fetch: into registers) to shared memory (put). Whatever does not exist is zero and is not read.
#pragma once

#include "common/cuda/product.cuh"

namespace pixcontrast::cuda {

// The first `valid` numbers from `from` on, at most a pack of them, in one load if `aligned`.
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

// What an operand may do with its packs on their way from registers to shared memory, not before: until then they may
// still be under way.
struct AsTheyAre {
  template <class Pack>
  __device__ __forceinline__ Pack operator()(const Pack& pack, int, int) const {
    return pack;
  }
};

// Rows that lie along the depth, four threads a row. source(row, depth, valid) is the pack of the row that starts at
// that depth, of which `valid` numbers are left; it goes through map(pack, depth, valid).
template <class Product, class Source, class Map = AsTheyAre>
class DepthRows {
  using T = typename Product::Number;

 public:
  using Tile = OperandTile<T, true>;

  __device__ __forceinline__ DepthRows(int last, const Source& source, const Map& map = Map())
      : last_(last), source_(source), map_(map) {}

  __device__ __forceinline__ void fetch(int depth) {
    if constexpr (!std::is_same_v<Map, AsTheyAre>) depth_ = depth + column();
    CU_UNROLL for (int i = 0; i < 2; ++i) pack_[i] = source_(row(i), depth + column(), last_ - depth - column());
  }
  __device__ __forceinline__ void put(T* tile) const {
    CU_UNROLL for (int i = 0; i < 2; ++i) {
      put_pack<Product>(tile + Tile::place(row(i), column()), map_(pack_[i], depth_, last_ - depth_));
    }
  }

 private:
  static __device__ __forceinline__ int row(int i) { return threadIdx.x / 4 + kTile / 2 * i; }
  static __device__ __forceinline__ int column() { return threadIdx.x % 4 * kPack<T>; }

  int last_, depth_ = 0;
  Source source_;
  Map map_;
  Pack<T> pack_[2];
};

// Numbers that lie along the rows: source(depth) is where those of that depth start, or null; `rows` of them exist. A
// pack goes through map(pack, row, valid), with the row it starts at and how many are left.
template <class Product, class Source, class Map = AsTheyAre>
class RowColumns {
  using T = typename Product::Number;
  static constexpr int kPacks = kTile / kPack<T>;  // of a depth

 public:
  using Tile = OperandTile<T, false>;

  __device__ __forceinline__ RowColumns(int last, int rows, bool aligned, const Source& source, const Map& map = Map())
      : last_(last), left_(rows - row()), aligned_(aligned), source_(source), map_(map) {}

  __device__ __forceinline__ void fetch(int depth) {
    CU_UNROLL for (int i = 0; i < 2; ++i) {
      const int k = depth + column(i);
      const T* const from = k < last_ ? source_(k) : nullptr;
      pack_[i] = load_some(from ? from + row() : nullptr, from ? left_ : 0, aligned_);
    }
  }
  __device__ __forceinline__ void put(T* tile) const {
    CU_UNROLL for (int i = 0; i < 2; ++i) {
      put_pack<Product>(tile + Tile::place(row(), column(i)), map_(pack_[i], row(), left_));
    }
  }

 private:
  static __device__ __forceinline__ int row() { return threadIdx.x % kPacks * kPack<T>; }
  static __device__ __forceinline__ int column(int i) { return threadIdx.x / kPacks + kThreads / kPacks * i; }

  int last_, left_;
  bool aligned_;
  Source source_;
  Map map_;
  Pack<T> pack_[2];
};

// Pixels of maps as rows, channels as the depth: a thread has one pixel, which starts at `pixel` (or null), and every
// other channel. Neighbouring threads read neighbouring pixels; single numbers, because any pixel may follow any other.
template <class Product>
class PixelRows {
  using T = typename Product::Number;
  static constexpr int kNumbers = kDepth<T> / 2;

 public:
  using Tile = OperandTile<T, false>;

  __device__ __forceinline__ PixelRows(int last, const T* pixel, int64_t map_pixels)
      : last_(pixel ? last : 0), pixel_(pixel), map_pixels_(map_pixels) {}

  __device__ __forceinline__ void fetch(int depth) {
    CU_UNROLL for (int i = 0; i < kNumbers; ++i) {
      const int k = depth + column(i);
      x_[i] = k < last_ ? pixel_[int64_t{k} * map_pixels_] : from_float<T>(0.0f);
    }
  }
  __device__ __forceinline__ void put(T* tile) const {
    CU_UNROLL for (int i = 0; i < kNumbers; ++i) {
      tile[Tile::place(threadIdx.x % kTile, column(i))] = Product::prepare(x_[i]);
    }
  }

 private:
  static __device__ __forceinline__ int column(int i) { return threadIdx.x / kTile + 2 * i; }

  int last_;
  const T* pixel_;
  int64_t map_pixels_;
  T x_[kNumbers];
};

// Channels of maps as rows, pixels as the depth: pixel k starts at start[k] in `channels`, or, below 0, does not exist.
template <class Product>
class ChannelRows {
  using T = typename Product::Number;
  static constexpr int kStep = kThreads / kDepth<T>, kNumbers = kTile / kStep;

 public:
  using Tile = OperandTile<T, true>;

  __device__ __forceinline__ ChannelRows(int last, int rows, const T* channels, const int64_t* start,
                                         int64_t map_pixels)
      : last_(last),
        rows_(rows),
        channels_(channels + threadIdx.x / kDepth<T> * map_pixels),
        start_(start + threadIdx.x % kDepth<T>),
        map_pixels_(map_pixels) {}

  __device__ __forceinline__ void fetch(int depth) {
    const int64_t start = depth + static_cast<int>(threadIdx.x % kDepth<T>) < last_ ? start_[depth] : -1;
    const T* from = channels_ + start;
    const int rows = start < 0 ? 0 : rows_;
    CU_UNROLL for (int i = 0; i < kNumbers; ++i) {
      x_[i] = row(i) < rows ? *from : from_float<T>(0.0f);
      from += kStep * map_pixels_;
    }
  }
  __device__ __forceinline__ void put(T* tile) const {
    CU_UNROLL for (int i = 0; i < kNumbers; ++i) {
      tile[Tile::place(row(i), threadIdx.x % kDepth<T>)] = Product::prepare(x_[i]);
    }
  }

 private:
  static __device__ __forceinline__ int row(int i) { return threadIdx.x / kDepth<T> + kStep * i; }

  int last_, rows_;
  const T* channels_;
  const int64_t* start_;
  int64_t map_pixels_;
  T x_[kNumbers];
};

}  // namespace pixcontrast::cuda
