// head.h on CUDA. T in {float, __nv_bfloat16, __half}; all pointers are on the device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace pixcontrast {

// Rows [P, E], of which those take part that `valid` names; null: all.
template <class T>
struct HeadRowsCuda {
  const T* hidden;
  int64_t total, width;  // P, E
  const bool* valid;     // [P]
};

template <class T>
struct HeadMomentsCuda {
  HeadRowsCuda<T> rows;
  float* mean;      // [E]
  float* variance;  // [E], divided by the number of rows
  int64_t* count;   // how many rows take part
};

struct HeadNorm {
  const float *mean, *rstd, *weight, *bias;  // [E]
};

template <class T>
struct HeadCuda {
  HeadRowsCuda<T> rows;
  HeadNorm norm;
  int64_t outputs;    // O
  const T* weight;    // [O, E]
  const float* bias;  // [O]
  T* out;             // [P, O]
};

template <class T>
struct HeadBackwardCuda {
  HeadRowsCuda<T> rows;
  HeadNorm norm;
  int64_t outputs;
  const T* weight;          // [O, E]
  const T* grad;            // [P, O]
  const float* share;       // of a row in mean and variance, 0 where they are constants
  T* grad_hidden;           // [P, E]
  float* grad_norm_weight;  // [E]
  float* grad_norm_bias;    // [E]
  float* grad_weight;       // [O, E]
  float* grad_bias;         // [O]
};

template <class T>
size_t head_moments_cuda_workspace(const HeadMomentsCuda<T>& args);
template <class T>
cudaError_t head_moments_cuda(const HeadMomentsCuda<T>& args, void* workspace, cudaStream_t stream);

template <class T>
size_t head_cuda_workspace(const HeadCuda<T>& args);
// With tensor_cores, float is rounded to tf32; they need compute capability 8.0.
template <class T>
cudaError_t head_cuda(const HeadCuda<T>& args, bool tensor_cores, void* workspace, cudaStream_t stream);

template <class T>
size_t head_backward_cuda_workspace(const HeadBackwardCuda<T>& args);
template <class T>
cudaError_t head_backward_cuda(const HeadBackwardCuda<T>& args, bool tensor_cores, void* workspace,
                               cudaStream_t stream);

}  // namespace pixcontrast
