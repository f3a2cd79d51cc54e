// What the forward kernels of InfoNCE share, and the one in exact float32. As in flash attention, a kernel streams over
// tiles of keys: z = anchors keys^T / T (gemm_qk), weights w of z, and, where a gradient is wanted, the key sums of w k
// (gemm_pv). What w is depends on the pass:
//
//   negatives  w = e^(z - row_max)                   row_max and sum of w         over keys of other classes
//   positives  w = sigma(lse - z)                    sums of w and -log(1 - w)    over keys of the own class
//   pairs      w = T dloss/dz_ij + T dloss/dz_ji, without constant factors        over the anchors themselves
//
// Anchors are sorted by class, and so are keys: a key's position counts whole tiles, class after class, queue after
// queue in a class, so that the keys of a class are a range of positions. Blocks (x, y) take tile x of anchors and
// split y of the keys; their sums are in row y of the workspace.
#pragma once

#include <climits>
#include <cmath>

#include "common/cuda/warp.cuh"
#include "infonce/infonce.h"

namespace pixcontrast::cuda {

enum class Pass { kNegatives, kPositives, kPairs };

struct __align__(16) AnchorKeys {
  int own_begin, own_end;  // positions of the keys of its class
  int excluded;            // position of the one that is no positive, or -1
  int positives;           // P
};

// The other anchors on the same pixel, in the caller's list.
struct SamePixel {
  int next;   // the next one, or -1
  int first;  // whether there is none before
};

struct __align__(16) PairWeights {
  float lse, sigmoids, one;  // the latter: sum_pos sigma / P and 1 / P, times kPairScale
};
constexpr float kPairScale = 256;  // keeps small weights out of the subnormals of half

// The arguments, how they are worked on, and the workspace; of all kernels. Without queues, the sorted anchors are the
// only queue.
struct InfoNCEParams : InfoNCE {
  bool each_other;  // no queues
  float scale;      // 1 / T
  int segments;     // C Q, each the keys of one class and queue
  int tile_keys;    // positions in a tile
  int splits;       // of the keys, in the last pass
  bool gradient;    // whether the forward kernels add up keys

  int* valid_anchors;       // [] sorted to the front
  int* row;                 // [R] caller's list: position in the sorted one, or -1
  int* order;               // [R] sorted list: position in the caller's
  SamePixel* same_pixel;    // [R] caller's list
  void* rows;               // [R, D] sorted anchors
  AnchorKeys* anchor_keys;  // [R] sorted
  int* first_tile;          // [segments + 1]
  int* valid_keys;          // [segments]
  float* lse;               // [R] -inf where there are no negatives
  float* sigmoids;          // [R] sum over positives of sigma(lse - z)
  PairWeights* pairs;       // [R] without queues
  float* grad_scale;        // [] factor of every gradient
  float2* row_sums;         // [splits, R] negatives: row_max, sum of w; positives: sum of w, loss
  float* key_sums;          // [splits, R, D]
};

template <class T>
struct KeyTile {
  const T* rows;
  int valid;     // rows
  int position;  // of the first one
};

// Finds tiles one after the other.
template <class T>
class KeyTiles {
 public:
  __device__ KeyTiles(const InfoNCEParams& params, int tile) : params_(params), segment_(0) {
    int end = params.segments;  // the last segment that starts at `tile` or before is in [segment_, end)
    while (end - segment_ > 1) {
      const int middle = (segment_ + end) / 2;
      (params.first_tile[middle] <= tile ? segment_ : end) = middle;
    }
  }

  // `tile` must not go back.
  __device__ KeyTile<T> at(int tile) {
    while (tile >= params_.first_tile[segment_ + 1]) ++segment_;
    const InfoNCEQueue& queue = params_.queue[segment_ % params_.queues];
    const int c = segment_ / params_.queues, first = (tile - params_.first_tile[segment_]) * params_.tile_keys;
    const T* rows = static_cast<const T*>(queue.rows) + (c * queue.capacity + first) * params_.layout.dim;
    return {rows, min(params_.valid_keys[segment_] - first, params_.tile_keys), tile * params_.tile_keys};
  }

