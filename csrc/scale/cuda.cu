// unit_rows: one warp a row, which stays in the cache between its two readings. H100, 21125 x 256 float32: 43 MB, 13
// us.
#include <algorithm>

#include "common/cuda/warp.cuh"
#include "scale/scale.h"

namespace pixcontrast {
namespace cuda {

constexpr int kRowWarps = 8;

template <class T, int W>
__global__ void __launch_bounds__(32 * kRowWarps) unit_rows(const __grid_constant__ UnitRows<T> args) {
  const int64_t row = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / 32;
  if (row >= args.rows) return;  // the whole warp
  const T* const from = args.from + row * args.dim;
  const int64_t lane = threadIdx.x % 32;
  float square = 0;
  for (int64_t column = lane * W; column < args.dim; column += 32 * W) {
    const auto x = load_few<W>(from + column);
    CU_UNROLL for (int w = 0; w < W; ++w) square += to_float(x.x[w]) * to_float(x.x[w]);
  }
  const float scale = inverse_norm(warp_sum(square));
  for (int64_t column = lane * W; column < args.dim; column += 32 * W) {
    auto x = load_few<W>(from + column);
    CU_UNROLL for (int w = 0; w < W; ++w) x.x[w] = from_float<T>(to_float(x.x[w]) * scale);
    write_few(args.to + row * args.dim + column, x);
  }
}

constexpr int kScaleThreads = 256;

// Elements before the first multiple of 16 bytes and behind the last one are taken one by one.
template <class T>
__device__ __forceinline__ void scale_elements(T* data, int64_t count, float factor) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kScaleThreads;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kScaleThreads + threadIdx.x;
  const auto misplaced = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) % 16 / sizeof(T));
  const int64_t head = min(count, misplaced == 0 ? int64_t{0} : kPack<T> - misplaced);
  const int64_t tail = head + (count - head) / kPack<T> * kPack<T>;
  for (int64_t i = head + thread * kPack<T>; i < tail; i += threads * kPack<T>) {
    Pack<T> pack = load_pack(data + i);
    CU_UNROLL for (int k = 0; k < kPack<T>; ++k) pack.x[k] = from_float<T>(factor * to_float(pack.x[k]));
    store_pack(data + i, pack);
  }
  for (int64_t i = thread; i < head + (count - tail); i += threads) {
    T& element = data[i < head ? i : tail + i - head];
    element = from_float<T>(factor * to_float(element));
  }
}

// Grid: (blocks, tensors).
__global__ void __launch_bounds__(kScaleThreads) scale(const __grid_constant__ Scale args) {
  const float factor = *args.factor;
  if (factor == 1.0f) return;
  const auto& tensor = args.tensor[blockIdx.y];
  if (tensor.dtype == Dtype::kFloat) scale_elements(static_cast<float*>(tensor.data), tensor.count, factor);
  if (tensor.dtype == Dtype::kBFloat16) scale_elements(static_cast<__nv_bfloat16*>(tensor.data), tensor.count, factor);
  if (tensor.dtype == Dtype::kHalf) scale_elements(static_cast<__half*>(tensor.data), tensor.count, factor);
}

}  // namespace cuda

template <class T>
cudaError_t unit_rows_cuda(const UnitRows<T>& args, cudaStream_t stream) {
  using namespace cuda;
  if (args.rows == 0) return cudaSuccess;
  const bool aligned = args.dim % kPack<T> == 0 && aligned16(args.from) && aligned16(args.to);
  const auto kernel = aligned ? unit_rows<T, kPack<T>> : unit_rows<T, 1>;
  return cu_launch(kernel, dim3(blocks_for(args.rows, kRowWarps)), dim3(32 * kRowWarps), 0, stream, args);
}

#define INSTANTIATE(T) template cudaError_t unit_rows_cuda(const UnitRows<T>&, cudaStream_t);
CU_FOR_DTYPES(INSTANTIATE)

cudaError_t scale_cuda(const Scale& args, int sm_count, cudaStream_t stream) {
  using namespace cuda;
  int64_t most = 0;
  for (int i = 0; i < args.tensors; ++i) most = std::max(most, args.tensor[i].count);
  if (most == 0) return cudaSuccess;
  const unsigned blocks = std::min(blocks_for(most, int64_t{kScaleThreads} * 4), 8u * sm_count);
  return cu_launch(scale, dim3(blocks, args.tensors), dim3(kScaleThreads), 0, stream, args);
}

}  // namespace pixcontrast
