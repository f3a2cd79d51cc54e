// The gradient of the weights of C layers, summed by pieces of their rows and then in order.
#pragma once

#include <algorithm>
#include <vector>

#include "common/cpu/blocks.h"
#include "common/cpu/parallel.h"
#include "common/cpu/product.h"
#include "common/cpu/row_kernels.h"

namespace pixcontrast::cpu {

template <class A>
class WeightSums {
 public:
  // grad [C, O, D]
  WeightSums(const std::vector<Block>& pieces, int64_t classes, int64_t outputs, int64_t dim, A* grad)
      : pieces_(pieces), outputs_(outputs), dim_(dim), grad_(grad), sums_(pieces.size()) {
    std::fill_n(grad, classes * outputs * dim, A(0));
  }

  // Where a piece adds up its sum [O, padded(D)]: at first all zeros, and for the first piece of a class the place of
  // the result, if it fits there.
  A* of(int64_t piece) {
    if (in_place(piece)) return of_class(piece);
    sums_[piece].resize(outputs_ * padded(dim_));
    return sums_[piece].data();
  }

  void merge() {
    for (size_t piece = 0; piece < pieces_.size(); ++piece) {
      if (in_place(piece)) continue;
      Pieces(outputs_, outputs_, 64).run([&](int64_t, int64_t begin, int64_t end) {
        for (int64_t o = begin; o < end; ++o) {
          const A* const row = sums_[piece].data() + o * padded(dim_);
          row_kernels<A>().accumulate(A(1), row, dim_, of_class(piece) + o * dim_);
        }
      });
    }
  }

 private:
  bool in_place(int64_t piece) const {
    return padded(dim_) == dim_ && (piece == 0 || pieces_[piece].c != pieces_[piece - 1].c);
  }
  A* of_class(int64_t piece) const { return grad_ + pieces_[piece].c * outputs_ * dim_; }

  const std::vector<Block>& pieces_;
  const int64_t outputs_, dim_;
  A* const grad_;
  std::vector<std::vector<A>> sums_;  // of the pieces that are not summed in place
};

}  // namespace pixcontrast::cpu
