// Some rows at a time, while they are in the cache: what comes out of BatchNorm and ReLU is never written, and backward
// made once more.
//
// With g_i = dLoss/dout_i, s_i = (weight^T g_i) where y_i > 0, else 0, and M rows, sums over them:
//   b = sum s_i              dLoss/dnorm_bias   = b            dLoss/dweight = sum g_i max(y_i, 0)^T
//   a = sum s_i x_i          dLoss/dnorm_weight = a            dLoss/dbias   = sum g_i
//   dLoss/dh_i = rstd * norm_weight * (s_i - share (b + x_i a)), with a share of 1 / M where mean and rstd are those of
//                the rows, and 0 where they are constants
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <vector>

#include "common/cpu/blocks.h"
#include "common/cpu/moments.h"
#include "common/cpu/row_kernels.h"
#include "common/cpu/weight_sums.h"
#include "head.h"

namespace pixcontrast {
namespace {

constexpr int64_t kBlockRows = cpu::RowProducts<float>::kMostRows;
constexpr int64_t kMostPieces = 32;  // each with a sum of dLoss/dweight

template <class T>
std::vector<cpu::Block> blocks_of(const HeadRows<T>& rows) {
  return cpu::blocks_of(1, &rows.count, kBlockRows);
}

// to [P, columns] = zero where no row takes part.
template <class T>
void clear_others(const HeadRows<T>& rows, int64_t columns, T* to) {
  for (int64_t i = 0, next = 0; i < rows.total; ++i) {
    if (next < rows.count && rows.order[next] == i) {
      ++next;
    } else {
      std::fill_n(to + i * columns, columns, T(0));
    }
  }
}

// The rows of a block in the dtype of the sums, `stride` numbers from each other, from a matrix [P, columns].
template <class T>
void gather(const HeadRows<T>& rows, const cpu::Block& block, const T* from, int64_t columns, int64_t stride,
            Acc<T>* to) {
  for (int64_t i = 0; i < block.size(); ++i) {
    cpu::convert(from + rows.order[block.begin + i] * columns, columns, to + i * stride);
  }
}

template <class T>
class HeadCpu {
  using A = Acc<T>;

 public:
  explicit HeadCpu(const Head<T>& args) : args_(args), rows_(args.rows), width_(args.rows.width), scale_(width_) {
    for (int64_t e = 0; e < width_; ++e) scale_[e] = args.norm_weight[e] * args.rstd[e];
  }

  void forward() {
    clear_others(rows_, args_.outputs, args_.out);
    cpu::for_blocks(blocks_of(rows_), make(), [&](int64_t, const cpu::Block& block, Own& own) {
      load(block, own);
      own.products.multiply(0, own.outputs.data());
      for (int64_t i = 0; i < block.size(); ++i) {
        A* const out = own.outputs.data() + i * wide_;
        for (int64_t o = 0; o < args_.outputs; ++o) out[o] += args_.bias[o];
        cpu::convert(out, args_.outputs, args_.out + rows_.order[block.begin + i] * args_.outputs);
      }
    });
  }

  void backward() {
    const int64_t piece = std::max(16 * kBlockRows, (rows_.count + kMostPieces - 1) / kMostPieces);
    const auto pieces = cpu::blocks_of(1, &rows_.count, piece);
    cpu::WeightSums<A> weights(pieces, 1, args_.outputs, width_, args_.grad_weight);
    std::vector<A> sums(pieces.size() * 2 * width_);           // [pieces, 2, E]: b, and a without its rstd
    std::vector<A> bias(pieces.size() * args_.outputs, A(0));  // [pieces, O]
    cpu::for_blocks(pieces, make(), [&](int64_t number, const cpu::Block& whole, Own& own) {
      A* const weight = weights.of(number);
      for (int64_t begin = whole.begin; begin < whole.end; begin += kBlockRows) {
        const cpu::Block block{0, begin, std::min(begin + kBlockRows, whole.end)};
        chain(block, own, weight);
        kernels_.accumulate(A(1), own.sums.data(), 2 * width_, sums.data() + number * 2 * width_);
        kernels_.accumulate(A(1), own.sums.data() + 2 * width_, args_.outputs, bias.data() + number * args_.outputs);
      }
    });
    weights.merge();
    std::vector<A> total(2 * width_);
    std::fill_n(args_.grad_bias, args_.outputs, A(0));
    for (size_t number = 0; number < pieces.size(); ++number) {
      kernels_.accumulate(A(1), sums.data() + number * 2 * width_, 2 * width_, total.data());
      kernels_.accumulate(A(1), bias.data() + number * args_.outputs, args_.outputs, args_.grad_bias);
    }
    through_norm(total);
  }

 private:
  // What one thread has.
  struct Own {
    cpu::RowProducts<T> products;
    std::vector<A> hidden, rows, outputs;  // of a block: [rows, E], then as wide as products have it
    std::vector<A> sums;                   // [2 E + O] of a block: b, a without its rstd, dLoss/dbias
  };

