// Statistics and backward sums take two launches each: partial sums of pieces of a segment, then their sum in order.
// Everything else is one warp a row.
//
// H100, 21125 rows x 256, float32: a matrix is 22 MB, 7 us. Statistics read one, forward reads one and writes one (for
// one output a segment, nothing), backward reads two twice (one output: one twice) and writes one.
#include "common/cuda/classes.cuh"
#include "norm_linear/norm_linear.h"

namespace pixcontrast {
namespace cuda {
namespace {

constexpr int64_t kPieceRows = 128;
constexpr int kWarps = 8;
constexpr int kRowsAtOnce = 4;  // rows of a warp whose loads are under way together
constexpr int kSums = 3;        // of a column, at most

// ---- sums over the rows of a piece. Block: (32 lanes of W columns, kWarps rows); grid: (pieces, blocks of columns)

// load(row) reads what add(loaded, sums) needs of the thread's columns. partial [pieces, N, E].
template <int N, int W, class Load, class Add>
__device__ __forceinline__ void sum_piece(const Piece& piece, int64_t width, const Load& load, const Add& add,
                                          float* partial) {
  CU_SHARED(float, of_warp, [kWarps][N][32 * W]);
  const int lane = threadIdx.x, warp = threadIdx.y;
  float sums[N][W] = {};
  for (int64_t first = piece.first + warp; first < piece.end; first += kRowsAtOnce * kWarps) {
    decltype(load(first)) loaded[kRowsAtOnce];
    CU_UNROLL for (int i = 0; i < kRowsAtOnce; ++i) {
      if (first + i * kWarps < piece.end) loaded[i] = load(first + i * kWarps);
    }
    CU_UNROLL for (int i = 0; i < kRowsAtOnce; ++i) {
      if (first + i * kWarps < piece.end) add(loaded[i], sums);
    }
  }
  CU_UNROLL for (int n = 0; n < N; ++n) {
    CU_UNROLL for (int w = 0; w < W; ++w) of_warp[warp][n][lane * W + w] = sums[n][w];
  }
  __syncthreads();
  for (int k = warp * 32 + lane; k < N * 32 * W; k += kWarps * 32) {
    const int n = k / (32 * W);
    const int64_t column = int64_t{blockIdx.y} * 32 * W + k % (32 * W);
    if (column >= width) continue;
    float sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += of_warp[i][n][k % (32 * W)];
    partial[(blockIdx.x * N + n) * width + column] = sum;
  }
}

// The sums of deviations from the first row of the piece, and of their squares: a value near the mean, so that nothing
// cancels.
template <class T, int W>
__global__ void __launch_bounds__(32 * kWarps)
    norm_stats_partial(const __grid_constant__ NormStats<T> args, float* partial) {
  const Piece piece = piece_of(args.rows.segments, blockIdx.x, kPieceRows);
  if (piece.c < 0) return;  // the whole block
  const int64_t width = args.rows.width, column = (int64_t{blockIdx.y} * 32 + threadIdx.x) * W;
  const auto load = [&](int64_t row) {
    return column < width ? load_few<W>(args.rows.hidden + args.rows.offset(row) + column) : Few<T, W>{};
  };
  const Few<T, W> pivot = load(piece.first);
  const auto add = [&](const Few<T, W>& x, float (&sums)[2][W]) {
    CU_UNROLL for (int w = 0; w < W; ++w) {
      const float d = to_float(x.x[w]) - to_float(pivot.x[w]);
      sums[0][w] += d;
      sums[1][w] += d * d;
    }
  };
  sum_piece<2, W>(piece, width, load, add, partial);
}

// Mean and sum of the squared deviations from it, of some rows.
struct Moments {
  float count, mean, squares;

  __device__ __forceinline__ void add(const Moments& other) {
    if (other.count == 0) return;
    const float delta = other.mean - mean, own = count;
    count += other.count;
    mean += delta * (other.count / count);
    squares += other.squares + delta * delta * own * (other.count / count);
  }
};

// Block: (32 columns, kWarps); grid: (blocks of columns, classes).
template <class T>
__global__ void norm_stats_finish(const __grid_constant__ NormStats<T> args, const float* partial) {
  CU_SHARED(Moments, of_warp, [kWarps][32]);
  const int64_t width = args.rows.width, column = int64_t{blockIdx.x} * 32 + threadIdx.x, c = blockIdx.y;
  const Segments& segments = args.rows.segments;
  const int64_t first = first_piece(segments, c, kPieceRows);
  const int64_t pieces = args.training ? pieces_in(segments.count[c], kPieceRows) : 0;
  Moments own{0, 0, 0};
  if (column < width) {
    for (int64_t p = threadIdx.y; p < pieces; p += kWarps) {
      const int64_t row = segments.begin(c) + p * kPieceRows, left = segments.end(c) - row;
      const float count = static_cast<float>(left < kPieceRows ? left : kPieceRows);
      const float* const sums = partial + (first + p) * 2 * width + column;
      const float mean = sums[0] / count, pivot = to_float(args.rows.hidden[args.rows.offset(row) + column]);
      own.add({count, pivot + mean, sums[width] - sums[0] * mean});
    }
  }
  of_warp[threadIdx.y][threadIdx.x] = own;
  __syncthreads();
  if (threadIdx.y > 0 || column >= width) return;
  for (int i = 1; i < kWarps; ++i) own.add(of_warp[i][threadIdx.x]);
  args.finish(c, column, own.mean, own.squares < 0.0f ? 0.0f : own.squares / static_cast<float>(segments.count[c]));
}

// ---- normalise and activate

template <class T, int W>
struct Norm {
  Few<float, W> mean, rstd, weight, bias;

