// What comes between and after the passes of InfoNCE: slots of the workspace are added in order, and numbers of anchors
// become the loss and the gradient of the features.
#pragma once

#include "infonce/anchors.cuh"

namespace pixcontrast::cuda {

constexpr int kFinishWarps = 8;

struct Finish {
  Listing list;
  int64_t dim;
  int slots;               // that the pass has written
  const float2* row_sums;  // [slots, R]
  float* key_sums;         // [slots, R, D], or null
  float* level;            // [R] L, -inf where there are no negatives
  float* sigmoids;         // [R] sum over positives of sigma(L - z)
  PairWeights* pairs;      // [R], or null
  float* factor;           // [] of every gradient
  double temperature, base_temperature, loss_weight;
  float* loss;
};

// Sum over warps of what each lane has; the first warp has the result.
__device__ __forceinline__ float sum_of_warps(float x) {
  CU_SHARED(float, sums, [kFinishWarps][32]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  sums[warp][lane] = x;
  __syncthreads();
  float sum = 0;
  if (warp == 0) {
    CU_UNROLL for (int w = 0; w < kFinishWarps; ++w) sum += sums[w][lane];
  }
  return sum;
}

// After the negatives, for one anchor and 32 channels a block: L, and the mean key sum_neg e^(z - L) k in the first
// slot.
__global__ void __launch_bounds__(32 * kFinishWarps) merge_negatives(const __grid_constant__ Finish args) {
  const int row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= *args.list.used) return;
  const int64_t capacity = args.list.count;
  float level = -INFINITY, total = 0;
  for (int slot = lane; slot < args.slots; slot += 32) level = fmaxf(level, args.row_sums[slot * capacity + row].x);
  level = warp_max(level);
  for (int slot = lane; slot < args.slots; slot += 32) {
    const float2 part = args.row_sums[slot * capacity + row];
    if (part.y != 0) total += part.y * expf(part.x - level);
  }
  level += logf(warp_sum(total));
  if (blockIdx.y == 0 && threadIdx.x == 0) args.level[row] = level;
  if (args.key_sums == nullptr) return;

  const int64_t channel = blockIdx.y * int64_t{32} + lane;
  float sum = 0;
  for (int slot = warp; slot < args.slots && channel < args.dim; slot += kFinishWarps) {
    const float2 part = args.row_sums[slot * capacity + row];
    if (part.y != 0) sum += expf(part.x - level) * args.key_sums[(slot * capacity + row) * args.dim + channel];
  }
  sum = sum_of_warps(sum);
  if (warp == 0 && channel < args.dim) args.key_sums[row * args.dim + channel] = sum;
}

// After the positives, for one anchor a warp.
__global__ void __launch_bounds__(256) merge_positives(const __grid_constant__ Finish args) {
  const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= *args.list.used) return;
  double sigmoids = 0, loss = 0;
  for (int slot = lane; slot < args.slots; slot += 32) {
    const float2 part = args.row_sums[slot * int64_t{args.list.count} + row];
    sigmoids += part.x;
    loss += part.y;
  }
  sigmoids = warp_sum(sigmoids);
  loss = warp_sum(loss);
  if (lane != 0) return;
  const int positives = args.list.anchors[row].positives;
  args.list.anchor_loss[args.list.order[row]] = positives > 0 ? static_cast<float>(loss / positives) : 0;
  args.sigmoids[row] = static_cast<float>(sigmoids);
  if (args.pairs != nullptr) {
    const float share = positives > 0 ? kPairScale / positives : 0;
    args.pairs[row] = {args.level[row], static_cast<float>(sigmoids) * share, share};
  }
}

// One block: the mean over anchors with positives, and what all gradients are multiplied with.
__global__ void __launch_bounds__(1024) mean_loss(const __grid_constant__ Finish args) {
  CU_SHARED(double, sums, [32]);
  CU_SHARED(int, counts, [32]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  double sum = 0;
  int count = 0;
  for (int i = threadIdx.x; i < args.list.count; i += blockDim.x) {
    sum += args.list.anchor_loss[i];
    count += args.list.positives[i] > 0;
  }
  sum = warp_sum(sum);
  count = warp_sum(count);
  if (lane == 0) {
    sums[warp] = sum;
    counts[warp] = count;
  }
  __syncthreads();
  if (warp > 0) return;
  sum = warp_sum(sums[lane]);
  count = warp_sum(counts[lane]);
  if (lane > 0) return;
  const double factor = count > 0 ? args.loss_weight / args.base_temperature / count : 0;
  *args.loss = static_cast<float>(factor * args.temperature * sum);
  *args.factor = static_cast<float>(factor);
}

// The gradient of a pixel, 32 channels a block, from all anchors on it; the block of the first one does it. With queues
// dloss_i = r_i / P_i (first slot) - (other slots) / P_i; without, all slots hold parts of the sum of pairs.
template <class T>
__global__ void __launch_bounds__(32 * kFinishWarps)
    scatter_gradient(const __grid_constant__ Finish args, T* grad_features) {
  const Listing& list = args.list;
  const int place = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (list.row[place] < 0 || !list.pixel[place].first) return;
  const int64_t channel = blockIdx.y * int64_t{32} + lane;
  float sum = 0;
  for (int i = place; i >= 0 && channel < args.dim; i = list.pixel[i].next) {
    const int row = list.row[i], positives = list.anchors[row].positives;
    const float share = args.pairs != nullptr ? 1 / kPairScale : positives > 0 ? 1.0f / positives : 0;
    for (int slot = warp; slot < args.slots; slot += kFinishWarps) {
      const float weight = args.pairs != nullptr ? 1 : slot == 0 ? args.sigmoids[row] : -1;
      sum += share * weight * args.key_sums[(slot * int64_t{list.count} + row) * args.dim + channel];
    }
  }
  sum = sum_of_warps(sum);
  if (warp == 0 && channel < args.dim) {
    grad_features[feature_place(list.layout, list.index[place], channel)] = from_float<T>(sum * *args.factor);
  }
}

}  // namespace pixcontrast::cuda
