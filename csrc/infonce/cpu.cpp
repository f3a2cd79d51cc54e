// The valid anchors of InfoNCE in class order, their results, and the contrast of the anchors with each other.
#include "infonce/cpu.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <numeric>

#include "common/cpu/parallel.h"

namespace pixcontrast {
namespace {

constexpr int64_t kPanelElements = 1 << 22;  // of z at a time: 16 MiB of float32

// copy(element of the features, element of rows [V, D]) for the channels of all anchors. Each thread has channels of
// its own, so that pixels that occur twice are added in order.
template <class Copy>
void for_elements(const InfoNCE& args, const std::vector<int64_t>& order, const Copy& copy) {
  const int64_t dim = args.layout.dim, stride = args.layout.channel_stride();
  cpu::Pieces(dim, 16, 16).run([&](int64_t, int64_t begin, int64_t end) {
    for (size_t i = 0; i < order.size(); ++i) {
      const int64_t offset = args.layout.offset(args.index[order[i]]), row = static_cast<int64_t>(i) * dim;
      for (int64_t d = begin; d < end; ++d) copy(offset + d * stride, row + d);
    }
  });
}

}  // namespace

template <class A>
SortedAnchors<A>::SortedAnchors(const InfoNCE& args)
    : args(args), inverse_temperature(static_cast<A>(1 / args.temperature)), dim(args.layout.dim) {
  const int64_t* const labels = args.labels;
  for (int64_t i = 0; i < args.count; ++i) {
    if (args.index[i] >= 0 && labels[i] >= 0 && labels[i] < args.classes) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return labels[a] < labels[b]; });
  for (const int64_t i : order) label.push_back(labels[i]);
  count = static_cast<int64_t>(order.size());
  rows.resize(count * dim);
  if (args.grad_features) grad.resize(count * dim);
  loss.resize(count);
  positives.resize(count);
  with_dtype(args.dtype, [&](auto element) {
    const auto* const features = static_cast<const decltype(element)*>(args.features);
    for_elements(args, order, [&](int64_t from, int64_t to) { rows[to] = static_cast<A>(features[from]); });
  });
}

template <class A>
Range SortedAnchors<A>::of_class(int64_t c) const {
  const auto found = std::equal_range(label.begin(), label.end(), c);
  return {found.first - label.begin(), found.second - label.begin()};
}

template <class A>
std::vector<A> SortedAnchors<A>::grad_scales() const {
  const auto contributing = std::count_if(positives.begin(), positives.end(), [](int64_t p) { return p > 0; });
  std::vector<A> scale(count);
  for (int64_t i = 0; i < count; ++i) {
    if (positives[i] == 0) continue;
    const auto terms = static_cast<double>(contributing * positives[i]);
    scale[i] = static_cast<A>(args.loss_weight / args.base_temperature / terms);
  }
  return scale;
}

template <class A>
void SortedAnchors<A>::finish() const {
  auto* const anchor_loss = static_cast<A*>(args.anchor_loss);
  std::fill_n(anchor_loss, args.count, A(0));
  std::fill_n(args.positives, args.count, 0);
  double sum = 0;
  int64_t contributing = 0;
  for (int64_t i = 0; i < count; ++i) {
    args.positives[order[i]] = positives[i];
    if (positives[i] == 0) continue;
    const double mean = loss[i] / static_cast<double>(positives[i]);
    anchor_loss[order[i]] = static_cast<A>(mean);
    sum += mean;
    ++contributing;
  }
  const double scale = args.loss_weight * args.temperature / args.base_temperature;
  *static_cast<A*>(args.loss) = contributing ? static_cast<A>(scale * sum / static_cast<double>(contributing)) : A(0);
  if (!args.grad_features) return;
  with_dtype(args.dtype, [&](auto element) {
    using T = cpu::GradOf<decltype(element)>;
    auto* const to = static_cast<T*>(args.grad_features);
    cpu::Pieces(args.layout.pixels * dim, 64, 1 << 14).run([&](int64_t, int64_t begin, int64_t end) {
      std::fill(to + begin, to + end, T(0));
    });
    for_elements(args, order, [&](int64_t pixel, int64_t row) { to[pixel] += static_cast<T>(grad[row]); });
  });
}

