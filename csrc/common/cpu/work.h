// How CPU kernels split their work, read and write rows, and keep the memory of large results.
#pragma once

#include <ATen/Parallel.h>
#include <c10/core/Allocator.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "common/cpu/kernels.h"
#include "common/layout.h"

namespace pixcontrast::cpu {

// ---- pieces of work. Their number depends on the problem alone, so that sums come out the same with any number of
// threads: each piece writes its own partial sums, which are then added in order.

struct Pieces {
  int64_t total, count, size;

  // At most `most` pieces of at least `least` items.
  Pieces(int64_t total, int64_t most, int64_t least)
      : total(total),
        count(std::clamp<int64_t>(total / least, 1, std::max<int64_t>(most, 1))),
        size((total + count - 1) / count) {}

  // body(piece, begin, end)
  template <class Body>
  void run(const Body& body) const {
    at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t piece = first; piece < last; ++piece) {
        body(piece, std::min(piece * size, total), std::min((piece + 1) * size, total));
      }
    });
  }
};

// ---- segments cut into blocks that lie in one class each

// Some of the rows of class c.
struct Block {
  int64_t c, begin, end;
  int64_t size() const { return end - begin; }
};

// The rows of all segments in blocks of much the same size, at most `most`.
inline std::vector<Block> blocks_of(const Segments& segments, int64_t most) {
  std::vector<Block> blocks;
  for (int64_t c = 0; c < segments.classes; ++c) {
    const int64_t first = segments.begin(c), size = segments.count[c], count = (size + most - 1) / most;
    for (int64_t k = 0; k < count; ++k) blocks.push_back({c, first + size * k / count, first + size * (k + 1) / count});
  }
  return blocks;
}

// body(number, block) for all blocks, anything with ascending `begin` and `end`; each thread has about as many rows.
template <class Block, class Body>
void for_blocks(const std::vector<Block>& blocks, const Body& body) {
  if (blocks.empty()) return;
  at::parallel_for(0, blocks.back().end, 1, [&](int64_t first, int64_t last) {
    const auto before = [](const Block& block, int64_t row) { return block.begin < row; };
    auto block = std::lower_bound(blocks.begin(), blocks.end(), first, before);
    for (; block != blocks.end() && block->begin < last; ++block) body(block - blocks.begin(), *block);
  });
}

// body(first, last) for the rows outside of all segments, one range after another.
template <class Body>
void for_gaps(const Segments& segments, const Body& body) {
  int64_t end = 0;
  for (int64_t c = 0; c < segments.classes; ++c) {
    if (segments.begin(c) > end) body(end, segments.begin(c));
    end = segments.end(c);
  }
  if (segments.rows > end) body(end, segments.rows);
}

// ---- rows in the dtype that sums are kept in, wherever and however they are stored

// to [count] = elements of another dtype.
template <class From, class To>
void convert(const From* from, int64_t count, To* to) {
  if constexpr (std::is_same_v<From, float> && std::is_same_v<To, c10::BFloat16>) {
    if (has_bf16()) return round(from, count, to);
  }
  if constexpr (std::is_same_v<From, c10::BFloat16> && std::is_same_v<To, float>) {
    if (has_bf16()) return widen(from, count, to);
  }
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
}

template <class T>
using GradOf = pixcontrast::GradOf<T, c10::Half>;

// INSTANTIATE(T) for the dtypes that kernels are compiled for.
#define CPU_FOR_DTYPES(INSTANTIATE) \
  INSTANTIATE(float) INSTANTIATE(double) INSTANTIATE(c10::BFloat16) INSTANTIATE(c10::Half)

// Memory for one row, or some that follow each other; what is stored in the right dtype is read and written in place.
template <class T>
class RowBuffer {
 public:
  using A = Acc<T>;
  static constexpr bool in_place = std::is_same_v<T, A>;

  explicit RowBuffer(int64_t dim) : dim_(dim), buffer_(in_place ? 0 : dim) {}

  const A* read(const T* row) { return read(row, dim_); }
  // The first `count` elements only.
  const A* read(const T* row, int64_t count) {
    if constexpr (in_place) return row;
    convert(row, count, buffer_.data());
    return buffer_.data();
  }

  // Where to put a row before write().
  A* target(T* row) {
    if constexpr (in_place) return row;
    return buffer_.data();
  }
  void write(T* row) {
    if constexpr (!in_place) convert(buffer_.data(), dim_, row);
  }

 private:
  int64_t dim_;
  std::vector<A> buffer_;
};

// Neighbouring pixels of a map [D, H*W] as rows. The stride between rows keeps them in different cache sets.
template <class T>
class PixelTile {
 public:
  using A = Acc<T>;
  static constexpr int64_t width = 64;

  explicit PixelTile(int64_t dim) : dim_(dim), stride_(dim + 16), rows_(width * stride_) {}

  A* row(int64_t pixel) { return rows_.data() + pixel * stride_; }

  // map points at the tile's first pixel; map_pixels is the distance from one channel to the next.
  void read(const T* map, int64_t map_pixels, int64_t count) {
    if constexpr (std::is_same_v<T, A>) return kernels_.transpose(map, map_pixels, dim_, count, row(0), stride_);
    for (int64_t d = 0; d < dim_; d += kChannels) {
      const int64_t channels = std::min(kChannels, dim_ - d);
      for (int64_t k = 0; k < channels; ++k) convert(map + (d + k) * map_pixels, count, planes_ + k * width);
      kernels_.transpose(planes_, width, channels, count, row(0) + d, stride_);
    }
  }
  template <class To>
  void write(To* map, int64_t map_pixels, int64_t count) {
    if constexpr (std::is_same_v<To, A>) return kernels_.transpose(row(0), stride_, count, dim_, map, map_pixels);
    for (int64_t d = 0; d < dim_; d += kChannels) {
      const int64_t channels = std::min(kChannels, dim_ - d);
      kernels_.transpose(row(0) + d, stride_, count, channels, planes_, width);
      for (int64_t k = 0; k < channels; ++k) convert(planes_ + k * width, count, map + (d + k) * map_pixels);
    }
  }

 private:
  static constexpr int64_t kChannels = 16;

  const RowKernels<A>& kernels_ = row_kernels<A>();
  int64_t dim_, stride_;
  std::vector<A> rows_;
  A planes_[kChannels * width];  // in the dtype of sums
};

// ---- memory for results of the size of feature maps, of which training asks for the same at every step
//
// malloc hands blocks of more than 32 MB back to the system as soon as they are freed (smaller ones when they lie on
// top of the heap), and the next step takes fresh ones, page by page, each filled with zeros first: for a gradient of
// 134 MB that took longer than computing it.

// Allocates like PyTorch, but keeps large blocks that are freed and gives them to the next that wants about as many
// bytes.
// What is kept and what is in use is together never more than was once in use.
c10::Allocator* kept_memory();

// Gives all that is kept back to the system.
void release_kept_memory();

}  // namespace pixcontrast::cpu
