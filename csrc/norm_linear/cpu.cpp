// Sums are kept for blocks of rows and then added in order.

#include "common/cpu/work.h"
#include "norm_linear/norm_linear.h"

namespace pixcontrast {
namespace {

constexpr int64_t kBlockRows = 128;

// Mean and squared deviations of each block in one pass, as deviations from its first row, merged by Chan's formula.
// Subtracting the squared mean costs few digits: the squares from one of n elements are at most n + 1 times those from
// the mean.
template <class T>
class Stats {
  using A = Acc<T>;

 public:
  explicit Stats(const NormStats<T>& args)
      : args_(args), width_(args.rows.width), blocks_(cpu::blocks_of(args.rows.segments, kBlockRows)) {}

  void run() {
    if (!args_.training) blocks_.clear();
    mean_.resize(blocks_.size() * width_);
    squares_.resize(blocks_.size() * width_);
    cpu::for_blocks(blocks_, [&](int64_t number, const cpu::Block& block) { take(number, block); });
    std::vector<A> mean(width_), squares(width_);
    auto block = blocks_.begin();
    for (int64_t c = 0; c < args_.rows.segments.classes; ++c) {
      std::fill(mean.begin(), mean.end(), A(0));
      std::fill(squares.begin(), squares.end(), A(0));
      A count = 0;
      for (; block != blocks_.end() && block->c == c; ++block) merge(*block, &count, mean.data(), squares.data());
      for (int64_t e = 0; e < width_; ++e) args_.finish(c, e, mean[e], count > 0 ? squares[e] / count : A(0));
    }
  }

 private:
  void take(int64_t number, const cpu::Block& block) {
    cpu::RowBuffer<T> row(width_), first(width_);
    A *const mean = mean_.data() + number * width_, *const squares = squares_.data() + number * width_;
    const A size = A(block.size()), *const pivot = first.read(args_.rows.hidden + args_.rows.offset(block.begin));
    for (int64_t i = block.begin + 1; i < block.end; ++i) {
      kernels_.add_deviations(row.read(args_.rows.hidden + args_.rows.offset(i)), pivot, width_, mean, squares);
    }
    for (int64_t e = 0; e < width_; ++e) {
      squares[e] = std::max(squares[e] - mean[e] * mean[e] / size, A(0));
      mean[e] = pivot[e] + mean[e] / size;
    }
  }

  void merge(const cpu::Block& block, A* count, A* mean, A* squares) const {
    const int64_t at = (&block - blocks_.data()) * width_;
    const A own = *count, other = A(block.size()), share = other / (own + other);
    for (int64_t e = 0; e < width_; ++e) {
      const A delta = mean_[at + e] - mean[e];
      mean[e] += delta * share;
      squares[e] += squares_[at + e] + delta * delta * own * share;
    }
    *count = own + other;
  }

  const NormStats<T>& args_;
  const cpu::RowKernels<A>& kernels_ = cpu::row_kernels<A>();
  const int64_t width_;
  std::vector<cpu::Block> blocks_;
  std::vector<A> mean_, squares_;  // [blocks, E]
};

template <class T>
class Norms {
  using A = Acc<T>;

 public:
  explicit Norms(const NormLinear<T>& args)
      : args_(args),
        width_(args.rows.width),
        classes_(args.rows.segments.classes),
        blocks_(cpu::blocks_of(args.rows.segments, kBlockRows)),
        scale_(classes_ * width_) {
    for (int64_t i = 0; i < classes_ * width_; ++i) scale_[i] = args.norm_weight[i] * args.rstd[i];
  }

  void forward() {
    cpu::for_gaps(args_.rows.segments, [&](int64_t first, int64_t last) {
      if (dense()) std::fill(args_.activations + first * width_, args_.activations + last * width_, T(0));
      if (!dense()) std::fill(args_.out + first, args_.out + last, A(0));
    });
    cpu::for_blocks(blocks_, [&](int64_t, const cpu::Block& block) {
      cpu::RowBuffer<T> row(width_), activations(width_);
      const auto norm = norm_of(block.c);
      for (int64_t i = block.begin; i < block.end; ++i) {
        const A* const hidden = row.read(args_.rows.hidden + args_.rows.offset(i));
        if (dense()) {
          T* const to = args_.activations + i * width_;
          kernels_.leaky(hidden, norm, width_, activations.target(to));
          activations.write(to);
        } else {
          args_.out[i] =
              args_.bias[block.c] + kernels_.leaky_dot(hidden, norm, args_.weight + block.c * width_, width_);
        }
      }
    });
  }

