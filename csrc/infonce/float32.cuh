// A pass of InfoNCE in exact float32, for any D and any alignment. Keys may be stored in any format; anchors are float.
//
// A block of 256 threads has 64 anchors x 64 keys at a time, a thread 4 x 4 of them, and goes through chunks of 64
// channels. 64 multiplications a thread need 8 loads of 16 bytes, which take shared memory as long as the
// multiplications take: at two thirds of the peak, 1023 x 190000 pairs of D = 256 (199 Gflop) take an H100 about 5 ms.
// Sums over keys are kept in the workspace, where each number belongs to one thread: 128 KB a tile through the cache, 8
// bytes a cycle.
#pragma once

#include "infonce/pass.cuh"

namespace pixcontrast::cuda {

constexpr int kSimpleRows = 64, kSimpleThreads = 256, kSimpleBlocks = 2;
constexpr int kSimpleStride = kSimpleRows + 4;  // of rows in shared memory; eight rows lie in different banks
constexpr size_t kSimpleShared = sizeof(float) * 3 * kSimpleRows * kSimpleStride;

// Channels [first, first + 64) of `rows` rows [., dim]; zero beyond.
template <class T>
__device__ __forceinline__ void load_chunk(float* to, const T* from, int rows, int first, int dim) {
  const int step = kSimpleThreads / 64, start = threadIdx.x / 64, column = threadIdx.x % 64;
  from += int64_t{start} * dim + first + column;
  CU_UNROLL for (int i = 0; i < kSimpleRows / step; ++i) {
    const int row = start + i * step;
    to[row * kSimpleStride + column] = row < rows && first + column < dim ? to_float(*from) : 0;
    from += int64_t{step} * dim;
  }
}

__device__ __forceinline__ float4 load4(const float* rows, int row, int column) {
  return *reinterpret_cast<const float4*>(rows + row * kSimpleStride + column);
}

__device__ __forceinline__ void add_product(float& sum, const float4& a, const float4& b) {
  sum = fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}
__device__ __forceinline__ void add_scaled(float (&sums)[4], float factor, const float4& x) {
  sums[0] = fmaf(factor, x.x, sums[0]);
  sums[1] = fmaf(factor, x.y, sums[1]);
  sums[2] = fmaf(factor, x.z, sums[2]);
  sums[3] = fmaf(factor, x.w, sums[3]);
}

template <class T>
__global__ void __launch_bounds__(kSimpleThreads, kSimpleBlocks) simple_pass(const __grid_constant__ Pass pass) {
  CU_DYN_SHARED(float, anchors);
  float* const keys = anchors + kSimpleRows * kSimpleStride;
  float* const weights = keys + kSimpleRows * kSimpleStride;

  const int first_row = blockIdx.x * kSimpleRows, count = *pass.count;
  if (first_row >= count) return;  // the whole block
  const int rows = min(kSimpleRows, count - first_row);
  const int2 tiles = tiles_of_block(pass, first_row, first_row + rows);
  const float* const from = static_cast<const float*>(pass.rows) + int64_t{first_row} * pass.dim;

  const int x = threadIdx.x % 16, y = threadIdx.x / 16;  // the thread's anchors are y + 16 i, its keys x + 16 j
  Row<16, 4> row[4] = {{pass, first_row + y, count},
                       {pass, first_row + y + 16, count},
                       {pass, first_row + y + 32, count},
                       {pass, first_row + y + 48, count}};
  // Calls body(sum, anchor) for the thread's sums over keys in the chunk from channel `first` on.
  const auto for_sums = [&](int first, const auto& body) {
    CU_UNROLL for (int i = 0; i < 4; ++i) {
      float* const to = row[i].key_sums(pass);
      if (to == nullptr) continue;
      CU_UNROLL for (int j = 0; j < 4; ++j) {
        if (first + 4 * x + j < pass.dim) body(to[first + 4 * x + j], i, j);
      }
    }
  };
  if (pass.sums) {
    for (int first = 0; first < pass.dim; first += 64) for_sums(first, [](float& sum, int, int) { sum = 0; });
  }

  KeyTiles<T> find(pass, tiles.x);
  for (int tile = tiles.x; tile < tiles.y; ++tile) {
    const KeyTile<T> current = find.at(tile);
    bool needed = false;
    CU_UNROLL for (int i = 0; i < 4; ++i) needed |= row[i].needs(pass, current);
    if (!__syncthreads_or(needed)) continue;

    float z[4][4] = {};
    for (int first = 0; first < pass.dim; first += 64) {
      load_chunk(anchors, from, rows, first, pass.dim);
      load_chunk(keys, current.rows, current.valid, first, pass.dim);
      __syncthreads();
      float part[4][4] = {};  // added up apart, for rounding errors that do not grow with D
      for (int column = 0; column < 64; column += 4) {
        float4 a[4], b[4];
        CU_UNROLL for (int i = 0; i < 4; ++i) a[i] = load4(anchors, y + 16 * i, column);
        CU_UNROLL for (int j = 0; j < 4; ++j) b[j] = load4(keys, x + 16 * j, column);
        CU_UNROLL for (int i = 0; i < 4; ++i) {
          CU_UNROLL for (int j = 0; j < 4; ++j) add_product(part[i][j], a[i], b[j]);
        }
      }
      CU_UNROLL for (int i = 0; i < 4; ++i) { CU_UNROLL for (int j = 0; j < 4; ++j) z[i][j] += part[i][j]; }
      __syncthreads();
    }
    float factor[4];
    CU_UNROLL for (int i = 0; i < 4; ++i) {
      factor[i] =
          row[i].weigh(pass, current, [&](int j) -> float& { return z[i][j]; }, [&](int j) { return x + 16 * j; });
    }
    if (!pass.sums) continue;

    CU_UNROLL for (int i = 0; i < 4; ++i) {
      CU_UNROLL for (int j = 0; j < 4; ++j) weights[(y + 16 * i) * kSimpleStride + x + 16 * j] = z[i][j];
    }
    for (int first = 0; first < pass.dim; first += 64) {
      load_chunk(keys, current.rows, current.valid, first, pass.dim);
      __syncthreads();
      float added[4][4] = {};
      for (int key = 0; key < 64; key += 4) {
        float4 w[4], k[4];
        CU_UNROLL for (int i = 0; i < 4; ++i) w[i] = load4(weights, y + 16 * i, key);
        CU_UNROLL for (int j = 0; j < 4; ++j) k[j] = load4(keys, key + j, 4 * x);
        CU_UNROLL for (int i = 0; i < 4; ++i) {
          add_scaled(added[i], w[i].x, k[0]);
          add_scaled(added[i], w[i].y, k[1]);
          add_scaled(added[i], w[i].z, k[2]);
          add_scaled(added[i], w[i].w, k[3]);
        }
      }
      for_sums(first, [&](float& sum, int i, int j) { sum = sum * factor[i] + added[i][j]; });
      __syncthreads();
    }
  }
  CU_UNROLL for (int i = 0; i < 4; ++i) row[i].store(pass);
}

}  // namespace pixcontrast::cuda
