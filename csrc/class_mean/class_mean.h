// Weighted mean unit row of each class of a memory, and the gradient of its weights.
//
//   m_c = sum_j v_j z_j/|z_j|    v_j = sigma(b_j) / sum_k sigma(b_k)    over the valid memory rows of class c
//   dLoss/db_j = v_j (1 - sigma(b_j)) (g_j - sum_k v_k g_k)    with g_j = <dLoss/dm_c, z_j/|z_j|>
//
// No torch header: raw pointers and sizes. T is how rows are stored, Acc<T> what sums are kept in.
#pragma once

#include "common/layout.h"

namespace pixcontrast {

template <class T>
struct ClassMean {
  int64_t classes, capacity, dim;
  const T* queue;               // [C, N, D]
  const int64_t* counts;        // [C] valid rows come first
  const Acc<T>* weight_logits;  // [C, N] b, or null: all alike
  Acc<T>* mean;                 // [C, D] m; forward only
  const Acc<T>* grad_mean;      // [C, D] backward only
  Acc<T>* grad_weight_logits;   // [C, N] backward only
};

template <class T>
void class_mean_cpu(const ClassMean<T>& args);
template <class T>
void class_mean_backward_cpu(const ClassMean<T>& args);

#ifdef PIXCONTRAST_WITH_CUDA
// For float, __nv_bfloat16 and __half. The workspace has as many bytes as the first function says, aligned to 256; its
// contents may be anything.
template <class T>
size_t class_mean_cuda_workspace(const ClassMean<T>& args);
template <class T>
cudaError_t class_mean_cuda(const ClassMean<T>& args, void* workspace, cudaStream_t stream);
template <class T>
cudaError_t class_mean_backward_cuda(const ClassMean<T>& args, cudaStream_t stream);
#endif

}  // namespace pixcontrast
