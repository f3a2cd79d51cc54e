// Backward. Towards the features: rows of A are rows of dy in the order of their pixels, rows of one pixel added up, so
// that each pixel is written once; B is the weight. Towards the weight: A is dy, B the gathered pixels, the depth all
// rows, split into parts whose sums, in the workspace, are added in order.
//
// H100, 21125 pixels x 2048 from 256: each takes as many products as the forward. The gradient of the features is
// cleared and written, in bf16 2 x 86 MB (58 us); lanes of a warp write runs of 8 pixels or channels. The gradient of
// the weight reads the features twice and dy 16 times from L2 (0.35 GB, 60 us); its 32 tiles are split into 8 parts,
// 264 blocks, whose 17 MB of sums take another 10 us.
#include "common/cuda/launch.h"
#include "common/cuda/parts.cuh"
#include "common/cuda/pixels.cuh"
#include "project_cuda.h"

namespace pixcontrast {
namespace cuda {
namespace {

constexpr int64_t kBlocks = 264;  // two for each multiprocessor of an H100; sums must not depend on the device

// ---- features

// The sorted row s: where its pixel starts and how many rows, from s on, have that pixel; none after the first of them.
struct PixelRun {
  int64_t start;
  int64_t rows;
};

template <class T>
__device__ PixelRun run_at(const ProjectBackward<T>& args, int64_t s) {
  if (s >= args.rows) return {-1, 0};
  const int64_t pixel = args.index[args.order[s]], start = start_of(args.layout, pixel);
  if (start < 0 || (s > 0 && args.index[args.order[s - 1]] == pixel)) return {-1, 0};
  int64_t end = s + 1;
  while (end < args.rows && args.index[args.order[end]] == pixel) ++end;
  return {start, end - s};
}

// The sum of a pack of dy over the rows of one pixel.
template <class T>
__device__ __forceinline__ Pack<T> merged_pack(const ProjectBackward<T>& args, int64_t s, int64_t rows, int k,
                                               int valid, bool aligned) {
  const auto pack_at = [&](int64_t row) {
    return load_some(args.grad + args.order[row] * args.outputs + k, valid, aligned);
  };
  if (rows == 0) return load_some(args.grad, 0, false);
  Pack<T> pack = pack_at(s);
  if (rows == 1) return pack;
  float sum[kPack<T>];
  CU_UNROLL for (int i = 0; i < kPack<T>; ++i) sum[i] = to_float(pack.x[i]);
  for (int64_t next = 1; next < rows; ++next) {
    const Pack<T> other = pack_at(s + next);
    CU_UNROLL for (int i = 0; i < kPack<T>; ++i) sum[i] += to_float(other.x[i]);
  }
  CU_UNROLL for (int i = 0; i < kPack<T>; ++i) pack.x[i] = from_float<T>(sum[i]);
  return pack;
}

template <class Product>
__global__ void __launch_bounds__(kThreads, Product::kBlocks)
    feature_gradient(const __grid_constant__ ProjectBackward<typename Product::Number> args, bool grad_aligned,
                     bool weight_aligned) {
  using T = typename Product::Number;
  CU_DYN_SHARED(T, shared);
  CU_SHARED(PixelRun, run, [kTile]);
  const int64_t dim = args.layout.dim, column_tiles = (dim + kTile - 1) / kTile;
  const int64_t first_row = blockIdx.x / column_tiles * kTile, first_column = blockIdx.x % column_tiles * kTile;
  if (threadIdx.x < kTile) run[threadIdx.x] = run_at(args, first_row + threadIdx.x);
  __syncthreads();

  const auto rows = [&](int row, int k, int valid) {
    return merged_pack(args, first_row + row, run[row].rows, k, valid, grad_aligned);
  };
  const auto weights = [&](int k) { return args.weight + k * dim + first_column; };
  const int depth = static_cast<int>(args.outputs);
  const int64_t step = args.layout.map_pixels ? args.layout.map_pixels : 1;
  DepthRows<Product, decltype(rows)> a(depth, rows);
  RowColumns<Product, decltype(weights)> b(depth, static_cast<int>(dim - first_column), weight_aligned, weights);
  multiply<Product>(a, b, depth, shared, [&](int row, int column, float sum) {
    const int64_t c = first_column + column;
    if (run[row].start >= 0 && c < dim) args.grad_features[run[row].start + c * step] = from_float<T>(sum);
  });
}

// ---- weight and bias

__global__ void find_pixels(FeatureLayout layout, const int64_t* index, int64_t rows, int64_t* start) {
  const int64_t r = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (r < rows) start[r] = start_of(layout, index[r]);
}

// The sums of part p over its rows go to sums [Dout, Din] + p Dout Din.
template <class Product, bool kMaps>
__global__ void __launch_bounds__(kThreads, Product::kBlocks)
    weight_gradient(const __grid_constant__ ProjectBackward<typename Product::Number> args, const int64_t* start,
                    int64_t part_rows, float* sums, bool grad_aligned, bool features_aligned) {
  using T = typename Product::Number;
  CU_DYN_SHARED(T, shared);
  const int dim = static_cast<int>(args.layout.dim), column_tiles = (dim + kTile - 1) / kTile;
  const int first_row = blockIdx.x / column_tiles * kTile, first_column = blockIdx.x % column_tiles * kTile;
  const int64_t first = blockIdx.y * part_rows, left = args.rows - first;
  const int depth = static_cast<int>(left < 0 ? 0 : left < part_rows ? left : part_rows);
  start += first;

  const T *const grad = args.grad + first * args.outputs + first_row, *const features = args.features + first_column;
  const auto grads = [&](int k) { return start[k] >= 0 ? grad + k * args.outputs : nullptr; };
  const auto pixels = [&](int k) { return start[k] >= 0 ? features + start[k] : nullptr; };
  const auto store = [&](int row, int column, float sum) {
    const int r = first_row + row, c = first_column + column;
    if (r < args.outputs && c < dim) sums[(blockIdx.y * args.outputs + r) * dim + c] = sum;
  };
  RowColumns<Product, decltype(grads)> a(depth, static_cast<int>(args.outputs) - first_row, grad_aligned, grads);
  if constexpr (kMaps) {
    const int64_t inside = args.layout.map_pixels;
    ChannelRows<Product> b(depth, dim - first_column, args.features + first_column * inside, start, inside);
    multiply<Product>(a, b, depth, shared, store);
  } else {
    RowColumns<Product, decltype(pixels)> b(depth, dim - first_column, features_aligned, pixels);
    multiply<Product>(a, b, depth, shared, store);
  }
}

// Sums of dy over the rows of part p go to sums [Dout] + p Dout.
template <class T>
__global__ void bias_gradient(const __grid_constant__ ProjectBackward<T> args, const int64_t* start, int64_t part_rows,
                              float* sums) {
  const int64_t column = int64_t{blockIdx.x} * kSumColumns + threadIdx.x;
  float of_part[1];
  sum_rows(PartRows(part_rows, args.rows), of_part, [&](int64_t row, float (&to)[1]) {
    if (column < args.outputs && start[row] >= 0) to[0] += to_float(args.grad[row * args.outputs + column]);
  });
  if (threadIdx.y == 0 && column < args.outputs) sums[blockIdx.y * args.outputs + column] = of_part[0];
}

// ---- launches

template <class T>
struct Plan {
  Parts weight_parts, bias_parts;
  int64_t tiles, weights;
  int64_t* start;      // [R]
  float* weight_sums;  // [parts, Dout, Din]
  float* bias_sums;    // [parts, Dout]

