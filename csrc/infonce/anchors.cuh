// What surrounds the forward kernels of InfoNCE: anchors are sorted by class and gathered, tiles of keys are listed,
// sums of splits are added in order, and sums of anchors become the loss and the gradient of the features.
#pragma once

#include "infonce/forward.cuh"

namespace pixcontrast::cuda {

__device__ __forceinline__ bool is_valid(const InfoNCEParams& params, int i) {
  const int64_t pixel = params.index[i], label = params.labels[i];
  return pixel >= 0 && pixel < params.layout.pixels && label >= 0 && label < params.classes;
}

// Counts, one warp for all: keys and tiles before each segment.
__device__ __forceinline__ void list_tiles(const InfoNCEParams& params) {
  const int lane = threadIdx.x % 32;
  int before = 0;
  for (int first = 0; first < params.segments; first += 32) {
    const int segment = first + lane;
    int valid = 0;
    if (segment < params.segments) {
      const InfoNCEQueue& queue = params.queue[segment % params.queues];
      valid = static_cast<int>(max(int64_t{0}, min(queue.counts[segment / params.queues], queue.capacity)));
      params.valid_keys[segment] = valid;
    }
    const int tiles = (valid + params.tile_keys - 1) / params.tile_keys;
    const int sum = warp_scan(tiles);
    if (segment < params.segments) params.first_tile[segment] = before + sum - tiles;
    before += __shfl_sync(kAllLanes, sum, 31);
  }
  if (lane == 0) params.first_tile[params.segments] = before;
}

// A stable sort by class: a warp counts the anchors that come before its own. R^2 comparisons are many beside a
// counting sort but few beside the R K D of the contrast (H100: microseconds for 1024 anchors, 5 ms for 65536, which
// take 25 ms or more to contrast), take one launch, need no bound of the labels, and find anchors of the same pixel as
// well. The first block lists the tiles of the queues meanwhile.
__global__ void __launch_bounds__(256) sort_anchors(const __grid_constant__ InfoNCEParams params) {
  if (!params.each_other && blockIdx.x == 0 && threadIdx.x < 32) list_tiles(params);
  const int i = (blockIdx.x - 1) * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (blockIdx.x == 0 || i >= params.count) return;  // the whole warp
  const bool valid = is_valid(params, i);
  const int64_t label = params.labels[i], pixel = params.index[i];
  int all = 0, smaller = 0, equal = 0, before = 0, earlier = 0, next = INT_MAX;
  for (int j = lane; j < params.count; j += 32) {
    if (!is_valid(params, j)) continue;
    const int64_t other = params.labels[j];
    ++all;
    smaller += other < label;
    equal += other == label;
    before += other == label && j < i;
    if (params.index[j] == pixel) {
      earlier |= j < i;
      if (j > i) next = min(next, j);
    }
  }
  all = warp_sum(all);
  smaller = warp_sum(smaller);
  equal = warp_sum(equal);
  before = warp_sum(before);
  earlier = warp_max(earlier);
  next = -warp_max(-next);
  if (lane != 0) return;
  if (i == 0) *params.valid_anchors = all;
  if (i == 0 && params.each_other) {  // the anchors are the keys
    params.valid_keys[0] = all;
    params.first_tile[0] = 0;
    params.first_tile[1] = (all + params.tile_keys - 1) / params.tile_keys;
  }
  params.row[i] = valid ? smaller + before : -1;
  params.same_pixel[i] = {next == INT_MAX ? -1 : next, !earlier};
  if (valid) {
    params.order[smaller + before] = i;
    params.anchor_keys[smaller + before] = {smaller, smaller + equal, smaller + before, equal - 1};
  } else {
    static_cast<float*>(params.anchor_loss)[i] = 0;
    params.positives[i] = 0;
  }
}

// The keys of an anchor's class, among the tiles of the queues.
__device__ __forceinline__ AnchorKeys find_keys(const InfoNCEParams& params, int i) {
  const int first = static_cast<int>(params.labels[i]) * params.queues, end = first + params.queues;
  AnchorKeys keys{params.first_tile[first] * params.tile_keys, params.first_tile[end] * params.tile_keys, -1, 0};
  const int64_t excluded = params.excluded != nullptr ? params.excluded[i] : -1;
  for (int segment = first; segment < end; ++segment) {
    const int64_t key = excluded - keys.positives;
    if (key >= 0 && key < params.valid_keys[segment]) {
      keys.excluded = params.first_tile[segment] * params.tile_keys + static_cast<int>(key);
    }
    keys.positives += params.valid_keys[segment];
  }
  keys.positives -= keys.excluded >= 0;
  return keys;
}

template <class T>
__device__ __forceinline__ T rounded(float x, bool to_tf32) {
  if constexpr (std::is_same_v<T, float>) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    if (to_tf32) return __uint_as_float(cu_to_tf32(x));
#endif
    return x;
  } else {
    return from_float<T>(x);
  }
}

// rows [R, D] in the sorted order, one a warp; T is how features are stored, Key what they are multiplied in.
template <class T, class Key>
__global__ void __launch_bounds__(256) gather_anchors(const __grid_constant__ InfoNCEParams params, bool to_tf32) {
  const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= *params.valid_anchors) return;
  const int i = params.order[row];
  const int64_t dim = params.layout.dim, stride = params.layout.channel_stride();
  const T* const from = static_cast<const T*>(params.features) + params.layout.offset(params.index[i]);
  Key* const to = static_cast<Key*>(params.rows) + row * dim;
  for (int64_t d = lane; d < dim; d += 32) to[d] = rounded<Key>(to_float(from[d * stride]), to_tf32);
  if (lane != 0) return;
  if (!params.each_other) params.anchor_keys[row] = find_keys(params, i);
  params.positives[i] = params.anchor_keys[row].positives;
}

