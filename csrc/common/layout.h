// How features lie in memory, the rows of each class, and the dtype of sums. No torch header.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef PIXCONTRAST_WITH_CUDA
#include <cuda_runtime_api.h>  // types of launchers
#endif

#ifdef __CUDACC__
#define PIXCONTRAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PIXCONTRAST_HOST_DEVICE inline
#endif

namespace pixcontrast {

constexpr double kNormFloor = 1e-12;  // rows of a smaller norm count as the zero vector

// 1/|x| from |x|^2: 0 where the norm is below the floor, NaN where the square is beyond the range of A.
template <class A>
PIXCONTRAST_HOST_DEVICE A inverse_norm(A square) {
  const A norm = std::sqrt(square);
  return norm < A(kNormFloor) ? A(0) : 1 / norm + 0 * square;  // 0 times infinity is NaN
}

// Sums of T are kept in this type.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The gradient of features is stored in their dtype, but for float16 in float32: forward writes it for grad_output = 1,
// and under loss scaling its elements are in the range of float16 only after they are multiplied by grad_output.
template <class T, class Half>
using GradOf = std::conditional_t<std::is_same_v<T, Half>, float, T>;

// How the elements of a tensor are stored, where kernels learn it when they run.
enum class Dtype { kFloat, kBFloat16, kHalf, kDouble };

// A feature matrix of P pixels and D channels: rows [P, D] (also channels_last maps), or maps [B, D, H*W].
struct FeatureLayout {
  int64_t pixels;      // P in all
  int64_t dim;         // D
  int64_t map_pixels;  // H*W of maps, 0 for rows

  // Distance from one channel of a pixel to the next.
  PIXCONTRAST_HOST_DEVICE int64_t channel_stride() const { return map_pixels == 0 ? 1 : map_pixels; }

  // Where the first channel of a pixel is.
  PIXCONTRAST_HOST_DEVICE int64_t offset(int64_t pixel) const {
    if (map_pixels == 0) return pixel * dim;
    return pixel / map_pixels * map_pixels * dim + pixel % map_pixels;
  }
};

// Rows [P, .] of which begin(c) to end(c) - 1 are of class c. Segments ascend and do not overlap; rows outside of all
// segments are not valid. class_order makes start and count of a label map. Without start, segments lie P / C rows
// apart: one segment of all valid rows, or the filled rows of a memory [C, N, D].
struct Segments {
  int64_t rows;          // P
  int64_t classes;       // C
  const int64_t* start;  // [C] or null
  const int64_t* count;  // [C]

  PIXCONTRAST_HOST_DEVICE int64_t begin(int64_t c) const { return start ? start[c] : c * (rows / classes); }
  PIXCONTRAST_HOST_DEVICE int64_t end(int64_t c) const { return begin(c) + count[c]; }
};

}  // namespace pixcontrast