  Plan(const ProjectBackward<T>& args, Workspace& workspace)
      : weight_parts(0, 1), bias_parts(args.rows, 64), weights(args.outputs * args.layout.dim) {
    tiles = int64_t{blocks_for(args.outputs, kTile)} * blocks_for(args.layout.dim, kTile);
    weight_parts = Parts(args.rows, tiles < kBlocks ? kBlocks / (tiles > 0 ? tiles : 1) : 1);
    start = workspace.take<int64_t>(args.rows);
    weight_sums = workspace.take<float>(args.grad_weight ? weight_parts.count * weights : 0);
    bias_sums = workspace.take<float>(args.grad_bias ? bias_parts.count * args.outputs : 0);
  }
};

template <class T>
cudaError_t launch_feature_gradient(const ProjectBackward<T>& args, bool tensor_cores, cudaStream_t stream) {
  const int64_t dim = args.layout.dim;
  const cudaError_t cleared = cudaMemsetAsync(args.grad_features, 0, args.layout.pixels * dim * sizeof(T), stream);
  if (cleared != cudaSuccess || args.rows * dim == 0) return cleared;
  const dim3 grid(blocks_for(args.rows, kTile) * blocks_for(dim, kTile));
  return with_product<T>(tensor_cores, [&](auto product) {
    return cu_launch(feature_gradient<decltype(product)>, grid, dim3(kThreads), kSharedBytes<T>, stream, args,
                     aligned_rows(args.grad, args.outputs), aligned_rows(args.weight, dim));
  });
}

template <class T>
cudaError_t launch_weight_gradient(const ProjectBackward<T>& args, const Plan<T>& plan, bool tensor_cores,
                                   cudaStream_t stream) {
  if (plan.weights == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.weight_parts.count));
  const cudaError_t status = with_product<T>(tensor_cores, [&](auto product) {
    using Product = decltype(product);
    const auto kernel = args.layout.map_pixels ? weight_gradient<Product, true> : weight_gradient<Product, false>;
    return cu_launch(kernel, grid, dim3(kThreads), kSharedBytes<T>, stream, args, plan.start, plan.weight_parts.rows,
                     plan.weight_sums, aligned_rows(args.grad, args.outputs),
                     aligned_rows(args.features, args.layout.dim));
  });
  if (status != cudaSuccess) return status;
  return cu_launch(add_parts<T>, dim3(blocks_for(plan.weights, 256)), dim3(256), 0, stream, plan.weight_sums,
                   plan.weight_parts.count, plan.weights, args.grad_weight);
}

template <class T>
cudaError_t launch_bias_gradient(const ProjectBackward<T>& args, const Plan<T>& plan, cudaStream_t stream) {
  if (args.outputs == 0) return cudaSuccess;
  const cudaError_t status =
      cu_launch(bias_gradient<T>, sum_grid(args.outputs, plan.bias_parts), dim3(kSumColumns, kSumThreads), 0, stream,
                args, plan.start, plan.bias_parts.rows, plan.bias_sums);
  if (status != cudaSuccess) return status;
  return cu_launch(add_parts<T>, dim3(blocks_for(args.outputs, 256)), dim3(256), 0, stream, plan.bias_sums,
                   plan.bias_parts.count, args.outputs, args.grad_bias);
}

}  // namespace
}  // namespace cuda

