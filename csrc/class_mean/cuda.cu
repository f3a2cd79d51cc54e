// Weighted mean unit row of each class of a memory on the device, and the gradient of its weights.
//
// Forward: a block sums up to 256 rows of a class, in registers, and a second launch adds the blocks' sums where a
// class has more. 19 x 256 x 256 float32 are 5 MB, 256 KB for each of 19 blocks of 16 warps with 64 KB in flight: one
// launch of about 5 us. With 2048 rows 152 blocks read 40 MB, 13 us at 3 TB/s. Backward: <G_c, z_j/|z_j|> by rows, then
// the rest by class.
#include <algorithm>

#include "class_mean/class_mean.h"
#include "common/cuda/classes.cuh"

namespace pixcontrast {
namespace cuda {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kPieceRows = 256;  // rows that one block sums up

template <class T>
__device__ __forceinline__ int valid_rows(const ClassMean<T>& args, int64_t c) {
  const int64_t count = args.counts[c];
  return static_cast<int>(count < 0 ? 0 : count > args.capacity ? args.capacity : count);
}

// v_j = factor * score(b_j, shift)
struct MemoryShare {
  float factor, shift;
};

// Of class c, for every thread of the block. `scratch` [kWarps] lies in shared memory. Ends with a barrier.
template <class T>
__device__ __forceinline__ MemoryShare memory_share(const ClassMean<T>& args, int64_t c, double* scratch) {
  const int count = valid_rows(args, c), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (args.weight_logits == nullptr) return {count > 0 ? 1.0f / static_cast<float>(count) : 0.0f, 0.0f};
  const float* const logits = args.weight_logits + c * args.capacity;
  int key = kLeastKey;
  for (int j = threadIdx.x; j < count; j += kThreads) key = max(key, order_key(logits[j]));
  key = warp_max(key);
  if (lane == 0) scratch[warp] = key;
  __syncthreads();
  for (int other = 0; other < kWarps; ++other) key = max(key, static_cast<int>(scratch[other]));
  __syncthreads();
  const float largest = from_order_key(key), shift = shift_of(largest);
  double total = 0;
  for (int j = threadIdx.x; j < count; j += kThreads) total += score(logits[j], shift);
  return {static_cast<float>(1 / block_sum<kWarps>(total, scratch)), shift};
}

// Grid: (classes, pieces, chunks of columns). out [C, pieces, D] gets the sum of the block's rows and columns.
template <class T, class Shape>
__global__ void __launch_bounds__(kThreads) sum_rows(const ClassMean<T> args, float* out) {
  constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns;
  CU_DYN_SHARED(float, warp_sums);  // [kWarps, kColumns], before that scratch for memory_share
  const int64_t c = blockIdx.x;
  const int dim = static_cast<int>(args.dim), warp = threadIdx.x / 32;
  const int chunk = blockIdx.z * kColumns;
  const MemoryShare share = memory_share(args, c, reinterpret_cast<double*>(warp_sums));
  const int64_t end = min(static_cast<int64_t>(blockIdx.y + 1) * kPieceRows, static_cast<int64_t>(valid_rows(args, c)));
  Few<float, Shape::kWidth> sum[Shape::kSlots];
  CU_UNROLL for (int slot = 0; slot < Shape::kSlots; ++slot) {
    CU_UNROLL for (int i = 0; i < Shape::kWidth; ++i) sum[slot].x[i] = 0;
  }

  int64_t j = static_cast<int64_t>(blockIdx.y) * kPieceRows + warp * kRows;
  for (; j < end; j += kWarps * kRows) {
    const T* const rows = args.queue + (c * args.capacity + j) * dim;
    RowChunk<T, Shape> row[kRows];
    CU_UNROLL for (int r = 0; r < kRows; ++r) {
      if (j + r < end) row[r].load(rows + static_cast<int64_t>(r) * dim, 1, chunk, dim);
    }
    CU_UNROLL for (int r = 0; r < kRows; ++r) {
      if (j + r >= end) break;
      float square = 0;
      row[r].add_products(nullptr, chunk, dim, &square, nullptr);
      for (int first = 0; kRows == 1 && first < dim; first += kColumns) {  // the columns of other blocks, for the norm
        RowChunk<T, Shape> other;
        if (first == chunk) continue;
        other.load(rows, 1, first, dim);
        other.add_products(nullptr, first, dim, &square, nullptr);
      }
      const float inverse = inverse_norm(warp_sum(square));
      if (inverse == 0) continue;
      const float weight =
          share.factor *
          (args.weight_logits ? score(args.weight_logits[c * args.capacity + j + r], share.shift) : 1.0f);
      Shape::for_columns(chunk, dim, [&](int slot, int) {
        CU_UNROLL for (int i = 0; i < Shape::kWidth; ++i) sum[slot].x[i] +=
            weight * inverse * to_float(row[r].x[slot].x[i]);
      });
    }
  }

  Shape::for_columns(chunk, dim,
                     [&](int slot, int column) { store_few(warp_sums + warp * kColumns + column - chunk, sum[slot]); });
  __syncthreads();
  for (int column = threadIdx.x; column < min(kColumns, dim - chunk); column += kThreads) {
    float total = 0;
    for (int other = 0; other < kWarps; ++other) total += warp_sums[other * kColumns + column];
    out[(c * gridDim.y + blockIdx.y) * dim + chunk + column] = total;
  }
}

// sums [C, pieces, D] to mean [C, D]
__global__ void add_pieces(const float* sums, float* mean, const int pieces, const int64_t dim,
                           const int64_t elements) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= elements) return;
  float total = 0;
  for (int piece = 0; piece < pieces; ++piece) total += sums[(i / dim * pieces + piece) * dim + i % dim];
  mean[i] = total;
}

