// Rows scaled to norm one, and gradients scaled by grad_output.
//
//   unit_rows  y_i = x_i / |x_i|, zero where |x_i| is below the floor; without gradient
//   scale_     tensors *= factor, for gradients that forward wrote for grad_output = 1. CUDA only: on a CPU grad_output
//              can be read, and is 1 for most losses.
#pragma once

#include "common/layout.h"

namespace pixcontrast {

template <class T>
struct UnitRows {
  int64_t rows, dim;
  const T* from;  // [P, D]
  T* to;          // [P, D]
};

constexpr int kMostScaled = 4;  // tensors of one launch

struct Scale {
  struct {
    void* data;     // [count] of dtype
    int64_t count;  // elements
    Dtype dtype;
  } tensor[kMostScaled];
  int tensors;
  const float* factor;  // []
};

#ifdef PIXCONTRAST_WITH_CUDA
// For float, __nv_bfloat16 and __half.
template <class T>
cudaError_t unit_rows_cuda(const UnitRows<T>& args, cudaStream_t stream);

// One launch. The factor stays on the device, so the host does not wait for it; where it is 1, nothing is read or
// written.
cudaError_t scale_cuda(const Scale& args, int sm_count, cudaStream_t stream);
#endif

}  // namespace pixcontrast
