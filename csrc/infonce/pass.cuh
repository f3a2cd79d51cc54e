// A pass of infonce.cu over the keys, whoever multiplies: for each tile of keys, z = anchors keys^T / T, weights w of
// z, and, where asked for, sums over keys of w k. What w is and what is added up beside depends on the pass:
//
//   negatives  w = e^(z - m), m the largest z so far     m and sum of w                 over keys of other classes
//   positives  w = sigma(L - z)                          sums of w and -log(1 - w)      over keys of the own class
//   pairs      w = T dloss/dz_ij + T dloss/dz_ji, without constant factors              over the anchors themselves
//
// Anchors are sorted by class, and so are keys: a key's place counts whole tiles, class after class, queue after queue
// in a class, so that the keys of a class are a range of places. Blocks (x, y) take tile x of anchors and part y of
// the keys; what they sum up lands in slot y of the workspace.
#pragma once

#include <climits>
#include <cmath>

#include "common/cuda/numbers.cuh"
#include "common/cuda/warp.cuh"
#include "infonce/infonce_cuda.h"

namespace pixcontrast::cuda {

enum class Kind { kNegatives, kPositives, kPairs };

struct __align__(16) Anchor {
  int own_first, own_last;  // places of the keys of its class
  int excluded;             // place of the one that is no positive, or -1
  int positives;            // P
};

struct __align__(16) PairWeights {
  float level, pull, push;  // L, sum_pos sigma / P, 1 / P: times kPairScale the latter two
};
constexpr float kPairScale = 256;  // keeps small weights out of the subnormal numbers of half

struct Keys {
  const void* rows[kMaxQueues];
  int64_t capacity[kMaxQueues];
  int queues, segments;   // C Q segments, of one class and queue each
  int tile_keys;          // places in a tile
  const int* first_tile;  // [segments + 1]
  const int* valid;       // [segments] keys in it
};

struct Pass {
  Kind kind;
  bool sums;                 // also sum over keys of w k
  int64_t capacity;          // R
  const int* count;          // [] anchors that take part, sorted to the front
  int dim;                   // D
  float scale;               // 1 / T
  const void* rows;          // [R, D] anchors
  const Anchor* anchors;     // [R]
  const float* level;        // [R] L, for positives
  const PairWeights* pairs;  // [R], for pairs
  Keys keys;
  float2* row_sums;  // [slots, R] negatives: m, sum of w; positives: sum of w, loss
  float* key_sums;   // [slots, R, D]
};

template <class T>
struct KeyTile {
  const T* rows;
  int valid;  // rows
  int place;  // of the first one
};

// Finds tiles one after the other.
template <class T>
class KeyTiles {
 public:
  __device__ KeyTiles(const Pass& pass, int tile) : pass_(pass), segment_(0) {
    int behind = pass.keys.segments;  // the last segment that starts at `tile` or before is in [segment_, behind)
    while (behind - segment_ > 1) {
      const int middle = (segment_ + behind) / 2;
      (pass.keys.first_tile[middle] <= tile ? segment_ : behind) = middle;
    }
  }

  // `tile` must not go back.
  __device__ KeyTile<T> at(int tile) {
    const Keys& keys = pass_.keys;
    while (tile >= keys.first_tile[segment_ + 1]) ++segment_;
    const int queue = segment_ % keys.queues, c = segment_ / keys.queues;
    const int first = (tile - keys.first_tile[segment_]) * keys.tile_keys;
    const T* rows = static_cast<const T*>(keys.rows[queue]) + (c * keys.capacity[queue] + first) * pass_.dim;
    return {rows, min(keys.valid[segment_] - first, keys.tile_keys), tile * keys.tile_keys};
  }

