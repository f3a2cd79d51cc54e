// s_i, as head_cpu.cpp has it, by a product that is rectified on its way to memory; sums over rows; the product towards
// the weight, whose operand is made once more; and dLoss/dh_i in the place of s_i.
//
// H100, 21125 rows x 256 to 256, float32: a matrix (22 MB, 7 us) is read or written about twelve times, 80 us; two
// products of 50 us of FMA units, or 6 us of tensor cores in bf16. The gradient of the weight has 4 tiles, split into
// 66 parts, whose 17 MB of sums take another 10 us.
#include "common/cuda/head.cuh"

namespace pixcontrast {
namespace cuda {
namespace {

constexpr int64_t kBlocks = 264;  // two for each multiprocessor of an H100; sums must not depend on the device

// ---- products

// s_i, in the place of dLoss/dh_i.
template <class Product>
__global__ void __launch_bounds__(kThreads, Product::kBlocks)
    head_chain(const __grid_constant__ HeadBackwardCuda<typename Product::Number> args, const Affine norm,
               bool grad_aligned, bool weight_aligned) {
  using T = typename Product::Number;
  CU_DYN_SHARED(T, shared);
  const int64_t width = args.rows.width, column_tiles = (width + kTile - 1) / kTile;
  const int64_t first_row = blockIdx.x / column_tiles * kTile, first_column = blockIdx.x % column_tiles * kTile;
  const int depth = static_cast<int>(args.outputs), columns_left = static_cast<int>(width - first_column);
  const auto grads = [&](int row, int k, int valid) {
    const int64_t r = first_row + row;
    return load_some(args.grad + r * depth + k, takes_part(args.rows, r) ? valid : 0, grad_aligned);
  };
  const auto weights = [&](int k) { return args.weight + k * width + first_column; };
  DepthRows<Product, decltype(grads)> a(depth, grads);
  RowColumns<Product, decltype(weights)> b(depth, columns_left, weight_aligned, weights);
  multiply<Product>(a, b, depth, shared, [&](int row, int column, float sum) {
    const int64_t r = first_row + row, e = first_column + column;
    if (r >= args.rows.total || column >= columns_left) return;
    const bool on = takes_part(args.rows, r) &&
                    fmaf(to_float(args.rows.hidden[r * width + e]), norm.scale[e], norm.shift[e]) > 0.0f;
    args.grad_hidden[r * width + e] = from_float<T>(on ? sum : 0.0f);
  });
}

// The sums of part p go to sums [O, E] + p O E.
template <class Product>
__global__ void __launch_bounds__(kThreads, Product::kBlocks)
    head_weight_gradient(const __grid_constant__ HeadBackwardCuda<typename Product::Number> args, const Affine norm,
                         int64_t part_rows, float* sums, bool grad_aligned, bool aligned) {
  using T = typename Product::Number;
  CU_DYN_SHARED(T, shared);
  const PartRows part(part_rows, args.rows.total);
  const int width = static_cast<int>(args.rows.width), outputs = static_cast<int>(args.outputs);
  const int column_tiles = (width + kTile - 1) / kTile;
  const int first_row = blockIdx.x / column_tiles * kTile, first_column = blockIdx.x % column_tiles * kTile;
  const int depth = static_cast<int>(part.end > part.first ? part.end - part.first : 0);
  const auto grads = [&](int k) {
    const int64_t r = part.first + k;
    return takes_part(args.rows, r) ? args.grad + r * outputs + first_row : nullptr;
  };
  const auto hidden = [&](int k) {
    const int64_t r = part.first + k;
    return takes_part(args.rows, r) ? args.rows.hidden + r * width + first_column : nullptr;
  };
  const auto rectify = [&](const Pack<T>& pack, int column, int) {
    return rectified(norm, pack, first_column + column);
  };
  RowColumns<Product, decltype(grads)> a(depth, outputs - first_row, grad_aligned, grads);
  RowColumns<Product, decltype(hidden), decltype(rectify)> b(depth, width - first_column, aligned, hidden, rectify);
  multiply<Product>(a, b, depth, shared, [&](int row, int column, float sum) {
    const int r = first_row + row, c = first_column + column;
    if (r < outputs && c < width) sums[(blockIdx.y * args.outputs + r) * width + c] = sum;
  });
}

// ---- sums over rows, and through BatchNorm

// b of part p goes to sums [E] + p E, a to that of the parts behind those of b.
template <class T>
__global__ void norm_sums(const __grid_constant__ HeadBackwardCuda<T> args, int64_t part_rows, float* sums) {
  const int64_t width = args.rows.width, column = int64_t{blockIdx.x} * kSumColumns + threadIdx.x;
  const bool inside = column < width;
  const float mean = inside ? args.norm.mean[column] : 0, rstd = inside ? args.norm.rstd[column] : 0;
  float of_part[2];
  sum_rows(PartRows(part_rows, args.rows.total), of_part, [&](int64_t row, float (&to)[2]) {
    if (!inside || !takes_part(args.rows, row)) return;
    const float s = to_float(args.grad_hidden[row * width + column]);
    to[0] += s;
    to[1] += s * ((to_float(args.rows.hidden[row * width + column]) - mean) * rstd);
  });
  if (threadIdx.y > 0 || !inside) return;
  sums[blockIdx.y * width + column] = of_part[0];
  sums[(gridDim.y + blockIdx.y) * width + column] = of_part[1];
}

template <class T>
__global__ void bias_sums(const __grid_constant__ HeadBackwardCuda<T> args, int64_t part_rows, float* sums) {
  const int64_t column = int64_t{blockIdx.x} * kSumColumns + threadIdx.x;
  float of_part[1];
  sum_rows(PartRows(part_rows, args.rows.total), of_part, [&](int64_t row, float (&to)[1]) {
    if (column < args.outputs && takes_part(args.rows, row)) to[0] += to_float(args.grad[row * args.outputs + column]);
  });
  if (threadIdx.y == 0 && column < args.outputs) sums[blockIdx.y * args.outputs + column] = of_part[0];
}

// From s_i to dLoss/dh_i, N numbers a thread.
template <class T, int N>
__global__ void through_norm(const __grid_constant__ HeadBackwardCuda<T> args) {
  const int64_t width = args.rows.width, first = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * N;
  const int64_t row = first / width, column = first % width;
  if (!takes_part(args.rows, row)) return;
  const float share = *args.share;
  const auto mean = load_few<N>(args.norm.mean + column), rstd = load_few<N>(args.norm.rstd + column);
  const auto weight = load_few<N>(args.norm.weight + column);
  const auto b = load_few<N>(args.grad_norm_bias + column), a = load_few<N>(args.grad_norm_weight + column);
  const auto hidden = load_few<N>(args.rows.hidden + first);
  auto grad = load_few<N>(args.grad_hidden + first);
  CU_UNROLL for (int i = 0; i < N; ++i) {
    const float x = (to_float(hidden.x[i]) - mean.x[i]) * rstd.x[i];
    const float s = to_float(grad.x[i]) - share * (b.x[i] + x * a.x[i]);
    grad.x[i] = from_float<T>(weight.x[i] * rstd.x[i] * s);
  }
  write_few(args.grad_hidden + first, grad);
}

// ---- launches

template <class T>
struct Plan {
  int64_t tiles, weights;
  Parts weight_parts, sum_parts;
  Affine norm;
  float* weight_sums;  // [parts, O, E]
  float* norm_sums;    // [2, parts, E]
  float* bias_sums;    // [parts, O]

