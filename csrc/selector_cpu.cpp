// The class selectors, some rows of one class at a time: they are gathered, multiplied and looked at while they are in
// the cache. Forward, hidden rows are written once and read once; backward, they are read twice, and their gradient is
// never written: the rows do with it what is to be done.
//
// With g_i = dLoss/dscore_i, slope_i = 1 or the slope of leaky, M rows in the class, sums over them:
//   b = sum g_i slope_i              dLoss/dnorm_bias   = weight * b
//   a = sum g_i slope_i x_i          dLoss/dnorm_weight = weight * a
//                                    dLoss/dweight      = norm_weight * a + norm_bias * b
//   dLoss/dh_i = rstd * norm_weight * weight * (g_i slope_i - b / M - x_i a / M),
//                the last two terms only where mean and rstd depend on the rows
//   dLoss/dfirst_c = sum dLoss/dh_i row_i^T      dLoss/drow_i = first_c^T dLoss/dh_i
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <vector>

#include "cpu/parallel.h"
#include "cpu/row_kernels.h"
#include "cpu/rows.h"
#include "selector.h"
#include "selector_products.h"

namespace pixcontrast {
namespace {

constexpr int64_t kBlockRows = SelectorProducts<float>::kMostRows;
constexpr int64_t kPieceRows = 16 * kBlockRows;  // of one class, for one sum of dLoss/dfirst

// Some of the rows of a class.
struct Block {
  int64_t c, begin, end;
  int64_t size() const { return end - begin; }
};

// The rows of all classes in blocks of much the same size, at most `most`.
std::vector<Block> blocks_of(const SortedRows& rows, int64_t most) {
  std::vector<Block> blocks;
  for (int64_t c = 0; c < rows.classes; ++c) {
    const int64_t size = rows.size(c), count = (size + most - 1) / most;
    for (int64_t k = 0; k < count; ++k) {
      blocks.push_back({c, rows.begin(c) + size * k / count, rows.begin(c) + size * (k + 1) / count});
    }
  }
  return blocks;
}

// body(number, block, what make() has made for the thread) for all blocks; each thread has about as many rows.
template <class Make, class Body>
void for_blocks(const std::vector<Block>& blocks, const Make& make, const Body& body) {
  if (blocks.empty()) return;
  at::parallel_for(0, blocks.back().end, 1, [&](int64_t first, int64_t last) {
    auto own = make();
    const auto before = [](const Block& block, int64_t row) { return block.begin < row; };
    auto block = std::lower_bound(blocks.begin(), blocks.end(), first, before);
    for (; block != blocks.end() && block->begin < last; ++block) body(block - blocks.begin(), *block, own);
  });
}

// norm_weight * rstd [C, E]
template <class T>
std::vector<Acc<T>> scale_of(const Selector<T>& args) {
  std::vector<Acc<T>> scale(args.sorted.classes * args.width);
  for (size_t i = 0; i < scale.size(); ++i) scale[i] = args.norm_weight[i] * args.rstd[i];
  return scale;
}

template <class T>
cpu::Norm<Acc<T>> norm_of(const Selector<T>& args, const std::vector<Acc<T>>& scale, int64_t c) {
  const int64_t at = c * args.width;
  return {args.mean + at, scale.data() + at, args.norm_bias + at, Acc<T>(kSelectorSlope)};
}

}  // namespace

template <class T>
void selector_hidden_cpu(const SelectorHidden<T>& args) {
  using A = Acc<T>;
  const int64_t width = args.width;
  const auto& kernels = cpu::row_kernels<A>();
  const auto blocks = blocks_of(args.sorted, kBlockRows);
  std::vector<A> means(blocks.size() * width), squares(blocks.size() * width);  // [blocks, E], of the block
  const int64_t stride = cpu::padded(width);
  struct Own {
    SelectorProducts<T> products;
    std::vector<A> hidden;
  };
  const auto make = [&] {
    return Own{SelectorProducts<T>(args.rows, args.first, width), std::vector<A>(kBlockRows * stride)};
  };
  for_blocks(blocks, make, [&](int64_t number, const Block& block, Own& own) {
    own.products.load(args.sorted.order + block.begin, block.size());
    own.products.hidden(block.c, own.hidden.data());
    A *const mean = means.data() + number * width, *const square = squares.data() + number * width;
    const A share = A(1) / A(block.size());
    for (int64_t i = 0; i < block.size(); ++i) {  // the statistics are those of the rounded numbers
      T* const row = args.hidden + (block.begin + i) * width;
      A* const precise = own.hidden.data() + i * stride;
      cpu::convert(precise, width, row);
      if constexpr (!std::is_same_v<T, A>) cpu::convert(row, width, precise);
      kernels.accumulate(share, precise, width, mean);
    }
    for (int64_t i = 0; i < block.size(); ++i) {
      kernels.add_squares(own.hidden.data() + i * stride, mean, width, square);
    }
  });
  std::fill_n(args.mean, args.sorted.classes * width, A(0));
  std::fill_n(args.variance, args.sorted.classes * width, A(0));
  const auto share_of = [&](const Block& block) { return A(block.size()) / A(args.sorted.size(block.c)); };
  for (size_t number = 0; number < blocks.size(); ++number) {
    const Block& block = blocks[number];
    kernels.accumulate(share_of(block), means.data() + number * width, width, args.mean + block.c * width);
  }
  // the squares in the blocks, and those of the blocks' means
  for (size_t number = 0; number < blocks.size(); ++number) {
    const Block& block = blocks[number];
    const A *const mean = args.mean + block.c * width, *const own = means.data() + number * width;
    A* const variance = args.variance + block.c * width;
    const A one = A(1) / A(args.sorted.size(block.c)), all = share_of(block);
    for (int64_t d = 0; d < width; ++d) {
      variance[d] += one * squares[number * width + d] + all * (own[d] - mean[d]) * (own[d] - mean[d]);
    }
  }
}

template <class T>
void selector_cpu(const Selector<T>& args) {
  using A = Acc<T>;
  const int64_t width = args.width;
  const auto& kernels = cpu::row_kernels<A>();
  const auto scale = scale_of(args);
  const auto make = [&] { return cpu::RowBuffer<T>(width); };
  for_blocks(blocks_of(args.sorted, kBlockRows), make, [&](int64_t, const Block& block, cpu::RowBuffer<T>& buffer) {
    const auto norm = norm_of(args, scale, block.c);
    for (int64_t i = block.begin; i < block.end; ++i) {
      const A* const row = buffer.read(args.hidden + i * width);
      const A score = kernels.leaky_dot(row, norm, args.weight + block.c * width, width);
      args.score[args.sorted.order[i]] = score + args.bias[block.c];
    }
  });
}

namespace {

template <class T>
class SelectorBackward {
  using A = Acc<T>;

