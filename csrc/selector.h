// BatchNorm - LeakyReLU - Linear(E, 1) of the class selectors, for hidden rows that are sorted by class.
//
//   x_i = (h_i - mean_c) * rstd_c            y_i = norm_weight_c * x_i + norm_bias_c
//   score_i = <weight_c, leaky(y_i)> + bias_c     leaky(y) = y for y > 0, else slope * y
//
// No torch header: raw pointers and sizes. T is how hidden rows are stored, Acc<T> everything else.
#pragma once

#include <cstdint>

#include "positive.h"

namespace pixcontrast {

constexpr double kSelectorSlope = 0.2;

// The rows of class c are ends[c - 1] : ends[c].
struct SortedRows {
  int64_t classes, dim;
  const int64_t* ends;  // [C], ascending
};

template <class T>
struct SelectorStatistics {
  SortedRows rows;
  const T* hidden;   // [P, E]
  Acc<T>* mean;      // [C, E], 0 for a class without rows
  Acc<T>* variance;  // [C, E], divided by the number of rows
};

template <class T>
struct Selector {
  SortedRows rows;
  const T* hidden;            // [P, E]
  const Acc<T>* mean;         // [C, E]
  const Acc<T>* rstd;         // [C, E]
  const Acc<T>* norm_weight;  // [C, E]
  const Acc<T>* norm_bias;    // [C, E]
  const Acc<T>* weight;       // [C, E]
  const Acc<T>* bias;         // [C]; forward only
  Acc<T>* score;              // [P]; forward only
  // backward only
  const Acc<T>* grad_score;  // [P]
  const bool* own;           // [C] whether mean and rstd are those of the rows, or constants
  T* grad_hidden;            // [P, E]
  Acc<T>* grad_norm_weight;  // [C, E]
  Acc<T>* grad_norm_bias;    // [C, E]
  Acc<T>* grad_weight;       // [C, E]
  Acc<T>* grad_bias;         // [C]
};

template <class T>
void selector_statistics_cpu(const SelectorStatistics<T>& args);
template <class T>
void selector_cpu(const Selector<T>& args);
template <class T>
void selector_backward_cpu(const Selector<T>& args);

}  // namespace pixcontrast
