// The hidden rows of a projection or prediction head through BatchNorm - ReLU - Linear(E, O).
//
//   x_i = (h_i - mean) * rstd     y_i = norm_weight * x_i + norm_bias     out_i = weight max(y_i, 0) + bias
//
// Only some of the P rows take part; the others neither count in the statistics nor get a gradient, and their out is
// zero. No torch header: raw pointers and sizes. T is the dtype of hidden rows, results and the product, Acc<T> of all
// else.
#pragma once

#include <cstdint>

#include "common/cpu/row_products.h"
#include "common/layout.h"

namespace pixcontrast {

// Rows [P, E] of which order[0] to order[count - 1], ascending, take part.
template <class T>
struct HeadRows {
  const T* hidden;
  int64_t total, width;  // P, E
  const int64_t* order;
  int64_t count;
};

template <class T>
struct HeadMoments {
  HeadRows<T> rows;
  Acc<T>* mean;      // [E]
  Acc<T>* variance;  // [E], divided by the number of rows
};

template <class T>
struct Head {
  HeadRows<T> rows;
  int64_t outputs;            // O
  const Acc<T>* mean;         // [E]
  const Acc<T>* rstd;         // [E]
  const Acc<T>* norm_weight;  // [E]
  const Acc<T>* norm_bias;    // [E]
  cpu::Source<T> weight;      // [O, E]
  const Acc<T>* bias;         // [O]; forward only
  T* out;                     // [P, O]; forward only
  // backward only
  const T* grad;             // [P, O]
  Acc<T> share;              // of a row in mean and variance; 0 where they are constants
  T* grad_hidden;            // [P, E]
  Acc<T>* grad_norm_weight;  // [E]
  Acc<T>* grad_norm_bias;    // [E]
  Acc<T>* grad_weight;       // [O, E]
  Acc<T>* grad_bias;         // [O]
};

template <class T>
void head_moments_cpu(const HeadMoments<T>& args);
template <class T>
void head_cpu(const Head<T>& args);
template <class T>
void head_backward_cpu(const Head<T>& args);

}  // namespace pixcontrast
