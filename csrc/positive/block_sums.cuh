// What the kernels of the positive objective share: the workspace, the weight of a pixel, the sums of a block.
#pragma once

#include "common/cuda/class_weights.cuh"
#include "common/cuda/rows.cuh"
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

}  // namespace pixcontrast::cuda