 public:
  explicit SelectorBackward(const Selector<T>& args)
      : args_(args), width_(args.width), dim_(args.rows.dim), scale_(scale_of(args)) {}

  void run() {
    sum_up();
    finish_sums();
    go_down();
  }

 private:
  // [C, 2, E]: b, and a without its rstd; and the sums of g.
  void sum_up() {
    const auto blocks = blocks_of(args_.sorted, kBlockRows);
    std::vector<A> partial(blocks.size() * 2 * width_);
    std::vector<double> grads(blocks.size());
    const auto make = [&] { return cpu::RowBuffer<T>(width_); };
    for_blocks(blocks, make, [&](int64_t number, const Block& block, cpu::RowBuffer<T>& buffer) {
      const auto norm = norm_of(args_, scale_, block.c);
      A* const sums = partial.data() + number * 2 * width_;
      for (int64_t i = block.begin; i < block.end; ++i) {
        const A grad = args_.grad_score[args_.sorted.order[i]];
        grads[number] += grad;
        kernels_.leaky_sums(buffer.read(args_.hidden + i * width_), norm, grad, width_, sums, sums + width_);
      }
    });
    sums_.resize(args_.sorted.classes * 2 * width_);
    grad_.resize(args_.sorted.classes);
    for (size_t number = 0; number < blocks.size(); ++number) {
      const int64_t c = blocks[number].c;
      kernels_.accumulate(A(1), partial.data() + number * 2 * width_, 2 * width_, sums_.data() + c * 2 * width_);
      grad_[c] += grads[number];
    }
  }

  // The gradients of the parameters behind the first product, and how those of hidden rows are made:
  // dLoss/dh = factor * (g slope) + shift + tilt * (h - mean).
  void finish_sums() {
    for (auto* numbers : {&factor_, &shift_, &tilt_}) numbers->resize(args_.sorted.classes * width_);
    for (int64_t c = 0; c < args_.sorted.classes; ++c) {
      args_.grad_bias[c] = static_cast<A>(grad_[c]);
      const A share = args_.own[c] ? A(1) / A(std::max<int64_t>(args_.sorted.size(c), 1)) : A(0);
      for (int64_t e = 0; e < width_; ++e) {
        const int64_t i = c * width_ + e;
        const A b = sums_[c * 2 * width_ + e], a = sums_[(c * 2 + 1) * width_ + e] * args_.rstd[i];
        args_.grad_norm_bias[i] = args_.weight[i] * b;
        args_.grad_norm_weight[i] = args_.weight[i] * a;
        args_.grad_weight[i] = args_.norm_weight[i] * a + args_.norm_bias[i] * b;
        factor_[i] = scale_[i] * args_.weight[i];
        shift_[i] = -factor_[i] * b * share;
        tilt_[i] = -factor_[i] * a * share * args_.rstd[i];
      }
    }
  }