  auto make() const {
    return [this] {
      return Own{cpu::RowProducts<T>(args_.weight, args_.outputs),
                 std::vector<A>(kBlockRows * width_),
                 std::vector<A>(kBlockRows * deep_),
                 std::vector<A>(kBlockRows * wide_),
                 {}};
    };
  }

  cpu::Norm<A> norm() const { return {args_.mean, scale_.data(), args_.norm_bias, A(0)}; }

  // Hidden rows of a block, and max(y, 0) of them to the products.
  void load(const cpu::Block& block, Own& own) const {
    gather(rows_, block, rows_.hidden, width_, width_, own.hidden.data());
    for (int64_t i = 0; i < block.size(); ++i) {
      kernels_.leaky(own.hidden.data() + i * width_, norm(), width_, own.rows.data() + i * deep_);
    }
    own.products.load(own.rows.data(), deep_, block.size());
  }

  // Sums up a block, adding to dLoss/dweight; leaves s_i in the place of dLoss/dh_i.
  void chain(const cpu::Block& block, Own& own, A* weight) {
    own.sums.assign(2 * width_ + args_.outputs, A(0));
    A* const sums = own.sums.data();
    load(block, own);
    gather(rows_, block, args_.grad, args_.outputs, wide_, own.outputs.data());
    for (int64_t i = 0; i < block.size(); ++i) {
      kernels_.accumulate(A(1), own.outputs.data() + i * wide_, args_.outputs, sums + 2 * width_);
    }
    own.products.row_gradient(0, own.outputs.data(), own.rows.data());
    own.products.add_weight_gradient(own.outputs.data(), weight);
    for (int64_t i = 0; i < block.size(); ++i) {
      A* const grad = own.rows.data() + i * deep_;
      kernels_.leaky_chain(own.hidden.data() + i * width_, norm(), width_, grad, sums, sums + width_);
      cpu::convert(grad, width_, args_.grad_hidden + rows_.order[block.begin + i] * width_);
    }
  }

  // From s_i to dLoss/dh_i = factor * s_i + shift + tilt * (h_i - mean).
  void through_norm(const std::vector<A>& sums) {
    std::vector<A> shift(width_), tilt(width_);
    for (int64_t e = 0; e < width_; ++e) {
      const A b = sums[e], a = sums[width_ + e] * args_.rstd[e];
      args_.grad_norm_bias[e] = b;
      args_.grad_norm_weight[e] = a;
      shift[e] = -scale_[e] * b * args_.share;
      tilt[e] = -scale_[e] * a * args_.share * args_.rstd[e];
    }
    clear_others(rows_, width_, args_.grad_hidden);
    cpu::for_blocks(blocks_of(rows_), make(), [&](int64_t, const cpu::Block& block, Own& own) {
      gather(rows_, block, rows_.hidden, width_, width_, own.hidden.data());
      for (int64_t i = 0; i < block.size(); ++i) {
        T* const stored = args_.grad_hidden + rows_.order[block.begin + i] * width_;
        A* const grad = own.rows.data();
        cpu::convert(stored, width_, grad);
        kernels_.norm_backward(own.hidden.data() + i * width_, args_.mean, scale_.data(), shift.data(), tilt.data(),
                               width_, grad);
        cpu::convert(grad, width_, stored);
      }
    });
  }

  const Head<T>& args_;
  const HeadRows<T>& rows_;
  const cpu::RowKernels<A>& kernels_ = cpu::row_kernels<A>();
  const int64_t width_;
  const int64_t deep_ = cpu::padded(args_.rows.width), wide_ = cpu::padded(args_.outputs);
  std::vector<A> scale_;  // [E] norm_weight * rstd
};

}  // namespace

template <class T>
void head_moments_cpu(const HeadMoments<T>& args) {
  using A = Acc<T>;
  const auto& rows = args.rows;
  const auto blocks = blocks_of(rows);
  cpu::Moments<A> moments(blocks, rows.width);
  const auto make = [&] { return std::vector<A>(kBlockRows * rows.width); };
  cpu::for_blocks(blocks, make, [&](int64_t number, const cpu::Block& block, std::vector<A>& hidden) {
    gather(rows, block, rows.hidden, rows.width, rows.width, hidden.data());
    moments.take(number, hidden.data(), rows.width);
  });
  moments.merge(1, args.mean, args.variance);
}

template <class T>
void head_cpu(const Head<T>& args) {
  HeadCpu<T>(args).forward();
}

template <class T>
void head_backward_cpu(const Head<T>& args) {
  HeadCpu<T>(args).backward();
}

#define INSTANTIATE(T)                                   \
  template void head_moments_cpu(const HeadMoments<T>&); \
  template void head_cpu(const Head<T>&);                \
  template void head_backward_cpu(const Head<T>&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(c10::BFloat16)
INSTANTIATE(c10::Half)

}  // namespace pixcontrast