 private:
  const InfoNCEParams& params_;
  int segment_;
};

// The tiles [x, y) of this block's split of the keys, for the anchors [row, end).
template <Pass kPass>
__device__ __forceinline__ int2 tiles_of_split(const InfoNCEParams& params, int row, int end) {
  int64_t first = 0, last = params.first_tile[params.segments];
  if (kPass == Pass::kPositives) {
    first = params.anchor_keys[row].own_begin / params.tile_keys;
    last = (params.anchor_keys[end - 1].own_end + int64_t{params.tile_keys} - 1) / params.tile_keys;
  }
  const int64_t split = blockIdx.y, splits = gridDim.y;
  return {static_cast<int>(first + (last - first) * split / splits),
          static_cast<int>(first + (last - first) * (split + 1) / splits)};
}

// An anchor as one of kLanes neighbouring lanes sees it, each of which has kKeys keys of every tile.
template <Pass kPass, int kLanes, int kKeys>
class AnchorRow {
 public:
  __device__ AnchorRow(const InfoNCEParams& params, int row, int count) : row_(row < count ? row : -1) {
    row_max_ = -INFINITY;
    lse_ = kPass == Pass::kNegatives || row_ < 0 ? -INFINITY : params.lse[row];
  }

  // Whether the anchor has weights for any key of the tile.
  template <class T>
  __device__ bool needs(const InfoNCEParams& params, const KeyTile<T>& tile) const {
    if (row_ < 0) return false;
    const AnchorKeys keys = params.anchor_keys[row_];
    const int end = tile.position + tile.valid;
    if (kPass == Pass::kNegatives) return keys.own_begin > tile.position || keys.own_end < end;
    if (kPass == Pass::kPositives) return keys.own_begin < end && keys.own_end > tile.position;
    return true;
  }

  // Products z(0) .. z(kKeys - 1), of the keys column(0) .. of the tile, become weights. Returns by how much to rescale
  // earlier key sums. The whole warp calls it.
  template <class T, class Z, class Column>
  __device__ float weigh(const InfoNCEParams& params, const KeyTile<T>& tile, const Z& z, const Column& column) {
    const AnchorKeys keys = params.anchor_keys[max(row_, 0)];
    const int own_begin = keys.own_begin - tile.position, own_end = keys.own_end - tile.position;
    // + 0 z: an infinite similarity becomes NaN, which no maximum, exponential or sigmoid below hides
    CU_UNROLL for (int i = 0; i < kKeys; ++i) z(i) = z(i) * params.scale + 0 * z(i);
    if constexpr (kPass == Pass::kNegatives) {
      if (tile.valid < params.tile_keys || (own_begin < tile.valid && own_end > 0)) {
        CU_UNROLL for (int i = 0; i < kKeys; ++i) {
          const int key = column(i);
          if (key >= tile.valid || (key >= own_begin && key < own_end)) z(i) = -INFINITY;
        }
      }
      return online_softmax(z);
    } else {
      const int own_valid = min(own_end, tile.valid), excluded = keys.excluded - tile.position;
      CU_UNROLL for (int i = 0; i < kKeys; ++i) {
        const int key = column(i);
        const bool own = key >= own_begin && key < own_valid;
        if constexpr (kPass == Pass::kPositives) {
          z(i) = own && key != excluded && has_negatives() ? weigh_positive(z(i)) : 0;
        } else {
          const bool valid = row_ >= 0 && has_negatives() && key < tile.valid && key != excluded;
          z(i) = valid ? weigh_pair(params, tile.position + key, own, z(i)) : 0;
        }
      }
      return 1;
    }
  }

  // The whole warp calls it.
  __device__ void store(const InfoNCEParams& params) const {
    if (kPass == Pass::kPairs) return;
    const float sum = warp_sum<kLanes>(sum_), loss = warp_sum<kLanes>(loss_);
    if (row_ < 0 || threadIdx.x % kLanes != 0) return;
    params.row_sums[blockIdx.y * params.count + row_] =
        kPass == Pass::kNegatives ? float2{row_max_, sum} : float2{sum, loss};
  }

  // Where the key sums of this anchor go, or null.
  __device__ float* key_sums(const InfoNCEParams& params) const {
    if (row_ < 0) return nullptr;
    return params.key_sums + (blockIdx.y * params.count + row_) * params.layout.dim;
  }

