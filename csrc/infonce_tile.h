// Some keys and their two products with anchors: by the library in the dtype of the sums, or by cpu::Bf16Tile.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>

#include "cpu/bf16_tile.h"

namespace pixcontrast {

// A half-open range of anchors.
struct Range {
  int64_t first, last;
  int64_t size() const { return std::max<int64_t>(last - first, 0); }
};

// anchors [V, D] as cpu::Bf16Tile wants them.
inline at::Tensor bf16_rows(const at::Tensor& anchors) {
  const int64_t dim = anchors.size(1);
  return at::constant_pad_nd(anchors.to(at::kBFloat16), {0, cpu::Bf16Tile::padded(dim) - dim});
}

template <class A>
class KeyTile {
 public:
  // anchors [V, D]; bf16: the same of bf16_rows(), if keys are bfloat16 and multiplied as such, else undefined.
  KeyTile(const at::Tensor& anchors, const at::Tensor& bf16) : anchors_(anchors), bf16_(bf16) {}

  // keys [columns, D] of any dtype
  void load(const at::Tensor& keys) {
    columns = stride_ = keys.size(0);
    if (bf16_.defined()) {
      packed_.pack(keys.const_data_ptr<at::BFloat16>(), columns, keys.size(1));
      stride_ = packed_.stride();
    } else {
      keys_ = keys.to(anchors_.scalar_type());
    }
  }

  // z = products of a range of anchors and the keys.
  void multiply(Range anchors) {
    range_ = anchors;
    const int64_t numbers = anchors.size() * stride_;
    if (!room_.defined() || room_.numel() < numbers) room_ = at::empty({numbers}, anchors_.options());
    z_ = room_.narrow(0, 0, numbers).view({anchors.size(), stride_});
    if (bf16_.defined()) {
      packed_.multiply(bf16_[anchors.first].const_data_ptr<at::BFloat16>(), anchors.size(), z_.data_ptr<float>());
    } else {
      at::mm_out(z_, anchors_.narrow(0, anchors.first, anchors.size()), keys_.t());
    }
  }

  // The row of z [columns] of an anchor of the range.
  A* row(int64_t anchor) const { return z_.data_ptr<A>() + (anchor - range_.first) * stride_; }

  // Rounds a row of z, which adds up to `sum`, as far as accumulate() does; returns what it adds up to then.
  A round(A* row, A sum) const {
    if constexpr (std::is_same_v<A, float>) {
      if (bf16_.defined()) return packed_.round(row);
    }
    return sum;
  }

  // sums [V, D], for the anchors of the range, += z keys
  void accumulate(const at::Tensor& sums) const {
    const at::Tensor mine = sums.narrow(0, range_.first, range_.size());
    if (bf16_.defined()) {
      packed_.accumulate(z_.data_ptr<float>(), range_.size(), mine.data_ptr<float>());
    } else {
      mine.addmm_(z_, keys_);
    }
  }

  int64_t columns = 0;

 private:
  const at::Tensor &anchors_, &bf16_;
  at::Tensor keys_, room_, z_;
  cpu::Bf16Tile packed_;
  Range range_{};
  int64_t stride_ = 0;  // of z
};

}  // namespace pixcontrast
