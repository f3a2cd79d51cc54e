// H100, 21125 rows x 256 to 256, 19 classes: 2.8 GFLOP, 184 x 2 blocks; in float32 50 us of FMA units. For the gradient
// of the weight, 30 pieces of at most 2048 rows x 4 tiles, whose 8 MB of sums take 5 us.
#include "common/cuda/classes.cuh"
#include "grouped_linear/grouped_linear.h"
#include "grouped_linear/product.cuh"

namespace pixcontrast {
namespace cuda {
namespace {

constexpr int64_t kPieceRows = 2048;  // of a partial sum of the outer products

template <class Product>
__global__ void __launch_bounds__(kThreads, Product::kBlocks)
    grouped_linear(const __grid_constant__ GroupedLinear<typename Product::Element> args, bool aligned) {
  using T = typename Product::Element;
  CU_DYN_SHARED(T, shared);
  const int column_tiles = static_cast<int>((args.outputs + kTile - 1) / kTile);
  const Piece piece = piece_of(args.segments, blockIdx.x / column_tiles, kTile);
  if (piece.c < 0) return;  // the whole block
  // Offsets inside a tile fit 32 bits, and registers are scarce.
  const int first_column = blockIdx.x % column_tiles * kTile, depth = static_cast<int>(args.dim);
  const int rows_left = static_cast<int>(piece.end - piece.first);
  const int columns_left = static_cast<int>(args.outputs) - first_column;
  const T* const first = args.rows + piece.first * args.dim;
  const T* const weight = args.weight + (piece.c * args.outputs + first_column) * args.dim;
  const auto rows = [&](int row, int k, int valid) {
    return load_some(first + row * depth + k, row < rows_left ? valid : 0, aligned);
  };
  const auto columns = [&](int row, int k, int valid) {
    return load_some(weight + row * depth + k, row < columns_left ? valid : 0, aligned);
  };
  DepthRows<Product, decltype(rows)> a(depth, rows);
  DepthRows<Product, decltype(columns)> b(depth, columns);
  T* const result = args.result + piece.first * args.outputs + first_column;
  multiply<Product>(a, b, depth, shared, [&](int row, int column, float sum) {
    if (row < rows_left && column < columns_left) result[row * args.outputs + column] = from_float<T>(sum);
  });
}

// The sum of piece p goes to sums [E, D] + p E D.
template <class Product>
__global__ void __launch_bounds__(kThreads, Product::kBlocks)
    grouped_outer(const __grid_constant__ GroupedOuter<typename Product::Element> args, float* sums, bool left_aligned,
                  bool right_aligned) {
  using T = typename Product::Element;
  CU_DYN_SHARED(T, shared);
  const Piece piece = piece_of(args.segments, blockIdx.y, kPieceRows);
  if (piece.c < 0) return;
  const int64_t column_tiles = (args.dim + kTile - 1) / kTile;
  const int64_t first_row = blockIdx.x / column_tiles * kTile, first_column = blockIdx.x % column_tiles * kTile;
  const auto left = [&](int k) { return args.left + (piece.first + k) * args.outputs + first_row; };
  const auto right = [&](int k) { return args.right + (piece.first + k) * args.dim + first_column; };
  const int depth = static_cast<int>(piece.end - piece.first);
  RowColumns<Product, decltype(left)> a(depth, args.outputs - first_row, left_aligned, left);
  RowColumns<Product, decltype(right)> b(depth, args.dim - first_column, right_aligned, right);
  multiply<Product>(a, b, depth, shared, [&](int row, int column, float sum) {
    const int64_t r = first_row + row, c = first_column + column;
    if (r < args.outputs && c < args.dim) sums[(blockIdx.y * args.outputs + r) * args.dim + c] = sum;
  });
}

// Adds the pieces of each class in order. Grid: (elements of a matrix / threads, classes).
template <class T>
__global__ void add_pieces(const __grid_constant__ GroupedOuter<T> args, const float* sums) {
  const int64_t elements = args.outputs * args.dim, i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= elements) return;
  const int64_t first = first_piece(args.segments, blockIdx.y, kPieceRows);
  const int64_t end = first + pieces_in(args.segments.count[blockIdx.y], kPieceRows);
  float sum = 0;
  for (int64_t piece = first; piece < end; ++piece) sum += sums[piece * elements + i];
  args.result[blockIdx.y * elements + i] = from_float<T>(sum);
}

}  // namespace
}  // namespace cuda

template <class T>
cudaError_t grouped_linear_cuda(const GroupedLinear<T>& args, bool tensor_cores, cudaStream_t stream) {
  using namespace cuda;
  if (args.segments.rows * args.outputs == 0) return cudaSuccess;
  const bool aligned = aligned_rows(args.rows, args.dim) && aligned_rows(args.weight, args.dim);
  const dim3 grid(static_cast<unsigned>(most_pieces(args.segments, kTile)) * blocks_for(args.outputs, kTile));
  return with_product<T>(tensor_cores, [&](auto product) {
    return cu_launch(grouped_linear<decltype(product)>, grid, dim3(kThreads), kSharedBytes<T>, stream, args, aligned);
  });
}

template <class T>
size_t grouped_outer_cuda_workspace(const GroupedOuter<T>& args) {
  return cuda::most_pieces(args.segments, cuda::kPieceRows) * args.outputs * args.dim * sizeof(float);
}

template <class T>
cudaError_t grouped_outer_cuda(const GroupedOuter<T>& args, bool tensor_cores, void* workspace, cudaStream_t stream) {
  using namespace cuda;
  const int64_t elements = args.outputs * args.dim;
  if (elements * args.segments.classes == 0) return cudaSuccess;
  float* const sums = static_cast<float*>(workspace);
  const dim3 grid(blocks_for(args.outputs, kTile) * blocks_for(args.dim, kTile),
                  static_cast<unsigned>(most_pieces(args.segments, kPieceRows)));
  CU_TRY(with_product<T>(tensor_cores, [&](auto product) {
    return cu_launch(grouped_outer<decltype(product)>, grid, dim3(kThreads), kSharedBytes<T>, stream, args, sums,
                     aligned_rows(args.left, args.outputs), aligned_rows(args.right, args.dim));
  }));
  const dim3 of_classes(blocks_for(elements, 256), static_cast<unsigned>(args.segments.classes));
  return cu_launch(add_pieces<T>, of_classes, dim3(256), 0, stream, args, sums);
}

#define INSTANTIATE(T)                                                                   \
  template cudaError_t grouped_linear_cuda(const GroupedLinear<T>&, bool, cudaStream_t); \
  template size_t grouped_outer_cuda_workspace(const GroupedOuter<T>&);                  \
  template cudaError_t grouped_outer_cuda(const GroupedOuter<T>&, bool, void*, cudaStream_t);
CU_FOR_DTYPES(INSTANTIATE)

}  // namespace pixcontrast
