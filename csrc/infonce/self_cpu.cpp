// Anchors against each other: panels of some anchors and all their partners, products by the library.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <cmath>

#include "common/cpu/pair_kernels.h"
#include "infonce/cpu.h"

namespace pixcontrast {
namespace {

constexpr int64_t kPanelNumbers = 1 << 22;  // anchors x anchors at a time: 16 MiB of float32

// z [V], products of anchor i with all, becomes dloss/dz T. Its negatives are before and behind its own class.
template <class A>
void contrast_row(SortedAnchors<A>& anchors, A* z, int64_t i, A scale) {
  const auto& kernels = cpu::pair_kernels<A>();
  const A inverse = anchors.inverse_temperature;
  const Range own = anchors.of_class(anchors.label[i]);
  const Range sides[] = {{0, own.first}, {own.last, anchors.count}};
  A largest = -std::numeric_limits<A>::infinity(), total = 0, softplus = 0, sigmoids = 0;
  for (const Range side : sides) {
    if (side.size() > 0) largest = std::max(largest, kernels.largest(z + side.first, side.size()) * inverse);
  }
  for (const Range side : sides) {
    if (side.size() > 0) total += kernels.exponentials(z + side.first, side.size(), inverse, largest);
  }
  if (total > 0) {
    const A limit = largest + std::log(total);
    for (const Range side : {Range{own.first, i}, Range{i + 1, own.last}}) {
      if (side.size() > 0) sigmoids += kernels.positives(z + side.first, side.size(), inverse, limit, &softplus);
    }
    z[i] = 0;
  } else {  // no negatives: the loss is 0 whatever the positives are
    std::fill(z + own.first, z + own.last, A(0));
  }
  anchors.loss[i] = softplus;
  const A away = total > 0 ? scale * sigmoids / total : A(0);
  for (const Range side : sides) {
    for (int64_t j = side.first; j < side.last; ++j) z[j] *= away;
  }
  for (int64_t j = own.first; j < own.last; ++j) z[j] *= -scale;
}

}  // namespace

template <class A>
void contrast_each_other(SortedAnchors<A>& anchors) {
  const int64_t count = anchors.count;
  const at::Tensor &rows = anchors.rows, &grad = anchors.grad;
  for (int64_t i = 0; i < count; ++i) anchors.positives[i] = anchors.of_class(anchors.label[i]).size() - 1;
  const std::vector<A> scale = anchors.scales();
  const int64_t height = std::clamp<int64_t>(kPanelNumbers / std::max<int64_t>(count, 1), 1, kPanelNumbers);
  const at::Tensor room = at::empty({std::min(height, count), count}, rows.options());
  for (int64_t first = 0; first < count; first += height) {
    const int64_t size = std::min(height, count - first);
    at::Tensor z = room.narrow(0, 0, size);
    at::mm_out(z, rows.narrow(0, first, size), rows.t());
    at::parallel_for(first, first + size, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) contrast_row(anchors, z.data_ptr<A>() + (i - first) * count, i, scale[i]);
    });
    if (!anchors.args.needs_grad) continue;
    // each pair pulls at both of its anchors
    if (size == count) {
      grad.addmm_(z + z.t(), rows);
    } else {
      grad.narrow(0, first, size).addmm_(z, rows);
      grad.addmm_(z.t(), rows.narrow(0, first, size));
    }
  }
}

template void contrast_each_other(SortedAnchors<float>&);
template void contrast_each_other(SortedAnchors<double>&);

}  // namespace pixcontrast
