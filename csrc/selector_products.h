// The products of the class selectors, for some rows of one class at a time; for one thread.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/bf16.h"
#include "cpu/pair_kernels.h"
#include "cpu/rows.h"
#include "selector.h"

namespace pixcontrast {

// Where T is bfloat16 and the processor multiplies that, so it is done. Else numbers are rounded to T and multiplied in
// the dtype of the sums.
template <class T>
class SelectorProducts {
  using A = Acc<T>;

 public:
  static constexpr int64_t kMostRows = 128;
  static constexpr int64_t kAhead = 8;

  SelectorProducts(const Source<T>& rows, const Source<T>& first, int64_t width)
      : kernels_(cpu::pair_kernels<A>()),
        rows_(rows),
        first_(first),
        width_(width),
        wide_(cpu::padded(width)),
        deep_(cpu::padded(rows.dim)) {}

  // Numbers from one row to the next in the results, of channels of hidden rows and of rows.
  int64_t hidden_stride() const { return wide_; }
  int64_t row_stride() const { return deep_; }

  void load(const int64_t* order, int64_t count) {
    count_ = count;
    if (bf16()) return read_rows(rows_, order, count, bf16_rows_);
    read_rows(rows_, order, count, plain_rows_);
  }

  // out [count, hidden_stride()] = rows first_c^T
  void hidden(int64_t c, A* out) {
    pack(c);
    if constexpr (std::is_same_v<A, float>) {
      if (bf16()) {
        const auto* const left = reinterpret_cast<const uint32_t*>(bf16_rows_.data());
        return cpu::bf16_product(
            {count_, deep_ / 2, wide_, left, deep_ / 2, 1, packed_pairs_.data(), wide_, out, wide_, false});
      }
    }
    kernels_.product({count_, deep_, wide_, plain_rows_.data(), deep_, 1, packed_.data(), wide_, out, wide_, false});
  }

  // sum [E, row_stride()] += grad^T rows, for grad [count, hidden_stride()], which is lost.
  void add_first_gradient(A* grad, A* sum) {
    if constexpr (std::is_same_v<A, float>) {
      if (bf16()) {
        row_pairs_.resize((count_ + 1) / 2 * deep_);
        cpu::pair_rows(bf16_rows_.data(), count_, deep_, row_pairs_.data());
        cpu::round_to_pairs(grad, count_, wide_, wide_, nullptr);
        const auto* const left = reinterpret_cast<const uint32_t*>(grad);
        return cpu::bf16_product(
            {width_, (count_ + 1) / 2, deep_, left, 1, wide_, row_pairs_.data(), deep_, sum, deep_, true});
      }
    }
    kernels_.product({width_, count_, deep_, grad, 1, wide_, plain_rows_.data(), deep_, sum, deep_, true});
  }

  // out [count, row_stride()] = grad first_c, for grad [count, hidden_stride()]: in the dtype of the sums, because it
  // is seldom wanted.
  void row_gradient(int64_t c, const A* grad, A* out) {
    if (unpacked_class_ != c) {
      unpacked_.assign(width_ * deep_, A(0));
      for (int64_t e = 0; e < width_; ++e) read_row(first_, c * width_ + e, unpacked_.data() + e * deep_);
      unpacked_class_ = c;
    }
    kernels_.product({count_, width_, deep_, grad, wide_, 1, unpacked_.data(), deep_, out, deep_, false});
  }

 private:
  static bool bf16() { return std::is_same_v<T, c10::BFloat16> && cpu::has_bf16(); }

  // to [D] = one row, rounded to T.
  template <class To>
  static void read_row(const Source<T>& source, int64_t row, To* to) {
    const int64_t at = row * source.dim;
    if (!source.is_float) return cpu::convert(static_cast<const T*>(source.numbers) + at, source.dim, to);
    const auto* const from = static_cast<const float*>(source.numbers) + at;
    if constexpr (std::is_same_v<To, T>) {
      cpu::convert(from, source.dim, to);
    } else {
      for (int64_t d = 0; d < source.dim; ++d) to[d] = static_cast<To>(static_cast<T>(from[d]));
    }
  }

  // The next rows lie anywhere: no processor foresees where.
  static void prefetch(const Source<T>& source, int64_t row) {
    const int64_t bytes = source.dim * (source.is_float ? sizeof(float) : sizeof(T));
    const auto* const from = static_cast<const char*>(source.numbers) + row * bytes;
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at);
  }

  template <class To>
  void read_rows(const Source<T>& source, const int64_t* order, int64_t count, std::vector<To>& to) {
    to.resize(kMostRows * deep_);  // zeros behind the last channel
    for (int64_t i = 0; i < count; ++i) {
      if (i + kAhead < count) prefetch(source, order[i + kAhead]);
      read_row(source, order[i], to.data() + i * deep_);
    }
  }

  // The transpose of first_c; pairs of channels count as one.
  void pack(int64_t c) {
    if (packed_class_ == c) return;
    packed_class_ = c;
    if (bf16()) {
      packed_pairs_.resize(deep_ / 2 * wide_);
      transpose<c10::BFloat16>(c, packed_pairs_.data());
    } else {
      packed_.resize(deep_ * wide_);
      transpose<A>(c, packed_.data());
    }
  }

  // to [units, wide] = units of Number channels each, for every hidden channel
  template <class Number, class Unit>
  void transpose(int64_t c, Unit* to) {
    constexpr int64_t most = 16;  // hidden channels at a time, so that whole cache lines are written
    constexpr int64_t channels = sizeof(Unit) / sizeof(Number);
    std::vector<Number> some(most * deep_);
    for (int64_t first = 0; first < width_; first += most) {
      const int64_t count = std::min(most, width_ - first);
      for (int64_t e = 0; e < count; ++e) read_row(first_, c * width_ + first + e, some.data() + e * deep_);
      for (int64_t u = 0; u < deep_ / channels; ++u) {
        for (int64_t e = 0; e < count; ++e) {
          std::memcpy(to + u * wide_ + first + e, some.data() + e * deep_ + u * channels, sizeof(Unit));
        }
      }
    }
  }

  const cpu::PairKernels<A>& kernels_;
  const Source<T>&rows_, &first_;
  const int64_t width_, wide_, deep_;
  int64_t count_ = 0, packed_class_ = -1, unpacked_class_ = -1;
  std::vector<A> plain_rows_, packed_, unpacked_;   // [rows, deep], [deep, wide], [E, deep]
  std::vector<c10::BFloat16> bf16_rows_;            // [rows, deep]
  std::vector<uint32_t> packed_pairs_, row_pairs_;  // [deep / 2, wide], [rows / 2, deep]
};

}  // namespace pixcontrast
