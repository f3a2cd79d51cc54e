// The keys are streamed in tiles, so no number is kept for a pair of anchor and key. Negatives come first, with a
// running maximum and rescaled sums; then each anchor's own class, when the sum over its negatives is known. Loss and
// gradient come out of the one stream: two products of anchors and keys each, by the library or, in bfloat16, by hand:
// the library either rounds z to bfloat16 or takes no less time than in float32.
//
// Threads share nothing while they stream: the work is cut into blocks of anchors times parts of the keys,
// and the sums of the parts are added in a fixed order.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/ThreadLocalState.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/row_kernels.h"
#include "infonce.h"
#include "infonce_tile.h"

namespace pixcontrast {
namespace {

using at::Tensor;

constexpr int64_t kBlockAnchors = 256;        // anchors of a task
constexpr int64_t kTileNumbers = 1 << 17;     // anchors x keys in a tile: half a MiB of float32, for the L2 of a core
constexpr int64_t kBf16Anchors = 64;          // the same in bfloat16: 64 KiB, beside 256 KiB of keys in
constexpr int64_t kBf16Keys = 256;            // both layouts
constexpr int64_t kMostParts = 32;            // of the keys
constexpr int64_t kPartialNumbers = 1 << 21;  // in the sums of all parts: 8 MiB of float32, twice
constexpr int64_t kPanelNumbers = 1 << 22;    // anchors x anchors at a time: 16 MiB of float32

Range common(Range a, Range b) { return {std::max(a.first, b.first), std::min(a.last, b.last)}; }

template <class A>
class Stream {
 public:
  explicit Stream(const InfoNCE& args)
      : args_(args), kernels_(cpu::row_kernels<A>()), inverse_temperature_(static_cast<A>(1 / args.temperature)) {
    const auto* label = args.labels.const_data_ptr<int64_t>();
    const int64_t classes = args.queues.empty() ? std::numeric_limits<int64_t>::max() : args.queues[0].size(0);
    for (int64_t i = 0; i < args.labels.numel(); ++i) {
      if (label[i] >= 0 && label[i] < classes) order_.push_back(i);
    }
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return label[a] < label[b]; });
    for (const int64_t i : order_) label_.push_back(label[i]);
    count_ = static_cast<int64_t>(order_.size());
    dim_ = args.anchors.size(1);
    anchors_ = args.anchors.index_select(0, at::tensor(order_, at::kLong));
    const auto is_bf16 = [](const Tensor& queue) { return queue.scalar_type() == at::kBFloat16; };
    if (cpu::has_bf16() && args.feature_type == at::kBFloat16 &&
        std::all_of(args.queues.begin(), args.queues.end(), is_bf16)) {
      bf16_ = bf16_rows(anchors_);
    }
    loss_.assign(count_, 0);
    positives_.assign(count_, 0);
  }

  InfoNCEResult run() {
    if (args_.needs_grad) grad_ = at::zeros_like(anchors_);
    if (args_.queues.empty()) {
      contrast_anchors();
    } else {
      contrast_queues();
    }
    return finish();
  }

 private:
  // What is summed for an anchor over some of the keys.
  struct Sums {
    A largest = -std::numeric_limits<A>::infinity();  // maximum of z over the negatives
    A total = 0;                                      // sum over the negatives of e^(z - largest)
    A weights = 0;                                    // the same of the rounded numbers that keys were multiplied by
    A softplus = 0;                                   // sum over the positives of l_ij - z_ij
    A sigmoids = 0;                                   // sum over the positives of s_ij, rounded likewise
    int64_t positives = 0;
  };

  // The sorted anchors of class c.
  Range of_class(int64_t c) const {
    const auto found = std::equal_range(label_.begin(), label_.end(), c);
    return {found.first - label_.begin(), found.second - label_.begin()};
  }

