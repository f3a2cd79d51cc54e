// Matrix products of rows sorted by class, each class with a matrix of its own: the linear layers of the class
// selectors. For T in {float, __nv_bfloat16, __half}; all pointers are on the device, and so are the ends of the
// classes, which nobody waits for. What PyTorch has for this takes bfloat16 alone without waiting.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace pixcontrast {

// Rows of class c are [ends[c - 1], ends[c]); ends[-1] is 0.
struct Groups {
  int64_t rows, count;  // P, C
  const int32_t* ends;  // [C] not decreasing, each at most P
};

// result[i] = weight[c] rows[i] for row i of class c. Rows from ends[C - 1] on are not written.
template <class T>
struct GroupedLinear {
  Groups groups;
  int64_t dim, outputs;  // D, E
  const T* rows;         // [P, D]
  const T* weight;       // [C, E, D]
  T* result;             // [P, E]
};

// result[c] = sum of left[i] right[i]^T over the rows i of class c.
template <class T>
struct GroupedOuter {
  Groups groups;
  int64_t outputs, dim;  // E, D
  const T* left;         // [P, E]
  const T* right;        // [P, D]
  T* result;             // [C, E, D]
};

// With tensor_cores, float is rounded to tf32; they need compute capability 8.0.
template <class T>
cudaError_t grouped_linear_cuda(const GroupedLinear<T>& args, bool tensor_cores, cudaStream_t stream);

template <class T>
size_t grouped_outer_cuda_workspace(const GroupedOuter<T>& args);
template <class T>
cudaError_t grouped_outer_cuda(const GroupedOuter<T>& args, bool tensor_cores, void* workspace, cudaStream_t stream);

}  // namespace pixcontrast