// ---- anchors against each other: panels of some anchors and all their partners, products by the library

namespace {

// z [V], products of anchor i with all, becomes dloss/dz T. Its negatives are before and behind its own class.
template <class A>
void contrast_row(SortedAnchors<A>& anchors, A* z, int64_t i, A grad_scale) {
  const auto& kernels = cpu::pair_kernels<A>();
  const A inverse = anchors.inverse_temperature;
  const Range own = anchors.of_class(anchors.label[i]);
  const Range sides[] = {{0, own.begin}, {own.end, anchors.count}};
  A row_max = -INFINITY, sum_exp = 0, softplus = 0, sigmoids = 0;
  for (const Range side : sides) {
    if (side.size() > 0) row_max = std::max(row_max, kernels.largest(z + side.begin, side.size()) * inverse);
  }
  for (const Range side : sides) {
    if (side.size() > 0) sum_exp += kernels.exponentials(z + side.begin, side.size(), inverse, row_max);
  }
  const A lse = row_max + std::log(sum_exp);
  for (const Range side : {Range{own.begin, i}, Range{i + 1, own.end}}) {
    if (side.size() > 0) sigmoids += kernels.positives(z + side.begin, side.size(), inverse, lse, &softplus);
  }
  z[i] = 0;
  anchors.loss[i] = softplus;
  const A of_negatives = grad_scale * sigmoids / sum_exp;
  for (const Range side : sides) {
    for (int64_t j = side.begin; j < side.end; ++j) z[j] *= of_negatives;
  }
  for (int64_t j = own.begin; j < own.end; ++j) z[j] *= -grad_scale;
}

}  // namespace

template <class A>
void contrast_each_other(SortedAnchors<A>& anchors) {
  const int64_t count = anchors.count;
  const auto as_tensor = [&](std::vector<A>& matrix) {
    return at::from_blob(matrix.data(), {count, anchors.dim}, at::CppTypeToScalarType<A>::value);
  };
  const at::Tensor rows = as_tensor(anchors.rows);
  for (int64_t i = 0; i < count; ++i) anchors.positives[i] = anchors.of_class(anchors.label[i]).size() - 1;
  if (count == 0 || anchors.of_class(anchors.label[0]).size() == count) return;  // no negatives: the loss is 0
  const std::vector<A> grad_scale = anchors.grad_scales();
  const int64_t height = std::clamp<int64_t>(kPanelElements / count, 1, kPanelElements);
  const at::Tensor panel = at::empty({std::min(height, count), count}, rows.options());
  for (int64_t first = 0; first < count; first += height) {
    const int64_t size = std::min(height, count - first);
    at::Tensor z = panel.narrow(0, 0, size);
    at::mm_out(z, rows.narrow(0, first, size), rows.t());
    at::parallel_for(first, first + size, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        contrast_row(anchors, z.data_ptr<A>() + (i - first) * count, i, grad_scale[i]);
      }
    });
    if (anchors.grad.empty()) continue;
    at::Tensor grad = as_tensor(anchors.grad);
    if (size == count) {  // each pair has a gradient for both of its anchors
      grad.addmm_(z + z.t(), rows);
    } else {
      grad.narrow(0, first, size).addmm_(z, rows);
      grad.addmm_(z.t(), rows.narrow(0, first, size));
    }
  }
}

void infonce_cpu(const InfoNCE& args) {
  const auto contrast = [&](auto sum) {
    SortedAnchors<decltype(sum)> anchors(args);
    args.queues == 0 ? contrast_each_other(anchors) : contrast_queues(anchors);
    anchors.finish();
  };
  args.dtype == Dtype::kDouble ? contrast(double{}) : contrast(float{});
}

template struct SortedAnchors<float>;
template struct SortedAnchors<double>;

}  // namespace pixcontrast
