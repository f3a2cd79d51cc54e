#include "infonce/cpu.h"

#include <ATen/ATen.h>

#include <limits>

namespace pixcontrast {

template <class A>
SortedAnchors<A>::SortedAnchors(const InfoNCE& args)
    : args(args), inverse_temperature(static_cast<A>(1 / args.temperature)) {
  const auto* of = args.labels.const_data_ptr<int64_t>();
  const int64_t classes = args.queues.empty() ? std::numeric_limits<int64_t>::max() : args.queues[0].size(0);
  for (int64_t i = 0; i < args.labels.numel(); ++i) {
    if (of[i] >= 0 && of[i] < classes) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return of[a] < of[b]; });
  for (const int64_t i : order) label.push_back(of[i]);
  count = static_cast<int64_t>(order.size());
  dim = args.anchors.size(1);
  rows = args.anchors.index_select(0, at::tensor(order, at::kLong));
  if (args.needs_grad) grad = at::zeros_like(rows);
  loss.assign(count, 0);
  positives.assign(count, 0);
}

template <class A>
Range SortedAnchors<A>::of_class(int64_t c) const {
  const auto found = std::equal_range(label.begin(), label.end(), c);
  return {found.first - label.begin(), found.second - label.begin()};
}

template <class A>
std::vector<A> SortedAnchors<A>::scales() const {
  const auto used = std::count_if(positives.begin(), positives.end(), [](int64_t p) { return p > 0; });
  std::vector<A> scale(count);
  for (int64_t i = 0; i < count; ++i) {
    if (positives[i] == 0) continue;
    scale[i] = static_cast<A>(args.loss_weight / args.base_temperature / static_cast<double>(used * positives[i]));
  }
  return scale;
}

template <class A>
InfoNCEResult SortedAnchors<A>::result() const {
  InfoNCEResult made;
  made.anchor_loss = at::zeros({args.labels.numel()}, rows.options());
  made.positives = at::zeros({args.labels.numel()}, args.labels.options());
  double sum = 0;
  int64_t used = 0;
  for (int64_t i = 0; i < count; ++i) {
    made.positives.data_ptr<int64_t>()[order[i]] = positives[i];
    if (positives[i] == 0) continue;
    const double mine = loss[i] / static_cast<double>(positives[i]);
    made.anchor_loss.data_ptr<A>()[order[i]] = static_cast<A>(mine);
    sum += mine;
    ++used;
  }
  const double scale = args.loss_weight * args.temperature / args.base_temperature;
  made.loss = at::scalar_tensor(used ? scale * sum / static_cast<double>(used) : 0.0, rows.options());
  if (!args.needs_grad) {
    made.grad = at::empty({0}, rows.options());
  } else {
    made.grad = at::zeros_like(args.anchors);
    made.grad.index_copy_(0, at::tensor(order, at::kLong), grad);
  }
  return made;
}

namespace {

template <class A>
InfoNCEResult contrast(const InfoNCE& args) {
  SortedAnchors<A> anchors(args);
  args.queues.empty() ? contrast_each_other(anchors) : contrast_queues(anchors);
  return anchors.result();
}

}  // namespace

InfoNCEResult infonce_cpu(const InfoNCE& args) {
  return args.anchors.scalar_type() == at::kDouble ? contrast<double>(args) : contrast<float>(args);
}

template struct SortedAnchors<float>;
template struct SortedAnchors<double>;

}  // namespace pixcontrast
