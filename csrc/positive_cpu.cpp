// Loss and all gradients of the positive objective in one pass over the features: each row is read once, and its
// gradient is written while it is still in the cache.
//
//   fh_i = f_i/|f_i|,  cos_i = <fh_i, m_c>,  S_c = sum_i w_i cos_i,  L_c = 1 - S_c,  s = loss_weight / C
//   dLoss/df_i = -s w_i (m_c - cos_i fh_i) / |f_i|
//   dLoss/da_i =  s w_i (1 - sigma(a_i)) (S_c - cos_i)
//   dLoss/dm_c = -s sum_i w_i fh_i
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/row_kernels.h"
#include "cpu/rows.h"
#include "positive.h"

namespace pixcontrast {
namespace {

constexpr int64_t kMostPieces = 64, kLeastPixels = 64;
// Gradients at least this large go past the caches, which cannot hold them beside the features: a quarter less time at
// 21125 x 256 float32 (21.6 MB) on a Zen 3 with 32 MB of L3.
constexpr int64_t kStreamedBytes = int64_t{16} << 20;

template <class T>
class PositiveCpu {
  using A = Acc<T>;

 public:
  explicit PositiveCpu(const Positive<T>& args)
      : args_(args),
        kernels_(cpu::row_kernels<A>()),
        classes_(args.classes),
        dim_(args.layout.dim),
        scale_(static_cast<A>(args.loss_weight / static_cast<double>(args.classes))),
        stream_(cpu::RowBuffer<T>::in_place && args.layout.map_pixels == 0 &&
                args.layout.pixels * args.layout.dim * static_cast<int64_t>(sizeof(T)) >= kStreamedBytes),
        // The sums for dLoss/dm take C*D numbers a piece; together they stay below an eighth of the features.
        pieces_(args.layout.pixels,
                args.grad_mean ? std::min(kMostPieces, args.layout.pixels / (8 * classes_)) : kMostPieces,
                kLeastPixels),
        factor_(classes_),
        score_(args.weights ? args.layout.pixels : 0),
        cosine_(args.grad_weights ? args.layout.pixels : 0),
        similarity_(pieces_.count * classes_),
        mean_sum_(args.grad_mean ? pieces_.count * classes_ * dim_ : 0) {}

  void run() {
    const auto largest = count();
    weigh(largest);
    pieces_.run([&](int64_t piece, int64_t begin, int64_t end) {
      args_.layout.map_pixels ? contrast_maps(piece, begin, end) : contrast_rows(piece, begin, end);
      if (stream_) cpu::fence();
    });
    finish_loss();
    if (args_.grad_weights) finish_weights();
    if (args_.grad_mean) finish_mean();
  }

 private:
  bool known(int64_t label) const { return label >= 0 && label < classes_ && label != args_.ignore_index; }

  // Pixels of each class and labels that are wrong; returns the largest logit of each class.
  std::vector<A> count() {
    std::vector<int64_t> pixels(pieces_.count * classes_), unknown(pieces_.count);
    std::vector<A> largest(args_.weights ? pieces_.count * classes_ : 0, -INFINITY);
    pieces_.run([&](int64_t piece, int64_t begin, int64_t end) {
      int64_t* mine = pixels.data() + piece * classes_;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t c = args_.labels[i];
        if (!known(c)) {
          unknown[piece] += c != args_.ignore_index;
          continue;
        }
        ++mine[c];
        if (args_.weights) {
          A& top = largest[piece * classes_ + c];
          top = std::max(top, args_.weights[i]);
        }
      }
    });
    *args_.unknown = 0;
    std::fill_n(args_.pixels, classes_, 0);
    std::vector<A> top(largest.empty() ? 0 : classes_, -INFINITY);
    for (int64_t piece = 0; piece < pieces_.count; ++piece) {
      *args_.unknown += unknown[piece];
      for (int64_t c = 0; c < classes_; ++c) {
        args_.pixels[c] += pixels[piece * classes_ + c];
        if (!top.empty()) top[c] = std::max(top[c], largest[piece * classes_ + c]);
      }
    }
    return top;
  }

  // w_i = score_[i] * factor_[c]: factor_ is 0 for classes that take no part, else one over the sum of their scores.
  void weigh(const std::vector<A>& largest) {
    std::vector<double> total(args_.weights ? pieces_.count * classes_ : 0);
    if (args_.weights) {
      pieces_.run([&](int64_t piece, int64_t begin, int64_t end) {
        std::vector<A> shift(end - begin);
        for (int64_t i = begin; i < end; ++i) {
          if (known(args_.labels[i])) shift[i - begin] = std::min(largest[args_.labels[i]], A(0));
        }
        kernels_.score(args_.weights + begin, shift.data(), end - begin, score_.data() + begin);
        for (int64_t i = begin; i < end; ++i) {
          if (known(args_.labels[i])) total[piece * classes_ + args_.labels[i]] += score_[i];
        }
      });
    }
    for (int64_t c = 0; c < classes_; ++c) {
      double sum = args_.weights ? 0 : static_cast<double>(args_.pixels[c]);
      for (int64_t piece = 0; args_.weights && piece < pieces_.count; ++piece) sum += total[piece * classes_ + c];
      const bool active = args_.pixels[c] >= kMinRows && args_.memory_counts[c] >= kMinRows;
      factor_[c] = active ? static_cast<A>(1 / sum) : A(0);
    }
  }

