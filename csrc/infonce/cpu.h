// What the CPU forms of InfoNCE work on: anchors sorted by class, and tiles of keys.
#pragma once

#include <algorithm>
#include <vector>

#include "common/cpu/work.h"
#include "infonce/infonce.h"

namespace pixcontrast {

struct Range {
  int64_t begin, end;
  int64_t size() const { return std::max<int64_t>(end - begin, 0); }
};

inline Range intersect(Range a, Range b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }

// The V valid anchors, sorted by class, and their results. A: float or double.
template <class A>
struct SortedAnchors {
  explicit SortedAnchors(const InfoNCE& args);

  Range of_class(int64_t c) const;

  // loss_weight / (T_base R P_i) for anchors with positives, else 0.
  std::vector<A> grad_scales() const;

  // Writes the results to the arguments.
  void finish() const;

  const InfoNCE& args;
  const A inverse_temperature;
  int64_t count, dim;                 // V, D
  std::vector<int64_t> order, label;  // [V] position in the caller's list, class
  std::vector<A> rows, grad;          // [V, D]; grad is empty if none is wanted
  std::vector<double> loss;           // [V] sum over positives of l_ij - z_ij
  std::vector<int64_t> positives;     // [V] P_i
};

// Fills in loss, positives and grad (queue_cpu.cpp).
template <class A>
void contrast_queues(SortedAnchors<A>& anchors);

// body(T{}) with the type of the dtype
template <class Body>
void with_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat:
      return body(float{});
    case Dtype::kBFloat16:
      return body(c10::BFloat16{});
    case Dtype::kHalf:
      return body(c10::Half{});
    case Dtype::kDouble:
      return body(double{});
  }
}

// ---- tiles of keys

constexpr int64_t kPanelAnchors = 32;              // anchors side by side, the columns of z
constexpr int64_t kMaxKeys = 192;                  // of a tile
constexpr int64_t kTileElements = kMaxKeys * 256;  // 192 KiB of float32 keys, for the L2 cache
constexpr int64_t kPrefetch = 24;  // keys ahead; a bfloat16 tile is in the cache already, load() reads it

inline const uint32_t* as_pairs(const void* elements) { return static_cast<const uint32_t*>(elements); }

// rows [V, D] as [panels, channels, kPanelAnchors], zero behind the last anchor and channel. `Pair` neighbouring
// channels stay neighbours.
template <class E, int64_t Pair, class A>
std::vector<E> panels_of(const std::vector<A>& rows, int64_t count, int64_t dim) {
  const int64_t width = cpu::padded(dim);
  std::vector<E> panels((count + kPanelAnchors - 1) / kPanelAnchors * width * kPanelAnchors);
  for (int64_t i = 0; i < count; ++i) {
    E* const panel = panels.data() + i / kPanelAnchors * width * kPanelAnchors;
    for (int64_t d = 0; d < dim; ++d) {
      panel[(d / Pair * kPanelAnchors + i % kPanelAnchors) * Pair + d % Pair] = static_cast<E>(rows[i * dim + d]);
    }
  }
  return panels;
}

// A tile of keys and its z, for one thread. Products are in the dtype of the sums or in bfloat16.
template <class A>
class KeyTile {
 public:
  KeyTile(int64_t dim, bool bf16)
      : dim_(dim),
        width_(cpu::padded(dim)),
        capacity_(std::clamp<int64_t>(kTileElements / width_ / 12, 1, kMaxKeys / 12) * 12),
        bf16_(bf16),
        z_(capacity_ * kPanelAnchors) {}

  int64_t capacity() const { return capacity_; }
  int64_t size() const { return size_; }
  A* z(int64_t column) { return z_.data() + column; }  // [keys, kPanelAnchors]

  // rows [size, D], which must stay where they are
  void load(const void* rows, Dtype dtype, int64_t size) {
    size_ = size;
    keys_ = rows;
    if (bf16_) {
      if (width_ != dim_) keys_ = padded_copy(static_cast<const c10::BFloat16*>(rows), bf16_copy_);
      pairs_.resize((capacity_ + 1) / 2 * width_);
      cpu::pair_rows(static_cast<const c10::BFloat16*>(keys_), width_, size, width_, pairs_.data());
    } else if (width_ != dim_ || dtype != (std::is_same_v<A, float> ? Dtype::kFloat : Dtype::kDouble)) {
      with_dtype(dtype, [&](auto e) { keys_ = padded_copy(static_cast<const decltype(e)*>(rows), copy_); });
    }
  }

  // z of all keys and `columns` anchors of a panel, a multiple of kColumnStep, from `column` on
  void gemm_qk(const void* panel, int64_t column, int64_t columns) {
    if constexpr (std::is_same_v<A, float>) {
      if (bf16_) {
        return cpu::bf16_product({size_, width_ / 2, columns, as_pairs(keys_), width_ / 2, 1, as_pairs(panel) + column,
                                  kPanelAnchors, z(column), kPanelAnchors, false, capacity_ * width_ / 2});
      }
    }
    kernels_.product({size_, width_, columns, static_cast<const A*>(keys_), width_, 1,
                      static_cast<const A*>(panel) + column, kPanelAnchors, z(column), kPanelAnchors, false,
                      kPrefetch * width_});
  }

  // Rounds z of some columns as gemm_pv needs it; adds the rounded elements to sum [columns].
  void round(int64_t column, int64_t columns, A* sum) {
    if constexpr (std::is_same_v<A, float>) cpu::round_to_pairs(z(column), size_, kPanelAnchors, columns, sum);
  }

  // sums [anchors, width] += z^T keys for some anchors of the panel
  void gemm_pv(int64_t column, int64_t anchors, A* sums) {
    if constexpr (std::is_same_v<A, float>) {
      if (bf16_) {
        return cpu::bf16_product({anchors, (size_ + 1) / 2, width_, as_pairs(z(column)), 1, kPanelAnchors,
                                  pairs_.data(), width_, sums, width_, true});
      }
    }
    kernels_.product({anchors, size_, width_, z(column), 1, kPanelAnchors, static_cast<const A*>(keys_), width_, sums,
                      width_, true});
  }

 private:
  template <class From, class To>
  const To* padded_copy(const From* rows, std::vector<To>& copy) {
    copy.resize(capacity_ * width_);
    for (int64_t k = 0; k < size_; ++k) cpu::convert(rows + k * dim_, dim_, copy.data() + k * width_);
    return copy.data();
  }

  const cpu::PairKernels<A>& kernels_ = cpu::pair_kernels<A>();
  const int64_t dim_, width_, capacity_;
  const bool bf16_;
  int64_t size_ = 0;
  const void* keys_ = nullptr;            // [size, width]
  std::vector<A> copy_;                   // of keys in another dtype or of another width
  std::vector<c10::BFloat16> bf16_copy_;  // of another width
  std::vector<uint32_t> pairs_;           // [ceil(size / 2), width], in bfloat16
  std::vector<A> z_;                      // [capacity, kPanelAnchors]
};

}  // namespace pixcontrast
