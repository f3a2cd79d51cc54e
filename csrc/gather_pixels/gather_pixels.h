// Some pixels of a feature map as rows, and the way back: sample first, then project.
//
//   gather_pixels    y_r = x_p(r) with p(r) = index[r]; y_r = 0 where p(r) is outside [0, P)
//   scatter_pixels   dx_p = sum_{r: p(r) = p} dy_r, added in the order of the rows and rounded once; 0 for other pixels
//
// No torch header: raw pointers and sizes. T is the dtype of features and rows.
#pragma once

#include "common/layout.h"

namespace pixcontrast {

template <class T>
struct GatherPixels {
  FeatureLayout layout;  // P pixels, D channels
  int64_t count;         // R
  const int64_t* index;  // [R] pixel of each row
  const int64_t* order;  // [R] the rows sorted by index, equal ones in their order; null for gather on CUDA
  const T* from;         // gather: features x; scatter: dy [R, D]
  T* to;                 // gather: y [R, D]; scatter: dx, laid out like features

  PIXCONTRAST_HOST_DEVICE bool has_pixel(int64_t row) const { return index[row] >= 0 && index[row] < layout.pixels; }
};

template <class T>
void gather_pixels_cpu(const GatherPixels<T>& args);
template <class T>
void scatter_pixels_cpu(const GatherPixels<T>& args);

#ifdef PIXCONTRAST_WITH_CUDA
// For float, __nv_bfloat16 and __half. One launch; scatter clears the features before.
template <class T>
cudaError_t gather_pixels_cuda(const GatherPixels<T>& args, cudaStream_t stream);
template <class T>
cudaError_t scatter_pixels_cuda(const GatherPixels<T>& args, cudaStream_t stream);
#endif

}  // namespace pixcontrast