  A share(int64_t i, int64_t c) const { return score_.empty() ? factor_[c] : score_[i] * factor_[c]; }
  bool active(int64_t i) const { return known(args_.labels[i]) && factor_[args_.labels[i]] != 0; }

  // One active pixel: x [D] is its row; its gradient goes to out [D] (which may be x) unless that is null.
  void contrast(int64_t piece, int64_t i, const A* x, A* out) {
    const int64_t c = args_.labels[i];
    const A* mean = args_.mean + c * dim_;
    A square, product;
    kernels_.square_and_dot(x, mean, dim_, &square, &product);
    const A norm = std::sqrt(square), weight = share(i, c);
    const bool zero = norm < A(kNormFloor);
    const A inverse = zero ? A(0) : 1 / norm, cosine = product * inverse;
    similarity_[piece * classes_ + c] += weight * cosine;
    if (args_.grad_weights) cosine_[i] = cosine;
    A* const sum = args_.grad_mean ? mean_sum_.data() + (piece * classes_ + c) * dim_ : nullptr;
    if (zero) {
      if (out) std::fill_n(out, dim_, A(0));
    } else if (out) {
      const A towards = -scale_ * weight * inverse;
      kernels_.combine(towards, mean, -towards * cosine * inverse, x, dim_, stream_, out, weight * inverse, sum);
    } else if (sum) {
      kernels_.accumulate(weight * inverse, x, dim_, sum);
    }
  }

  void contrast_rows(int64_t piece, int64_t begin, int64_t end) {
    cpu::RowBuffer<T> buffer(dim_);
    for (int64_t i = begin; i < end; ++i) {
      T* grad = args_.grad_features ? args_.grad_features + i * dim_ : nullptr;
      if (active(i)) {
        const A* x = buffer.read(args_.features + i * dim_);
        contrast(piece, i, x, grad ? buffer.target(grad) : nullptr);
        if (grad) buffer.write(grad);
      } else if (grad) {
        std::fill_n(grad, dim_, T(0));
      }
    }
  }

  void contrast_maps(int64_t piece, int64_t begin, int64_t end) {
    const int64_t map_pixels = args_.layout.map_pixels;
    cpu::PixelTile<T> tile(dim_);
    for (int64_t first = begin; first < end;) {
      const int64_t image = first / map_pixels, inside = first % map_pixels;
      const int64_t count = std::min({tile.width, end - first, map_pixels - inside});
      const int64_t offset = image * dim_ * map_pixels + inside;
      tile.read(args_.features + offset, map_pixels, count);
      for (int64_t p = 0; p < count; ++p) {
        if (active(first + p)) {
          contrast(piece, first + p, tile.row(p), args_.grad_features ? tile.row(p) : nullptr);
        } else {
          std::fill_n(tile.row(p), dim_, A(0));
        }
      }
      if (args_.grad_features) tile.write(args_.grad_features + offset, map_pixels, count);
      first += count;
    }
  }

  // Leaves S_c in the first piece's sums.
  void finish_loss() {
    double loss = 0;
    for (int64_t c = 0; c < classes_; ++c) {
      for (int64_t piece = 1; piece < pieces_.count; ++piece) similarity_[c] += similarity_[piece * classes_ + c];
      const double class_loss = factor_[c] != 0 ? 1 - similarity_[c] : 0;
      args_.class_loss[c] = static_cast<A>(class_loss);
      loss += class_loss;
    }
    *args_.loss = static_cast<A>(loss * args_.loss_weight / static_cast<double>(classes_));
  }

  void finish_weights() {
    pieces_.run([&](int64_t, int64_t begin, int64_t end) {
      std::vector<A> minus_logit(end - begin), rest(end - begin);  // rest = 1 - sigma(a) = sigma(-a)
      const std::vector<A> zero(end - begin);
      for (int64_t i = begin; i < end; ++i) minus_logit[i - begin] = -args_.weights[i];
      kernels_.score(minus_logit.data(), zero.data(), end - begin, rest.data());
      for (int64_t i = begin; i < end; ++i) {
        const int64_t c = args_.labels[i];
        args_.grad_weights[i] =
            active(i) ? scale_ * share(i, c) * rest[i - begin] * static_cast<A>(similarity_[c] - cosine_[i]) : A(0);
      }
    });
  }

  void finish_mean() {
    const int64_t numbers = classes_ * dim_;
    std::fill_n(args_.grad_mean, numbers, A(0));
    for (int64_t piece = 0; piece < pieces_.count; ++piece) {
      kernels_.accumulate(-scale_, mean_sum_.data() + piece * numbers, numbers, args_.grad_mean);
    }
  }

  const Positive<T>& args_;
  const cpu::RowKernels<A>& kernels_;
  const int64_t classes_, dim_;
  const A scale_;
  const bool stream_;
  const cpu::Pieces pieces_;
  std::vector<A> factor_;           // [C]
  std::vector<A> score_;            // [P] with weights
  std::vector<A> cosine_;           // [P] for dLoss/da
  std::vector<double> similarity_;  // [pieces, C] sums of w_i cos_i
  std::vector<A> mean_sum_;         // [pieces, C, D] for dLoss/dm
};

}  // namespace

template <class T>
void positive_cpu(const Positive<T>& args) {
  PositiveCpu<T>(args).run();
}

template void positive_cpu(const Positive<float>&);
template void positive_cpu(const Positive<double>&);
template void positive_cpu(const Positive<c10::BFloat16>&);
template void positive_cpu(const Positive<c10::Half>&);

}  // namespace pixcontrast
