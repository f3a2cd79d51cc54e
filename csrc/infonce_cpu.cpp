// The keys are streamed in tiles, so no number is kept for a pair of anchor and key. Negatives come first, with a
// running maximum and rescaled sums; then each anchor's own class, when the sum over its negatives is known. Loss and
// gradient come out of the one stream: two products of anchors and keys each, by the library.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "cpu/parallel.h"
#include "cpu/row_kernels.h"
#include "infonce.h"

namespace pixcontrast {
namespace {

using at::Tensor;

constexpr int64_t kTileKeys = 2048;        // keys in a tile of a queue
constexpr int64_t kTileNumbers = 1 << 22;  // anchors x keys in a tile, at most: 16 MiB of float32

template <class A>
class Stream {
 public:
  explicit Stream(const InfoNCE& args) : args_(args), inverse_temperature_(static_cast<A>(1 / args.temperature)) {
    const auto* label = args.labels.const_data_ptr<int64_t>();
    const int64_t classes = args.queues.empty() ? std::numeric_limits<int64_t>::max() : args.queues[0].size(0);
    for (int64_t i = 0; i < args.labels.numel(); ++i) {
      if (label[i] >= 0 && label[i] < classes) order_.push_back(i);
    }
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return label[a] < label[b]; });
    for (const int64_t i : order_) label_.push_back(label[i]);
    count_ = static_cast<int64_t>(order_.size());
    anchors_ = args.anchors.index_select(0, at::tensor(order_, at::kLong));
    loss_.assign(count_, 0);
    sigmoids_.assign(count_, 0);
    positives_.assign(count_, 0);
    largest_.assign(count_, -std::numeric_limits<A>::infinity());
    total_.assign(count_, 0);
  }

  InfoNCEResult run() {
    Tensor grad;
    if (args_.needs_grad) grad = at::zeros_like(anchors_);
    if (!args_.queues.empty()) {
      contrast_queues(grad);
    } else {
      contrast_anchors(grad);
    }
    return finish(grad);
  }

 private:
  // Anchors of class c: [first, last) of the sorted ones.
  std::pair<int64_t, int64_t> range(int64_t c) const {
    const auto found = std::equal_range(label_.begin(), label_.end(), c);
    return {found.first - label_.begin(), found.second - label_.begin()};
  }

  // Calls body(keys [k, D], class, place of the first among the keys of its class) for every tile of valid rows.
  template <class Body>
  void for_tiles(const Body& body) {
    const int64_t classes = args_.queues[0].size(0);
    std::vector<int64_t> before(classes);
    for (size_t q = 0; q < args_.queues.size(); ++q) {
      const Tensor& queue = args_.queues[q];
      const auto* counts = args_.counts[q].const_data_ptr<int64_t>();
      const int64_t most = std::max<int64_t>(1, std::min(kTileKeys, kTileNumbers / std::max<int64_t>(count_, 1)));
      for (int64_t c = 0; c < classes; ++c) {
        const int64_t valid = std::clamp<int64_t>(counts[c], 0, queue.size(1));
        for (int64_t first = 0; first < valid; first += most) {
          const int64_t keys = std::min(most, valid - first);
          body(queue[c].narrow(0, first, keys).to(anchors_.scalar_type()), c, before[c] + first);
        }
        before[c] += valid;
      }
    }
  }

  // <x_i, k_j> of anchors [first, last) and the keys, [last - first, k] in the one buffer.
  Tensor products(int64_t first, int64_t last, const Tensor& keys) {
    const int64_t numbers = (last - first) * keys.size(0);
    if (!buffer_.defined() || buffer_.numel() < numbers) buffer_ = at::empty({numbers}, anchors_.options());
    Tensor z = buffer_.narrow(0, 0, numbers).view({last - first, keys.size(0)});
    return at::mm_out(z, anchors_.narrow(0, first, last - first), keys.t());
  }

