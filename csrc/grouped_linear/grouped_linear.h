// Matrix products of rows in segments, each segment with a matrix of its own: the first layer of the class selectors.
// The sizes of the segments stay on the device, where PyTorch's grouped_mm takes bfloat16 alone without waiting, and no
// gaps between segments. No torch header: raw pointers and sizes.
#pragma once

#include "common/layout.h"

namespace pixcontrast {

// result[i] = weight[c] rows[i] for row i of segment c. Rows outside of segments are not written.
template <class T>
struct GroupedLinear {
  Segments segments;     // P rows, C classes
  int64_t dim, outputs;  // D, E
  const T* rows;         // [P, D]
  const T* weight;       // [C, E, D]
  T* result;             // [P, E]
};

// result[c] = sum of left[i] right[i]^T over the rows i of segment c.
template <class T>
struct GroupedOuter {
  Segments segments;
  int64_t outputs, dim;  // E, D
  const T* left;         // [P, E]
  const T* right;        // [P, D]
  T* result;             // [C, E, D]
};

#ifdef PIXCONTRAST_WITH_CUDA
// For float, __nv_bfloat16 and __half. With tensor_cores, float is rounded to tf32; they need compute capability 8.0.
template <class T>
cudaError_t grouped_linear_cuda(const GroupedLinear<T>& args, bool tensor_cores, cudaStream_t stream);
template <class T>
size_t grouped_outer_cuda_workspace(const GroupedOuter<T>& args);
template <class T>
cudaError_t grouped_outer_cuda(const GroupedOuter<T>& args, bool tensor_cores, void* workspace, cudaStream_t stream);
#endif

}  // namespace pixcontrast
