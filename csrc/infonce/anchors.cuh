// What comes before the passes of InfoNCE: anchors sorted by class, with the places of their keys; the list of tiles.
#pragma once

#include "infonce/pass.cuh"

namespace pixcontrast::cuda {

// The other anchors on the same pixel, in the caller's list.
struct SamePixel {
  int next;   // the next one, or -1
  int first;  // whether there is none before
};

struct Listing {
  FeatureLayout layout;
  int64_t classes;          // labels are below
  int count;                // R
  const int64_t* index;     // [R] the caller's list
  const int64_t* labels;    // [R]
  const int64_t* excluded;  // [R] or null
  int queues;
  InfoNCEQueue queue[kMaxQueues];
  int tile_keys;

  int* used;           // [] anchors that take part
  int* row;            // [R] place in the sorted list, or -1
  int* order;          // [R] sorted list: place in the caller's
  SamePixel* pixel;    // [R] caller's list
  Anchor* anchors;     // [R] sorted
  int* first_tile;     // [segments + 1]
  int* valid;          // [segments]
  float* anchor_loss;  // [R]
  int64_t* positives;  // [R]

  __device__ bool takes_part(int i) const {
    return index[i] >= 0 && index[i] < layout.pixels && labels[i] >= 0 && labels[i] < classes;
  }
};

// Counts, one warp for all: keys and tiles before each segment.
__device__ __forceinline__ void list_tiles(const Listing& list, int segments) {
  const int lane = threadIdx.x % 32;
  int before = 0;
  for (int first = 0; first < segments; first += 32) {
    const int segment = first + lane;
    int valid = 0;
    if (segment < segments) {
      const InfoNCEQueue& queue = list.queue[segment % list.queues];
      valid = static_cast<int>(max(int64_t{0}, min(queue.counts[segment / list.queues], queue.capacity)));
      list.valid[segment] = valid;
    }
    const int tiles = (valid + list.tile_keys - 1) / list.tile_keys;
    int sum = tiles;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += other;
    }
    if (segment < segments) list.first_tile[segment] = before + sum - tiles;
    before += __shfl_sync(kAllLanes, sum, 31);
  }
  if (lane == 0) list.first_tile[segments] = before;
}

// A stable sort by class: a warp counts the anchors that come before its own. R^2 comparisons are many beside a
// counting sort but few beside the R K D of the contrast (H100: microseconds for 1024 anchors, 5 ms for 65536, which
// take 25 ms or more to contrast), take one launch, know no bound of the labels, and find anchors of the same pixel as
// well. The first block lists the tiles of the queues meanwhile.
__global__ void __launch_bounds__(256) sort_anchors(const __grid_constant__ Listing list, int segments) {
  if (list.queues > 0 && blockIdx.x == 0 && threadIdx.x < 32) list_tiles(list, segments);
  const int i = (blockIdx.x - 1) * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (blockIdx.x == 0 || i >= list.count) return;  // the whole warp
  const bool takes_part = list.takes_part(i);
  const int64_t label = list.labels[i], pixel = list.index[i];
  int used = 0, smaller = 0, equal = 0, before = 0, earlier = 0, next = INT_MAX;
  for (int j = lane; j < list.count; j += 32) {
    if (!list.takes_part(j)) continue;
    const int64_t other = list.labels[j];
    ++used;
    smaller += other < label;
    equal += other == label;
    before += other == label && j < i;
    if (list.index[j] == pixel) {
      earlier |= j < i;
      if (j > i) next = min(next, j);
    }
  }
  used = warp_sum(used);
  smaller = warp_sum(smaller);
  equal = warp_sum(equal);
  before = warp_sum(before);
  earlier = warp_max(earlier);
  next = -warp_max(-next);
  if (lane != 0) return;
  if (i == 0) *list.used = used;
  if (i == 0 && list.queues == 0) {  // the anchors are the keys
    list.valid[0] = used;
    list.first_tile[0] = 0;
    list.first_tile[1] = (used + list.tile_keys - 1) / list.tile_keys;
  }
  list.row[i] = takes_part ? smaller + before : -1;
  list.pixel[i] = {next == INT_MAX ? -1 : next, !earlier};
  if (takes_part) {
    list.order[smaller + before] = i;
    list.anchors[smaller + before] = {smaller, smaller + equal, smaller + before, equal - 1};
  } else {
    list.anchor_loss[i] = 0;
    list.positives[i] = 0;
  }
}

__device__ __forceinline__ int64_t feature_place(const FeatureLayout& layout, int64_t pixel, int64_t channel) {
  const int64_t inside = layout.map_pixels;
  if (inside == 0) return pixel * layout.dim + channel;
  return (pixel / inside * layout.dim + channel) * inside + pixel % inside;
}

// The keys of an anchor's class, among the tiles of the queues.
__device__ __forceinline__ Anchor find_keys(const Listing& list, int i) {
  const int first = static_cast<int>(list.labels[i]) * list.queues;
  Anchor anchor{list.first_tile[first] * list.tile_keys, list.first_tile[first + list.queues] * list.tile_keys, -1, 0};
  const int64_t excluded = list.excluded != nullptr ? list.excluded[i] : -1;
  for (int segment = first; segment < first + list.queues; ++segment) {
    const int64_t place = excluded - anchor.positives;
    if (place >= 0 && place < list.valid[segment]) {
      anchor.excluded = list.first_tile[segment] * list.tile_keys + static_cast<int>(place);
    }
    anchor.positives += list.valid[segment];
  }
  anchor.positives -= anchor.excluded >= 0;
  return anchor;
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

// rows [R, D] in the sorted order, one a warp.
template <class T, class Number>
__global__ void __launch_bounds__(256)
    gather_anchors(const __grid_constant__ Listing list, const T* features, Number* rows, bool to_tf32) {
  const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= *list.used) return;
  const int i = list.order[row];
  const int64_t dim = list.layout.dim, start = feature_place(list.layout, list.index[i], 0);
  const int64_t step = list.layout.map_pixels > 0 ? list.layout.map_pixels : 1;
  for (int64_t d = lane; d < dim; d += 32) {
    rows[row * dim + d] = rounded<Number>(to_float(features[start + d * step]), to_tf32);
  }
  if (lane == 0) {
    if (list.queues > 0) list.anchors[row] = find_keys(list, i);
    list.positives[i] = list.anchors[row].positives;
  }
}

}  // namespace pixcontrast::cuda