  void backward() {
    sum_blocks();
    finish_sums();
    cpu::for_gaps(args_.rows.segments, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) std::fill_n(args_.grad_hidden + args_.rows.offset(i), width_, T(0));
    });
    cpu::for_blocks(blocks_, [&](int64_t, const cpu::Block& block) {
      cpu::RowBuffer<T> row(width_), grads(width_), result(width_);
      const auto norm = norm_of(block.c);
      const int64_t at = block.c * width_;
      for (int64_t i = block.begin; i < block.end; ++i) {
        const int64_t place = args_.rows.offset(i);
        T* const to = args_.grad_hidden + place;
        kernels_.leaky_backward(row.read(args_.rows.hidden + place), norm, grad_of(i, grads), dense(),
                                factor_.data() + at, shift_.data() + at, tilt_.data() + at, width_, result.target(to));
        result.write(to);
      }
    });
  }

 private:
  bool dense() const { return args_.weight == nullptr; }

  cpu::Norm<A> norm_of(int64_t c) const {
    const int64_t at = c * width_;
    return {args_.mean + at, scale_.data() + at, args_.norm_bias + at, args_.slope};
  }

  const A* grad_of(int64_t i, cpu::RowBuffer<T>& buffer) const {
    return dense() ? buffer.read(args_.grad_activations + i * width_) : args_.grad_out + i;
  }

  // The sums of s, of s (h - mean), and of the incoming gradient of one output, for each block.
  void sum_blocks() {
    sums_.resize(blocks_.size() * 2 * width_);
    grads_.resize(blocks_.size());
    cpu::for_blocks(blocks_, [&](int64_t number, const cpu::Block& block) {
      cpu::RowBuffer<T> row(width_), grads(width_);
      const auto norm = norm_of(block.c);
      A* const sums = sums_.data() + number * 2 * width_;
      for (int64_t i = block.begin; i < block.end; ++i) {
        const A* const grad = grad_of(i, grads);
        if (!dense()) grads_[number] += *grad;
        kernels_.leaky_sums(row.read(args_.rows.hidden + args_.rows.offset(i)), norm, grad, dense(), width_, sums,
                            sums + width_);
      }
    });
  }

  // The gradients of the parameters, and those of hidden rows as factor * s + shift + tilt * (h - mean).
  void finish_sums() {
    for (auto* values : {&factor_, &shift_, &tilt_}) values->resize(classes_ * width_);
    std::vector<A> sums(2 * width_);
    size_t number = 0;
    for (int64_t c = 0; c < classes_; ++c) {
      std::fill(sums.begin(), sums.end(), A(0));
      double grad = 0;
      for (; number < blocks_.size() && blocks_[number].c == c; ++number) {
        kernels_.accumulate(A(1), sums_.data() + number * 2 * width_, 2 * width_, sums.data());
        grad += grads_[number];
      }
      if (!dense()) args_.grad_bias[c] = static_cast<A>(grad);
      for (int64_t e = 0; e < width_; ++e) {
        const int64_t i = c * width_ + e;
        args_.finish(c, e, sums[e], sums[width_ + e] * args_.rstd[i]);
        factor_[i] = scale_[i] * (dense() ? A(1) : args_.weight[i]);
        shift_[i] = -scale_[i] * args_.share[c] * args_.grad_norm_bias[i];
        tilt_[i] = -scale_[i] * args_.share[c] * args_.grad_norm_weight[i] * args_.rstd[i];
      }
    }
  }

  const NormLinear<T>& args_;
  const cpu::RowKernels<A>& kernels_ = cpu::row_kernels<A>();
  const int64_t width_, classes_;
  const std::vector<cpu::Block> blocks_;
  std::vector<A> scale_;  // [C, E] norm_weight * rstd
  std::vector<A> sums_;   // [blocks, 2, E]
  std::vector<double> grads_;
  std::vector<A> factor_, shift_, tilt_;  // [C, E]
};

}  // namespace

template <class T>
void norm_stats_cpu(const NormStats<T>& args) {
  Stats<T>(args).run();
}

template <class T>
void norm_forward_cpu(const NormLinear<T>& args) {
  Norms<T>(args).forward();
}

template <class T>
void norm_backward_cpu(const NormLinear<T>& args) {
  Norms<T>(args).backward();
}

#define INSTANTIATE(T)                                  \
  template void norm_stats_cpu(const NormStats<T>&);    \
  template void norm_forward_cpu(const NormLinear<T>&); \
  template void norm_backward_cpu(const NormLinear<T>&);
CPU_FOR_DTYPES(INSTANTIATE)

}  // namespace pixcontrast
