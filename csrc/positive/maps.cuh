// The pass over features stored as maps [B, D, H*W], through a tile of neighbouring pixels in shared memory:
// neighbouring threads take neighbouring pixels in global memory and neighbouring channels in the tile.
//
// Float32, D = 256: 32 pixels are 33 KB, 4 to 6 blocks fit on a multiprocessor, and the 32 loads of a thread are issued
// 16 at a time: 16 KB in flight a block. The distance between pixels in the tile is an odd count of words, so that
// neither direction has bank conflicts. A feature costs about 12 instructions: 12.6 M warp instructions for 131072
// pixels, 27 us at 2 a clock against 90 us of memory.
#pragma once

#include "positive/block_sums.cuh"

namespace pixcontrast::cuda {

constexpr int kMapsWidth = 32;  // pixels of a tile at most

// How many pixels of D channels a tile takes (a power of two; 0 if one does not fit) and their distance in it.
struct MapsTile {
  int width = 0;
  int64_t stride = 0;
  int64_t bytes = 0;
};

template <class T>
MapsTile maps_tile(int64_t dim) {
  constexpr int64_t most_bytes = 40 * 1024, word = 4 / static_cast<int64_t>(sizeof(T));
  const int64_t stride = ((dim + word - 1) / word | 1) * word;
  for (int width = kMapsWidth; width > 0; width /= 2) {
    const int64_t bytes = width * stride * static_cast<int64_t>(sizeof(T));
    if (bytes <= most_bytes) return {width, stride, bytes};
  }
  return {};
}

// What the columns of a pixel need, in one load.
struct __align__(16) PixelPull {
  int c;  // -1: the gradient is zero
  float share, towards, along;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    contrast_maps(const Positive<T> args, const PositiveWork work, const int width, const int stride) {
  CU_DYN_SHARED(unsigned char, shared);
  CU_SHARED(Pixel, pixels, [kMapsWidth]);
  CU_SHARED(PixelPull, pulls, [kMapsWidth]);
  const BlockSums sums = BlockSums::begin(args, work, shared);
  using Grad = GradOf<T>;  // the tile holds features, then their gradient
  Grad* const tile = reinterpret_cast<Grad*>(sums.tile);
  const int dim = static_cast<int>(args.layout.dim), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int own_pixel = threadIdx.x % width, own_channel = threadIdx.x / width, channels = kThreads / width;
  const int64_t map_pixels = args.layout.map_pixels;
  const int64_t map_tiles = (map_pixels + width - 1) / width, tiles = args.layout.pixels / map_pixels * map_tiles;
  const float scale = loss_scale(args);

  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const int64_t image = t / map_tiles, inside = t % map_tiles * width;
    const int64_t first_pixel = image * map_pixels + inside;
    const int count = static_cast<int>(min(static_cast<int64_t>(width), map_pixels - inside));
    const int64_t corner = image * dim * map_pixels + inside + own_pixel;
    if (threadIdx.x < count) pixels[threadIdx.x] = look_up(args, work.share, first_pixel + threadIdx.x);
    if (own_pixel < count) {
      constexpr int most = 16;  // loads on their way at once
      for (int first = own_channel; first < dim; first += most * channels) {
        T element[most];
        CU_UNROLL for (int k = 0; k < most; ++k) {
          const int64_t d = first + k * channels;
          if (d < dim) element[k] = args.features[corner + d * map_pixels];
        }
        CU_UNROLL for (int k = 0; k < most; ++k) {
          const int d = first + k * channels;
          if (d >= dim) continue;
          if constexpr (std::is_same_v<Grad, T>) {
            tile[own_pixel * stride + d] = element[k];
          } else {
            tile[own_pixel * stride + d] = to_float(element[k]);
          }
        }
      }
    }
    __syncthreads();

    for (int p = warp; p < count; p += kWarps) {
      const Pixel pixel = pixels[p];
      if (pixel.c < 0) {
        if (lane == 0) pulls[p] = {-1, 0.0f, 0.0f, 0.0f};
        continue;
      }
      const float* const mean = args.mean + static_cast<int64_t>(pixel.c) * dim;
      float square = 0, product = 0;
      for (int d = lane; d < dim; d += 32) {
        const float element = to_float(tile[p * stride + d]);
        square += element * element;
        product += element * mean[d];
      }
      const Contrast result = contrast(pixel.weight, warp_sum(square), warp_sum(product), scale);
      if (lane == 0) {
        pulls[p] = {pixel.c, result.share, result.towards, result.along};
        sums.add_similarity(work, pixel.c, pixel.weight * result.cosine);
        if (args.grad_weight_logits) args.grad_weight_logits[first_pixel + p] = result.cosine;  // see finish_weights
      }
    }
    __syncthreads();

    // The gradient takes the place of the features.
    for (int d = threadIdx.x; d < dim; d += kThreads) {
      ColumnSum sum{sums.mean_sum + d, dim};
      int c = -1;
      float mean = 0;
      for (int p = 0; p < count; ++p) {
        Grad* const element = tile + p * stride + d;
        const PixelPull pull = pulls[p];
        if (pull.c < 0) {
          *element = from_float<Grad>(0.0f);
          continue;
        }
        if (pull.c != c) {
          c = pull.c;
          mean = args.mean[static_cast<int64_t>(c) * dim + d];
        }
        const float feature = to_float(*element);
        if (args.grad_mean) sum.add(c, pull.share * feature);
        *element = from_float<Grad>(pull.towards * mean + pull.along * feature);
      }
      if (args.grad_mean) sum.flush();
    }
    __syncthreads();

    // Each thread reads what it wrote into the tile before, so the next tile needs no barrier.
    if (args.grad_features && own_pixel < count) {
      for (int d = own_channel; d < dim; d += channels) {
        static_cast<Grad*>(args.grad_features)[corner + static_cast<int64_t>(d) * map_pixels] =
            tile[own_pixel * stride + d];
      }
    }
  }
  sums.finish(work);
}

}  // namespace pixcontrast::cuda
