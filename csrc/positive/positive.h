// Class-wise memory contrast, positives only (Alonso et al., ICCV 2021, Eq. 8), in its factorised form.
//
//   L_c  = sum_i w_i (1 - <f_i/|f_i|, m_c>)    w_i = sigma(a_i) / sum_k sigma(a_k)    over the pixels of class c
//   loss = loss_weight / C * sum_c L_c         over classes with at least two pixels and two memory rows
//
// m_c is the weighted mean unit memory row of class_mean.h. No torch header: raw pointers and sizes. T is how features
// are stored, Acc<T> what sums are kept in.
#pragma once

#include "common/layout.h"

namespace pixcontrast {

constexpr int64_t kMinRows = 2;  // pixels, and memory rows, that a class needs to take part in the loss

template <class T>
struct Positive {
  FeatureLayout layout;
  int64_t classes;
  int64_t ignore_index;
  double loss_weight;
  const T* features;             // [P, D] or [B, D, H*W]
  const int64_t* labels;         // [P]
  const Acc<T>* weight_logits;   // [P] a, or null: all alike
  const Acc<T>* mean;            // [C, D] m
  const int64_t* memory_counts;  // [C]
  Acc<T>* loss;                  // []
  Acc<T>* class_loss;            // [C] L, 0 where a class takes no part
  int64_t* counts;               // [C] valid pixels
  int64_t* unknown;              // [] labels that are neither a class nor ignore_index
  void* grad_features;           // like features, of GradOf<T>; or null
  Acc<T>* grad_weight_logits;    // [P] or null
  Acc<T>* grad_mean;             // [C, D] or null
};

template <class T>
void positive_cpu(const Positive<T>& args);

#ifdef PIXCONTRAST_WITH_CUDA
// For float, __nv_bfloat16 and __half. The workspace has as many bytes as the first function says, aligned to 256; its
// contents may be anything. `sm_count` is the number of multiprocessors of the device: results are equal bit by bit on
// any device with as many. Nothing is allocated or read by the host, so the call can be captured in a CUDA graph.
template <class T>
size_t positive_cuda_workspace(const Positive<T>& args, int sm_count);
template <class T>
cudaError_t positive_cuda(const Positive<T>& args, int sm_count, void* workspace, cudaStream_t stream);
#endif

}  // namespace pixcontrast
