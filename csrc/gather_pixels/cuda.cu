// A block moves a tile of 32 rows x 32 channels. Neighbouring threads take neighbouring channels of rows, and of maps
// neighbouring rows, whose pixels are neighbours where the index ascends; in between lies a tile in shared memory.
//
// H100, 1024 pixels of [2, 720, 128, 256] float32: 736 blocks. Every element is in a sector of 32 bytes of its own, 24
// MB to read and 3 MB to write: 10 us. Backward clears 189 MB (60 us) and writes the same sectors; before it, PyTorch
// sorts 1024 indices.
#include "common/cuda/warp.cuh"
#include "gather_pixels/gather_pixels.h"

namespace pixcontrast {
namespace cuda {
namespace {

constexpr int kTile = 32, kWarps = 8;

struct TilePosition {
  int64_t row, channel;

  __device__ __forceinline__ explicit TilePosition(int64_t dim) {
    const int64_t channel_tiles = (dim + kTile - 1) / kTile;
    row = blockIdx.x / channel_tiles * kTile;
    channel = blockIdx.x % channel_tiles * kTile;
  }
};

template <class T, bool kMaps>
__global__ void __launch_bounds__(kTile* kWarps) gather_tile(const GatherPixels<T> args) {
  CU_SHARED(int64_t, offset, [kTile]);     // of the pixel of each row; -1: none
  CU_SHARED(T, tile, [kTile][kTile + 1]);  // [channel][row]
  const int64_t dim = args.layout.dim;
  const TilePosition first(dim);
  const int lane = threadIdx.x;
  if (threadIdx.y == 0) {
    const int64_t row = first.row + lane;
    offset[lane] = row < args.count && args.has_pixel(row) ? args.layout.offset(args.index[row]) : -1;
  }
  __syncthreads();
  const auto element = [&](int row, int64_t channel) {
    return offset[row] < 0 ? from_float<T>(0.0f) : args.from[offset[row] + channel * args.layout.channel_stride()];
  };
  if constexpr (kMaps) {
    for (int k = threadIdx.y; k < kTile; k += kWarps) {
      if (first.channel + k < dim) tile[k][lane] = element(lane, first.channel + k);
    }
    __syncthreads();
  }
  for (int k = threadIdx.y; k < kTile; k += kWarps) {
    const int64_t row = first.row + k, channel = first.channel + lane;
    if (row >= args.count || channel >= dim) continue;
    args.to[row * dim + channel] = kMaps ? tile[lane][k] : element(k, channel);
  }
}

// The rows of one pixel, `count` from a position in the order on.
struct Run {
  int64_t offset, count;
};

// The run that begins at this position; its count is 0 if none begins there.
template <class T>
__device__ __forceinline__ Run run_at(const GatherPixels<T>& args, int64_t position) {
  const auto pixel_at = [&](int64_t i) { return args.index[args.order[i]]; };
  if (position >= args.count || !args.has_pixel(args.order[position])) return {0, 0};
  const int64_t pixel = pixel_at(position);
  if (position > 0 && pixel_at(position - 1) == pixel) return {0, 0};
  int64_t end = position + 1;
  while (end < args.count && pixel_at(end) == pixel) ++end;
  return {args.layout.offset(pixel), end - position};
}

template <class T, bool kMaps>
__global__ void __launch_bounds__(kTile* kWarps) scatter_tile(const GatherPixels<T> args) {
  CU_SHARED(Run, run, [kTile]);
  CU_SHARED(T, tile, [kTile][kTile + 1]);  // [run][channel]
  const int64_t dim = args.layout.dim;
  const TilePosition first(dim);
  const int lane = threadIdx.x;
  if (threadIdx.y == 0) run[lane] = run_at(args, first.row + lane);
  __syncthreads();
  for (int k = threadIdx.y; k < kTile; k += kWarps) {
    const int64_t channel = first.channel + lane;
    if (run[k].count == 0 || channel >= dim) continue;
    const int64_t* const order = args.order + first.row + k;
    float sum = to_float(args.from[order[0] * dim + channel]);
    for (int64_t i = 1; i < run[k].count; ++i) sum += to_float(args.from[order[i] * dim + channel]);
    (kMaps ? tile[k][lane] : args.to[run[k].offset + channel]) = from_float<T>(sum);
  }
  if constexpr (kMaps) {
    __syncthreads();
    for (int k = threadIdx.y; k < kTile; k += kWarps) {
      const int64_t channel = first.channel + k;
      if (run[lane].count == 0 || channel >= dim) continue;
      args.to[run[lane].offset + channel * args.layout.map_pixels] = tile[lane][k];
    }
  }
}

template <class T>
cudaError_t launch_tiles(const GatherPixels<T>& args, void (*kernel)(GatherPixels<T>), cudaStream_t stream) {
  if (args.count * args.layout.dim == 0) return cudaSuccess;
  const dim3 grid(blocks_for(args.count, kTile) * blocks_for(args.layout.dim, kTile));
  return cu_launch(kernel, grid, dim3(kTile, kWarps), 0, stream, args);
}

}  // namespace
}  // namespace cuda

template <class T>
cudaError_t gather_pixels_cuda(const GatherPixels<T>& args, cudaStream_t stream) {
  using namespace cuda;
  return launch_tiles<T>(args, args.layout.map_pixels ? gather_tile<T, true> : gather_tile<T, false>, stream);
}

template <class T>
cudaError_t scatter_pixels_cuda(const GatherPixels<T>& args, cudaStream_t stream) {
  using namespace cuda;
  CU_TRY(cudaMemsetAsync(args.to, 0, args.layout.pixels * args.layout.dim * sizeof(T), stream));
  return launch_tiles<T>(args, args.layout.map_pixels ? scatter_tile<T, true> : scatter_tile<T, false>, stream);
}

#define INSTANTIATE(T)                                                           \
  template cudaError_t gather_pixels_cuda(const GatherPixels<T>&, cudaStream_t); \
  template cudaError_t scatter_pixels_cuda(const GatherPixels<T>&, cudaStream_t);
CU_FOR_DTYPES(INSTANTIATE)

}  // namespace pixcontrast