  // Calls body(i) for every anchor, in parallel.
  template <class Body>
  void for_anchors(const Body& body) const {
    at::parallel_for(0, count_, 16, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) body(i);
    });
  }

  // ---- anchors against queues

  void contrast_queues() {
    const int64_t numbers = std::max<int64_t>(count_ * dim_, 1);
    const int64_t parts = std::clamp<int64_t>(kPartialNumbers / numbers, 1, kMostParts);
    const int64_t blocks = (count_ + kBlockAnchors - 1) / kBlockAnchors;
    std::vector<Sums> sums(parts * count_);
    Tensor away, towards;  // [parts, V, D] sums of e_in k_n over the negatives, of s_ij k_j over the positives
    if (args_.needs_grad) {
      away = at::zeros({parts, count_, dim_}, anchors_.options());
      towards = at::zeros({parts, count_, dim_}, anchors_.options());
    }
    const auto slab = [&](const Tensor& of_parts, int64_t part) {
      return args_.needs_grad ? of_parts[part] : Tensor();
    };
    const auto for_tasks = [&](const auto& body) {
      const at::ThreadLocalState state;  // the library is called from the threads: they need to know inference mode
      at::parallel_for(0, blocks * parts, 1, [&](int64_t first, int64_t last) {
        const at::ThreadLocalStateGuard guard(state);
        for (int64_t task = first; task < last; ++task) {
          const int64_t start = task / parts * kBlockAnchors, part = task % parts;
          body(Range{start, std::min(start + kBlockAnchors, count_)}, part);
        }
      });
    };
    for_tasks([&](Range block, int64_t part) {
      stream_negatives(block, {part, parts}, sums.data() + part * count_, slab(away, part));
    });
    for_anchors([&](int64_t i) { merge_negatives(i, parts, sums, away); });
    for_tasks([&](Range block, int64_t part) {
      stream_positives(block, {part, parts}, sums.data() + part * count_, slab(towards, part));
    });
    merge_positives(parts, sums, away, towards);
  }

  struct Part {
    int64_t number, of;
  };

  // Calls body(queue, class, valid rows) for the rows of each class of each queue.
  template <class Body>
  void for_classes(const Body& body) const {
    for (size_t q = 0; q < args_.queues.size(); ++q) {
      const auto* counts = args_.counts[q].const_data_ptr<int64_t>();
      for (int64_t c = 0; c < args_.queues[q].size(0); ++c) {
        body(args_.queues[q], c, std::clamp<int64_t>(counts[c], 0, args_.queues[q].size(1)));
      }
    }
  }

  // Calls body(keys [k, D], class, place of the first among the keys of its class) for the tiles of one part of all
  // keys.
  template <class Body>
  void for_tiles(Range block, Part part, const Body& body) const {
    int64_t total = 0;
    for_classes([&](const Tensor&, int64_t, int64_t valid) { total += valid; });
    const Range mine{total * part.number / part.of, total * (part.number + 1) / part.of};
    const int64_t most =
        bf16_.defined() ? kBf16Keys : std::max<int64_t>(64, kTileNumbers / std::max<int64_t>(block.size(), 1));
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

  void stream_negatives(Range block, Part part, Sums* sums, Tensor away) const {
    KeyTile<A> tile(anchors_, bf16_);
    A* const row = away.defined() ? away.data_ptr<A>() : nullptr;
    for_tiles(block, part, [&](const Tensor& keys, int64_t c, int64_t) {
      tile.load(keys);
      const Range own = common(block, of_class(c));
      // A few anchors of the class itself are multiplied in vain: thin products of the library are slower.
      const bool whole = !bf16_.defined() && 4 * own.size() <= block.size();
      const Range before = whole ? block : common(block, {0, own.first}),
                  behind = common(block, {own.last, whole ? own.last : block.last});
      for (const Range side : {before, behind}) {
        for_some(side, [&](Range anchors) {
          tile.multiply(anchors);
          for (int64_t i = anchors.first; i < anchors.last; ++i) {
            if (i >= own.first && i < own.last) {
              std::fill_n(tile.row(i), tile.columns, A(0));
            } else {
              add_negatives(tile.row(i), tile.columns, sums[i], row ? row + i * dim_ : nullptr, &tile);
            }
          }
          if (row) tile.accumulate(away);
        });
      }
    });
  }

  // Calls body(anchors) for the anchors of a range, with no more at a time than is good for the products.
  template <class Body>
  void for_some(Range range, const Body& body) const {
    const int64_t most = bf16_.defined() ? kBf16Anchors : kBlockAnchors;
    for (; range.size() > 0; range.first += most) body(Range{range.first, std::min(range.first + most, range.last)});
  }

  // z [columns] become e^(z/T - largest); what was summed under a smaller maximum is scaled down. With a tile, they are
  // rounded as it weighs keys with them.
  void add_negatives(A* z, int64_t columns, Sums& sums, A* away, const KeyTile<A>* tile = nullptr) const {
    const A top = kernels_.largest(z, columns) * inverse_temperature_;
    if (top > sums.largest) {
      const A scale = sums.total > 0 ? std::exp(sums.largest - top) : A(0);
      sums.total *= scale;
      sums.weights *= scale;
      if (away) kernels_.combine(A(0), away, scale, away, dim_, false, away, A(0), nullptr);
      sums.largest = top;
    }
    const A added = kernels_.exponentials(z, columns, inverse_temperature_, sums.largest);
    sums.total += added;
    sums.weights += tile && away ? tile->round(z, added) : added;
  }

  // The sums of all parts under the one maximum go to the first part's place; its largest and total to every part's.
  void merge_negatives(int64_t i, int64_t parts, std::vector<Sums>& sums, const Tensor& away) const {
    A largest = -std::numeric_limits<A>::infinity(), total = 0, weights = 0;
    for (int64_t p = 0; p < parts; ++p) largest = std::max(largest, sums[p * count_ + i].largest);
    for (int64_t p = 0; p < parts; ++p) {
      Sums& part = sums[p * count_ + i];
      const A scale = part.total > 0 ? std::exp(part.largest - largest) : A(0);
      total += part.total * scale;
      weights += part.weights * scale;
      if (!away.defined()) continue;
      A* const first = away.data_ptr<A>() + i * dim_;
      A* const mine = first + p * count_ * dim_;
      kernels_.combine(p == 0 ? A(0) : A(1), first, scale, mine, dim_, false, first, A(0), nullptr);
    }
    for (int64_t p = 0; p < parts; ++p) {
      sums[p * count_ + i].largest = largest;
      sums[p * count_ + i].total = total;
      sums[p * count_ + i].weights = weights;
    }
  }

  void stream_positives(Range block, Part part, Sums* sums, Tensor towards) const {
    KeyTile<A> tile(anchors_, bf16_);
    for_tiles(block, part, [&](const Tensor& keys, int64_t c, int64_t place) {
      const Range own = common(block, of_class(c));
      if (own.size() == 0) return;
      tile.load(keys);
      for_some(own, [&](Range anchors) {
        tile.multiply(anchors);
        for (int64_t i = anchors.first; i < anchors.last; ++i) {
          add_positives(tile.row(i), tile.columns, excluded(i) - place, sums[i], towards.defined() ? &tile : nullptr);
        }
        if (towards.defined()) tile.accumulate(towards);
      });
    });
  }

  int64_t excluded(int64_t i) const {
    return args_.excluded.defined() ? args_.excluded.const_data_ptr<int64_t>()[order_[i]] : -1;
  }

  // z [columns] become s_ij, rounded like those of add_negatives; place `skipped` is no positive.
  void add_positives(A* z, int64_t columns, int64_t skipped, Sums& sums, const KeyTile<A>* tile = nullptr) const {
    const bool skips = skipped >= 0 && skipped < columns;
    sums.positives += columns - skips;
    if (sums.total == 0) {  // no negatives: the loss is 0 whatever the positives are
      std::fill_n(z, columns, A(0));
      return;
    }
    const A away = sums.largest + std::log(sums.total);
    if (skips) z[skipped] = std::numeric_limits<A>::max() / 4 * args_.temperature;
    A softplus = 0;
    const A added = kernels_.positives(z, columns, inverse_temperature_, away, &softplus);
    sums.softplus += softplus;
    if (skips) z[skipped] = 0;
    sums.sigmoids += tile ? tile->round(z, added) : added;
  }

  void merge_positives(int64_t parts, const std::vector<Sums>& sums, const Tensor& away, const Tensor& towards) {
    std::vector<A> sigmoids(count_);
    for (int64_t i = 0; i < count_; ++i) {
      for (int64_t p = 0; p < parts; ++p) {
        loss_[i] += sums[p * count_ + i].softplus;
        sigmoids[i] += sums[p * count_ + i].sigmoids;
        positives_[i] += sums[p * count_ + i].positives;
      }
    }
    if (!args_.needs_grad) return;
    const std::vector<A> scale = scales();
    for_anchors([&](int64_t i) {
      A* const grad = grad_.data_ptr<A>() + i * dim_;
      if (sums[i].total > 0) {  // weights of negatives and of positives add up to the same, rounded or not
        kernels_.accumulate(scale[i] * sigmoids[i] / sums[i].weights, away.data_ptr<A>() + i * dim_, dim_, grad);
      }
      for (int64_t p = 0; p < parts; ++p) {
        kernels_.accumulate(-scale[i], towards.data_ptr<A>() + (p * count_ + i) * dim_, dim_, grad);
      }
    });
  }

  // ---- anchors against each other: panels of some anchors and all their partners

  void contrast_anchors() {
    for (int64_t i = 0; i < count_; ++i) positives_[i] = of_class(label_[i]).size() - 1;
    const std::vector<A> scale = scales();
    const int64_t height = std::clamp<int64_t>(kPanelNumbers / std::max<int64_t>(count_, 1), 1, kPanelNumbers);
    const Tensor room = at::empty({std::min(height, count_), count_}, anchors_.options());
    for (int64_t first = 0; first < count_; first += height) {
      const Range panel{first, std::min(first + height, count_)};
      Tensor z = room.narrow(0, 0, panel.size());
      at::mm_out(z, anchors_.narrow(0, panel.first, panel.size()), anchors_.t());
      at::parallel_for(panel.first, panel.last, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) contrast_row(z.data_ptr<A>() + (i - first) * count_, i, scale[i]);
      });
      if (!args_.needs_grad) continue;
      // z is now dloss/dz T; each pair pulls at both of its anchors
      if (panel.size() == count_) {
        grad_.addmm_(z + z.t(), anchors_);
      } else {
        grad_.narrow(0, first, panel.size()).addmm_(z, anchors_);
        grad_.addmm_(z.t(), anchors_.narrow(0, first, panel.size()));
      }
    }
  }

  void contrast_row(A* z, int64_t i, A scale) {
    const Range own = of_class(label_[i]);
    Sums sums;
    if (own.first > 0) add_negatives(z, own.first, sums, nullptr);
    const A first_maximum = sums.largest;
    if (own.last < count_) add_negatives(z + own.last, count_ - own.last, sums, nullptr);
    add_positives(z + own.first, own.size(), i - own.first, sums);
    loss_[i] = sums.softplus;
    const A away = sums.total > 0 ? scale * sums.sigmoids / sums.total : A(0);
    const A away_before = own.first > 0 ? away * std::exp(first_maximum - sums.largest) : A(0);
    for (int64_t j = 0; j < own.first; ++j) z[j] *= away_before;
    for (int64_t j = own.first; j < own.last; ++j) z[j] *= -scale;
    for (int64_t j = own.last; j < count_; ++j) z[j] *= away;
  }

  // ---- both

  // loss_weight / (T_base R P_i) for anchors with positives, else 0
  std::vector<A> scales() const {
    const auto used = std::count_if(positives_.begin(), positives_.end(), [](int64_t p) { return p > 0; });
    std::vector<A> scale(count_);
    for (int64_t i = 0; i < count_; ++i) {
      if (positives_[i] == 0) continue;
      scale[i] = static_cast<A>(args_.loss_weight / args_.base_temperature / static_cast<double>(used * positives_[i]));
    }
    return scale;
  }

  InfoNCEResult finish() const {
    InfoNCEResult result;
    result.anchor_loss = at::zeros({args_.labels.numel()}, anchors_.options());
    result.positives = at::zeros({args_.labels.numel()}, args_.labels.options());
    double sum = 0;
    int64_t used = 0;
    for (int64_t i = 0; i < count_; ++i) {
      result.positives.data_ptr<int64_t>()[order_[i]] = positives_[i];
      if (positives_[i] == 0) continue;
      const double loss = loss_[i] / static_cast<double>(positives_[i]);
      result.anchor_loss.data_ptr<A>()[order_[i]] = static_cast<A>(loss);
      sum += loss;
      ++used;
    }
    const double scale = args_.loss_weight * args_.temperature / args_.base_temperature;
    result.loss = at::scalar_tensor(used ? scale * sum / static_cast<double>(used) : 0.0, anchors_.options());
    if (!args_.needs_grad) {
      result.grad = at::empty({0}, anchors_.options());
    } else {
      result.grad = at::zeros_like(args_.anchors);
      result.grad.index_copy_(0, at::tensor(order_, at::kLong), grad_);
    }
    return result;
  }

  const InfoNCE& args_;
  const cpu::RowKernels<A>& kernels_;
  const A inverse_temperature_;
  int64_t count_, dim_;                 // V anchors that take part, sorted by class; D
  std::vector<int64_t> order_, label_;  // [V] place in the caller's list, class
  Tensor anchors_, grad_;               // [V, D]
  Tensor bf16_;                         // the anchors once more, if all is bfloat16 and the processor multiplies that
  std::vector<double> loss_;            // [V] sum over positives of l_ij - z_ij
  std::vector<int64_t> positives_;      // [V] P_i
};

}  // namespace

InfoNCEResult infonce_cpu(const InfoNCE& args) {
  if (args.anchors.scalar_type() == at::kDouble) return Stream<double>(args).run();
  return Stream<float>(args).run();
}

}  // namespace pixcontrast
