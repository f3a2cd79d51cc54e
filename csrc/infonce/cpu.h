// What the two CPU forms of InfoNCE, anchors against queues and against each other, share.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "infonce/infonce.h"

namespace pixcontrast {

// A half-open range.
struct Range {
  int64_t first, last;
  int64_t size() const { return std::max<int64_t>(last - first, 0); }
};

inline Range common(Range a, Range b) { return {std::max(a.first, b.first), std::min(a.last, b.last)}; }

// The V anchors that take part, sorted by class, and what comes out for them. A: float or double.
template <class A>
struct SortedAnchors {
  explicit SortedAnchors(const InfoNCE& args);

  // Those of class c.
  Range of_class(int64_t c) const;

  // loss_weight / (T_base R P_i) for anchors with positives, else 0.
  std::vector<A> scales() const;

  InfoNCEResult result() const;

  const InfoNCE& args;
  const A inverse_temperature;
  int64_t count, dim;                 // V, D
  std::vector<int64_t> order, label;  // [V] place in the caller's list, class
  at::Tensor rows, grad;              // [V, D]; grad is undefined if none is wanted
  std::vector<double> loss;           // [V] sum over positives of l_ij - z_ij
  std::vector<int64_t> positives;     // [V] P_i
};

// Fill in loss, positives and grad.
template <class A>
void contrast_queues(SortedAnchors<A>& anchors);
template <class A>
void contrast_each_other(SortedAnchors<A>& anchors);

}  // namespace pixcontrast
