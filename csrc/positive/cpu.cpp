// Loss and all gradients of the positive objective in one pass over the features: each row is read once, and its
// gradient is written while it is still in the cache.
//
//   fh_i = f_i/|f_i|,  cos_i = <fh_i, m_c>,  S_c = sum_i w_i cos_i,  L_c = 1 - S_c,  s = loss_weight / C
//   dLoss/df_i = -s w_i (m_c - cos_i fh_i) / |f_i|
//   dLoss/da_i =  s w_i (1 - sigma(a_i)) (S_c - cos_i)
//   dLoss/dm_c = -s sum_i w_i fh_i

#include <cmath>
#include <memory>
#include <vector>

#include "common/cpu/work.h"
#include "positive/positive.h"

namespace pixcontrast {
namespace {

constexpr int64_t kMostPieces = 32, kLeastPixels = 64;
// Gradients at least this large go past the caches, which cannot hold them beside the features: a quarter less time at
// 21125 x 256 float32 (21.6 MB) on a Zen 3 with 32 MB of L3.
constexpr int64_t kStreamedBytes = int64_t{16} << 20;

template <class T>
class PositiveCpu {
  using A = Acc<T>;
  using Grad = cpu::GradOf<T>;

 public:
  explicit PositiveCpu(const Positive<T>& args)
      : args_(args),
        kernels_(cpu::row_kernels<A>()),
        classes_(args.classes),
        dim_(args.layout.dim),
        grad_features_(static_cast<Grad*>(args.grad_features)),
        scale_(static_cast<A>(args.loss_weight / static_cast<double>(args.classes))),
        stream_(cpu::RowBuffer<Grad>::in_place && args.layout.map_pixels == 0 &&
                args.layout.pixels * args.layout.dim * static_cast<int64_t>(sizeof(Grad)) >= kStreamedBytes),
        // The sums for dLoss/dm take C*D elements a piece; together they stay below an eighth of the features.
        pieces_(args.layout.pixels,
                args.grad_mean ? std::min(kMostPieces, args.layout.pixels / (8 * classes_)) : kMostPieces,
                kLeastPixels),
        class_(args.layout.pixels),
        factor_(classes_),
        score_(args.weight_logits ? args.layout.pixels : 0),
        cosine_(args.grad_weight_logits ? args.layout.pixels : 0),
        similarity_(pieces_.count * classes_),
        mean_sum_(args.grad_mean ? new A[pieces_.count * classes_ * dim_] : nullptr) {}

  void run() {
    weigh();
    pieces_.run([&](int64_t piece, int64_t begin, int64_t end) {
      if (mean_sum_) std::fill_n(mean_sum_.get() + piece * classes_ * dim_, classes_ * dim_, A(0));
      args_.layout.map_pixels ? contrast_maps(piece, begin, end) : contrast_rows(piece, begin, end);
      if (stream_) cpu::fence();
    });
    finish_loss();
    if (args_.grad_weight_logits) finish_weights();
    if (args_.grad_mean) finish_mean();
  }

