// What forward and backward of the heads share.
#pragma once

#include "common/cuda/launch.h"
#include "common/cuda/parts.cuh"
#include "common/cuda/pixels.cuh"
#include "common/cuda/rows.cuh"
#include "head_cuda.h"

namespace pixcontrast::cuda {

constexpr int64_t kMostParts = 64;

template <class T>
__device__ __forceinline__ bool takes_part(const HeadRowsCuda<T>& rows, int64_t row) {
  return row < rows.total && (rows.valid == nullptr || rows.valid[row]);
}

// ---- BatchNorm and ReLU

// y = scale h + shift, and y = 0 from column E on, up to a whole tile: what products need, without any condition.
struct Affine {
  float *scale, *shift;

  Affine(Workspace& workspace, int64_t width)
      : scale(workspace.take<float>(padded(width))), shift(workspace.take<float>(padded(width))) {}

  static int64_t padded(int64_t width) { return (width + kTile - 1) / kTile * kTile; }
};

static __global__ void fold_norm(HeadNorm norm, int64_t width, const Affine to) {
  const int64_t column = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const bool inside = column < width;
  const float scale = inside ? norm.weight[column] * norm.rstd[column] : 0.0f;
  to.scale[column] = scale;
  to.shift[column] = inside ? norm.bias[column] - norm.mean[column] * scale : 0.0f;
}

inline cudaError_t launch_fold_norm(const HeadNorm& norm, int64_t width, const Affine& to, cudaStream_t stream) {
  return cu_launch(fold_norm, dim3(blocks_for(width, kTile)), dim3(kTile), 0, stream, norm, width, to);
}

// max(y, 0) of a pack of hidden numbers from `column` on.
template <class T>
__device__ __forceinline__ Pack<T> rectified(const Affine& norm, Pack<T> pack, int column) {
  CU_UNROLL for (int start = 0; start < kPack<T>; start += 4) {  // registers are scarce
    const auto scale = load_few<4>(norm.scale + column + start), shift = load_few<4>(norm.shift + column + start);
    CU_UNROLL for (int i = 0; i < 4; ++i) {
      const float y = fmaf(to_float(pack.x[start + i]), scale.x[i], shift.x[i]);
      pack.x[start + i] = from_float<T>(y < 0.0f ? 0.0f : y);  // fmaxf would turn NaN into 0
    }
  }
  return pack;
}

}  // namespace pixcontrast::cuda