// grad_weight_logits [C, N] gets g_j = <G_c, z_j/|z_j|>. Grid: (classes, groups of rows).
template <class T, class Shape>
__global__ void __launch_bounds__(kThreads) project_rows(const ClassMean<T> args) {
  constexpr int kRows = Shape::kRows;
  const int64_t c = blockIdx.x;
  const int dim = static_cast<int>(args.dim), lane = threadIdx.x % 32;
  const int64_t first_row = (static_cast<int64_t>(blockIdx.y) * kWarps + threadIdx.x / 32) * kRows;
  const int64_t end = valid_rows(args, c);
  const T* const rows = args.queue + (c * args.capacity + first_row) * dim;
  const float* const grad_mean = args.grad_mean + c * dim;
  RowChunk<T, Shape> row[kRows];
  CU_UNROLL for (int r = 0; r < kRows; ++r) {
    if (first_row + r < end) row[r].load(rows + static_cast<int64_t>(r) * dim, 1, 0, dim);
  }
  CU_UNROLL for (int r = 0; r < kRows; ++r) {
    if (first_row + r >= end) break;
    float square = 0, product = 0;
    row[r].add_products(grad_mean, 0, dim, &square, &product);
    for (int first = Shape::kColumns; kRows == 1 && first < dim; first += Shape::kColumns) {
      row[r].load(rows, 1, first, dim);
      row[r].add_products(grad_mean, first, dim, &square, &product);
    }
    const float inverse = inverse_norm(warp_sum(square));
    product = warp_sum(product);
    if (lane == 0) {
      args.grad_weight_logits[c * args.capacity + first_row + r] = inverse == 0 ? 0.0f : product * inverse;
    }
  }
}

// dLoss/db_j = v_j (1 - sigma(b_j)) (g_j - sum_k v_k g_k). A block for each class.
template <class T>
__global__ void __launch_bounds__(kThreads) finish_memory_weights(const ClassMean<T> args) {
  CU_SHARED(double, scratch, [kWarps]);
  const int64_t c = blockIdx.x;
  const int count = valid_rows(args, c);
  const MemoryShare share = memory_share(args, c, scratch);
  const float* const logits = args.weight_logits + c * args.capacity;
  float* const grad = args.grad_weight_logits + c * args.capacity;
  double mean = 0;
  for (int j = threadIdx.x; j < count; j += kThreads) {
    mean += static_cast<double>(share.factor * score(logits[j], share.shift)) * grad[j];
  }
  mean = block_sum<kWarps>(mean, scratch);
  for (int64_t j = threadIdx.x; j < args.capacity; j += kThreads) {
    grad[j] = j >= count ? 0.0f
                         : share.factor * score(logits[j], share.shift) * score(-logits[j], 0.0f) *
                               static_cast<float>(grad[j] - mean);
  }
}

template <class T>
int64_t pieces_of(const ClassMean<T>& args) {
  return std::max<int64_t>((args.capacity + kPieceRows - 1) / kPieceRows, 1);
}

template <class T, class Body>
cudaError_t with_shape_of(const ClassMean<T>& args, const float* other, const Body& body) {
  return with_row_shape<T>(args.dim, args.dim % kPack<T> == 0 && aligned16(args.queue) && aligned16(other), body);
}

}  // namespace cuda

template <class T>
size_t class_mean_cuda_workspace(const ClassMean<T>& args) {
  const int64_t pieces = cuda::pieces_of(args);
  return pieces == 1 ? 0 : static_cast<size_t>(args.classes * pieces * args.dim) * sizeof(float);
}

template <class T>
cudaError_t class_mean_cuda(const ClassMean<T>& args, void* workspace, cudaStream_t stream) {
  using namespace cuda;
  if (args.classes * args.dim == 0) return cudaSuccess;
  const int64_t pieces = pieces_of(args);
  float* const sums = pieces == 1 ? args.mean : static_cast<float*>(workspace);
  CU_TRY(with_shape_of(args, nullptr, [&](auto shape) {
    using Shape = decltype(shape);
    const dim3 grid(static_cast<unsigned>(args.classes), static_cast<unsigned>(pieces),
                    blocks_for(args.dim, Shape::kColumns));
    return cu_launch(sum_rows<T, Shape>, grid, dim3(kThreads), kWarps * Shape::kColumns * sizeof(float), stream, args,
                     sums);
  }));
  if (pieces == 1) return cudaSuccess;
  return cu_launch(add_pieces, dim3(blocks_for(args.classes * args.dim, kThreads)), dim3(kThreads), 0, stream, sums,
                   args.mean, pieces, args.dim, args.classes * args.dim);
}

template <class T>
cudaError_t class_mean_backward_cuda(const ClassMean<T>& args, cudaStream_t stream) {
  using namespace cuda;
  if (args.classes * args.capacity == 0) return cudaSuccess;
  CU_TRY(with_shape_of(args, args.grad_mean, [&](auto shape) {
    using Shape = decltype(shape);
    const dim3 grid(static_cast<unsigned>(args.classes), blocks_for(args.capacity, kWarps * Shape::kRows));
    return cu_launch(project_rows<T, Shape>, grid, dim3(kThreads), 0, stream, args);
  }));
  return cu_launch(finish_memory_weights<T>, dim3(static_cast<unsigned>(args.classes)), dim3(kThreads), 0, stream,
                   args);
}

#define INSTANTIATE(T)                                                            \
  template size_t class_mean_cuda_workspace(const ClassMean<T>&);                 \
  template cudaError_t class_mean_cuda(const ClassMean<T>&, void*, cudaStream_t); \
  template cudaError_t class_mean_backward_cuda(const ClassMean<T>&, cudaStream_t);
CU_FOR_DTYPES(INSTANTIATE)

}  // namespace pixcontrast
