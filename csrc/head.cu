// Forward: statistics of the columns, then a product whose operand is normalised and rectified on its way from memory.
// Backward: s_i, as head_cpu.cpp has it, by a product that is rectified on its way to memory; sums over rows; the
// product towards the weight, whose operand is made once more; and dLoss/dh_i in the place of s_i. Nothing waits for
// the device, and what a row without part has is never used.
//
// H100, 21125 rows x 256 to 256: 22 MB a matrix in float32, 7 us; 2.8 GFLOP a product, 50 us of FMA units or 6 us of
// tensor cores in bf16. Forward reads the hidden rows three times (the products of two tiles of outputs), writes
// once: 30 us of memory; backward reads or writes a matrix about twelve times, 80 us, and has two products.
#include "cuda/launch.h"
#include "cuda/parts.cuh"
#include "cuda/pixels.cuh"
#include "cuda/rows.cuh"
#include "head_cuda.h"

namespace pixcontrast {
namespace cuda {
namespace {

constexpr int64_t kBlocks = 264;  // two for each multiprocessor of an H100; sums must not depend on the device
constexpr int64_t kMostParts = 64;

template <class T>
__device__ __forceinline__ bool takes_part(const HeadRowsCuda<T>& rows, int64_t row) {
  return row < rows.total && (rows.valid == nullptr || rows.valid[row]);
}

// ---- statistics

// Of some numbers: how many there are, their mean, the sum of the squared deviations from it.
struct Moments {
  int count;
  float mean, squares;

  __device__ __forceinline__ void add(float x) {
    const float delta = x - mean;
    mean += delta / static_cast<float>(++count);
    squares += delta * (x - mean);
  }
  __device__ __forceinline__ void add(const Moments& other) {
    if (other.count == 0) return;
    const float delta = other.mean - mean, own = static_cast<float>(count);
    count += other.count;
    const float share = static_cast<float>(other.count) / static_cast<float>(count);
    mean += delta * share;
    squares += other.squares + delta * delta * own * share;
  }
};

// Those of part p and column e go to moments[p E + e].
template <class T>
__global__ void part_moments(const __grid_constant__ HeadMomentsCuda<T> args, int64_t part_rows, Moments* moments) {
  constexpr int kAtOnce = 4;  // loads under way
  CU_SHARED(Moments, part, [kSumThreads][kSumColumns]);
  const PartRows rows(part_rows, args.rows.total);
  const int64_t width = args.rows.width, column = int64_t{blockIdx.x} * kSumColumns + threadIdx.x;
  Moments own{0, 0.0f, 0.0f};
  for (int64_t first = rows.first + threadIdx.y; first < rows.end; first += kAtOnce * kSumThreads) {
    float x[kAtOnce];
    bool valid[kAtOnce];
    CU_UNROLL for (int i = 0; i < kAtOnce; ++i) {
      const int64_t row = first + i * kSumThreads;
      valid[i] = column < width && row < rows.end && takes_part(args.rows, row);
      x[i] = valid[i] ? to_float(args.rows.hidden[row * width + column]) : 0.0f;
    }
    CU_UNROLL for (int i = 0; i < kAtOnce; ++i) {
      if (valid[i]) own.add(x[i]);
    }
  }
  part[threadIdx.y][threadIdx.x] = own;
  __syncthreads();
  if (threadIdx.y > 0 || column >= width) return;
  for (int i = 1; i < kSumThreads; ++i) own.add(part[i][threadIdx.x]);
  moments[blockIdx.y * width + column] = own;
}

template <class T>
__global__ void add_moments(const __grid_constant__ HeadMomentsCuda<T> args, const Moments* moments, int64_t parts) {
  const int64_t width = args.rows.width, column = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (column >= width) return;
  Moments all = moments[column];
  for (int64_t p = 1; p < parts; ++p) all.add(moments[p * width + column]);
  args.mean[column] = all.mean;
  args.variance[column] = all.count > 0 ? all.squares / static_cast<float>(all.count) : 0.0f;
  if (column == 0) *args.count = all.count;
}

// ---- BatchNorm and ReLU

// y = scale h + shift, and y = 0 from column E on, up to a whole tile: what products need, without any condition.
struct Affine {
  float *scale, *shift;

  Affine(Workspace& workspace, int64_t width)
      : scale(workspace.take<float>(padded(width))), shift(workspace.take<float>(padded(width))) {}

