// The pass over features stored as rows [P, D]. A warp keeps a few whole rows in registers between their norms and
// their gradients, so that each is read once (in chunks and twice where RowShape says so).
//
// 131072 x 256 float32: 134 MB read, 134 MB written, 90 us at 3 TB/s. Three blocks of 8 warps a multiprocessor (80
// registers) have 4 KB a warp in flight, 96 KB together; half of that with 16-bit elements. About 8 instructions an
// element are 8.4 M warp instructions, 16 us at 2 a clock, and 11 shuffles a row 6 us: both hide behind the memory.
// Means come from L1, 1 KB a row.
#pragma once

#include "positive/block_sums.cuh"

namespace pixcontrast::cuda {

// Any layout by strides: element d of pixel p lies at image * image_stride + inside * pixel_stride + d *
// channel_stride.
struct RowPlace {
  int64_t map_pixels, image_stride, pixel_stride, channel_stride;

  __device__ __forceinline__ int64_t at(int64_t pixel) const {
    if (map_pixels == 0) return pixel * pixel_stride;
    return pixel / map_pixels * image_stride + pixel % map_pixels * pixel_stride;
  }
};

// Shared memory of the tile for dLoss/dm: the rows of the block's warps, whatever the shape.
constexpr size_t kRowsTileBytes = static_cast<size_t>(kWarps) * 32 * kLaneElements * sizeof(float);

// Adds the tile [rows, columns] of scaled features to the columns from `first` on.
template <class Shape>
__device__ __forceinline__ void add_tile(const BlockSums& sums, const float* tile, const int* classes, int first,
                                         int dim) {
  const int columns = min(Shape::kColumns, dim - first);
  for (int column = threadIdx.x; column < columns; column += kThreads) {
    ColumnSum sum{sums.mean_sum + first + column, dim};
    for (int row = 0; row < kWarps * Shape::kRows; ++row) {
      if (classes[row] >= 0) sum.add(classes[row], tile[row * Shape::kColumns + column]);
    }
    sum.flush();
  }
}

template <class T, class Shape>
__global__ void __launch_bounds__(kThreads, 3)
    contrast_rows(const Positive<T> args, const PositiveWork work, const RowPlace place) {
  constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns;
  CU_DYN_SHARED(unsigned char, shared);
  CU_SHARED(int, tile_classes, [kWarps * kRows]);
  const BlockSums sums = BlockSums::begin(args, work, shared);
  float* const tile = reinterpret_cast<float*>(sums.tile);
  const int dim = static_cast<int>(args.layout.dim), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float scale = loss_scale(args);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps * kRows;

  // Lane r looks after row r of the warp, and already after the row it will have in the next turn.
  int64_t first_pixel = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * kRows;
  Pixel next = look_up(args, work.share, lane < kRows ? first_pixel + lane : args.layout.pixels);
  for (int64_t block_pixel = first_pixel - warp * kRows; block_pixel < args.layout.pixels; block_pixel += step) {
    const Pixel own = next;
    int c[kRows];
    RowChunk<T, Shape> row[kRows];
    CU_UNROLL for (int r = 0; r < kRows; ++r) {
      c[r] = __shfl_sync(kAllLanes, own.c, r);
      if (c[r] >= 0) row[r].load(args.features + place.at(first_pixel + r), place.channel_stride, 0, dim);
    }
    next = look_up(args, work.share, lane < kRows ? first_pixel + step + lane : args.layout.pixels);

    float own_square = 0, own_product = 0;
    CU_UNROLL for (int r = 0; r < kRows; ++r) {
      float square = 0, product = 0;
      if (c[r] >= 0) {
        const float* const mean = args.mean + static_cast<int64_t>(c[r]) * dim;
        row[r].add_products(mean, 0, dim, &square, &product);
        for (int first = kColumns; kRows == 1 && first < dim; first += kColumns) {
          row[r].load(args.features + place.at(first_pixel + r), place.channel_stride, first, dim);
          row[r].add_products(mean, first, dim, &square, &product);
        }
      }
      square = warp_sum(square);
      product = warp_sum(product);
      if (lane == r) {
        own_square = square;
        own_product = product;
      }
    }
    const Contrast result = contrast(own.weight, own_square, own_product, scale);
    for_classes(own.c, [&](int one, unsigned) {
      const float sum = warp_sum(own.c == one ? own.weight * result.cosine : 0.0f);
      if (lane == 0) sums.add_similarity(work, one, sum);
    });
    if (args.grad_weight_logits && own.c >= 0)
      args.grad_weight_logits[first_pixel + lane] = result.cosine;  // see finish_weights

    if (lane < kRows) tile_classes[warp * kRows + lane] = own.c;
    for (int first = 0; first < dim; first += kColumns) {
      CU_UNROLL for (int r = 0; r < kRows; ++r) {
        const float share = __shfl_sync(kAllLanes, result.share, r), along = __shfl_sync(kAllLanes, result.along, r);
        const float towards = __shfl_sync(kAllLanes, result.towards, r);
        if (kRows == 1 && dim > kColumns && c[r] >= 0) {
          row[r].load(args.features + place.at(first_pixel + r), place.channel_stride, first, dim);
        }
        if (args.grad_features && first_pixel + r < args.layout.pixels) {
          auto* const grad = static_cast<GradOf<T>*>(args.grad_features) + place.at(first_pixel + r);
          if (c[r] >= 0) {
            const float* const mean = args.mean + static_cast<int64_t>(c[r]) * dim;
            row[r].store_combination(along, towards, mean, first, dim, grad, place.channel_stride);
          } else {
            row[r].store_zeros(first, dim, grad, place.channel_stride);
          }
        }
        if (args.grad_mean && c[r] >= 0) {
          row[r].store_scaled(share, first, dim, tile + (warp * kRows + r) * kColumns - first);
        }
      }
      if (args.grad_mean) {
        __syncthreads();
        add_tile<Shape>(sums, tile, tile_classes, first, dim);
        __syncthreads();
      }
    }
    first_pixel += step;
  }
  sums.finish(work);
}

}  // namespace pixcontrast::cuda
