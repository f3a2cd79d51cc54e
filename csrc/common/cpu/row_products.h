// Some rows at a time through linear layers and back, for one thread.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/cpu/bf16.h"
#include "common/cpu/pair_kernels.h"
#include "common/cpu/rows.h"

namespace pixcontrast::cpu {

// A matrix that products take in the dtype T: it is stored so or, under autocast, in float32.
template <class T>
struct Source {
  const void* numbers;
  int64_t dim;
  bool is_float;

  // to [dim] = one row, rounded to T.
  template <class To>
  void read(int64_t row, To* to) const {
    const int64_t at = row * dim;
    if (!is_float) return convert(static_cast<const T*>(numbers) + at, dim, to);
    const auto* const from = static_cast<const float*>(numbers) + at;
    if constexpr (std::is_same_v<To, T>) {
      convert(from, dim, to);
    } else {
      for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<To>(static_cast<T>(from[d]));
    }
  }

  void prefetch(int64_t row) const {
    const int64_t bytes = dim * static_cast<int64_t>(is_float ? sizeof(float) : sizeof(T));
    const auto* const from = static_cast<const char*>(numbers) + row * bytes;
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at);
  }
};

// Rows [count, D] and weights [C * O, D], one of C layers at a time. Where T is bfloat16 and the processor multiplies
// that, so it is done. Else numbers are rounded to T and multiplied in the dtype of the sums.
template <class T>
class RowProducts {
  using A = Acc<T>;

 public:
  static constexpr int64_t kMostRows = 128;

  RowProducts(const Source<T>& weights, int64_t outputs)
      : kernels_(pair_kernels<A>()),
        weights_(weights),
        outputs_(outputs),
        wide_(padded(outputs)),
        deep_(padded(weights.dim)) {}

  // Numbers from one row to the next: of outputs, and of what else is as wide as the rows. Those behind the last
  // channel are zero in results, and must be in what is given.
  int64_t output_stride() const { return wide_; }
  int64_t row_stride() const { return deep_; }

  // The rows are order[0] to order[count - 1] of a matrix [N, D], or those of a block.
  void load(const Source<T>& rows, const int64_t* order, int64_t count) {
    bf16() ? read_rows(rows, order, count, bf16_rows_) : read_rows(rows, order, count, plain_rows_);
  }
  void load(const A* rows, int64_t stride, int64_t count) {
    bf16() ? round_rows(rows, stride, count, bf16_rows_) : round_rows(rows, stride, count, plain_rows_);
  }

  // out [count, output_stride()] = rows weight_c^T
  void multiply(int64_t c, A* out) {
    pack(c);
    if constexpr (std::is_same_v<A, float>) {
      if (bf16()) {
        return bf16_product({count_, deep_ / 2, wide_, pairs_of(bf16_rows_), deep_ / 2, 1, packed_pairs_.data(), wide_,
                             out, wide_, false});
      }
    }
    kernels_.product({count_, deep_, wide_, plain_rows_.data(), deep_, 1, packed_.data(), wide_, out, wide_, false});
  }

  // sum [O, row_stride()] += grad^T rows, for grad [count, output_stride()], which is lost.
  void add_weight_gradient(A* grad, A* sum) {
    if constexpr (std::is_same_v<A, float>) {
      if (bf16()) {
        row_pairs_.resize((count_ + 1) / 2 * deep_);
        pair_rows(bf16_rows_.data(), count_, deep_, row_pairs_.data());
        round_to_pairs(grad, count_, wide_, wide_, nullptr);
        const auto* const left = reinterpret_cast<const uint32_t*>(grad);
        return bf16_product(
            {outputs_, (count_ + 1) / 2, deep_, left, 1, wide_, row_pairs_.data(), deep_, sum, deep_, true});
      }
    }
    kernels_.product({outputs_, count_, deep_, grad, 1, wide_, plain_rows_.data(), deep_, sum, deep_, true});
  }

  // out [count, row_stride()] = grad weight_c, for grad [count, output_stride()]
  void row_gradient(int64_t c, const A* grad, A* out) {
    unpack(c);
    if constexpr (std::is_same_v<A, float>) {
      if (bf16()) {
        bf16_grad_.resize(count_ * wide_);
        round(grad, count_ * wide_, bf16_grad_.data());
        return bf16_product({count_, wide_ / 2, deep_, pairs_of(bf16_grad_), wide_ / 2, 1, unpacked_pairs_.data(),
                             deep_, out, deep_, false});
      }
    }
    kernels_.product({count_, wide_, deep_, grad, wide_, 1, unpacked_.data(), deep_, out, deep_, false});
  }

