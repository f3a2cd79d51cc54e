// Forward: rows of the result are rows of A, pixels gathered from the features; B is the weight.
//
// H100, 21125 pixels x 2048 to 256: 22 GFLOP, 332 blocks. The features are read twice (once from memory: blocks that
// share pixels are neighbours), the weight by each block from the L2 cache: in bf16 86 MB from memory (29 us), 0.35 GB
// from L2 (60 us), 55 us of tensor cores at 400 TFLOP/s; in float32 400 us of FMA units.
#include "common/cuda/launch.h"
#include "common/cuda/pixels.cuh"
#include "project_cuda.h"

namespace pixcontrast {
namespace cuda {
namespace {

template <class Product, bool kMaps>
__global__ void __launch_bounds__(kThreads, Product::kBlocks)
    project_tiles(const __grid_constant__ Project<typename Product::Number> args, bool features_aligned,
                  bool weight_aligned) {
  using T = typename Product::Number;
  CU_DYN_SHARED(T, shared);
  CU_SHARED(int64_t, start, [kTile]);  // of each pixel
  const int64_t dim = args.layout.dim, column_tiles = (args.outputs + kTile - 1) / kTile;
  const int64_t first_row = blockIdx.x / column_tiles * kTile, first_column = blockIdx.x % column_tiles * kTile;
  if (threadIdx.x < kTile) {
    const int64_t r = first_row + threadIdx.x;
    start[threadIdx.x] = r < args.rows ? start_of(args.layout, args.index[r]) : -1;
  }
  __syncthreads();

  const auto weights = [&](int row, int k, int valid) {
    const int64_t column = first_column + row;
    return load_some(args.weight + column * dim + k, column < args.outputs ? valid : 0, weight_aligned);
  };
  const auto pixels = [&](int row, int k, int valid) {
    return load_some(args.features + start[row] + k, start[row] >= 0 ? valid : 0, features_aligned);
  };
  const auto store = [&](int row, int column, float sum) {
    const int64_t r = first_row + row, c = first_column + column;
    if (r >= args.rows || c >= args.outputs) return;
    const float bias = args.bias ? to_float(args.bias[c]) : 0.0f;
    args.result[r * args.outputs + c] = from_float<T>(start[row] >= 0 ? sum + bias : 0.0f);
  };
  const int depth = static_cast<int>(dim);
  DepthRows<Product, decltype(weights)> b(depth, weights);
  if constexpr (kMaps) {
    const int64_t mine = start[threadIdx.x % kTile];
    PixelRows<Product> a(depth, mine >= 0 ? args.features + mine : nullptr, args.layout.map_pixels);
    multiply<Product>(a, b, depth, shared, store);
  } else {
    DepthRows<Product, decltype(pixels)> a(depth, pixels);
    multiply<Product>(a, b, depth, shared, store);
  }
}

}  // namespace
}  // namespace cuda

template <class T>
cudaError_t project_cuda(const Project<T>& args, bool tensor_cores, cudaStream_t stream) {
  using namespace cuda;
  if (args.rows * args.outputs == 0) return cudaSuccess;
  const bool features = aligned_rows(args.features, args.layout.dim),
             weight = aligned_rows(args.weight, args.layout.dim);
  const dim3 grid(blocks_for(args.rows, kTile) * blocks_for(args.outputs, kTile));
  return with_product<T>(tensor_cores, [&](auto product) {
    using Product = decltype(product);
    const auto kernel = args.layout.map_pixels ? project_tiles<Product, true> : project_tiles<Product, false>;
    return cu_launch(kernel, grid, dim3(kThreads), kSharedBytes<T>, stream, args, features, weight);
  });
}

template cudaError_t project_cuda(const Project<float>&, bool, cudaStream_t);
template cudaError_t project_cuda(const Project<__nv_bfloat16>&, bool, cudaStream_t);
template cudaError_t project_cuda(const Project<__half>&, bool, cudaStream_t);

}  // namespace pixcontrast
