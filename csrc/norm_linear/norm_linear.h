// The second half of a head: BatchNorm over the rows of each segment, (leaky) ReLU, and a linear layer.
//
//   x_i = (h_i - mean_c) rstd_c     y_i = norm_weight_c x_i + norm_bias_c     a_i = y_i if y_i > 0, else slope y_i
//
// for rows i of segment c. Behind it stands a dense layer of all segments, out_i = W a_i + b (a product of the
// library), or one output a segment, out_i = <weight_c, a_i> + bias_c. Activations a_i are not stored; backward
// recomputes them.
//
// With the gradient s_i that reaches y_i, and sums over the rows of a segment:
//   B = sum s_i               dL/dnorm_bias   = B
//   A = sum s_i x_i           dL/dnorm_weight = A
//   dL/dh_i = rstd norm_weight (s_i - share (B + x_i A))
// where share is one over the number of rows if mean and rstd are those of the rows, and 0 if they are constants. A
// bias added to h_i would cancel in the first case, so it is never added: it enters through the mean of the second
// case, and its gradient is rstd norm_weight B there and 0 elsewhere.
//
// No torch header: raw pointers and sizes. T is how hidden rows and activations are stored, Acc<T> everything else.
#pragma once

#include "common/layout.h"

namespace pixcontrast {

// Row i of the segments is hidden row order[i], or i where there is no order.
template <class T>
struct SegmentRows {
  Segments segments;     // P rows, C classes
  int64_t width;         // E
  const T* hidden;       // [P, E]
  const int64_t* order;  // [P] a permutation, or null

  PIXCONTRAST_HOST_DEVICE int64_t offset(int64_t row) const { return (order ? order[row] : row) * width; }
};

// Mean and rstd of the rows of each segment. A segment of fewer than two rows, and every segment outside of training,
// takes the running statistics, less the bias that was not added; other segments move the running statistics.
template <class T>
struct NormStats {
  SegmentRows<T> rows;
  bool training;
  Acc<T> momentum, eps;
  const Acc<T>* hidden_bias;  // [C, E]
  Acc<T>* running_mean;       // [C, E]
  Acc<T>* running_var;        // [C, E]
  int64_t* batches;           // [] counts trainings of the first segment, or null
  Acc<T>* mean;               // [C, E]
  Acc<T>* rstd;               // [C, E]
  Acc<T>* share;              // [C]

  // `variance` is divided by the number of rows.
  PIXCONTRAST_HOST_DEVICE void finish(int64_t c, int64_t e, Acc<T> row_mean, Acc<T> variance) const {
    const int64_t i = c * rows.width + e, count = rows.segments.count[c];
    const bool own = training && count >= 2;
    const Acc<T> bias = hidden_bias[i], n = static_cast<Acc<T>>(count);
    const Acc<T> old_mean = running_mean[i], old_var = running_var[i];
    mean[i] = own ? row_mean : old_mean - bias;
    rstd[i] = Acc<T>(1) / std::sqrt((own ? variance : old_var) + eps);
    if (e == 0) share[c] = own ? Acc<T>(1) / n : Acc<T>(0);
    if (!own) return;
    running_mean[i] = old_mean + momentum * (row_mean + bias - old_mean);
    running_var[i] = old_var + momentum * (variance * (n / (n - 1)) - old_var);
    if (i == 0 && batches) ++*batches;
  }
};

template <class T>
struct NormLinear {
  using A = Acc<T>;
  SegmentRows<T> rows;
  A slope;
  const A *mean, *rstd, *norm_weight, *norm_bias;  // [C, E]
  const A* weight;                                 // [C, E] one output a segment; null: dense
  const A* bias;                                   // [C]
  T* activations;                                  // [P, E] dense: a, 0 outside of segments
  A* out;                                          // [P] one output: 0 outside of segments
  // backward
  const A* share;             // [C]
  const T* grad_activations;  // [P, E] dense
  const A* grad_out;          // [P] one output
  T* grad_hidden;             // [P, E] at the place of the hidden row, 0 outside of segments
  A *grad_norm_weight, *grad_norm_bias, *grad_hidden_bias;  // [C, E]
  A* grad_weight;                                           // [C, E] one output
  A* grad_bias;                                             // [C] one output

  // Stores the sums of a segment and column: B and A as above, for one output without the factor weight_c.
  PIXCONTRAST_HOST_DEVICE void finish(int64_t c, int64_t e, A sum, A sum_x) const {
    const int64_t i = c * rows.width + e;
    const A factor = weight ? weight[i] : A(1);
    grad_norm_bias[i] = factor * sum;
    grad_norm_weight[i] = factor * sum_x;
    grad_hidden_bias[i] = share[c] > 0 ? A(0) : rstd[i] * norm_weight[i] * factor * sum;
    if (weight) grad_weight[i] = norm_weight[i] * sum_x + norm_bias[i] * sum;  // leaky(y) = leaky'(y) y
  }
};

template <class T>
void norm_stats_cpu(const NormStats<T>& args);
// Writes activations, or out.
template <class T>
void norm_forward_cpu(const NormLinear<T>& args);
template <class T>
void norm_backward_cpu(const NormLinear<T>& args);

#ifdef PIXCONTRAST_WITH_CUDA
// For float, __nv_bfloat16 and __half. A workspace has as many bytes as the first function says, aligned to 256; its
// contents may be anything.
template <class T>
size_t norm_workspace(const SegmentRows<T>& rows);
template <class T>
cudaError_t norm_stats_cuda(const NormStats<T>& args, void* workspace, cudaStream_t stream);
template <class T>
cudaError_t norm_forward_cuda(const NormLinear<T>& args, cudaStream_t stream);
template <class T>
cudaError_t norm_backward_cuda(const NormLinear<T>& args, void* workspace, cudaStream_t stream);
#endif

}  // namespace pixcontrast
