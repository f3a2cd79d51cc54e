// Anchors against queues, as in flash attention: keys are streamed in tiles, so nothing is stored for a pair of anchor
// and key. Negatives come first, with an online softmax; then each anchor's own class, when lse is known. Loss and
// gradient come out of the one stream: two products of anchors and keys each (gemm_qk, gemm_pv).
//
// Threads share nothing while they stream: tasks are blocks of anchors times splits of the keys, and the sums of the
// splits are added in a fixed order.

#include <cmath>

#include "infonce/cpu.h"

namespace pixcontrast {
namespace {

constexpr int64_t kBlockAnchors = 8 * kPanelAnchors;  // of a task
constexpr int64_t kMaxSplits = 32;
constexpr int64_t kSumElements = 1 << 21;  // in the key sums of all splits: 8 MiB of float32, twice

// The columns of a panel that hold some of its anchors: whole groups of kColumnStep.
struct Columns {
  explicit Columns(Range anchors)
      : first(anchors.begin / cpu::kColumnStep * cpu::kColumnStep), count(cpu::padded(anchors.end) - first) {}
  int64_t first, count;
};

// What is summed for each anchor over one split of the keys: [V].
template <class A>
struct Sums {
  explicit Sums(int64_t anchors)
      : row_max(anchors, -INFINITY), sum_exp(anchors), weights(anchors), softplus(anchors), sigmoids(anchors) {}

  std::vector<A> row_max;   // of z over the negatives
  std::vector<A> sum_exp;   // sum over the negatives of e^(z - row_max)
  std::vector<A> weights;   // the same of the rounded elements that gemm_pv takes
  std::vector<A> softplus;  // sum over the positives of l_ij - z_ij
  std::vector<A> sigmoids;  // sum over the positives of s_ij, rounded likewise
};

template <class A>
class Stream {
 public:
  explicit Stream(SortedAnchors<A>& anchors)
      : anchors_(anchors),
        args_(anchors.args),
        gradient_(args_.grad_features != nullptr),
        width_(cpu::padded(anchors.dim)),
        splits_(std::clamp<int64_t>(kSumElements / std::max<int64_t>(anchors.count * width_, 1), 1, kMaxSplits)),
        class_keys_(args_.classes),
        sums_(splits_, Sums<A>(anchors.count)) {
    bf16_ = cpu::has_bf16() && args_.dtype == Dtype::kBFloat16;
    for (int q = 0; q < args_.queues; ++q) bf16_ = bf16_ && args_.queue[q].dtype == Dtype::kBFloat16;
    for_segments([&](const InfoNCEQueue&, int64_t c, int64_t valid) { class_keys_[c] += valid, keys_ += valid; });
    if (bf16_) {
      bf16_panels_ = panels_of<c10::BFloat16, 2>(anchors.rows, anchors.count, anchors.dim);
    } else {
      panels_ = panels_of<A, 1>(anchors.rows, anchors.count, anchors.dim);
    }
    if (!gradient_) return;
    negative_sums_.resize(splits_ * anchors.count * width_);
    positive_sums_.resize(splits_ * anchors.count * width_);
  }

  void run() {
    for_tasks([&](Range block, int64_t split) { stream_negatives(block, split); });
    for_anchors([&](int64_t i) { merge_negatives(i); });
    for_tasks([&](Range block, int64_t split) { stream_positives(block, split); });
    merge_positives();
  }

 private:
  // ---- the work of a task

  template <class Body>
  void for_anchors(const Body& body) const {
    at::parallel_for(0, anchors_.count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    });
  }