  __device__ __forceinline__ Norm(const NormLinear<T>& args, int64_t at)
      : mean(load_few<W>(args.mean + at)),
        rstd(load_few<W>(args.rstd + at)),
        weight(load_few<W>(args.norm_weight + at)),
        bias(load_few<W>(args.norm_bias + at)) {}

  __device__ __forceinline__ float x(int w, T hidden) const { return (to_float(hidden) - mean.x[w]) * rstd.x[w]; }
  __device__ __forceinline__ float y(int w, float x) const { return fmaf(weight.x[w], x, bias.x[w]); }
};

// The derivative of the activation, and y times it; NaN stays NaN.
__device__ __forceinline__ float slope_at(float y, float slope) { return y > 0.0f ? 1.0f : slope; }
__device__ __forceinline__ float activate(float y, float slope) { return y < 0.0f ? slope * y : y; }

// A row of this warp, and its class. Block: 256 threads.
struct WarpRow {
  int64_t row, c;
  int lane;

  __device__ __forceinline__ explicit WarpRow(const Segments& segments)
      : row(int64_t{blockIdx.x} * kWarps + threadIdx.x / 32),
        c(row < segments.rows ? class_of(segments, row) : -1),
        lane(threadIdx.x % 32) {}
};

template <class T, int W>
__global__ void __launch_bounds__(32 * kWarps) norm_forward_dense(const __grid_constant__ NormLinear<T> args) {
  const WarpRow at(args.rows.segments);
  const int64_t width = args.rows.width;
  if (at.row >= args.rows.segments.rows) return;
  const T* const hidden = args.rows.hidden + args.rows.offset(at.row);
  for (int64_t column = at.lane * W; column < width; column += 32 * W) {
    Few<T, W> out{};
    if (at.c >= 0) {
      const Norm<T, W> norm(args, at.c * width + column);
      const Few<T, W> h = load_few<W>(hidden + column);
      CU_UNROLL for (int w = 0; w < W; ++w) {
        out.x[w] = from_float<T>(activate(norm.y(w, norm.x(w, h.x[w])), args.slope));
      }
    }
    write_few(args.activations + at.row * width + column, out);
  }
}

template <class T, int W>
__global__ void __launch_bounds__(32 * kWarps) norm_forward_dot(const __grid_constant__ NormLinear<T> args) {
  const WarpRow at(args.rows.segments);
  const int64_t width = args.rows.width;
  float sum = 0;
  if (at.c >= 0) {
    const T* const hidden = args.rows.hidden + args.rows.offset(at.row);
    for (int64_t column = at.lane * W; column < width; column += 32 * W) {
      const Norm<T, W> norm(args, at.c * width + column);
      const Few<T, W> h = load_few<W>(hidden + column);
      const auto weight = load_few<W>(args.weight + at.c * width + column);
      CU_UNROLL for (int w = 0; w < W; ++w) {
        sum = fmaf(weight.x[w], activate(norm.y(w, norm.x(w, h.x[w])), args.slope), sum);
      }
    }
  }
  sum = warp_sum(sum);
  if (at.lane == 0 && at.row < args.rows.segments.rows) args.out[at.row] = at.c < 0 ? 0.0f : sum + args.bias[at.c];
}

// ---- backward

// What a row contributes to the sums of a column: the hidden row and the gradient that arrives.
template <class T, int W, bool Dense>
struct Arrived {
  Few<T, W> hidden;
  Few<T, Dense ? W : 1> dense;
  float one;