  Plan(const HeadBackwardCuda<T>& args, Workspace& workspace)
      : tiles(int64_t{blocks_for(args.outputs, kTile)} * blocks_for(args.rows.width, kTile)),
        weights(args.outputs * args.rows.width),
        weight_parts(args.rows.total, tiles < kBlocks ? kBlocks / (tiles > 0 ? tiles : 1) : 1),
        sum_parts(args.rows.total, kMostParts),
        norm(workspace, args.rows.width) {
    weight_sums = workspace.take<float>(weight_parts.count * weights);
    norm_sums = workspace.take<float>(2 * sum_parts.count * args.rows.width);
    bias_sums = workspace.take<float>(sum_parts.count * args.outputs);
  }
};

// to [numbers] = sum over parts.
cudaError_t add_up(const float* sums, int64_t parts, int64_t numbers, float* to, cudaStream_t stream) {
  return cu_launch(add_parts<float>, dim3(blocks_for(numbers, 256)), dim3(256), 0, stream, sums, parts, numbers, to);
}

template <class T>
cudaError_t launch_chain(const HeadBackwardCuda<T>& args, const Plan<T>& plan, bool tensor_cores, cudaStream_t stream) {
  const dim3 grid(blocks_for(args.rows.total, kTile) * blocks_for(args.rows.width, kTile));
  return with_product<T>(tensor_cores, [&](auto product) {
    return cu_launch(head_chain<decltype(product)>, grid, dim3(kThreads), kSharedBytes<T>, stream, args, plan.norm,
                     aligned_rows(args.grad, args.outputs), aligned_rows(args.weight, args.rows.width));
  });
}

template <class T>
cudaError_t launch_weight_gradient(const HeadBackwardCuda<T>& args, const Plan<T>& plan, bool tensor_cores,
                                   cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.weight_parts.count));
  const cudaError_t status = with_product<T>(tensor_cores, [&](auto product) {
    return cu_launch(head_weight_gradient<decltype(product)>, grid, dim3(kThreads), kSharedBytes<T>, stream, args,
                     plan.norm, plan.weight_parts.rows, plan.weight_sums, aligned_rows(args.grad, args.outputs),
                     aligned_rows(args.rows.hidden, args.rows.width));
  });
  if (status != cudaSuccess) return status;
  return add_up(plan.weight_sums, plan.weight_parts.count, plan.weights, args.grad_weight, stream);
}

template <class T>
cudaError_t launch_sums(const HeadBackwardCuda<T>& args, const Plan<T>& plan, cudaStream_t stream) {
  const int64_t width = args.rows.width, parts = plan.sum_parts.count, rows = plan.sum_parts.rows;
  const dim3 threads(kSumColumns, kSumThreads);
  cudaError_t status =
      cu_launch(bias_sums<T>, sum_grid(args.outputs, plan.sum_parts), threads, 0, stream, args, rows, plan.bias_sums);
  if (status == cudaSuccess) status = add_up(plan.bias_sums, parts, args.outputs, args.grad_bias, stream);
  if (status == cudaSuccess) {
    status = cu_launch(norm_sums<T>, sum_grid(width, plan.sum_parts), threads, 0, stream, args, rows, plan.norm_sums);
  }
  if (status == cudaSuccess) status = add_up(plan.norm_sums, parts, width, args.grad_norm_bias, stream);
  if (status != cudaSuccess) return status;
  return add_up(plan.norm_sums + parts * width, parts, width, args.grad_norm_weight, stream);
}

template <class T>
cudaError_t launch_through_norm(const HeadBackwardCuda<T>& args, cudaStream_t stream) {
  const HeadNorm& norm = args.norm;
  const bool aligned = aligned_rows(args.rows.hidden, args.rows.width) && aligned16(args.grad_hidden) &&
                       aligned16(norm.mean) && aligned16(norm.rstd) && aligned16(norm.weight) &&
                       aligned16(args.grad_norm_bias) && aligned16(args.grad_norm_weight);
  const int64_t numbers = args.rows.total * args.rows.width, each = aligned ? kPack<T> : 1;
  const auto kernel = aligned ? through_norm<T, kPack<T>> : through_norm<T, 1>;
  return cu_launch(kernel, dim3(blocks_for(numbers, 256 * each)), dim3(256), 0, stream, args);
}

}  // namespace
}  // namespace cuda