  // body(block of anchors, split)
  template <class Body>
  void for_tasks(const Body& body) const {
    const int64_t blocks = (anchors_.count + kBlockAnchors - 1) / kBlockAnchors;
    at::parallel_for(0, blocks * splits_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task / splits_ * kBlockAnchors;
        body(Range{first, std::min(first + kBlockAnchors, anchors_.count)}, task % splits_);
      }
    });
  }

  // body(queue, class, valid rows) for the rows of each class of each queue
  template <class Body>
  void for_segments(const Body& body) const {
    for (int q = 0; q < args_.queues; ++q) {
      const InfoNCEQueue& queue = args_.queue[q];
      for (int64_t c = 0; c < args_.classes; ++c) {
        body(queue, c, std::clamp<int64_t>(queue.counts[c], 0, queue.capacity));
      }
    }
  }

  // body(load the tile, class, position of its first key among the keys of its class) for the tiles of one split
  template <class Body>
  void for_tiles(int64_t split, KeyTile<A>& tile, const Body& body) const {
    const Range own{keys_ * split / splits_, keys_ * (split + 1) / splits_};
    std::vector<int64_t> before(args_.classes);
    int64_t passed = 0;
    for_segments([&](const InfoNCEQueue& queue, int64_t c, int64_t valid) {
      const int64_t end = std::min(own.end - passed, valid), size = queue.dtype == Dtype::kDouble  ? 8
                                                                    : queue.dtype == Dtype::kFloat ? 4
                                                                                                   : 2;
      for (int64_t first = std::max<int64_t>(own.begin - passed, 0); first < end; first += tile.capacity()) {
        const auto* const rows =
            static_cast<const char*>(queue.rows) + (c * queue.capacity + first) * args_.layout.dim * size;
        body([&] { tile.load(rows, queue.dtype, std::min(tile.capacity(), end - first)); }, c, before[c] + first);
      }
      before[c] += valid;
      passed += valid;
    });
  }

  // body(panel, the anchor in its first column, its anchors among those of a range, counted from there)
  template <class Body>
  void for_panels(Range anchors, const Body& body) const {
    for (int64_t i = anchors.begin; i < anchors.end;) {
      const int64_t start = i / kPanelAnchors * kPanelAnchors, end = std::min(start + kPanelAnchors, anchors.end);
      const void* const panel = bf16_ ? static_cast<const void*>(bf16_panels_.data() + start * width_)
                                      : static_cast<const void*>(panels_.data() + start * width_);
      body(panel, start, Range{i - start, end - start});
      i = end;
    }
  }

  A* sum_of(std::vector<A>& sums, int64_t split, int64_t anchor) const {
    return sums.data() + (split * anchors_.count + anchor) * width_;
  }

  // ---- negatives

  // The anchors of a panel before and behind those of the keys' own class.
  struct Sides {
    Range before, behind;

    bool empty() const { return before.size() + behind.size() == 0; }
    Columns columns() const {
      return Columns({before.size() ? before.begin : behind.begin, behind.size() ? behind.end : before.end});
    }
    template <class Body>
    void for_each(const Body& body) const {
      for (const Range side : {before, behind}) {
        for (int64_t k = side.begin; k < side.end; ++k) body(k);
      }
    }
  };

  void stream_negatives(Range block, int64_t split) {
    KeyTile<A> tile(anchors_.dim, bf16_);
    for_tiles(split, tile, [&](const auto& load, int64_t c, int64_t) {
      Range own = anchors_.of_class(c);
      if (own.size() == 0) own = {anchors_.count, anchors_.count};
      if (intersect(own, block).size() == block.size()) return;
      load();
      for_panels(block, [&](const void* panel, int64_t start, Range anchors) {
        const Sides sides{intersect(anchors, {0, own.begin - start}),
                          intersect(anchors, {own.end - start, kPanelAnchors})};
        if (sides.empty()) return;
        const Columns columns = sides.columns();
        tile.gemm_qk(panel, columns.first, columns.count);
        online_softmax(tile, start, sides, split);
        if (!gradient_) return;
        for (const Range side : {sides.before, sides.behind}) {
          if (side.size()) {
            tile.gemm_pv(side.begin, side.size(), sum_of(negative_sums_, split, start + side.begin));
          }
        }
      });
    });
  }

  // z of some anchors of a panel become e^(z/T - row_max); sums under a smaller maximum are rescaled.
  void online_softmax(KeyTile<A>& tile, int64_t start, const Sides& sides, int64_t split) {
    const auto [first, count] = sides.columns();
    const A inverse = anchors_.inverse_temperature;
    A* const z = tile.z(first);
    A shift[kPanelAnchors], sum_exp[kPanelAnchors] = {}, weights[kPanelAnchors] = {};
    kernels_.column_largest(z, tile.size(), kPanelAnchors, count, shift + first);
    for (int64_t k = first; k < first + count; ++k) shift[k] *= inverse;
    Sums<A>& sums = sums_[split];
    sides.for_each([&](int64_t k) {
      A& row_max = sums.row_max[start + k];
      if (shift[k] > row_max) rescale(start + k, std::exp(row_max - shift[k]), split);
      shift[k] = row_max = std::max(row_max, shift[k]);
    });
    kernels_.column_exponentials(z, tile.size(), kPanelAnchors, count, inverse, shift + first, sum_exp + first);
    const bool rounds = bf16_ && gradient_;
    if (rounds) tile.round(first, count, weights + first);
    sides.for_each([&](int64_t k) {
      sums.sum_exp[start + k] += sum_exp[k];
      sums.weights[start + k] += rounds ? weights[k] : sum_exp[k];
    });
  }

  void rescale(int64_t i, A scale, int64_t split) {
    Sums<A>& sums = sums_[split];
    if (sums.sum_exp[i] == 0) return;
    sums.sum_exp[i] *= scale;
    sums.weights[i] *= scale;
    if (!gradient_) return;
    A* const row = sum_of(negative_sums_, split, i);
    rows_.combine(A(0), row, scale, row, width_, false, row, A(0), nullptr);
  }

  // The sums of all splits under the one maximum go to the first split's place; row_max and sum_exp to every split's.
  void merge_negatives(int64_t i) {
    A row_max = -INFINITY, sum_exp = 0, weights = 0;
    for (const Sums<A>& sums : sums_) row_max = std::max(row_max, sums.row_max[i]);
    for (int64_t s = 0; s < splits_; ++s) {
      const Sums<A>& sums = sums_[s];
      const A scale = sums.sum_exp[i] > 0 ? std::exp(sums.row_max[i] - row_max) : A(0);
      sum_exp += sums.sum_exp[i] * scale;
      weights += sums.weights[i] * scale;
      if (!gradient_) continue;
      A *const first = sum_of(negative_sums_, 0, i), *const own = sum_of(negative_sums_, s, i);
      rows_.combine(s == 0 ? A(0) : A(1), first, scale, own, width_, false, first, A(0), nullptr);
    }
    for (Sums<A>& sums : sums_) {
      sums.row_max[i] = row_max;
      sums.sum_exp[i] = sum_exp;
      sums.weights[i] = weights;
    }
  }

  // ---- positives

  void stream_positives(Range block, int64_t split) {
    KeyTile<A> tile(anchors_.dim, bf16_);
    for_tiles(split, tile, [&](const auto& load, int64_t c, int64_t position) {
      const Range own = intersect(block, anchors_.of_class(c));
      if (own.size() == 0) return;
      load();
      for_panels(own, [&](const void* panel, int64_t start, Range anchors) {
        const Columns columns(anchors);
        tile.gemm_qk(panel, columns.first, columns.count);
        add_positives(tile, start, anchors, position, split);
        if (gradient_) {
          tile.gemm_pv(anchors.begin, anchors.size(), sum_of(positive_sums_, split, start + anchors.begin));
        }
      });
    });
  }

  int64_t excluded(int64_t i) const { return args_.excluded ? args_.excluded[anchors_.order[i]] : -1; }

  // z of some anchors of a panel become s_ij, or 0 for the excluded key of an anchor.
  void add_positives(KeyTile<A>& tile, int64_t start, Range anchors, int64_t position, int64_t split) {
    const auto [first, count] = Columns(anchors);
    A* const z = tile.z(first);
    A lse[kPanelAnchors] = {}, sigmoids[kPanelAnchors] = {}, softplus[kPanelAnchors] = {};
    Sums<A>& sums = sums_[split];
    for (int64_t k = anchors.begin; k < anchors.end; ++k) {
      if (has_negatives(start + k)) lse[k] = sums.row_max[start + k] + std::log(sums.sum_exp[start + k]);
    }
    const auto set_excluded = [&](A value) {
      for (int64_t k = anchors.begin; k < anchors.end; ++k) {
        const int64_t key = excluded(start + k) - position;
        if (key >= 0 && key < tile.size()) tile.z(k)[key * kPanelAnchors] = value;
      }
    };
    // so large that it adds nothing, also after the division by the temperature, and finite
    set_excluded(static_cast<A>(std::numeric_limits<A>::max() / 4 * std::min(args_.temperature, 1.0)));
    kernels_.column_positives(z, tile.size(), kPanelAnchors, count, anchors_.inverse_temperature, lse + first,
                              sigmoids + first, softplus + first);
    set_excluded(0);
    if (bf16_ && gradient_) {
      std::fill_n(sigmoids, kPanelAnchors, A(0));
      tile.round(first, count, sigmoids + first);
    }
    for (int64_t k = anchors.begin; k < anchors.end; ++k) {
      sums.softplus[start + k] += softplus[k];
      sums.sigmoids[start + k] += sigmoids[k];
    }
  }

  void merge_positives() {
    std::vector<A> sigmoids(anchors_.count);
    for (int64_t i = 0; i < anchors_.count; ++i) {
      const int64_t own = class_keys_[anchors_.label[i]];
      anchors_.positives[i] = own - (excluded(i) >= 0 && excluded(i) < own);
      if (!has_negatives(i)) continue;  // the loss is 0 whatever the positives are
      for (const Sums<A>& sums : sums_) {
        anchors_.loss[i] += sums.softplus[i];
        sigmoids[i] += sums.sigmoids[i];
      }
    }
    if (!gradient_) return;
    const std::vector<A> scale = anchors_.grad_scales();
    for_anchors([&](int64_t i) {
      if (!has_negatives(i)) return;
      A* const grad = anchors_.grad.data() + i * anchors_.dim;
      // the weights of negatives and of positives have the same sum, rounded or not
      rows_.accumulate(scale[i] * sigmoids[i] / sums_[0].weights[i], sum_of(negative_sums_, 0, i), anchors_.dim, grad);
      for (int64_t s = 0; s < splits_; ++s) {
        rows_.accumulate(-scale[i], sum_of(positive_sums_, s, i), anchors_.dim, grad);
      }
    });
  }

  bool has_negatives(int64_t i) const { return class_keys_[anchors_.label[i]] < keys_; }

  SortedAnchors<A>& anchors_;
  const InfoNCE& args_;
  const cpu::PairKernels<A>& kernels_ = cpu::pair_kernels<A>();
  const cpu::RowKernels<A>& rows_ = cpu::row_kernels<A>();
  const bool gradient_;
  const int64_t width_, splits_;  // channels and the zeros behind them
  bool bf16_;
  int64_t keys_ = 0;                              // valid ones
  std::vector<int64_t> class_keys_;               // [C]
  std::vector<A> panels_;                         // see panels_of
  std::vector<c10::BFloat16> bf16_panels_;        // instead, with bf16_
  std::vector<Sums<A>> sums_;                     // [splits]
  std::vector<A> negative_sums_, positive_sums_;  // [splits, V, width] sums of e_in k_n and of s_ij k_j
};

}  // namespace

template <class A>
void contrast_queues(SortedAnchors<A>& anchors) {
  if (anchors.count > 0) Stream<A>(anchors).run();
}

template void contrast_queues(SortedAnchors<float>&);
template void contrast_queues(SortedAnchors<double>&);

}  // namespace pixcontrast