 private:
  template <class Z>
  __device__ float online_softmax(const Z& z) {
    float row_max = row_max_;
    CU_UNROLL for (int i = 0; i < kKeys; ++i) row_max = fmaxf(row_max, z(i));
    row_max = warp_max<kLanes>(row_max);
    const float base = row_max == -INFINITY ? 0 : row_max, rescale = __expf(row_max_ - base);
    sum_ *= rescale;
    CU_UNROLL for (int i = 0; i < kKeys; ++i) sum_ += z(i) = __expf(z(i) - base);
    row_max_ = row_max;
    return rescale;
  }

  // sigma(lse - z); the loss is log(1 + e^(lse - z)).
  __device__ float weigh_positive(float z) {
    const float x = lse_ - z, e = __expf(-fabsf(x));
    loss_ += fmaxf(x, 0) + log1pf(e);
    const float sigmoid = __fdividef(x >= 0 ? 1 : e, 1 + e);
    sum_ += sigmoid;
    return sigmoid;
  }

  __device__ float weigh_pair(const InfoNCEParams& params, int other_row, bool own, float z) const {
    const PairWeights a = params.pairs[row_], b = params.pairs[other_row];
    if (!own) return a.sigmoids * __expf(z - a.lse) + b.sigmoids * __expf(z - b.lse);
    return -__fdividef(a.one, 1 + __expf(z - a.lse)) - __fdividef(b.one, 1 + __expf(z - b.lse));
  }

  // Otherwise the loss is 0, whatever the positives are.
  __device__ bool has_negatives() const { return lse_ != -INFINITY; }

  int row_;  // -1: none
  float row_max_, lse_;
  float sum_ = 0, loss_ = 0;  // this lane's part
};

// ---- exact float32, for any D and any alignment. Keys may be stored in any dtype; anchors are float.
//
// A block of 256 threads has 64 anchors x 64 keys at a time, a thread 4 x 4 of them, and goes through chunks of 64
// channels. 64 multiplications a thread need 8 loads of 16 bytes, which take shared memory as long as the
// multiplications take: at two thirds of the peak, 1023 x 190000 pairs of D = 256 (199 Gflop) take an H100 about 5 ms.
// Key sums are kept in the workspace, where each element belongs to one thread: 128 KB a tile through the cache, 8
// bytes a cycle.

template <class T>
struct Float32Traits {
  using Key = T;
  static constexpr int kRows = 64, kTileKeys = 64, kThreads = 256, kBlocksPerSm = 2;
  static constexpr int kChunk = 64;           // channels
  static constexpr int kStride = kChunk + 4;  // of rows in shared memory; eight rows lie in different banks
  static constexpr size_t kSharedBytes = sizeof(float) * 3 * kRows * kStride;

  // Channels [first, first + kChunk) of `rows` rows [., dim]; zero beyond.
  template <class From>
  static __device__ __forceinline__ void load_chunk(float* to, const From* from, int rows, int first, int dim) {
    const int step = kThreads / kChunk, start = threadIdx.x / kChunk, column = threadIdx.x % kChunk;
    from += int64_t{start} * dim + first + column;
    CU_UNROLL for (int i = 0; i < kRows / step; ++i) {
      const int row = start + i * step;
      to[row * kStride + column] = row < rows && first + column < dim ? to_float(*from) : 0;
      from += int64_t{step} * dim;
    }
  }

