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

#include "common/cpu/blocks.h"
#include "common/cpu/moments.h"
#include "common/cpu/row_kernels.h"
#include "common/cpu/row_products.h"
#include "common/cpu/weight_sums.h"
#include "selector.h"

namespace pixcontrast {
namespace {

constexpr int64_t kBlockRows = cpu::RowProducts<float>::kMostRows;
constexpr int64_t kPieceRows = 16 * kBlockRows;  // of one class, for one sum of dLoss/dfirst

std::vector<cpu::Block> blocks_of(const SortedRows& sorted, int64_t most) {
  return cpu::blocks_of(sorted.classes, sorted.ends, most);
}

int64_t size_of(const SortedRows& sorted, int64_t c) { return sorted.ends[c] - (c > 0 ? sorted.ends[c - 1] : 0); }

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
  const int64_t width = args.width, stride = cpu::padded(width);
  const auto blocks = blocks_of(args.sorted, kBlockRows);
  cpu::Moments<A> moments(blocks, width);
  struct Own {
    cpu::RowProducts<T> products;
    std::vector<A> hidden;
  };
  const auto make = [&] { return Own{cpu::RowProducts<T>(args.first, width), std::vector<A>(kBlockRows * stride)}; };
  cpu::for_blocks(blocks, make, [&](int64_t number, const cpu::Block& block, Own& own) {
    own.products.load(args.rows, args.sorted.order + block.begin, block.size());
    own.products.multiply(block.c, own.hidden.data());
    for (int64_t i = 0; i < block.size(); ++i) {  // the moments are those of the rounded numbers
      T* const row = args.hidden + (block.begin + i) * width;
      A* const precise = own.hidden.data() + i * stride;
      cpu::convert(precise, width, row);
      if constexpr (!std::is_same_v<T, A>) cpu::convert(row, width, precise);
    }
    moments.take(number, own.hidden.data(), stride);
  });
  moments.merge(args.sorted.classes, args.mean, args.variance);
}

template <class T>
void selector_cpu(const Selector<T>& args) {
  using A = Acc<T>;
  const int64_t width = args.width;
  const auto& kernels = cpu::row_kernels<A>();
  const auto scale = scale_of(args);
  const auto make = [&] { return cpu::RowBuffer<T>(width); };
  cpu::for_blocks(blocks_of(args.sorted, kBlockRows), make,
                  [&](int64_t, const cpu::Block& block, cpu::RowBuffer<T>& buffer) {
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
    cpu::for_blocks(blocks, make, [&](int64_t number, const cpu::Block& block, cpu::RowBuffer<T>& buffer) {
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
      const A share = args_.own[c] ? A(1) / A(std::max<int64_t>(size_of(args_.sorted, c), 1)) : A(0);
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
    cpu::RowProducts<T> products;
    cpu::RowBuffer<T> buffer;
    std::vector<A> grad, grad_rows;  // of the hidden rows and the rows of a block
  };

  // dLoss/dfirst, and the gradients of rows on the way.
  void go_down() {
    const auto pieces = blocks_of(args_.sorted, kPieceRows);
    cpu::WeightSums<A> sums(pieces, args_.sorted.classes, width_, dim_, args_.grad_first);
    const auto make = [&] { return Own{cpu::RowProducts<T>(args_.first, width_), cpu::RowBuffer<T>(width_), {}, {}}; };
    cpu::for_blocks(pieces, make, [&](int64_t number, const cpu::Block& piece, Own& own) {
      A* const sum = sums.of(number);
      for (int64_t begin = piece.begin; begin < piece.end; begin += kBlockRows) {
        add_block({piece.c, begin, std::min(begin + kBlockRows, piece.end)}, own, sum);
      }
    });
    sums.merge();
  }

  void add_block(const cpu::Block& block, Own& own, A* sum) {
    auto& products = own.products;
    const int64_t *const order = args_.sorted.order + block.begin, at = block.c * width_;
    products.load(args_.rows, order, block.size());
    own.grad.resize(kBlockRows * products.output_stride());  // zeros behind the last channel
    const auto norm = norm_of(args_, scale_, block.c);
    for (int64_t i = 0; i < block.size(); ++i) {
      const A* const hidden = own.buffer.read(args_.hidden + (block.begin + i) * width_);
      kernels_.leaky_backward(hidden, norm, args_.grad_score[order[i]], factor_.data() + at, shift_.data() + at,
                              tilt_.data() + at, width_, own.grad.data() + i * products.output_stride());
    }
    if (args_.grad_rows) {
      own.grad_rows.resize(kBlockRows * products.row_stride());
      products.row_gradient(block.c, own.grad.data(), own.grad_rows.data());
      for (int64_t i = 0; i < block.size(); ++i) {
        std::copy_n(own.grad_rows.data() + i * products.row_stride(), dim_, args_.grad_rows + order[i] * dim_);
      }
    }
    products.add_weight_gradient(own.grad.data(), sum);
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
