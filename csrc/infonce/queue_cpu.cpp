// The keys are streamed in tiles, so no number is kept for a pair of anchor and key. Negatives come first, with a
// running maximum and rescaled sums; then each anchor's own class, when the sum over its negatives is known. Loss and
// gradient come out of the one stream: two products of anchors and keys each.
//
// Threads share nothing while they stream: the work is cut into blocks of anchors times parts of the keys,
// and the sums of the parts are added in a fixed order.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/ThreadLocalState.h>

#include <cmath>
#include <limits>

#include "common/cpu/row_kernels.h"
#include "infonce/cpu.h"
#include "infonce/tile.h"

namespace pixcontrast {
namespace {

using at::Tensor;

constexpr int64_t kBlockAnchors = 8 * kPanelAnchors;  // of a task
constexpr int64_t kMostParts = 32;                    // of the keys
constexpr int64_t kPartialNumbers = 1 << 21;          // in the sums of all parts: 8 MiB of float32, twice

struct Part {
  int64_t number, of;
};

// What is summed for each anchor over one part of the keys: [V].
template <class A>
struct Sums {
  explicit Sums(int64_t anchors)
      : largest(anchors, -std::numeric_limits<A>::infinity()),
        total(anchors),
        weights(anchors),
        softplus(anchors),
        sigmoids(anchors) {}

  std::vector<A> largest;   // maximum of z over the negatives
  std::vector<A> total;     // sum over the negatives of e^(z - largest)
  std::vector<A> weights;   // the same of the rounded numbers that keys were multiplied by
  std::vector<A> softplus;  // sum over the positives of l_ij - z_ij
  std::vector<A> sigmoids;  // sum over the positives of s_ij, rounded likewise
};

// The columns of a panel that hold some of its anchors: whole groups of kColumnStep.
struct Columns {
  explicit Columns(Range anchors)
      : first(anchors.first / cpu::kColumnStep * cpu::kColumnStep), count(cpu::padded(anchors.last) - first) {}
  int64_t first, count;
};

template <class A>
class Stream {
 public:
  explicit Stream(SortedAnchors<A>& anchors)
      : anchors_(anchors),
        args_(anchors.args),
        width_(cpu::padded(anchors.dim)),
        bf16_(multiply_bf16(args_)),
        panels_(panels_of(anchors.rows, bf16_)),
        parts_(std::clamp<int64_t>(kPartialNumbers / std::max<int64_t>(anchors.count * width_, 1), 1, kMostParts)),
        sums_(parts_, Sums<A>(anchors.count)) {
    if (!args_.needs_grad) return;
    away_ = at::zeros({parts_, anchors.count, width_}, anchors.rows.options());
    towards_ = at::zeros({parts_, anchors.count, width_}, anchors.rows.options());
  }

  void run() {
    for_tasks([&](Range block, Part part) { stream_negatives(block, part); });
    for_anchors([&](int64_t i) { merge_negatives(i); });
    for_tasks([&](Range block, Part part) { stream_positives(block, part); });
    merge_positives();
  }

 private:
  static bool multiply_bf16(const InfoNCE& args) {
    const auto is_bf16 = [](const Tensor& queue) { return queue.scalar_type() == at::kBFloat16; };
    return cpu::has_bf16() && args.feature_type == at::kBFloat16 &&
           std::all_of(args.queues.begin(), args.queues.end(), is_bf16);
  }

  // ---- who works on what

  template <class Body>
  void for_anchors(const Body& body) const {
    at::parallel_for(0, anchors_.count, 16, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) body(i);
    });
  }

  // body(block of anchors, part of the keys)
  template <class Body>
  void for_tasks(const Body& body) const {
    const int64_t blocks = (anchors_.count + kBlockAnchors - 1) / kBlockAnchors;
    const at::ThreadLocalState state;  // tensors are made in the threads: they need to know inference mode
    at::parallel_for(0, blocks * parts_, 1, [&](int64_t first, int64_t last) {
      const at::ThreadLocalStateGuard guard(state);
      for (int64_t task = first; task < last; ++task) {
        const int64_t start = task / parts_ * kBlockAnchors;
        body(Range{start, std::min(start + kBlockAnchors, anchors_.count)}, Part{task % parts_, parts_});
      }
    });
  }

