// The class selectors: for each class a Linear(D, E) - BatchNorm - LeakyReLU - Linear(E, 1) of its own.
//
//   h_i = first_c row_i                      (without bias, which the mean takes away)
//   x_i = (h_i - mean_c) * rstd_c            y_i = norm_weight_c * x_i + norm_bias_c
//   score_i = <weight_c, leaky(y_i)> + bias_c     leaky(y) = y for y > 0, else slope * y
//
// No torch header: raw pointers and sizes. T is the dtype of the first product and of hidden rows, Acc<T> of all else.
#pragma once

#include <cstdint>

#include "common/cpu/row_products.h"
#include "common/layout.h"

namespace pixcontrast {

constexpr double kSelectorSlope = 0.2;

// Rows of a matrix [N, D] sorted by class: class c has rows order[ends[c - 1]] to order[ends[c] - 1].
struct SortedRows {
  int64_t classes;
  const int64_t* order;  // [P], each row at most once
  const int64_t* ends;   // [C], ascending, the last one P
};

template <class T>
struct SelectorHidden {
  SortedRows sorted;
  int64_t width;         // E
  cpu::Source<T> rows;   // [N, D]
  cpu::Source<T> first;  // [C * E, D]
  T* hidden;             // [P, E]
  Acc<T>* mean;          // [C, E], 0 for a class without rows
  Acc<T>* variance;      // [C, E], divided by the number of rows
};

template <class T>
struct Selector {
  SortedRows sorted;
  int64_t width;              // E
  const T* hidden;            // [P, E]
  const Acc<T>* mean;         // [C, E]
  const Acc<T>* rstd;         // [C, E]
  const Acc<T>* norm_weight;  // [C, E]
  const Acc<T>* norm_bias;    // [C, E]
  const Acc<T>* weight;       // [C, E]
  const Acc<T>* bias;         // [C]; forward only
  Acc<T>* score;              // [N] where there is a row; forward only
  // backward only
  cpu::Source<T> rows;       // [N, D]
  cpu::Source<T> first;      // [C * E, D]
  const Acc<T>* grad_score;  // [N]
  const bool* own;           // [C] whether mean and rstd are those of the rows, or constants
  Acc<T>* grad_rows;         // [N, D] where there is a row, or null
  Acc<T>* grad_first;        // [C, E, D]
  Acc<T>* grad_norm_weight;  // [C, E]
  Acc<T>* grad_norm_bias;    // [C, E]
  Acc<T>* grad_weight;       // [C, E]
  Acc<T>* grad_bias;         // [C]
};

template <class T>
void selector_hidden_cpu(const SelectorHidden<T>& args);
template <class T>
void selector_cpu(const Selector<T>& args);
template <class T>
void selector_backward_cpu(const Selector<T>& args);

}  // namespace pixcontrast