template <class T>
size_t head_backward_cuda_workspace(const HeadBackwardCuda<T>& args) {
  cuda::Workspace workspace(nullptr);
  cuda::Plan<T>(args, workspace);
  return workspace.bytes();
}

template <class T>
cudaError_t head_backward_cuda(const HeadBackwardCuda<T>& args, bool tensor_cores, void* workspace,
                               cudaStream_t stream) {
  using namespace cuda;
  Workspace room(workspace);
  const Plan<T> plan(args, room);
  cudaError_t status = launch_fold_norm(args.norm, args.rows.width, plan.norm, stream);
  if (status == cudaSuccess && args.rows.total > 0) status = launch_chain(args, plan, tensor_cores, stream);
  if (status == cudaSuccess) status = launch_weight_gradient(args, plan, tensor_cores, stream);
  if (status == cudaSuccess) status = launch_sums(args, plan, stream);
  if (status == cudaSuccess && args.rows.total > 0) status = launch_through_norm(args, stream);
  return status;
}

#define INSTANTIATE(T)                                                      \
  template size_t head_backward_cuda_workspace(const HeadBackwardCuda<T>&); \
  template cudaError_t head_backward_cuda(const HeadBackwardCuda<T>&, bool, void*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(__nv_bfloat16)
INSTANTIATE(__half)

}  // namespace pixcontrast
