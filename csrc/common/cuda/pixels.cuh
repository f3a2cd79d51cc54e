// Where pixels lie in features, and which of the two products a launch uses.
#pragma once

#include "common/cuda/operands.cuh"
#include "common/layout.h"

namespace pixcontrast::cuda {

// Where the first channel of a pixel is; -1 for a pixel that does not exist.
__device__ __forceinline__ int64_t start_of(const FeatureLayout& layout, int64_t pixel) {
  if (pixel < 0 || pixel >= layout.pixels) return -1;
  const int64_t inside = layout.map_pixels;
  return inside == 0 ? pixel * layout.dim : pixel / inside * inside * layout.dim + pixel % inside;
}

// Whether all rows [., columns] start at multiples of 16 bytes.
template <class T>
bool aligned_rows(const T* rows, int64_t columns) {
  return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && columns % kPack<T> == 0;
}

template <class T, class Body>
cudaError_t with_product(bool tensor_cores, const Body& body) {
  return tensor_cores ? body(TensorProduct<T>()) : body(ExactProduct<T>());
}

}  // namespace pixcontrast::cuda
