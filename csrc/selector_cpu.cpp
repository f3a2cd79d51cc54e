// The class selectors behind their first product: each pass reads the hidden rows once.
//
// With g_i = dLoss/dscore_i, slope_i = 1 or the slope of leaky, M rows in the class, sums over them:
//   b = sum g_i slope_i              dLoss/dnorm_bias   = weight * b
//   a = sum g_i slope_i x_i          dLoss/dnorm_weight = weight * a
//                                    dLoss/dweight      = norm_weight * a + norm_bias * b
//   dLoss/dh_i = rstd * norm_weight * weight * (g_i slope_i - b / M - x_i a / M),
//                the last two terms only where mean and rstd depend on the rows
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <vector>

#include "cpu/parallel.h"
#include "cpu/row_kernels.h"
#include "cpu/rows.h"
#include "selector.h"

namespace pixcontrast {
namespace {

constexpr int64_t kBlock = 128;  // rows of one class that one task works on

struct Block {
  int64_t c, begin, end;
};

std::vector<Block> blocks_of(const SortedRows& rows) {
  std::vector<Block> blocks;
  for (int64_t c = 0, begin = 0; c < rows.classes; begin = rows.ends[c++]) {
    for (int64_t first = begin; first < rows.ends[c]; first += kBlock) {
      blocks.push_back({c, first, std::min(first + kBlock, rows.ends[c])});
    }
  }
  return blocks;
}

int64_t size_of(const SortedRows& rows, int64_t c) { return rows.ends[c] - (c > 0 ? rows.ends[c - 1] : 0); }

// body(number, block) for all blocks.
template <class Body>
void for_blocks(const std::vector<Block>& blocks, const Body& body) {
  const auto count = static_cast<int64_t>(blocks.size());
  if (count == 0) return;
  const cpu::Pieces pieces(count, count, 1);
  pieces.run([&](int64_t number, int64_t, int64_t) { body(number, blocks[number]); });
}

// norm_weight * rstd [C, E]
template <class T>
std::vector<Acc<T>> scale_of(const Selector<T>& args) {
  std::vector<Acc<T>> scale(args.rows.classes * args.rows.dim);
  for (size_t i = 0; i < scale.size(); ++i) scale[i] = args.norm_weight[i] * args.rstd[i];
  return scale;
}

template <class T>
cpu::Norm<Acc<T>> norm_of(const Selector<T>& args, const std::vector<Acc<T>>& scale, int64_t c) {
  const int64_t at = c * args.rows.dim;
  return {args.mean + at, scale.data() + at, args.norm_bias + at, Acc<T>(kSelectorSlope)};
}

}  // namespace

template <class T>
void selector_statistics_cpu(const SelectorStatistics<T>& args) {
  using A = Acc<T>;
  const int64_t dim = args.rows.dim;
  const auto& kernels = cpu::row_kernels<A>();
  const auto blocks = blocks_of(args.rows);
  std::vector<A> means(blocks.size() * dim), squares(blocks.size() * dim);  // [blocks, E], of the block
  for_blocks(blocks, [&](int64_t number, const Block& block) {
    cpu::RowBuffer<T> buffer(dim);
    A *const mean = means.data() + number * dim, *const square = squares.data() + number * dim;
    const A share = A(1) / A(block.end - block.begin);
    for (int64_t i = block.begin; i < block.end; ++i) {
      kernels.accumulate(share, buffer.read(args.hidden + i * dim), dim, mean);
    }
    for (int64_t i = block.begin; i < block.end; ++i) {
      kernels.add_squares(buffer.read(args.hidden + i * dim), mean, dim, square);
    }
  });
  std::fill_n(args.mean, args.rows.classes * dim, A(0));
  std::fill_n(args.variance, args.rows.classes * dim, A(0));
  const auto share_of = [&](const Block& block) { return A(block.end - block.begin) / A(size_of(args.rows, block.c)); };
  for (size_t number = 0; number < blocks.size(); ++number) {
    const Block& block = blocks[number];
    kernels.accumulate(share_of(block), means.data() + number * dim, dim, args.mean + block.c * dim);
  }
  // the squares in the blocks, and those of the blocks' means
  for (size_t number = 0; number < blocks.size(); ++number) {
    const Block& block = blocks[number];
    const A *const mean = args.mean + block.c * dim, *const own = means.data() + number * dim;
    A* const variance = args.variance + block.c * dim;
    const A one = A(1) / A(size_of(args.rows, block.c)), all = share_of(block);
    for (int64_t d = 0; d < dim; ++d) {
      variance[d] += one * squares[number * dim + d] + all * (own[d] - mean[d]) * (own[d] - mean[d]);
    }
  }
}

template <class T>
void selector_cpu(const Selector<T>& args) {
  using A = Acc<T>;
  const int64_t dim = args.rows.dim;
  const auto& kernels = cpu::row_kernels<A>();
  const auto scale = scale_of(args);
  for_blocks(blocks_of(args.rows), [&](int64_t, const Block& block) {
    cpu::RowBuffer<T> buffer(dim);
    const auto norm = norm_of(args, scale, block.c);
    for (int64_t i = block.begin; i < block.end; ++i) {
      const A* const row = buffer.read(args.hidden + i * dim);
      args.score[i] = kernels.leaky_dot(row, norm, args.weight + block.c * dim, dim) + args.bias[block.c];
    }
  });
}

template <class T>
void selector_backward_cpu(const Selector<T>& args) {
  using A = Acc<T>;
  const int64_t dim = args.rows.dim, numbers = args.rows.classes * dim;
  const auto& kernels = cpu::row_kernels<A>();
  const auto scale = scale_of(args);
  const auto blocks = blocks_of(args.rows);
  std::vector<A> partial(blocks.size() * 2 * dim);  // [blocks, 2, E]: b, and a without its rstd
  std::vector<double> grads(blocks.size());         // sums of g
  for_blocks(blocks, [&](int64_t number, const Block& block) {
    cpu::RowBuffer<T> buffer(dim);
    const auto norm = norm_of(args, scale, block.c);
    A* const sums = partial.data() + number * 2 * dim;
    for (int64_t i = block.begin; i < block.end; ++i) {
      grads[number] += args.grad_score[i];
      kernels.leaky_sums(buffer.read(args.hidden + i * dim), norm, args.grad_score[i], dim, sums, sums + dim);
    }
  });

  std::vector<A> sums(2 * numbers);  // [C, 2, E]
  std::vector<double> grad(args.rows.classes);
  for (size_t number = 0; number < blocks.size(); ++number) {
    const int64_t c = blocks[number].c;
    kernels.accumulate(A(1), partial.data() + number * 2 * dim, 2 * dim, sums.data() + c * 2 * dim);
    grad[c] += grads[number];
  }
  // dLoss/dh = factor * (g slope) + shift + tilt * (h - mean)
  std::vector<A> factor(numbers), shift(numbers), tilt(numbers);
  for (int64_t c = 0; c < args.rows.classes; ++c) {
    args.grad_bias[c] = static_cast<A>(grad[c]);
    const A share = args.own[c] ? A(1) / A(std::max<int64_t>(size_of(args.rows, c), 1)) : A(0);
    for (int64_t d = 0; d < dim; ++d) {
      const int64_t i = c * dim + d;
      const A b = sums[c * 2 * dim + d], a = sums[(c * 2 + 1) * dim + d] * args.rstd[i];
      args.grad_norm_bias[i] = args.weight[i] * b;
      args.grad_norm_weight[i] = args.weight[i] * a;
      args.grad_weight[i] = args.norm_weight[i] * a + args.norm_bias[i] * b;
      factor[i] = scale[i] * args.weight[i];
      shift[i] = -factor[i] * b * share;
      tilt[i] = -factor[i] * a * share * args.rstd[i];
    }
  }
  for_blocks(blocks, [&](int64_t, const Block& block) {
    cpu::RowBuffer<T> buffer(dim);
    const auto norm = norm_of(args, scale, block.c);
    const int64_t at = block.c * dim;
    for (int64_t i = block.begin; i < block.end; ++i) {
      T* const out = args.grad_hidden + i * dim;
      kernels.leaky_backward(buffer.read(args.hidden + i * dim), norm, args.grad_score[i], factor.data() + at,
                             shift.data() + at, tilt.data() + at, dim, buffer.target(out));
      buffer.write(out);
    }
  });
}

#define INSTANTIATE(T)                                                 \
  template void selector_statistics_cpu(const SelectorStatistics<T>&); \
  template void selector_cpu(const Selector<T>&);                      \
  template void selector_backward_cpu(const Selector<T>&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(c10::BFloat16)
INSTANTIATE(c10::Half)

}  // namespace pixcontrast
