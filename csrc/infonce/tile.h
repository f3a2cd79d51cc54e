// Some keys and their two products with anchors, in the dtype of the sums or in bfloat16; for one thread.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "common/cpu/bf16.h"
#include "common/cpu/pair_kernels.h"

namespace pixcontrast {

constexpr int64_t kPanelAnchors = 32;  // side by side

// anchors [V, D] as InfoNCETile wants them: [panels, units, kPanelAnchors] with zeros behind the last anchor and
// channel. A unit is a channel or, in bfloat16, a pair of channels as an int32.
inline at::Tensor panels_of(const at::Tensor& anchors, bool bf16) {
  const int64_t count = anchors.size(0), dim = anchors.size(1);
  const int64_t panels = (count + kPanelAnchors - 1) / kPanelAnchors;
  at::Tensor rows = at::constant_pad_nd(anchors, {0, cpu::padded(dim) - dim, 0, panels * kPanelAnchors - count});
  if (bf16) rows = rows.to(at::kBFloat16).view(at::kInt);
  return rows.view({panels, kPanelAnchors, rows.size(1)}).transpose(1, 2).contiguous();
}

template <class A>
class InfoNCETile {
 public:
  InfoNCETile(int64_t dim, bool bf16)
      : kernels_(cpu::pair_kernels<A>()),
        dim_(dim),
        width_(cpu::padded(dim)),
        most_(std::clamp<int64_t>(kNumbers / width_ / 12, 1, kMostKeys / 12) * 12),
        bf16_(bf16),
        z_(most_ * kPanelAnchors) {}

  int64_t most_keys() const { return most_; }
  int64_t size() const { return count_; }

  // keys [count, D] of any dtype, which must stay where they are; bfloat16, if the tile is
  void load(const at::Tensor& keys) {
    count_ = keys.size(0);
    keys_ = keys;
    const auto type = bf16_ ? at::kBFloat16 : at::CppTypeToScalarType<A>::value;
    if (width_ != dim_ || keys.scalar_type() != type) {
      if (!room_.defined()) room_ = at::zeros({most_, width_}, keys.options().dtype(type));
      keys_ = room_.narrow(0, 0, count_);
      keys_.narrow(1, 0, dim_).copy_(keys);
    }
    if (!bf16_) return;
    pairs_.resize((most_ + 1) / 2 * width_);
    cpu::pair_rows(keys_.const_data_ptr<at::BFloat16>(), count_, width_, pairs_.data());
  }

  // z of all keys and the anchors in `columns` of a panel, a multiple of kColumnStep.
  void multiply(const at::Tensor& panels, int64_t panel, int64_t first, int64_t columns) {
    const int64_t at = panel * panels.stride(0) + first;
    if constexpr (std::is_same_v<A, float>) {
      if (bf16_) {
        const auto* const left = static_cast<const uint32_t*>(keys_.const_data_ptr());
        const auto* const right = static_cast<const uint32_t*>(panels.const_data_ptr());
        return cpu::bf16_product({count_, width_ / 2, columns, left, width_ / 2, 1, right + at, kPanelAnchors, z(first),
                                  kPanelAnchors, false, most_ * width_ / 2});
      }
    }
    kernels_.product({count_, width_, columns, keys_.template const_data_ptr<A>(), width_, 1,
                      panels.template const_data_ptr<A>() + at, kPanelAnchors, z(first), kPanelAnchors, false,
                      kAhead * width_});
  }

  // z [keys, kPanelAnchors], from an anchor of the panel on.
  A* z(int64_t anchor) { return z_.data() + anchor; }

  // Rounds z of some columns as far as accumulate() does; adds the rounded numbers to sum [columns].
  void round(int64_t first, int64_t columns, A* sum) {
    if constexpr (std::is_same_v<A, float>) cpu::round_to_pairs(z(first), count_, kPanelAnchors, columns, sum);
  }

  // sums [anchors, width] += z^T keys for some anchors of the panel
  void accumulate(int64_t first, int64_t anchors, A* sums) {
    if constexpr (std::is_same_v<A, float>) {
      if (bf16_) {
        const auto* const left = reinterpret_cast<const uint32_t*>(z(first));
        return cpu::bf16_product(
            {anchors, (count_ + 1) / 2, width_, left, 1, kPanelAnchors, pairs_.data(), width_, sums, width_, true});
      }
    }
    kernels_.product({anchors, count_, width_, z(first), 1, kPanelAnchors, keys_.template const_data_ptr<A>(), width_,
                      sums, width_, true});
  }

 private:
  static constexpr int64_t kMostKeys = 192, kNumbers = kMostKeys * 256;  // 192 KiB of float32 keys, for the L2 cache
  static constexpr int64_t kAhead = 24;  // keys; in bfloat16 a whole tile, because load() reads the keys first

  const cpu::PairKernels<A>& kernels_;
  const int64_t dim_, width_, most_;
  const bool bf16_;
  int64_t count_ = 0;
  at::Tensor keys_, room_;       // [count, width]
  std::vector<uint32_t> pairs_;  // [ceil(count / 2), width], in bfloat16
  std::vector<A> z_;             // [most, kPanelAnchors]
};

}  // namespace pixcontrast