 private:
  static constexpr int64_t kAhead = 8;  // rows; they may lie anywhere, so no processor foresees the next

  static bool bf16() { return std::is_same_v<T, c10::BFloat16> && has_bf16(); }

  static const uint32_t* pairs_of(const std::vector<c10::BFloat16>& rows) {
    return reinterpret_cast<const uint32_t*>(rows.data());
  }

  template <class To>
  void read_rows(const Source<T>& source, const int64_t* order, int64_t count, std::vector<To>& to) {
    make_room(count, to);
    for (int64_t i = 0; i < count; ++i) {
      if (i + kAhead < count) source.prefetch(order[i + kAhead]);
      source.read(order[i], to.data() + i * deep_);
    }
  }

  template <class To>
  void round_rows(const A* rows, int64_t stride, int64_t count, std::vector<To>& to) {
    make_room(count, to);
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (std::is_same_v<To, T>) {
        convert(rows + i * stride, weights_.dim, to.data() + i * deep_);
      } else {
        for (int64_t d = 0; d < weights_.dim; ++d)
          to[i * deep_ + d] = static_cast<To>(static_cast<T>(rows[i * stride + d]));
      }
    }
  }

  template <class To>
  void make_room(int64_t count, std::vector<To>& to) {
    count_ = count;
    to.resize(kMostRows * deep_);  // zeros behind the last channel
  }

  // The transpose of weight_c; pairs of channels count as one.
  void pack(int64_t c) {
    if (packed_layer_ == c) return;
    packed_layer_ = c;
    if (bf16()) {
      packed_pairs_.resize(deep_ / 2 * wide_);
      transpose<c10::BFloat16>(c, packed_pairs_.data());
    } else {
      packed_.resize(deep_ * wide_);
      transpose<A>(c, packed_.data());
    }
  }

  // to [units, wide] = units of Number channels each, for every output
  template <class Number, class Unit>
  void transpose(int64_t c, Unit* to) {
    constexpr int64_t most = 16;  // outputs at a time, so that whole cache lines are written
    constexpr int64_t channels = sizeof(Unit) / sizeof(Number);
    std::vector<Number> some(most * deep_);
    for (int64_t first = 0; first < outputs_; first += most) {
      const int64_t count = std::min(most, outputs_ - first);
      for (int64_t o = 0; o < count; ++o) weights_.read(c * outputs_ + first + o, some.data() + o * deep_);
      for (int64_t u = 0; u < deep_ / channels; ++u) {
        for (int64_t o = 0; o < count; ++o) {
          std::memcpy(to + u * wide_ + first + o, some.data() + o * deep_ + u * channels, sizeof(Unit));
        }
      }
    }
  }

  // weight_c with zeros behind the last channel and output; pairs of outputs count as one.
  void unpack(int64_t c) {
    if (unpacked_layer_ == c) return;
    unpacked_layer_ = c;
    if (bf16()) {
      std::vector<c10::BFloat16> rows(wide_ * deep_);
      for (int64_t o = 0; o < outputs_; ++o) weights_.read(c * outputs_ + o, rows.data() + o * deep_);
      unpacked_pairs_.resize(wide_ / 2 * deep_);
      pair_rows(rows.data(), wide_, deep_, unpacked_pairs_.data());
    } else {
      unpacked_.resize(wide_ * deep_);
      for (int64_t o = 0; o < outputs_; ++o) weights_.read(c * outputs_ + o, unpacked_.data() + o * deep_);
    }
  }

  const PairKernels<A>& kernels_;
  const Source<T> weights_;
  const int64_t outputs_, wide_, deep_;
  int64_t count_ = 0, packed_layer_ = -1, unpacked_layer_ = -1;
  std::vector<A> plain_rows_, packed_, unpacked_;     // [rows, deep], [deep, wide], [wide, deep]
  std::vector<c10::BFloat16> bf16_rows_, bf16_grad_;  // [rows, deep], [rows, wide]
  std::vector<uint32_t> packed_pairs_, unpacked_pairs_,
      row_pairs_;  // [deep / 2, wide], [wide / 2, deep], [rows / 2, deep]
};

}  // namespace pixcontrast::cpu