template <class T>
size_t project_backward_cuda_workspace(const ProjectBackward<T>& args) {
  cuda::Workspace workspace(nullptr);
  cuda::Plan<T>(args, workspace);
  return workspace.bytes();
}

template <class T>
cudaError_t project_backward_cuda(const ProjectBackward<T>& args, bool tensor_cores, void* workspace,
                                  cudaStream_t stream) {
  using namespace cuda;
  Workspace room(workspace);
  const Plan<T> plan(args, room);
  cudaError_t status = cudaSuccess;
  if (args.grad_features) status = launch_feature_gradient(args, tensor_cores, stream);
  if (status == cudaSuccess && args.rows > 0 && (args.grad_weight || args.grad_bias)) {
    status = cu_launch(find_pixels, dim3(blocks_for(args.rows, 256)), dim3(256), 0, stream, args.layout, args.index,
                       args.rows, plan.start);
  }
  if (status == cudaSuccess && args.grad_weight) status = launch_weight_gradient(args, plan, tensor_cores, stream);
  if (status == cudaSuccess && args.grad_bias) status = launch_bias_gradient(args, plan, stream);
  return status;
}

#define INSTANTIATE(T)                                                        \
  template size_t project_backward_cuda_workspace(const ProjectBackward<T>&); \
  template cudaError_t project_backward_cuda(const ProjectBackward<T>&, bool, void*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(__nv_bfloat16)
INSTANTIATE(__half)

}  // namespace pixcontrast