  static int64_t padded(int64_t width) { return (width + kTile - 1) / kTile * kTile; }
};

__global__ void fold_norm(HeadNorm norm, int64_t width, const Affine to) {
  const int64_t column = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const bool inside = column < width;
  const float scale = inside ? norm.weight[column] * norm.rstd[column] : 0.0f;
  to.scale[column] = scale;
  to.shift[column] = inside ? norm.bias[column] - norm.mean[column] * scale : 0.0f;
}

cudaError_t launch_fold_norm(const HeadNorm& norm, int64_t width, const Affine& to, cudaStream_t stream) {
  return cu_launch(fold_norm, dim3(blocks_for(width, kTile)), dim3(kTile), 0, stream, norm, width, to);
}

// max(y, 0) of a pack of hidden numbers from `column` on.
template <class T>
__device__ __forceinline__ Pack<T> rectified(const Affine& norm, Pack<T> pack, int column) {
  CU_UNROLL for (int start = 0; start < kPack<T>; start += 4) {  // registers are scarce
    const auto scale = load_few<4>(norm.scale + column + start), shift = load_few<4>(norm.shift + column + start);
    CU_UNROLL for (int i = 0; i < 4; ++i) {
      const float y = fmaf(to_float(pack.x[start + i]), scale.x[i], shift.x[i]);
      pack.x[start + i] = from_float<T>(fmaxf(y, 0.0f));
    }
  }
  return pack;
}

// ---- products

template <class Product>
__global__ void __launch_bounds__(kThreads, Product::kBlocks)
    head_rows(const __grid_constant__ HeadCuda<typename Product::Number> args, const Affine norm, bool aligned,
              bool weight_aligned) {
  using T = typename Product::Number;
  CU_DYN_SHARED(T, shared);
  const int column_tiles = static_cast<int>((args.outputs + kTile - 1) / kTile);
  const int64_t first_row = int64_t{blockIdx.x / column_tiles} * kTile;
  const int first_column = blockIdx.x % column_tiles * kTile, width = static_cast<int>(args.rows.width);
  const int columns_left = static_cast<int>(args.outputs) - first_column;
  // Offsets inside a tile fit 32 bits, and registers are scarce.
  const T* const hidden = args.rows.hidden + first_row * width;
  const T* const weight = args.weight + int64_t{first_column} * width;
  const auto rows = [&](int row, int k, int valid) {
    return load_some(hidden + row * width + k, takes_part(args.rows, first_row + row) ? valid : 0, aligned);
  };
  const auto rectify = [&](const Pack<T>& pack, int column, int) { return rectified(norm, pack, column); };
  const auto weights = [&](int row, int k, int valid) {
    return load_some(weight + row * width + k, row < columns_left ? valid : 0, weight_aligned);
  };
  DepthRows<Product, decltype(rows), decltype(rectify)> a(width, rows, rectify);
  DepthRows<Product, decltype(weights)> b(width, weights);
  multiply<Product>(a, b, width, shared, [&](int row, int column, float sum) {
    const int64_t r = first_row + row;
    if (r >= args.rows.total || column >= columns_left) return;
    const float out = takes_part(args.rows, r) ? sum + args.bias[first_column + column] : 0.0f;
    args.out[r * args.outputs + first_column + column] = from_float<T>(out);
  });
}

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

dim3 sum_grid(int64_t columns, const Parts& parts) {
  return dim3(blocks_for(columns, kSumColumns), static_cast<unsigned>(parts.count));
}

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
size_t head_moments_cuda_workspace(const HeadMomentsCuda<T>& args) {
  return cuda::Parts(args.rows.total, cuda::kMostParts).count * args.rows.width * sizeof(cuda::Moments);
}

template <class T>
cudaError_t head_moments_cuda(const HeadMomentsCuda<T>& args, void* workspace, cudaStream_t stream) {
  using namespace cuda;
  const Parts parts(args.rows.total, kMostParts);
  auto* const moments = static_cast<Moments*>(workspace);
  const cudaError_t status = cu_launch(part_moments<T>, sum_grid(args.rows.width, parts),
                                       dim3(kSumColumns, kSumThreads), 0, stream, args, parts.rows, moments);
  if (status != cudaSuccess) return status;
  return cu_launch(add_moments<T>, dim3(blocks_for(args.rows.width, 256)), dim3(256), 0, stream, args, moments,
                   parts.count);
}

template <class T>
size_t head_cuda_workspace(const HeadCuda<T>& args) {
  cuda::Workspace workspace(nullptr);
  cuda::Affine(workspace, args.rows.width);
  return workspace.bytes();
}

template <class T>
cudaError_t head_cuda(const HeadCuda<T>& args, bool tensor_cores, void* workspace, cudaStream_t stream) {
  using namespace cuda;
  if (args.rows.total * args.outputs == 0) return cudaSuccess;
  Workspace room(workspace);
  const Affine norm(room, args.rows.width);
  const cudaError_t status = launch_fold_norm(args.norm, args.rows.width, norm, stream);
  if (status != cudaSuccess) return status;
  const dim3 grid(blocks_for(args.rows.total, kTile) * blocks_for(args.outputs, kTile));
  return with_product<T>(tensor_cores, [&](auto product) {
    return cu_launch(head_rows<decltype(product)>, grid, dim3(kThreads), kSharedBytes<T>, stream, args, norm,
                     aligned_rows(args.rows.hidden, args.rows.width), aligned_rows(args.weight, args.rows.width));
  });
}

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

#define INSTANTIATE(T)                                                                    \
  template size_t head_moments_cuda_workspace(const HeadMomentsCuda<T>&);                 \
  template cudaError_t head_moments_cuda(const HeadMomentsCuda<T>&, void*, cudaStream_t); \
  template size_t head_cuda_workspace(const HeadCuda<T>&);                                \
  template cudaError_t head_cuda(const HeadCuda<T>&, bool, void*, cudaStream_t);          \
  template size_t head_backward_cuda_workspace(const HeadBackwardCuda<T>&);               \
  template cudaError_t head_backward_cuda(const HeadBackwardCuda<T>&, bool, void*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(__nv_bfloat16)
INSTANTIATE(__half)

}  // namespace pixcontrast