  // What one thread has.
  struct Own {
    SelectorProducts<T> products;
    cpu::RowBuffer<T> buffer;
    std::vector<A> grad, grad_rows;  // of the hidden rows and the rows of a block
  };

  // dLoss/dfirst [E, row_stride()] of each piece of a class, the first in its place, if it fits there, and then of the
  // class; the gradients of rows on the way.
  void go_down() {
    const auto pieces = blocks_of(args_.sorted, kPieceRows);
    const int64_t stride = cpu::padded(dim_), numbers = width_ * dim_;
    std::fill_n(args_.grad_first, args_.sorted.classes * numbers, A(0));
    std::vector<std::vector<A>> sums(pieces.size());
    const auto in_place = [&](const Block& piece) {
      return stride == dim_ && piece.begin == args_.sorted.begin(piece.c);
    };
    const auto make = [&] {
      return Own{SelectorProducts<T>(args_.rows, args_.first, width_), cpu::RowBuffer<T>(width_), {}, {}};
    };
    for_blocks(pieces, make, [&](int64_t number, const Block& piece, Own& own) {
      if (!in_place(piece)) sums[number].resize(width_ * stride);
      A* const sum = in_place(piece) ? args_.grad_first + piece.c * numbers : sums[number].data();
      for (int64_t begin = piece.begin; begin < piece.end; begin += kBlockRows) {
        add_block({piece.c, begin, std::min(begin + kBlockRows, piece.end)}, own, sum);
      }
    });
    for (size_t number = 0; number < pieces.size(); ++number) {
      const Block& piece = pieces[number];
      if (in_place(piece)) continue;
      cpu::Pieces(width_, width_, 64).run([&](int64_t, int64_t begin, int64_t end) {
        for (int64_t e = begin; e < end; ++e) {
          A* const grad = args_.grad_first + piece.c * numbers + e * dim_;
          kernels_.accumulate(A(1), sums[number].data() + e * stride, dim_, grad);
        }
      });
    }
  }

  void add_block(const Block& block, Own& own, A* sum) {
    auto& products = own.products;
    const int64_t *const order = args_.sorted.order + block.begin, at = block.c * width_;
    products.load(order, block.size());
    own.grad.resize(kBlockRows * products.hidden_stride());  // zeros behind the last channel
    const auto norm = norm_of(args_, scale_, block.c);
    for (int64_t i = 0; i < block.size(); ++i) {
      const A* const hidden = own.buffer.read(args_.hidden + (block.begin + i) * width_);
      kernels_.leaky_backward(hidden, norm, args_.grad_score[order[i]], factor_.data() + at, shift_.data() + at,
                              tilt_.data() + at, width_, own.grad.data() + i * products.hidden_stride());
    }
    if (args_.grad_rows) {
      own.grad_rows.resize(kBlockRows * products.row_stride());
      products.row_gradient(block.c, own.grad.data(), own.grad_rows.data());
      for (int64_t i = 0; i < block.size(); ++i) {
        std::copy_n(own.grad_rows.data() + i * products.row_stride(), dim_, args_.grad_rows + order[i] * dim_);
      }
    }
    products.add_first_gradient(own.grad.data(), sum);
  }

  const Selector<T>& args_;
  const cpu::RowKernels<A>& kernels_ = cpu::row_kernels<A>();
  const int64_t width_, dim_;
  const std::vector<A> scale_;  // [C, E]
  std::vector<A> sums_;
  std::vector<double> grad_;              // [C]
  std::vector<A> factor_, shift_, tilt_;  // [C, E]
};

}  // namespace

template <class T>
void selector_backward_cpu(const Selector<T>& args) {
  SelectorBackward<T>(args).run();
}

#define INSTANTIATE(T)                                         \
  template void selector_hidden_cpu(const SelectorHidden<T>&); \
  template void selector_cpu(const Selector<T>&);              \
  template void selector_backward_cpu(const Selector<T>&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(c10::BFloat16)
INSTANTIATE(c10::Half)

}  // namespace pixcontrast