 private:
  const Pass& pass_;
  int segment_;
};

// The tiles [first, last) of this block's part of the keys, for the anchors [row, behind).
__device__ __forceinline__ int2 tiles_of_block(const Pass& pass, int row, int behind) {
  int64_t first = 0, last = pass.keys.first_tile[pass.keys.segments];
  if (pass.kind == Kind::kPositives) {
    first = pass.anchors[row].own_first / pass.keys.tile_keys;
    last = (pass.anchors[behind - 1].own_last + int64_t{pass.keys.tile_keys} - 1) / pass.keys.tile_keys;
  }
  const int64_t part = blockIdx.y, parts = gridDim.y;
  return {static_cast<int>(first + (last - first) * part / parts),
          static_cast<int>(first + (last - first) * (part + 1) / parts)};
}

// The sum or maximum over a group of neighbouring lanes.
template <int Lanes>
__device__ __forceinline__ float group_sum(float x) {
  CU_UNROLL for (int step = Lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
template <int Lanes>
__device__ __forceinline__ float group_max(float x) {
  CU_UNROLL for (int step = Lanes / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// An anchor as one of `Lanes` neighbouring lanes sees it, each of which has N keys of every tile.
template <int Lanes, int N>
class Row {
 public:
  __device__ Row(const Pass& pass, int row, int count) : row_(row < count ? row : -1) {
    level_ = pass.kind == Kind::kNegatives || row_ < 0 ? -INFINITY : pass.level[row];
  }

  // Whether any key of the tile counts.
  template <class T>
  __device__ bool needs(const Pass& pass, const KeyTile<T>& tile) const {
    if (row_ < 0) return false;
    const Anchor anchor = pass.anchors[row_];
    const int last = tile.place + tile.valid;
    if (pass.kind == Kind::kNegatives) return anchor.own_first > tile.place || anchor.own_last < last;
    if (pass.kind == Kind::kPositives) return anchor.own_first < last && anchor.own_last > tile.place;
    return true;
  }

  // Products z(0) .. z(N - 1), of the keys column(0) .. of the tile, become weights. Returns the factor for all sums of
  // earlier weights. The whole warp calls it.
  template <class T, class Z, class Column>
  __device__ float weigh(const Pass& pass, const KeyTile<T>& tile, const Z& z, const Column& column) {
    const Anchor anchor = pass.anchors[max(row_, 0)];
    const int own_first = anchor.own_first - tile.place, own_last = anchor.own_last - tile.place;
    const int excluded = anchor.excluded - tile.place;
    CU_UNROLL for (int i = 0; i < N; ++i) z(i) *= pass.scale;
    if (pass.kind == Kind::kNegatives) {
      if (tile.valid < pass.keys.tile_keys || (own_first < tile.valid && own_last > 0)) {
        CU_UNROLL for (int i = 0; i < N; ++i) {
          const int key = column(i);
          if (key >= tile.valid || (key >= own_first && key < own_last)) z(i) = -INFINITY;
        }
      }
      return weigh_negatives(z);
    }
    CU_UNROLL for (int i = 0; i < N; ++i) {
      const int key = column(i);
      const bool own = key >= own_first && key < own_last, counts = key < tile.valid && key != excluded;
      if (pass.kind == Kind::kPositives) {
        z(i) = counts && own ? weigh_positive(z(i)) : 0;
      } else {
        z(i) = counts && row_ >= 0 ? weigh_pair(pass, tile.place + key, own, z(i)) : 0;
      }
    }
    return 1;
  }

  // The whole warp calls it.
  __device__ void store(const Pass& pass) const {
    const float total = group_sum<Lanes>(total_), loss = group_sum<Lanes>(loss_);
    if (row_ < 0 || threadIdx.x % Lanes != 0 || pass.kind == Kind::kPairs) return;
    const bool negatives = pass.kind == Kind::kNegatives;
    pass.row_sums[blockIdx.y * pass.capacity + row_] = negatives ? float2{level_, total} : float2{total, loss};
  }

  // Where the sums over keys of this anchor go, or null.
  __device__ float* key_sums(const Pass& pass) const {
    if (row_ < 0) return nullptr;
    return pass.key_sums + (blockIdx.y * pass.capacity + row_) * pass.dim;
  }

 private:
  template <class Z>
  __device__ float weigh_negatives(const Z& z) {
    float largest = level_;
    CU_UNROLL for (int i = 0; i < N; ++i) largest = fmaxf(largest, z(i));
    largest = group_max<Lanes>(largest);
    const float base = largest == -INFINITY ? 0 : largest, factor = __expf(level_ - base);
    total_ *= factor;
    CU_UNROLL for (int i = 0; i < N; ++i) total_ += z(i) = __expf(z(i) - base);
    level_ = largest;
    return factor;
  }

  // sigma(L - z); the loss is log(1 + e^(L - z)).
  __device__ float weigh_positive(float z) {
    const float away = level_ - z, small = __expf(-fabsf(away));
    loss_ += fmaxf(away, 0) + log1pf(small);
    const float sigmoid = __fdividef(away >= 0 ? 1 : small, 1 + small);
    total_ += sigmoid;
    return sigmoid;
  }

  __device__ float weigh_pair(const Pass& pass, int other_row, bool own, float z) const {
    const PairWeights self = pass.pairs[row_], other = pass.pairs[other_row];
    if (!own) return self.pull * __expf(z - self.level) + other.pull * __expf(z - other.level);
    return -__fdividef(self.push, 1 + __expf(z - self.level)) - __fdividef(other.push, 1 + __expf(z - other.level));
  }

  int row_;                     // -1: none
  float level_;                 // negatives: the largest z so far; else L
  float total_ = 0, loss_ = 0;  // this lane's share
};

}  // namespace pixcontrast::cuda