  // body(queue, class, valid rows) for the rows of each class of each queue
  template <class Body>
  void for_classes(const Body& body) const {
    for (size_t q = 0; q < args_.queues.size(); ++q) {
      const auto* counts = args_.counts[q].const_data_ptr<int64_t>();
      for (int64_t c = 0; c < args_.queues[q].size(0); ++c) {
        body(args_.queues[q], c, std::clamp<int64_t>(counts[c], 0, args_.queues[q].size(1)));
      }
    }
  }

  // body(keys [k, D], class, place of the first among the keys of its class) for the tiles of one part of all keys
  template <class Body>
  void for_tiles(Part part, int64_t most, const Body& body) const {
    int64_t total = 0;
    for_classes([&](const Tensor&, int64_t, int64_t valid) { total += valid; });
    const Range mine{total * part.number / part.of, total * (part.number + 1) / part.of};
    std::vector<int64_t> before(args_.queues[0].size(0));
    int64_t passed = 0;
    for_classes([&](const Tensor& queue, int64_t c, int64_t valid) {
      const int64_t end = std::min(mine.last - passed, valid);
      for (int64_t first = std::max<int64_t>(mine.first - passed, 0); first < end; first += most) {
        body(queue[c].narrow(0, first, std::min(most, end - first)), c, before[c] + first);
      }
      before[c] += valid;
      passed += valid;
    });
  }

  // body(panel, the anchor in its first column, its anchors among those of a range, counted from there)
  template <class Body>
  static void for_panels(Range anchors, const Body& body) {
    for (int64_t i = anchors.first; i < anchors.last;) {
      const int64_t panel = i / kPanelAnchors, start = panel * kPanelAnchors;
      const int64_t end = std::min(start + kPanelAnchors, anchors.last);
      body(panel, start, Range{i - start, end - start});
      i = end;
    }
  }

  A* sum_of(const Tensor& of_parts, Part part, int64_t anchor) const {
    return of_parts.data_ptr<A>() + (part.number * anchors_.count + anchor) * width_;
  }

  // ---- negatives

  // The anchors of a panel before and behind those of the keys' own class.
  struct Sides {
    Range before, behind;

    int64_t size() const { return before.size() + behind.size(); }
    Columns columns() const {
      return Columns({before.size() ? before.first : behind.first, behind.size() ? behind.last : before.last});
    }
    template <class Body>
    void for_each(const Body& body) const {
      for (const Range side : {before, behind}) {
        for (int64_t k = side.first; k < side.last; ++k) body(k);
      }
    }
  };

  void stream_negatives(Range block, Part part) {
    InfoNCETile<A> tile(anchors_.dim, bf16_);
    for_tiles(part, tile.most_keys(), [&](const Tensor& keys, int64_t c, int64_t) {
      Range own = anchors_.of_class(c);
      if (own.size() == 0) own = {anchors_.count, anchors_.count};
      if (common(own, block).size() == block.size()) return;
      tile.load(keys);
      for_panels(block, [&](int64_t panel, int64_t start, Range anchors) {
        const Sides sides{common(anchors, {0, own.first - start}), common(anchors, {own.last - start, kPanelAnchors})};
        if (sides.size() == 0) return;
        const Columns columns = sides.columns();
        tile.multiply(panels_, panel, columns.first, columns.count);
        add_negatives(tile, start, sides, part);
        if (!args_.needs_grad) return;
        for (const Range side : {sides.before, sides.behind}) {
          if (side.size()) tile.accumulate(side.first, side.size(), sum_of(away_, part, start + side.first));
        }
      });
    });
  }