constexpr int kMergeWarps = 8;

// Sum over warps of what each lane has; the first warp has the result.
__device__ __forceinline__ float sum_of_warps(float x) {
  CU_SHARED(float, sums, [kMergeWarps][32]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  sums[warp][lane] = x;
  __syncthreads();
  float sum = 0;
  if (warp == 0) {
    CU_UNROLL for (int w = 0; w < kMergeWarps; ++w) sum += sums[w][lane];
  }
  return sum;
}

// After the negatives, for one anchor and 32 channels a block: lse, and the mean key sum_neg e^(z - lse) k in the first
// split's place.
__global__ void __launch_bounds__(32 * kMergeWarps) merge_negatives(const __grid_constant__ InfoNCEParams params) {
  const int row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= *params.valid_anchors) return;
  const int64_t stride = params.count, dim = params.layout.dim;
  float row_max = -INFINITY, sum_exp = 0;
  for (int split = lane; split < params.splits; split += 32) {
    row_max = fmaxf(row_max, params.row_sums[split * stride + row].x);
  }
  row_max = warp_max(row_max);
  for (int split = lane; split < params.splits; split += 32) {
    const float2 sums = params.row_sums[split * stride + row];
    if (sums.y != 0) sum_exp += sums.y * expf(sums.x - row_max);
  }
  const float lse = row_max + logf(warp_sum(sum_exp));
  if (blockIdx.y == 0 && threadIdx.x == 0) params.lse[row] = lse;
  if (!params.gradient) return;

  const int64_t channel = blockIdx.y * int64_t{32} + lane;
  float sum = 0;
  for (int split = warp; split < params.splits && channel < dim; split += kMergeWarps) {
    const float2 sums = params.row_sums[split * stride + row];
    if (sums.y != 0) sum += expf(sums.x - lse) * params.key_sums[(split * stride + row) * dim + channel];
  }
  sum = sum_of_warps(sum);
  if (warp == 0 && channel < dim) params.key_sums[row * dim + channel] = sum;
}

// After the positives, for one anchor a warp.
__global__ void __launch_bounds__(256) merge_positives(const __grid_constant__ InfoNCEParams params) {
  const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= *params.valid_anchors) return;
  double sigmoids = 0, loss = 0;
  for (int split = lane; split < params.splits; split += 32) {
    const float2 sums = params.row_sums[split * params.count + row];
    sigmoids += sums.x;
    loss += sums.y;
  }
  sigmoids = warp_sum(sigmoids);
  loss = warp_sum(loss);
  if (lane != 0) return;
  const int positives = params.anchor_keys[row].positives;
  static_cast<float*>(params.anchor_loss)[params.order[row]] = positives > 0 ? static_cast<float>(loss / positives) : 0;
  params.sigmoids[row] = static_cast<float>(sigmoids);
  if (params.each_other) {
    const float one = positives > 0 ? kPairScale / positives : 0;
    params.pairs[row] = {params.lse[row], static_cast<float>(sigmoids) * one, one};
  }
}

// One block: the mean over anchors with positives, and what all gradients are multiplied by.
__global__ void __launch_bounds__(1024) mean_loss(const __grid_constant__ InfoNCEParams params) {
  CU_SHARED(double, sums, [32]);
  CU_SHARED(int, counts, [32]);
  double sum = 0;
  int count = 0;
  for (int i = threadIdx.x; i < params.count; i += blockDim.x) {
    sum += static_cast<const float*>(params.anchor_loss)[i];
    count += params.positives[i] > 0;
  }
  sum = block_sum<32>(sum, sums);
  count = block_sum<32>(count, counts);
  if (threadIdx.x > 0) return;
  const double scale = count > 0 ? params.loss_weight / params.base_temperature / count : 0;
  *static_cast<float*>(params.loss) = static_cast<float>(scale * params.temperature * sum);
  *params.grad_scale = static_cast<float>(scale);
}

// The gradient of a pixel, 32 channels a block, from all anchors on it; the block of the first one does it. With queues
// dloss_i = r_i / P_i (first split) - (other splits) / P_i; without, all splits hold parts of the sum of pairs.
template <class T>
__global__ void __launch_bounds__(32 * kMergeWarps) scatter_gradient(const __grid_constant__ InfoNCEParams params) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (params.row[blockIdx.x] < 0 || !params.same_pixel[blockIdx.x].first) return;
  const int64_t dim = params.layout.dim, channel = blockIdx.y * int64_t{32} + lane;
  float sum = 0;
  for (int i = blockIdx.x; i >= 0 && channel < dim; i = params.same_pixel[i].next) {
    const int row = params.row[i], positives = params.anchor_keys[row].positives;
    if (params.lse[row] == -INFINITY) continue;  // no negatives: no gradient, whatever the keys are
    const float share = params.each_other ? 1 / kPairScale : positives > 0 ? 1.0f / positives : 0;
    for (int split = warp; split < params.splits; split += kMergeWarps) {
      const float weight = params.each_other ? 1 : split == 0 ? params.sigmoids[row] : -1;
      sum += share * weight * params.key_sums[(split * params.count + row) * dim + channel];
    }
  }
  sum = sum_of_warps(sum);
  if (warp == 0 && channel < dim) {
    const int64_t offset = params.layout.offset(params.index[blockIdx.x]) + channel * params.layout.channel_stride();
    static_cast<GradOf<T>*>(params.grad_features)[offset] = from_float<GradOf<T>>(sum * *params.grad_scale);
  }
}

}  // namespace pixcontrast::cuda
