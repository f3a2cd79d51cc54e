// Weighted mean unit row of each class of a memory, and the gradient of its weights: one read of the memory each.

#include <cmath>
#include <vector>

#include "class_mean/class_mean.h"
#include "common/cpu/work.h"

namespace pixcontrast {
namespace {

constexpr int64_t kBlock = 128;  // rows that one task sums up
constexpr int64_t kAtOnce = 4;   // of them, read and then added together

template <class T>
int64_t valid_rows(const ClassMean<T>& args, int64_t c) {
  return std::clamp<int64_t>(args.counts[c], 0, args.capacity);
}

// v_j [C, N] of the valid rows; sigma(b_j) over its sum, see RowKernels::score for the shift.
template <class T>
std::vector<Acc<T>> shares(const ClassMean<T>& args) {
  using A = Acc<T>;
  std::vector<A> share(args.classes * args.capacity);
  constexpr int64_t least = 1 << 14;  // rows that are worth waking a thread for
  cpu::Pieces(args.classes, args.classes, least / args.capacity + 1).run([&](int64_t, int64_t begin, int64_t end) {
    std::vector<A> shift(args.capacity);
    for (int64_t c = begin; c < end; ++c) {
      const int64_t count = valid_rows(args, c);
      A* row = share.data() + c * args.capacity;
      if (args.weight_logits == nullptr) {
        std::fill_n(row, count, A(1) / A(count));
        continue;
      }
      const A* logit = args.weight_logits + c * args.capacity;
      A largest = -INFINITY;
      for (int64_t j = 0; j < count; ++j) largest = std::max(largest, logit[j]);
      std::fill_n(shift.data(), count, std::min(largest, A(0)));
      cpu::row_kernels<A>().score(logit, shift.data(), count, row);
      A total = 0;
      for (int64_t j = 0; j < count; ++j) total += row[j];
      for (int64_t j = 0; j < count; ++j) row[j] /= total;
    }
  });
  return share;
}

}  // namespace

template <class T>
void class_mean_cpu(const ClassMean<T>& args) {
  using A = Acc<T>;
  if (args.classes * args.capacity == 0) {
    std::fill_n(args.mean, args.classes * args.dim, A(0));
    return;
  }
  const auto& kernels = cpu::row_kernels<A>();
  const auto share = shares(args);
  const int64_t blocks = (args.capacity + kBlock - 1) / kBlock;
  std::vector<A> partial(args.classes * blocks * args.dim);  // [C, blocks, D]
  cpu::Pieces(args.classes * blocks, args.classes * blocks, 1).run([&](int64_t task, int64_t, int64_t) {
    const int64_t c = task / blocks, first = task % blocks * kBlock;
    const int64_t last = std::min(first + kBlock, valid_rows(args, c));
    cpu::RowBuffer<T> buffer(kAtOnce * args.dim);
    for (int64_t j = first; j < last; j += kAtOnce) {
      const int64_t count = std::min(kAtOnce, last - j), at = c * args.capacity + j;
      const A* const rows = buffer.read(args.queue + at * args.dim, count * args.dim);
      kernels.add_unit_rows(rows, share.data() + at, count, args.dim, A(kNormFloor), partial.data() + task * args.dim);
    }
  });
  for (int64_t c = 0; c < args.classes; ++c) {
    A* mean = args.mean + c * args.dim;
    std::copy_n(partial.data() + c * blocks * args.dim, args.dim, mean);
    for (int64_t b = 1; b < blocks; ++b) {
      kernels.accumulate(A(1), partial.data() + (c * blocks + b) * args.dim, args.dim, mean);
    }
  }
}

// dLoss/db_j = v_j (1 - sigma(b_j)) (g_j - sum_k v_k g_k) with g_j = <G_c, z_j/|z_j|>, G = dLoss/dm
template <class T>
void class_mean_backward_cpu(const ClassMean<T>& args) {
  using A = Acc<T>;
  if (args.classes * args.capacity == 0) return;
  const auto& kernels = cpu::row_kernels<A>();
  const auto share = shares(args);
  const int64_t blocks = (args.capacity + kBlock - 1) / kBlock;
  cpu::Pieces(args.classes * blocks, args.classes * blocks, 1).run([&](int64_t task, int64_t, int64_t) {
    const int64_t c = task / blocks, first = task % blocks * kBlock;
    const int64_t last = std::min(first + kBlock, valid_rows(args, c));
    cpu::RowBuffer<T> buffer(args.dim);
    for (int64_t j = first; j < last; ++j) {
      const A* row = buffer.read(args.queue + (c * args.capacity + j) * args.dim);
      A square, product;
      kernels.square_and_dot(row, args.grad_mean + c * args.dim, args.dim, &square, &product);
      const A inverse = inverse_norm(square);
      args.grad_weight_logits[c * args.capacity + j] = inverse == 0 ? A(0) : product * inverse;  // g_j
    }
  });
  cpu::Pieces(args.classes, args.classes, 1).run([&](int64_t c, int64_t, int64_t) {
    const int64_t count = valid_rows(args, c);
    A* const grad = args.grad_weight_logits + c * args.capacity;
    const A* const v = share.data() + c * args.capacity;
    std::vector<A> minus_logit(count), rest(count);  // rest = 1 - sigma(b) = sigma(-b)
    double mean = 0;
    for (int64_t j = 0; j < count; ++j) {
      mean += static_cast<double>(v[j]) * grad[j];
      minus_logit[j] = -args.weight_logits[c * args.capacity + j];
    }
    kernels.score(minus_logit.data(), nullptr, count, rest.data());
    for (int64_t j = 0; j < count; ++j) grad[j] = v[j] * rest[j] * static_cast<A>(grad[j] - mean);
    std::fill(grad + count, grad + args.capacity, A(0));
  });
}

#define INSTANTIATE(T)                               \
  template void class_mean_cpu(const ClassMean<T>&); \
  template void class_mean_backward_cpu(const ClassMean<T>&);
CPU_FOR_DTYPES(INSTANTIATE)

}  // namespace pixcontrast