  // z of some anchors of a panel become e^(z/T - largest); what was summed under a smaller maximum is scaled down.
  void add_negatives(InfoNCETile<A>& tile, int64_t start, const Sides& sides, Part part) {
    const Columns columns = sides.columns();
    const A inverse = anchors_.inverse_temperature;
    A* const z = tile.z(columns.first);
    A shift[kPanelAnchors], total[kPanelAnchors] = {}, weights[kPanelAnchors] = {};
    kernels_.column_largest(z, tile.size(), kPanelAnchors, columns.count, shift + columns.first);
    for (int64_t k = columns.first; k < columns.first + columns.count; ++k) shift[k] *= inverse;
    Sums<A>& sums = sums_[part.number];
    sides.for_each([&](int64_t k) {
      A& largest = sums.largest[start + k];
      if (shift[k] > largest) scale_down(start + k, std::exp(largest - shift[k]), part);
      shift[k] = largest = std::max(largest, shift[k]);
    });
    kernels_.column_exponentials(z, tile.size(), kPanelAnchors, columns.count, inverse, shift + columns.first,
                                 total + columns.first);
    const bool rounds = bf16_ && args_.needs_grad;
    if (rounds) tile.round(columns.first, columns.count, weights + columns.first);
    sides.for_each([&](int64_t k) {
      sums.total[start + k] += total[k];
      sums.weights[start + k] += rounds ? weights[k] : total[k];
    });
  }

  void scale_down(int64_t i, A scale, Part part) {
    Sums<A>& sums = sums_[part.number];
    if (sums.total[i] == 0) return;
    sums.total[i] *= scale;
    sums.weights[i] *= scale;
    if (!args_.needs_grad) return;
    A* const away = sum_of(away_, part, i);
    rows_.combine(A(0), away, scale, away, width_, false, away, A(0), nullptr);
  }

  // The sums of all parts under the one maximum go to the first part's place; its largest and total to every part's.
  void merge_negatives(int64_t i) {
    A largest = -std::numeric_limits<A>::infinity(), total = 0, weights = 0;
    for (const Sums<A>& sums : sums_) largest = std::max(largest, sums.largest[i]);
    for (int64_t p = 0; p < parts_; ++p) {
      const Sums<A>& sums = sums_[p];
      const A scale = sums.total[i] > 0 ? std::exp(sums.largest[i] - largest) : A(0);
      total += sums.total[i] * scale;
      weights += sums.weights[i] * scale;
      if (!args_.needs_grad) continue;
      A* const first = sum_of(away_, {0, parts_}, i);
      A* const mine = sum_of(away_, {p, parts_}, i);
      rows_.combine(p == 0 ? A(0) : A(1), first, scale, mine, width_, false, first, A(0), nullptr);
    }
    for (Sums<A>& sums : sums_) {
      sums.largest[i] = largest;
      sums.total[i] = total;
      sums.weights[i] = weights;
    }
  }

  // ---- positives

  void stream_positives(Range block, Part part) {
    InfoNCETile<A> tile(anchors_.dim, bf16_);
    for_tiles(part, tile.most_keys(), [&](const Tensor& keys, int64_t c, int64_t place) {
      const Range own = common(block, anchors_.of_class(c));
      if (own.size() == 0) return;
      tile.load(keys);
      for_panels(own, [&](int64_t panel, int64_t start, Range anchors) {
        const Columns columns(anchors);
        tile.multiply(panels_, panel, columns.first, columns.count);
        add_positives(tile, start, anchors, place, part);
        if (args_.needs_grad) {
          tile.accumulate(anchors.first, anchors.size(), sum_of(towards_, part, start + anchors.first));
        }
      });
    });
  }

  int64_t excluded(int64_t i) const {
    return args_.excluded.defined() ? args_.excluded.const_data_ptr<int64_t>()[anchors_.order[i]] : -1;
  }

