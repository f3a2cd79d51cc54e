// The one pass of the positive objective over the features: the weight of a pixel, the sums of a block, and the kernels
// for features stored as rows and as maps.
#pragma once

#include "common/cuda/classes.cuh"
#include "positive/positive.h"

namespace pixcontrast::cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32;  // of the kernels that read features
constexpr int kSimilarityBits = 60;                    // sums of w cos lie between -1 and 1
constexpr int kMostSharedSums = 2048;                  // classes whose similarity fits in shared memory beside a tile

// w_i = factor * score(a_i, shift); the factor of a class that takes no part is 0.
struct ClassShare {
  float factor, shift;
};

// Device pointers into the workspace.
struct PositiveWork {
  int* part_pixels;                // [weigh_blocks, C]
  float* part_largest;             // [weigh_blocks, C] logits
  float* part_total;               // [weigh_blocks, C] sums of score(a_i, shift_of(part_largest))
  int* part_unknown;               // [weigh_blocks]
  ClassShare* share;               // [C]
  unsigned long long* similarity;  // [C] S_c in fixed point
  int* not_finite;                 // [C] set when S_c is not finite; fixed point cannot represent that
  float* mean_sum;                 // [blocks, C, D] sums of w_i fh_i
  bool shared_mean_sum;            // a block adds up its own in shared memory first
};

constexpr int kIgnored = -1, kUnknown = -2;

// The class of a pixel, or one of the two above.
template <class T>
__device__ __forceinline__ int class_of(const Positive<T>& args, int64_t label) {
  if (label == args.ignore_index) return kIgnored;
  return label >= 0 && label < args.classes ? static_cast<int>(label) : kUnknown;
}

struct Pixel {
  int c;  // -1: takes no part, and its features are not looked at
  float weight;
};

template <class T>
__device__ __forceinline__ Pixel look_up(const Positive<T>& args, const ClassShare* shares, int64_t pixel) {
  if (pixel >= args.layout.pixels) return {-1, 0.0f};
  const int c = class_of(args, args.labels[pixel]);
  if (c < 0) return {-1, 0.0f};
  const ClassShare share = shares[c];
  if (share.factor == 0) return {-1, 0.0f};
  return {c, args.weight_logits ? share.factor * score(args.weight_logits[pixel], share.shift) : share.factor};
}

// What a pixel does, once its <f, f> and <f, m> are known.
struct Contrast {
  float cosine;
  float share;           // of f_i in the weighted mean unit feature: w_i / |f_i|
  float towards, along;  // dLoss/df_i = towards * m_c + along * f_i
};

__device__ __forceinline__ Contrast contrast(float weight, float square, float product, float scale) {
  const float inverse = inverse_norm(square);
  const float cosine = product * inverse, share = weight * inverse;
  return {cosine, share, -scale * share, scale * share * cosine * inverse};
}

template <class T>
__host__ __device__ inline float loss_scale(const Positive<T>& args) {
  return static_cast<float>(args.loss_weight / static_cast<double>(args.classes));
}

// The block's own sums by class, in its dynamic shared memory where they fit.
struct BlockSums {
  unsigned long long* similarity;  // [C]
  float* mean_sum;                 // [C, D]; each column is one thread's
  unsigned char* tile;             // the shared memory behind the sums
  int classes;
  int64_t elements;  // C*D, 0 without dLoss/dm

  __host__ __device__ static int64_t similarity_bytes(int64_t classes) {
    return classes <= kMostSharedSums ? (classes * 8 + 15) / 16 * 16 : 0;
  }
  __host__ __device__ static int64_t mean_sum_bytes(int64_t elements) { return (elements * 4 + 15) / 16 * 16; }

  // Ends with a barrier.
  template <class T>
  __device__ __forceinline__ static BlockSums begin(const Positive<T>& args, const PositiveWork& work,
                                                    unsigned char* shared) {
    BlockSums sums;
    sums.classes = static_cast<int>(args.classes);
    sums.elements = args.grad_mean ? args.classes * args.layout.dim : 0;
    sums.similarity = work.similarity;
    if (args.classes <= kMostSharedSums) {
      sums.similarity = reinterpret_cast<unsigned long long*>(shared);
      shared += similarity_bytes(args.classes);
      for (int c = threadIdx.x; c < sums.classes; c += kThreads) sums.similarity[c] = 0;
    }
    sums.mean_sum = work.mean_sum + blockIdx.x * sums.elements;
    if (work.shared_mean_sum) {
      sums.mean_sum = reinterpret_cast<float*>(shared);
      shared += mean_sum_bytes(sums.elements);
    }
    for (int64_t i = threadIdx.x; i < sums.elements; i += kThreads) sums.mean_sum[i] = 0;
    sums.tile = shared;
    __syncthreads();
    return sums;
  }

  __device__ __forceinline__ void add_similarity(const PositiveWork& work, int c, float x) const {
    if (fabsf(x) <= 2.0f) {
      add_fixed<kSimilarityBits>(similarity + c, x);
    } else {
      atomicOr(work.not_finite + c, 1);
    }
  }

  __device__ __forceinline__ void finish(const PositiveWork& work) const {
    __syncthreads();
    if (similarity != work.similarity) {
      for (int c = threadIdx.x; c < classes; c += kThreads) {
        if (similarity[c] != 0) atomicAdd(work.similarity + c, similarity[c]);
      }
    }
    if (work.shared_mean_sum) {
      for (int64_t i = threadIdx.x; i < elements; i += kThreads) {
        work.mean_sum[blockIdx.x * elements + i] = mean_sum[i];
      }
    }
  }
};

// Adds up one column over pixels, in a register while the class stays the same.
struct ColumnSum {
  float* column;  // of the block's mean_sum
  int64_t dim;
  int c = -1;
  float sum = 0;

  __device__ __forceinline__ void add(int next, float x) {
    if (next != c) {
      flush();
      c = next;
      sum = 0;
    }
    sum += x;
  }
  __device__ __forceinline__ void flush() {
    if (c >= 0) column[c * dim] += sum;
  }
};

// ---- rows [P, D]. A warp keeps a few whole rows in registers between their norms and their gradients, so that each is
// read once (in chunks and twice where RowShape says so).
//
// 131072 x 256 float32: 134 MB read, 134 MB written, 90 us at 3 TB/s. Three blocks of 8 warps a multiprocessor (80
// registers) have 4 KB a warp in flight, 96 KB together; half of that with 16-bit elements. About 8 instructions an
// element are 8.4 M warp instructions, 16 us at 2 a clock, and 11 shuffles a row 6 us: both hide behind the memory.
// Means come from L1, 1 KB a row.

// FeatureLayout with its strides multiplied out, because contrast_rows takes fewer registers so (half on sm_90: 64, not
// 72). Element d of pixel p lies at image * image_stride + inside * pixel_stride + d * channel_stride.
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

  // Lane r looks up class and weight of the warp's row r, one iteration ahead.
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

// ---- maps [B, D, H*W], through a tile of neighbouring pixels in shared memory: neighbouring threads take neighbouring
// pixels in global memory and neighbouring channels in the tile.
//
// Float32, D = 256: 32 pixels are 33 KB, 4 to 6 blocks fit on a multiprocessor, and the 32 loads of a thread are issued
// 16 at a time: 16 KB in flight a block. The distance between pixels in the tile is an odd count of words, so that
// neither direction has bank conflicts. A feature costs about 12 instructions: 12.6 M warp instructions for 131072
// pixels, 27 us at 2 a clock against 90 us of memory.

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