  __device__ __forceinline__ float grad(int w) const { return Dense ? to_float(dense.x[Dense ? w : 0]) : one; }
};

template <class T, int W, bool Dense>
__device__ __forceinline__ Arrived<T, W, Dense> load_arrived(const NormLinear<T>& args, int64_t row, int64_t column) {
  Arrived<T, W, Dense> arrived;
  arrived.hidden = load_few<W>(args.rows.hidden + args.rows.offset(row) + column);
  if constexpr (Dense) {
    arrived.dense = load_few<W>(args.grad_activations + row * args.rows.width + column);
  } else {
    arrived.one = args.grad_out[row];
  }
  return arrived;
}

// The sums of s, of s x and, for one output, of the incoming gradient; s without the factor weight_c.
template <class T, int W, bool Dense>
__global__ void __launch_bounds__(32 * kWarps)
    norm_backward_partial(const __grid_constant__ NormLinear<T> args, float* partial) {
  const Piece piece = piece_of(args.rows.segments, blockIdx.x, kPieceRows);
  if (piece.c < 0) return;  // the whole block
  const int64_t width = args.rows.width, own = (int64_t{blockIdx.y} * 32 + threadIdx.x) * W;
  const int64_t column = own < width ? own : 0;  // threads beyond the last column repeat the first, and store nothing
  const Norm<T, W> norm(args, piece.c * width + column);
  const auto load = [&](int64_t row) { return load_arrived<T, W, Dense>(args, row, column); };
  const auto add = [&](const Arrived<T, W, Dense>& arrived, float (&sums)[Dense ? 2 : 3][W]) {
    CU_UNROLL for (int w = 0; w < W; ++w) {
      const float x = norm.x(w, arrived.hidden.x[w]), s = arrived.grad(w) * slope_at(norm.y(w, x), args.slope);
      sums[0][w] += s;
      sums[1][w] += s * x;
      if constexpr (!Dense) sums[2][w] += arrived.one;
    }
  };
  sum_piece<Dense ? 2 : 3, W>(piece, width, load, add, partial);
}

// Block: (32 columns, kWarps); grid: (blocks of columns, classes).
template <class T, int N>
__global__ void norm_backward_finish(const __grid_constant__ NormLinear<T> args, const float* partial) {
  CU_SHARED(float, of_warp, [kWarps][N][32]);
  const int64_t width = args.rows.width, column = int64_t{blockIdx.x} * 32 + threadIdx.x, c = blockIdx.y;
  const Segments& segments = args.rows.segments;
  const int64_t first = first_piece(segments, c, kPieceRows), pieces = pieces_in(segments.count[c], kPieceRows);
  float sums[N] = {};
  for (int64_t p = threadIdx.y; column < width && p < pieces; p += kWarps) {
    CU_UNROLL for (int n = 0; n < N; ++n) sums[n] += partial[((first + p) * N + n) * width + column];
  }
  CU_UNROLL for (int n = 0; n < N; ++n) of_warp[threadIdx.y][n][threadIdx.x] = sums[n];
  __syncthreads();
  if (threadIdx.y > 0 || column >= width) return;
  for (int i = 1; i < kWarps; ++i) {
    CU_UNROLL for (int n = 0; n < N; ++n) sums[n] += of_warp[i][n][threadIdx.x];
  }
  args.finish(c, column, sums[0], sums[1]);
  if (N == 3 && column == 0) args.grad_bias[c] = sums[N - 1];
}

template <class T, int W, bool Dense>
__global__ void __launch_bounds__(32 * kWarps) norm_backward_apply(const __grid_constant__ NormLinear<T> args) {
  const WarpRow at(args.rows.segments);
  const int64_t width = args.rows.width;
  if (at.row >= args.rows.segments.rows) return;
  T* const grad_hidden = args.grad_hidden + args.rows.offset(at.row);
  for (int64_t column = at.lane * W; column < width; column += 32 * W) {
    Few<T, W> grad{};
    if (at.c >= 0) {
      const int64_t i = at.c * width + column;
      const Norm<T, W> norm(args, i);
      const auto arrived = load_arrived<T, W, Dense>(args, at.row, column);
      const auto sum = load_few<W>(args.grad_norm_bias + i), sum_x = load_few<W>(args.grad_norm_weight + i);
      Few<float, W> weight;
      if constexpr (!Dense) weight = load_few<W>(args.weight + i);
      const float share = args.share[at.c];
      CU_UNROLL for (int w = 0; w < W; ++w) {
        const float x = norm.x(w, arrived.hidden.x[w]);
        float s = arrived.grad(w) * slope_at(norm.y(w, x), args.slope);
        if constexpr (!Dense) s *= weight.x[w];
        grad.x[w] = from_float<T>(norm.weight.x[w] * norm.rstd.x[w] * (s - share * (sum.x[w] + x * sum_x.x[w])));
      }
    }
    write_few(grad_hidden + column, grad);
  }
}

// ---- launches

// body(std::integral_constant<int, columns of a thread>): 16 bytes of T, if all addresses allow it.
template <class T, class Body>
cudaError_t with_columns(int64_t width, std::initializer_list<const void*> pointers, const Body& body) {
  bool aligned = width % kPack<T> == 0;
  for (const void* pointer : pointers) aligned = aligned && aligned16(pointer);
  return aligned ? body(std::integral_constant<int, kPack<T>>()) : body(std::integral_constant<int, 1>());
}

template <class T>
dim3 partial_grid(const SegmentRows<T>& rows, int columns) {
  return dim3(static_cast<unsigned>(most_pieces(rows.segments, kPieceRows)), blocks_for(rows.width, 32 * columns));
}
template <class T>
dim3 finish_grid(const SegmentRows<T>& rows) {
  return dim3(blocks_for(rows.width, 32), static_cast<unsigned>(rows.segments.classes));
}
template <class T>
dim3 row_grid(const SegmentRows<T>& rows) {
  return dim3(blocks_for(rows.segments.rows, kWarps));
}

}  // namespace
}  // namespace cuda

template <class T>
size_t norm_workspace(const SegmentRows<T>& rows) {
  return cuda::most_pieces(rows.segments, cuda::kPieceRows) * cuda::kSums * rows.width * sizeof(float);
}

template <class T>
cudaError_t norm_stats_cuda(const NormStats<T>& args, void* workspace, cudaStream_t stream) {
  using namespace cuda;
  float* const partial = static_cast<float*>(workspace);
  if (args.rows.width * args.rows.segments.classes == 0) return cudaSuccess;
  if (args.training) {
    CU_TRY(with_columns<T>(args.rows.width, {args.rows.hidden}, [&](auto columns) {
      constexpr int W = decltype(columns)::value;
      return cu_launch(norm_stats_partial<T, W>, partial_grid(args.rows, W), dim3(32, kWarps), 0, stream, args,
                       partial);
    }));
  }
  return cu_launch(norm_stats_finish<T>, finish_grid(args.rows), dim3(32, kWarps), 0, stream, args, partial);
}

template <class T>
cudaError_t norm_forward_cuda(const NormLinear<T>& args, cudaStream_t stream) {
  using namespace cuda;
  if (args.rows.segments.rows == 0) return cudaSuccess;
  const std::initializer_list<const void*> pointers{args.rows.hidden, args.activations, args.mean,  args.rstd,
                                                    args.norm_weight, args.norm_bias,   args.weight};
  return with_columns<T>(args.rows.width, pointers, [&](auto columns) {
    constexpr int W = decltype(columns)::value;
    const auto kernel = args.weight ? norm_forward_dot<T, W> : norm_forward_dense<T, W>;
    return cu_launch(kernel, row_grid(args.rows), dim3(32 * kWarps), 0, stream, args);
  });
}

template <class T>
cudaError_t norm_backward_cuda(const NormLinear<T>& args, void* workspace, cudaStream_t stream) {
  using namespace cuda;
  float* const partial = static_cast<float*>(workspace);
  if (args.rows.width * args.rows.segments.classes == 0) return cudaSuccess;
  const std::initializer_list<const void*> pointers{
      args.rows.hidden, args.grad_activations, args.grad_hidden,      args.mean,           args.rstd,
      args.norm_weight, args.norm_bias,        args.grad_norm_weight, args.grad_norm_bias, args.weight};
  return with_columns<T>(args.rows.width, pointers, [&](auto columns) {
    constexpr int W = decltype(columns)::value;
    const auto partial_sums = args.weight ? norm_backward_partial<T, W, false> : norm_backward_partial<T, W, true>;
    const auto finish = args.weight ? norm_backward_finish<T, 3> : norm_backward_finish<T, 2>;
    const auto apply = args.weight ? norm_backward_apply<T, W, false> : norm_backward_apply<T, W, true>;
    CU_TRY(cu_launch(partial_sums, partial_grid(args.rows, W), dim3(32, kWarps), 0, stream, args, partial));
    CU_TRY(cu_launch(finish, finish_grid(args.rows), dim3(32, kWarps), 0, stream, args, partial));
    if (args.rows.segments.rows == 0) return cudaSuccess;
    return cu_launch(apply, row_grid(args.rows), dim3(32 * kWarps), 0, stream, args);
  });
}

#define INSTANTIATE(T)                                                            \
  template size_t norm_workspace(const SegmentRows<T>&);                          \
  template cudaError_t norm_stats_cuda(const NormStats<T>&, void*, cudaStream_t); \
  template cudaError_t norm_forward_cuda(const NormLinear<T>&, cudaStream_t);     \
  template cudaError_t norm_backward_cuda(const NormLinear<T>&, void*, cudaStream_t);
CU_FOR_DTYPES(INSTANTIATE)

}  // namespace pixcontrast