  static __device__ __forceinline__ float4 load4(const float* rows, int row, int column) {
    return *reinterpret_cast<const float4*>(rows + row * kStride + column);
  }
};

__device__ __forceinline__ void add_product(float& sum, const float4& a, const float4& b) {
  sum = fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}
__device__ __forceinline__ void add_scaled(float (&sums)[4], float scale, const float4& x) {
  sums[0] = fmaf(scale, x.x, sums[0]);
  sums[1] = fmaf(scale, x.y, sums[1]);
  sums[2] = fmaf(scale, x.z, sums[2]);
  sums[3] = fmaf(scale, x.w, sums[3]);
}

template <class Traits, Pass kPass>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    infonce_forward_float32(const __grid_constant__ InfoNCEParams params) {
  constexpr int kRows = Traits::kRows, kChunk = Traits::kChunk;
  CU_DYN_SHARED(float, anchors);
  float *const keys = anchors + kRows * Traits::kStride, *const weights = keys + kRows * Traits::kStride;

  const int first_row = blockIdx.x * kRows, count = *params.valid_anchors, dim = static_cast<int>(params.layout.dim);
  if (first_row >= count) return;  // the whole block
  const int rows = min(kRows, count - first_row);
  const int2 tiles = tiles_of_split<kPass>(params, first_row, first_row + rows);
  const float* const from = static_cast<const float*>(params.rows) + int64_t{first_row} * dim;

  const int x = threadIdx.x % 16, y = threadIdx.x / 16;  // the thread's anchors are y + 16 i, its keys x + 16 j
  AnchorRow<kPass, 16, 4> row[4] = {{params, first_row + y, count},
                                    {params, first_row + y + 16, count},
                                    {params, first_row + y + 32, count},
                                    {params, first_row + y + 48, count}};
  // Calls body(sum, anchor) for the thread's key sums in the chunk from channel `first` on.
  const auto for_sums = [&](int first, const auto& body) {
    CU_UNROLL for (int i = 0; i < 4; ++i) {
      float* const to = row[i].key_sums(params);
      if (to == nullptr) continue;
      CU_UNROLL for (int j = 0; j < 4; ++j) {
        if (first + 4 * x + j < dim) body(to[first + 4 * x + j], i, j);
      }
    }
  };
  if (params.gradient) {
    for (int first = 0; first < dim; first += kChunk) for_sums(first, [](float& sum, int, int) { sum = 0; });
  }

  KeyTiles<typename Traits::Key> find(params, tiles.x);
  for (int tile = tiles.x; tile < tiles.y; ++tile) {
    const auto current = find.at(tile);
    bool needed = false;
    CU_UNROLL for (int i = 0; i < 4; ++i) needed |= row[i].needs(params, current);
    if (!__syncthreads_or(needed)) continue;

    float z[4][4] = {};
    for (int first = 0; first < dim; first += kChunk) {  // gemm_qk
      Traits::load_chunk(anchors, from, rows, first, dim);
      Traits::load_chunk(keys, current.rows, current.valid, first, dim);
      __syncthreads();
      float chunk[4][4] = {};  // added up apart, for rounding errors that do not grow with D
      for (int column = 0; column < kChunk; column += 4) {
        float4 a[4], b[4];
        CU_UNROLL for (int i = 0; i < 4; ++i) a[i] = Traits::load4(anchors, y + 16 * i, column);
        CU_UNROLL for (int j = 0; j < 4; ++j) b[j] = Traits::load4(keys, x + 16 * j, column);
        CU_UNROLL for (int i = 0; i < 4; ++i) {
          CU_UNROLL for (int j = 0; j < 4; ++j) add_product(chunk[i][j], a[i], b[j]);
        }
      }
      CU_UNROLL for (int i = 0; i < 4; ++i) { CU_UNROLL for (int j = 0; j < 4; ++j) z[i][j] += chunk[i][j]; }
      __syncthreads();
    }
    float rescale[4];
    CU_UNROLL for (int i = 0; i < 4; ++i) {
      rescale[i] =
          row[i].weigh(params, current, [&](int j) -> float& { return z[i][j]; }, [&](int j) { return x + 16 * j; });
    }
    if (!params.gradient) continue;

    CU_UNROLL for (int i = 0; i < 4; ++i) {
      CU_UNROLL for (int j = 0; j < 4; ++j) weights[(y + 16 * i) * Traits::kStride + x + 16 * j] = z[i][j];
    }
    for (int first = 0; first < dim; first += kChunk) {  // gemm_pv
      Traits::load_chunk(keys, current.rows, current.valid, first, dim);
      __syncthreads();
      float added[4][4] = {};
      for (int key = 0; key < Traits::kTileKeys; key += 4) {
        float4 w[4], k[4];
        CU_UNROLL for (int i = 0; i < 4; ++i) w[i] = Traits::load4(weights, y + 16 * i, key);
        CU_UNROLL for (int j = 0; j < 4; ++j) k[j] = Traits::load4(keys, key + j, 4 * x);
        CU_UNROLL for (int i = 0; i < 4; ++i) {
          add_scaled(added[i], w[i].x, k[0]);
          add_scaled(added[i], w[i].y, k[1]);
          add_scaled(added[i], w[i].z, k[2]);
          add_scaled(added[i], w[i].w, k[3]);
        }
      }
      for_sums(first, [&](float& sum, int i, int j) { sum = sum * rescale[i] + added[i][j]; });
      __syncthreads();
    }
  }
  CU_UNROLL for (int i = 0; i < 4; ++i) row[i].store(params);
}

}  // namespace pixcontrast::cuda
