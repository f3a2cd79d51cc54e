// Statistics of the columns, then a product whose operand is normalised and rectified on its way from memory. Nothing
// waits for the device, and what a row without part has is never used.
//
// H100, 21125 rows x 256 to 256: 22 MB a matrix in float32, 7 us; 2.8 GFLOP a product, 50 us of FMA units or 6 us of
// tensor cores in bf16. The hidden rows are read three times (the product has two tiles of outputs), the result written
// once: 30 us of memory.
#include "common/cuda/head.cuh"

namespace pixcontrast {
namespace cuda {
namespace {

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

#define INSTANTIATE(T)                                                                    \
  template size_t head_moments_cuda_workspace(const HeadMomentsCuda<T>&);                 \
  template cudaError_t head_moments_cuda(const HeadMomentsCuda<T>&, void*, cudaStream_t); \
  template size_t head_cuda_workspace(const HeadCuda<T>&);                                \
  template cudaError_t head_cuda(const HeadCuda<T>&, bool, void*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(__nv_bfloat16)
INSTANTIATE(__half)

}  // namespace pixcontrast
