// Gradients that forward wrote for grad_output = 1, multiplied by grad_output. CUDA only: on a CPU grad_output can be
// read, and is 1 for most losses.
#pragma once

#include "common/layout.h"

#ifdef PIXCONTRAST_WITH_CUDA
#include <cuda_runtime_api.h>

namespace pixcontrast {

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

// All tensors *= *factor, in one launch. The factor stays on the device, so the host does not wait for it; where it is
// 1, nothing is read or written.
cudaError_t scale_cuda(const Scale& args, int sm_count, cudaStream_t stream);

}  // namespace pixcontrast
#endif