  // z of some anchors of a panel become s_ij; a key that is no positive of its anchor has none.
  void add_positives(InfoNCETile<A>& tile, int64_t start, Range anchors, int64_t place, Part part) {
    const Columns columns(anchors);
    A* const z = tile.z(columns.first);
    A limit[kPanelAnchors] = {}, sigmoids[kPanelAnchors] = {}, softplus[kPanelAnchors] = {};
    Sums<A>& sums = sums_[part.number];
    for (int64_t k = anchors.first; k < anchors.last; ++k) {
      const A total = sums.total[start + k];
      limit[k] = total > 0 ? sums.largest[start + k] + std::log(total) : A(0);
    }
    const auto skipped = [&](int64_t k) -> A* {
      const int64_t key = excluded(start + k) - place;
      return key >= 0 && key < tile.size() ? tile.z(k) + key * kPanelAnchors : nullptr;
    };
    for (int64_t k = anchors.first; k < anchors.last; ++k) {  // so large that it adds nothing
      if (A* const one = skipped(k)) *one = std::numeric_limits<A>::max() / 4 * args_.temperature;
    }
    kernels_.column_positives(z, tile.size(), kPanelAnchors, columns.count, anchors_.inverse_temperature,
                              limit + columns.first, sigmoids + columns.first, softplus + columns.first);
    for (int64_t k = anchors.first; k < anchors.last; ++k) {
      if (A* const one = skipped(k)) *one = 0;
    }
    if (bf16_ && args_.needs_grad) {
      std::fill_n(sigmoids, kPanelAnchors, A(0));
      tile.round(columns.first, columns.count, sigmoids + columns.first);
    }
    for (int64_t k = anchors.first; k < anchors.last; ++k) {
      sums.softplus[start + k] += softplus[k];
      sums.sigmoids[start + k] += sigmoids[k];
    }
  }

  void merge_positives() {
    std::vector<int64_t> keys(args_.queues[0].size(0));  // of each class
    for_classes([&](const Tensor&, int64_t c, int64_t valid) { keys[c] += valid; });
    std::vector<A> sigmoids(anchors_.count);
    for (int64_t i = 0; i < anchors_.count; ++i) {
      const int64_t own = keys[anchors_.label[i]];
      anchors_.positives[i] = own - (excluded(i) >= 0 && excluded(i) < own);
      if (!has_negatives(i)) continue;  // the loss is 0 whatever the positives are
      for (const Sums<A>& sums : sums_) {
        anchors_.loss[i] += sums.softplus[i];
        sigmoids[i] += sums.sigmoids[i];
      }
    }
    if (!args_.needs_grad) return;
    const std::vector<A> scale = anchors_.scales();
    for_anchors([&](int64_t i) {
      if (!has_negatives(i)) return;
      A* const grad = anchors_.grad.template data_ptr<A>() + i * anchors_.dim;
      // weights of negatives and of positives add up to the same, rounded or not
      rows_.accumulate(scale[i] * sigmoids[i] / sums_[0].weights[i], sum_of(away_, {0, parts_}, i), anchors_.dim, grad);
      for (int64_t p = 0; p < parts_; ++p) {
        rows_.accumulate(-scale[i], sum_of(towards_, {p, parts_}, i), anchors_.dim, grad);
      }
    });
  }

  bool has_negatives(int64_t i) const { return sums_[0].total[i] > 0; }

  SortedAnchors<A>& anchors_;
  const InfoNCE& args_;
  const cpu::PairKernels<A>& kernels_ = cpu::pair_kernels<A>();
  const cpu::RowKernels<A>& rows_ = cpu::row_kernels<A>();
  const int64_t width_;  // channels and the zeros behind them
  const bool bf16_;
  const Tensor panels_;
  const int64_t parts_;
  std::vector<Sums<A>> sums_;  // of each part
  Tensor away_, towards_;      // [parts, V, width] sums of e_in k_n over the negatives, of s_ij k_j over the positives
};

}  // namespace

template <class A>
void contrast_queues(SortedAnchors<A>& anchors) {
  Stream<A>(anchors).run();
}

template void contrast_queues(SortedAnchors<float>&);
template void contrast_queues(SortedAnchors<double>&);

}  // namespace pixcontrast
