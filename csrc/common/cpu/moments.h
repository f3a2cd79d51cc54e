// Mean and variance of the rows of each class, from those of blocks of them.
#pragma once

#include <algorithm>
#include <vector>

#include "common/cpu/blocks.h"
#include "common/cpu/row_kernels.h"

namespace pixcontrast::cpu {

template <class A>
class Moments {
 public:
  Moments(const std::vector<Block>& blocks, int64_t width)
      : blocks_(blocks), width_(width), mean_(blocks.size() * width), square_(blocks.size() * width) {}

  // Block `number` has these rows, `stride` numbers from each other.
  void take(int64_t number, const A* rows, int64_t stride) {
    const int64_t count = blocks_[number].size();
    A *const mean = mean_.data() + number * width_, *const square = square_.data() + number * width_;
    for (int64_t i = 0; i < count; ++i) kernels_.accumulate(A(1) / A(count), rows + i * stride, width_, mean);
    for (int64_t i = 0; i < count; ++i) kernels_.add_squares(rows + i * stride, mean, width_, square);
  }

  // mean and variance [classes, width], the latter divided by the number of rows; 0 for a class without rows.
  void merge(int64_t classes, A* mean, A* variance) const {
    std::vector<int64_t> rows(classes);
    for (const Block& block : blocks_) rows[block.c] += block.size();
    std::fill_n(mean, classes * width_, A(0));
    std::fill_n(variance, classes * width_, A(0));
    const auto share = [&](const Block& block) { return A(block.size()) / A(rows[block.c]); };
    for (size_t number = 0; number < blocks_.size(); ++number) {
      const Block& block = blocks_[number];
      kernels_.accumulate(share(block), mean_.data() + number * width_, width_, mean + block.c * width_);
    }
    // the squares in the blocks, and those of the blocks' means
    for (size_t number = 0; number < blocks_.size(); ++number) {
      const Block& block = blocks_[number];
      const A *const whole = mean + block.c * width_, *const own = mean_.data() + number * width_;
      A* const to = variance + block.c * width_;
      const A one = A(1) / A(rows[block.c]), all = share(block);
      for (int64_t d = 0; d < width_; ++d) {
        to[d] += one * square_[number * width_ + d] + all * (own[d] - whole[d]) * (own[d] - whole[d]);
      }
    }
  }

 private:
  const RowKernels<A>& kernels_ = row_kernels<A>();
  const std::vector<Block>& blocks_;
  const int64_t width_;
  std::vector<A> mean_, square_;  // [blocks, width]
};

}  // namespace pixcontrast::cpu