  void contrast_queues(Tensor& grad) {
    const auto& kernels = cpu::row_kernels<A>();
    Tensor away = args_.needs_grad ? at::zeros_like(anchors_) : Tensor();  // sum over negatives of e^(z - largest) k
    for_tiles([&](const Tensor& keys, int64_t c, int64_t) {
      const auto [own, behind] = range(c);
      for (const auto& [first, last] : {std::pair<int64_t, int64_t>{0, own}, {behind, count_}}) {
        if (first == last) continue;
        Tensor z = products(first, last, keys);
        A* const row = z.data_ptr<A>();
        A* const sum = args_.needs_grad ? away.data_ptr<A>() : nullptr;
        const int64_t columns = keys.size(0), dim = anchors_.size(1), start = first;
        cpu::Pieces(last - first, 64, 1).run([&](int64_t, int64_t begin, int64_t end) {
          for (int64_t r = begin; r < end; ++r) {
            add_negatives(kernels, row + r * columns, columns, start + r, sum ? sum + (start + r) * dim : nullptr, dim);
          }
        });
        if (args_.needs_grad) away.narrow(0, first, last - first).addmm_(z, keys);
      }
    });
    for_tiles([&](const Tensor& keys, int64_t c, int64_t place) {
      const auto [first, last] = range(c);
      if (first == last) return;
      Tensor z = products(first, last, keys);
      A* const row = z.data_ptr<A>();
      const int64_t columns = keys.size(0), start = first;
      cpu::Pieces(last - first, 64, 1).run([&](int64_t, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          const int64_t skipped = excluded(start + r) - place;
          add_positives(kernels, row + r * columns, columns, start + r, skipped);
        }
      });
      if (args_.needs_grad) grad.narrow(0, first, last - first).addmm_(z, keys, 1, -1);
    });
    if (args_.needs_grad) {
      Tensor share = at::zeros({count_, 1}, anchors_.options());
      for (int64_t i = 0; i < count_; ++i) {
        if (total_[i] > 0) share.data_ptr<A>()[i] = sigmoids_[i] / total_[i];
      }
      grad.addcmul_(away, share).mul_(scales().unsqueeze(1));
    }
  }

  int64_t excluded(int64_t i) const {
    return args_.excluded.defined() ? args_.excluded.const_data_ptr<int64_t>()[order_[i]] : -1;
  }

  // z [columns] of anchor i become e^(z/T - largest); what was summed under a smaller maximum is scaled down.
  void add_negatives(const cpu::RowKernels<A>& kernels, A* z, int64_t columns, int64_t i, A* sum, int64_t dim) {
    const A top = kernels.largest(z, columns) * inverse_temperature_;
    if (top > largest_[i]) {
      const A scale = total_[i] > 0 ? std::exp(largest_[i] - top) : A(0);
      total_[i] *= scale;
      if (sum) kernels.combine(A(0), sum, scale, sum, dim, false, sum, A(0), nullptr);
      largest_[i] = top;
    }
    total_[i] += kernels.exponentials(z, columns, inverse_temperature_, largest_[i]);
  }

  // z [columns] of anchor i become s_ij; place `skipped` is no positive.
  void add_positives(const cpu::RowKernels<A>& kernels, A* z, int64_t columns, int64_t i, int64_t skipped) {
    const bool skips = skipped >= 0 && skipped < columns;
    positives_[i] += columns - skips;
    if (total_[i] == 0) {  // no negatives: the loss is 0 whatever the positives are
      std::fill_n(z, columns, A(0));
      return;
    }
    const A away = largest_[i] + std::log(total_[i]);
    if (skips) z[skipped] = std::numeric_limits<A>::max() / 4 * args_.temperature;
    A softplus = 0;
    sigmoids_[i] += kernels.positives(z, columns, inverse_temperature_, away, &softplus);
    loss_[i] += softplus;
    if (skips) z[skipped] = 0;
  }

  // All anchors against all others: blocks of rows, each with all its columns.
  void contrast_anchors(Tensor& grad) {
    const auto& kernels = cpu::row_kernels<A>();
    for (int64_t i = 0; i < count_; ++i) {
      const auto [first, last] = range(label_[i]);
      positives_[i] = last - first - 1;
    }
    const Tensor scale = scales();
    const A* const scale_of = scale.template const_data_ptr<A>();
    const int64_t rows = std::max<int64_t>(1, std::min<int64_t>(count_, kTileNumbers / std::max<int64_t>(count_, 1)));
    for (int64_t first = 0; first < count_; first += rows) {
      const int64_t last = std::min(first + rows, count_), start = first;
      Tensor z = products(first, last, anchors_);
      A* const row = z.data_ptr<A>();
      cpu::Pieces(last - first, 64, 1).run([&](int64_t, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) contrast_row(kernels, row + r * count_, start + r, scale_of[start + r]);
      });
      if (args_.needs_grad) {  // z is now dloss/dz T; each pair pulls at both of its anchors
        grad.narrow(0, first, last - first).addmm_(z, anchors_);
        grad.addmm_(z.t(), anchors_.narrow(0, first, last - first));
      }
    }
  }

  void contrast_row(const cpu::RowKernels<A>& kernels, A* z, int64_t i, A scale) {
    const auto [own, behind] = range(label_[i]);
    const int64_t inside = behind - own, after = count_ - behind;
    if (own > 0) add_negatives(kernels, z, own, i, nullptr, 0);
    const A first_maximum = largest_[i];
    if (after > 0) add_negatives(kernels, z + behind, after, i, nullptr, 0);
    const int64_t count = positives_[i];
    add_positives(kernels, z + own, inside, i, i - own);
    positives_[i] = count;
    const A away = total_[i] > 0 ? scale * sigmoids_[i] / total_[i] : A(0);
    const A away_before = own > 0 ? away * std::exp(first_maximum - largest_[i]) : A(0);
    for (int64_t j = 0; j < own; ++j) z[j] *= away_before;
    for (int64_t j = own; j < behind; ++j) z[j] *= -scale;
    for (int64_t j = behind; j < count_; ++j) z[j] *= away;
  }

  // loss_weight / (T_base R P_i) for anchors with positives, else 0: [count]
  Tensor scales() {
    const auto used = std::count_if(positives_.begin(), positives_.end(), [](int64_t p) { return p > 0; });
    Tensor scale = at::zeros({count_}, anchors_.options());
    for (int64_t i = 0; i < count_; ++i) {
      if (positives_[i] > 0) {
        scale.data_ptr<A>()[i] =
            static_cast<A>(args_.loss_weight / args_.base_temperature / static_cast<double>(used * positives_[i]));
      }
    }
    return scale;
  }

  InfoNCEResult finish(const Tensor& grad) {
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
      result.grad.index_copy_(0, at::tensor(order_, at::kLong), grad);
    }
    return result;
  }

  const InfoNCE& args_;
  const A inverse_temperature_;
  int64_t count_;                       // V anchors that take part, sorted by class
  std::vector<int64_t> order_, label_;  // [V] place in the caller's list, class
  Tensor anchors_;                      // [V, D]
  Tensor buffer_;                       // room for the products of one tile
  std::vector<A> largest_, total_;      // [V] maximum of z over negatives, sum of e^(z - largest)
  std::vector<double> loss_;            // [V] sum over positives of l_ij - z_ij
  std::vector<A> sigmoids_;             // [V] sum over positives of s_ij
  std::vector<int64_t> positives_;      // [V] P_i
};

}  // namespace

InfoNCEResult infonce_cpu(const InfoNCE& args) {
  if (args.anchors.scalar_type() == at::kDouble) return Stream<double>(args).run();
  return Stream<float>(args).run();
}

}  // namespace pixcontrast
