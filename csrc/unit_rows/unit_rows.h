// Rows scaled to norm one, without gradient: x_i / |x_i|, and zero where |x_i| is below the floor.
#pragma once

#include "common/layout.h"

#ifdef PIXCONTRAST_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace pixcontrast {

template <class T>
struct UnitRows {
  int64_t rows, dim;
  const T* from;  // [P, D]
  T* to;          // [P, D]
};

#ifdef PIXCONTRAST_WITH_CUDA
// For float, __nv_bfloat16 and __half.
template <class T>
cudaError_t unit_rows_cuda(const UnitRows<T>& args, cudaStream_t stream);
#endif

}  // namespace pixcontrast