 private:
  // Class of each pixel (-1: none), pixels of each class, labels that are wrong, and with weights the scores
  // w_i = score_[i] * factor_[c], where factor_ is 0 for classes that take no part, else one over the sum of their
  // scores.
  void weigh() {
    const int64_t elements = pieces_.count * classes_;
    std::vector<int64_t> pixels(elements), unknown(pieces_.count);
    std::vector<A> largest(args_.weight_logits ? elements : 0, -INFINITY);
    std::vector<double> total(elements);
    pieces_.run([&](int64_t piece, int64_t begin, int64_t end) {
      unknown[piece] = classify(begin, end, pixels.data() + piece * classes_, largest.data() + piece * classes_);
      if (!args_.weight_logits) return;
      kernels_.score(args_.weight_logits + begin, nullptr, end - begin, score_.data() + begin);
      sum_scores(begin, end, total.data() + piece * classes_);
    });
    *args_.unknown = 0;
    std::vector<A> shift(classes_);
    bool shifted = false;
    for (int64_t c = 0; c < classes_; ++c) {
      args_.counts[c] = 0;
      A top = -INFINITY;
      for (int64_t piece = 0; piece < pieces_.count; ++piece) {
        args_.counts[c] += pixels[piece * classes_ + c];
        if (args_.weight_logits) top = std::max(top, largest[piece * classes_ + c]);
      }
      shift[c] = args_.weight_logits && args_.counts[c] > 0 ? std::min(top, A(0)) : A(0);
      shifted = shifted || shift[c] < 0;
    }
    for (const int64_t count : unknown) *args_.unknown += count;
    if (shifted) {  // a class all of whose logits are below zero: its scores might underflow together
      std::fill(total.begin(), total.end(), 0.0);
      pieces_.run([&](int64_t piece, int64_t begin, int64_t end) {
        std::vector<A> shift_of(end - begin);
        for (int64_t i = begin; i < end; ++i) shift_of[i - begin] = class_[i] >= 0 ? shift[class_[i]] : A(0);
        kernels_.score(args_.weight_logits + begin, shift_of.data(), end - begin, score_.data() + begin);
        sum_scores(begin, end, total.data() + piece * classes_);
      });
    }
    for (int64_t c = 0; c < classes_; ++c) {
      double sum = args_.weight_logits ? 0 : static_cast<double>(args_.counts[c]);
      for (int64_t piece = 0; piece < pieces_.count; ++piece) sum += total[piece * classes_ + c];
      const bool active = args_.counts[c] >= kMinRows && args_.memory_counts[c] >= kMinRows;
      factor_[c] = active ? static_cast<A>(1 / sum) : A(0);
    }
  }

  // The loops over labels copy what they need: the compiler cannot know that writing a result changes no member.

  int64_t classify(int64_t begin, int64_t end, int64_t* pixels, A* largest) {
    const int64_t* const labels = args_.labels;
    const A* const logits = args_.weight_logits;
    const int64_t classes = classes_, ignored = args_.ignore_index;
    int32_t* const class_of = class_.data();
    int64_t wrong = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c = labels[i];
      const bool known = static_cast<uint64_t>(c) < static_cast<uint64_t>(classes) && c != ignored;
      class_of[i] = known ? static_cast<int32_t>(c) : -1;
      wrong += !known && c != ignored;
      if (!known) continue;
      ++pixels[c];
      if (logits) largest[c] = std::max(largest[c], logits[i]);
    }
    return wrong;
  }

  void sum_scores(int64_t begin, int64_t end, double* total) {
    const int32_t* const class_of = class_.data();
    const A* const score = score_.data();
    for (int64_t i = begin; i < end; ++i) {
      if (class_of[i] >= 0) total[class_of[i]] += score[i];
    }
  }

  A share(int64_t i, int64_t c) const { return score_.empty() ? factor_[c] : score_[i] * factor_[c]; }
  bool active(int64_t i) const { return class_[i] >= 0 && factor_[class_[i]] != 0; }

  // An active pixel between its two sweeps.
  struct Row {
    int64_t pixel;
    const A* x;  // [D]
    A inverse;   // 1/|f|, 0 for a zero row
    A weight, cosine;
  };

  Row look(int64_t piece, int64_t i, const A* x) {
    const int64_t c = class_[i];
    A square, product;
    kernels_.square_and_dot(x, args_.mean + c * dim_, dim_, &square, &product);
    const A inverse = inverse_norm(square);
    const Row row{i, x, inverse, share(i, c), product * inverse};
    similarity_[piece * classes_ + c] += row.weight * row.cosine;
    if (args_.grad_weight_logits) cosine_[i] = row.cosine;
    return row;
  }

  // The gradient of the row goes to out [D] (which may be its x) unless that is null.
  void pull(int64_t piece, const Row& row, A* out) {
    const int64_t c = class_[row.pixel];
    A* const sum = mean_sum_ ? mean_sum_.get() + (piece * classes_ + c) * dim_ : nullptr;
    const A share = row.weight * row.inverse, towards = -scale_ * share, along = -towards * row.cosine * row.inverse;
    if (row.inverse == 0) {
      if (out) std::fill_n(out, dim_, A(0));
    } else if (out) {
      kernels_.combine(towards, args_.mean + c * dim_, along, row.x, dim_, stream_, out, share, sum);
    } else if (sum) {
      kernels_.accumulate(share, row.x, dim_, sum);
    }
  }

