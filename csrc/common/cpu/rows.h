// Rows in the dtype that sums are kept in, wherever and however they are stored.
#pragma once

#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>
#include <vector>

#include "common/cpu/bf16.h"
#include "common/layout.h"

namespace pixcontrast::cpu {

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

// A few neighbouring pixels of a map [D, H*W] as rows. The stride between rows keeps them in different cache sets.
template <class T>
class PixelTile {
 public:
  using A = Acc<T>;
  static constexpr int64_t width = 16;

  explicit PixelTile(int64_t dim) : dim_(dim), stride_(dim + 16), buffer_(width * stride_) {}

  A* row(int64_t pixel) { return buffer_.data() + pixel * stride_; }

  // map points at the tile's first pixel; map_pixels is the distance from one channel to the next.
  void read(const T* map, int64_t map_pixels, int64_t count) {
    if (count == width) return copy_in(map, map_pixels, std::integral_constant<int64_t, width>());
    copy_in(map, map_pixels, count);
  }
  template <class To>
  void write(To* map, int64_t map_pixels, int64_t count) {
    if (count == width) return copy_out(map, map_pixels, std::integral_constant<int64_t, width>());
    copy_out(map, map_pixels, count);
  }

 private:
  template <class Count>
  void copy_in(const T* map, int64_t map_pixels, Count count) {
    for (int64_t d = 0; d < dim_; ++d)
      for (int64_t p = 0; p < count; ++p) buffer_[p * stride_ + d] = static_cast<A>(map[d * map_pixels + p]);
  }
  template <class To, class Count>
  void copy_out(To* map, int64_t map_pixels, Count count) {
    for (int64_t d = 0; d < dim_; ++d)
      for (int64_t p = 0; p < count; ++p) map[d * map_pixels + p] = static_cast<To>(buffer_[p * stride_ + d]);
  }

  int64_t dim_, stride_;
  std::vector<A> buffer_;
};

}  // namespace pixcontrast::cpu