  // First sweeps of a few rows, then their second ones: the square roots and divisions of the one row then run while
  // the next is read.
  void contrast_rows(int64_t piece, int64_t begin, int64_t end) {
    constexpr int64_t most = 4;
    std::vector<cpu::RowBuffer<T>> buffers(most, cpu::RowBuffer<T>(dim_));
    cpu::RowBuffer<Grad> result(dim_);
    Row rows[most];
    for (int64_t first = begin; first < end; first += most) {
      int64_t count = 0;
      for (int64_t i = first; i < std::min(first + most, end); ++i) {
        if (active(i)) {
          rows[count] = look(piece, i, buffers[count].read(args_.features + i * dim_));
          ++count;
        } else if (grad_features_) {
          std::fill_n(grad_features_ + i * dim_, dim_, Grad(0));
        }
      }
      for (int64_t r = 0; r < count; ++r) {
        Grad* const grad = grad_features_ ? grad_features_ + rows[r].pixel * dim_ : nullptr;
        pull(piece, rows[r], grad ? result.target(grad) : nullptr);
        if (grad) result.write(grad);
      }
    }
  }

  void contrast_maps(int64_t piece, int64_t begin, int64_t end) {
    const int64_t map_pixels = args_.layout.map_pixels;
    cpu::PixelTile<T> tile(dim_);
    Row rows[cpu::PixelTile<T>::width];
    for (int64_t first = begin; first < end;) {
      const int64_t image = first / map_pixels, inside = first % map_pixels;
      const int64_t count = std::min({tile.width, end - first, map_pixels - inside});
      const int64_t offset = image * dim_ * map_pixels + inside;
      tile.read(args_.features + offset, map_pixels, count);
      int64_t used = 0;
      for (int64_t p = 0; p < count; ++p) {
        if (active(first + p)) {
          rows[used++] = look(piece, first + p, tile.row(p));
        } else {
          std::fill_n(tile.row(p), dim_, A(0));
        }
      }
      for (int64_t r = 0; r < used; ++r) {
        pull(piece, rows[r], grad_features_ ? tile.row(rows[r].pixel - first) : nullptr);
      }
      if (grad_features_) tile.write(grad_features_ + offset, map_pixels, count);
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
      for (int64_t i = begin; i < end; ++i) minus_logit[i - begin] = -args_.weight_logits[i];
      kernels_.score(minus_logit.data(), nullptr, end - begin, rest.data());
      for (int64_t i = begin; i < end; ++i) {
        const int64_t c = class_[i];
        args_.grad_weight_logits[i] =
            active(i) ? scale_ * share(i, c) * rest[i - begin] * static_cast<A>(similarity_[c] - cosine_[i]) : A(0);
      }
    });
  }

  void finish_mean() {
    const int64_t elements = classes_ * dim_;
    cpu::Pieces(elements, kMostPieces, 256).run([&](int64_t, int64_t begin, int64_t end) {
      std::fill(args_.grad_mean + begin, args_.grad_mean + end, A(0));
      for (int64_t piece = 0; piece < pieces_.count; ++piece) {
        const A* const sum = mean_sum_.get() + piece * elements;
        kernels_.accumulate(-scale_, sum + begin, end - begin, args_.grad_mean + begin);
      }
    });
  }

  const Positive<T>& args_;
  const cpu::RowKernels<A>& kernels_;
  const int64_t classes_, dim_;
  Grad* const grad_features_;
  const A scale_;
  const bool stream_;
  const cpu::Pieces pieces_;
  std::vector<int32_t> class_;      // [P] class of the pixel, -1 for none
  std::vector<A> factor_;           // [C]
  std::vector<A> score_;            // [P] with weights
  std::vector<A> cosine_;           // [P] for dLoss/da
  std::vector<double> similarity_;  // [pieces, C] sums of w_i cos_i
  std::unique_ptr<A[]> mean_sum_;   // [pieces, C, D] for dLoss/dm, set to zero by each piece
};

}  // namespace

template <class T>
void positive_cpu(const Positive<T>& args) {
  PositiveCpu<T>(args).run();
}

#define INSTANTIATE(T) template void positive_cpu(const Positive<T>&);
CPU_FOR_DTYPES(INSTANTIATE)

}  // namespace pixcontrast
