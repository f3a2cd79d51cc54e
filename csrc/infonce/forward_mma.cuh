// The forward kernel of InfoNCE on tensor cores, for D up to kDim with D a multiple of 16. A warp has 16 anchors; their
// key sums stay in registers, the anchors in shared memory, and tiles of keys come through two buffers by asynchronous
// copies. One barrier a tile: copies into a buffer start when all warps have left it.
//
// The limit is reading shared memory, 128 bytes a cycle: a warp reads its anchors once and a tile of keys twice for
// each tile. On an H100 (132 multiprocessors, 1.75 GHz) with D = 256:
//   bfloat16  72 KB for 16 x 64 pairs: 0.46 ms or more for 1023 x 190000 pairs, whose multiplications alone take
//             mma.sync about 0.32 ms. Blocks have 4 warps, 96 KB and 255 registers a thread; two on a multiprocessor,
//             so that one multiplies while the other weighs or waits.
//   tf32      80 KB for 16 x 32 pairs: 1.0 ms or more. Blocks have 8 warps, 192 KB, one on a multiprocessor.
// Few anchors: 64 KB of keys are under way on a multiprocessor, so that 38 x 190000 pairs go at the speed of memory.
#pragma once

#include "infonce/forward.cuh"

namespace pixcontrast::cuda {

// Rows of kDim elements of T in shared memory; rows and columns beyond the data are zero. 16-byte chunks of a row trade
// places so that every read below takes its eight rows from different banks.
template <class T, int kDim>
struct SharedRows {
  static constexpr int kChunks = kDim / kPack<T>;

  // The element at `column`.
  static __device__ __forceinline__ int offset(int row, int column) {
    const int swap = sizeof(T) == 2 ? row % 8 : (row % 4 * 2) ^ (row & 4);
    return row * kDim + ((column / kPack<T>)^swap) * kPack<T> + column % kPack<T>;
  }

  template <int Rows, int Threads>
  static __device__ __forceinline__ void copy(T* to, const T* from, int rows, int dim) {
    constexpr int kStep = Threads / kChunks;  // rows that are copied at a time
    static_assert(Threads % kChunks == 0 && Rows % kStep == 0, "all threads must have as much to copy");
    const int first = threadIdx.x / kChunks, column = threadIdx.x % kChunks * kPack<T>;
    from += int64_t{first} * dim + column;
    CU_UNROLL for (int row = first; row < first + Rows; row += kStep) {
      cu_cp_async16(to + offset(row, column), from, row < rows && column < dim ? 16 : 0);
      from += int64_t{kStep} * dim;
    }
  }
};

// The products of a warp. bfloat16 and half: fragments by ldmatrix; weights, rounded to T, are multiplied from the
// registers they are in.
template <class T, int kDim>
struct WarpGemm {
  using Rows = SharedRows<T, kDim>;
  static constexpr int kWarps = 4, kTileKeys = 64, kBlocksPerSm = 2;

  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, __half>) {
      cu_mma_f16_16816(d, a, b, d);
    } else {
      cu_mma_bf16_16816(d, a, b, d);
    }
  }

  static __device__ __forceinline__ uint32_t pair(float first, float second) {
    union {
      T elements[2];
      uint32_t bits;
    };
    elements[0] = from_float<T>(first);
    elements[1] = from_float<T>(second);
    return bits;
  }

  // z = anchors [16, kDim] keys^T
  static __device__ __forceinline__ void gemm_qk(float (&z)[kTileKeys / 8][4], const T* anchors, const T* keys) {
    const int lane = threadIdx.x % 32;
    CU_UNROLL for (int column = 0; column < kDim; column += 16) {
      uint32_t a[4];
      cu_ldmatrix<4, false>(a, anchors + Rows::offset(lane % 16, column + lane / 16 * 8));
      CU_UNROLL for (int n = 0; n < kTileKeys / 8; n += 2) {
        uint32_t b[4];
        cu_ldmatrix<4, false>(b, keys + Rows::offset(n * 8 + lane / 16 * 8 + lane % 8, column + lane / 8 % 2 * 8));
        multiply(z[n], a, {b[0], b[1]});
        multiply(z[n + 1], a, {b[2], b[3]});
      }
    }
  }

  // sums += weights keys
  static __device__ __forceinline__ void gemm_pv(float (&sums)[kDim / 8][4], const float (&w)[kTileKeys / 8][4],
                                                 const T* keys) {
    const int lane = threadIdx.x % 32;
    CU_UNROLL for (int n = 0; n < kTileKeys / 8; n += 2) {
      const uint32_t a[4] = {pair(w[n][0], w[n][1]), pair(w[n][2], w[n][3]), pair(w[n + 1][0], w[n + 1][1]),
                             pair(w[n + 1][2], w[n + 1][3])};
      CU_UNROLL for (int column = 0; column < kDim; column += 16) {
        uint32_t b[4];
        cu_ldmatrix<4, true>(b, keys + Rows::offset(n * 8 + lane % 16, column + lane / 16 * 8));
        multiply(sums[column / 8], a, {b[0], b[1]});
        multiply(sums[column / 8 + 1], a, {b[2], b[3]});
      }
    }
  }

  // The anchor, key and channel of this lane's fragment elements (n, i).
  static __device__ __forceinline__ int anchor(int i) { return threadIdx.x % 32 / 4 + i / 2 * 8; }
  static __device__ __forceinline__ int key(int n, int i) { return n * 8 + threadIdx.x % 4 * 2 + i % 2; }
  static __device__ __forceinline__ int channel(int n, int i) { return key(n, i); }
};

// float as tf32. There is no ldmatrix for 32-bit elements, so lanes load fragments themselves, and permute rows,
// columns and depth of the products until a lane's elements are 16 neighbouring bytes: it takes depths t and t + 4 of
// two fragments from channels 4t to 4t + 3 (gemm_qk), and column g of four fragments from channels 4g to 4g + 3
// (gemm_pv). anchor(), key() and channel() undo the permutation. gather_anchors rounds anchors and gemm_pv rounds
// weights to tf32; of keys the hardware ignores the low bits.
template <int kDim>
struct WarpGemm<float, kDim> {
  using Rows = SharedRows<float, kDim>;
  static constexpr int kWarps = 8, kTileKeys = 32, kBlocksPerSm = 1;

  static __device__ __forceinline__ float4 load(const float* rows, int row, int column) {
    return *reinterpret_cast<const float4*>(rows + Rows::offset(row, column));
  }
  static __device__ __forceinline__ uint32_t bits(float x) { return __float_as_uint(x); }
  // Rows g of eight, so that even and odd ones come from different banks, as do four even or four odd ones.
  static __device__ __forceinline__ int spread(int g) { return g / 2 + g % 2 * 4; }

  static __device__ __forceinline__ void gemm_qk(float (&z)[kTileKeys / 8][4], const float* anchors,
                                                 const float* keys) {
    const int g = spread(threadIdx.x % 32 / 4), t = threadIdx.x % 4;
    CU_UNROLL for (int column = 0; column < kDim; column += 16) {
      const float4 upper = load(anchors, g, column + 4 * t), lower = load(anchors, g + 8, column + 4 * t);
      const uint32_t first[4] = {bits(upper.x), bits(lower.x), bits(upper.y), bits(lower.y)};
      const uint32_t second[4] = {bits(upper.z), bits(lower.z), bits(upper.w), bits(lower.w)};
      CU_UNROLL for (int n = 0; n < kTileKeys / 8; ++n) {
        const float4 b = load(keys, n * 8 + g, column + 4 * t);
        cu_mma_tf32_1688(z[n], first, {bits(b.x), bits(b.y)}, z[n]);
        cu_mma_tf32_1688(z[n], second, {bits(b.z), bits(b.w)}, z[n]);
      }
    }
  }

  static __device__ __forceinline__ void gemm_pv(float (&sums)[kDim / 8][4], const float (&w)[kTileKeys / 8][4],
                                                 const float* keys) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    CU_UNROLL for (int n = 0; n < kTileKeys / 8; ++n) {
      const uint32_t a[4] = {cu_to_tf32(w[n][0]), cu_to_tf32(w[n][2]), cu_to_tf32(w[n][1]), cu_to_tf32(w[n][3])};
      CU_UNROLL for (int column = 0; column < kDim; column += 32) {
        const float4 even = load(keys, n * 8 + t, column + 4 * g), odd = load(keys, n * 8 + t + 4, column + 4 * g);
        cu_mma_tf32_1688(sums[column / 8], a, {bits(even.x), bits(odd.x)}, sums[column / 8]);
        cu_mma_tf32_1688(sums[column / 8 + 1], a, {bits(even.y), bits(odd.y)}, sums[column / 8 + 1]);
        cu_mma_tf32_1688(sums[column / 8 + 2], a, {bits(even.z), bits(odd.z)}, sums[column / 8 + 2]);
        cu_mma_tf32_1688(sums[column / 8 + 3], a, {bits(even.w), bits(odd.w)}, sums[column / 8 + 3]);
      }
    }
  }

  static __device__ __forceinline__ int anchor(int i) { return spread(threadIdx.x % 32 / 4) + i / 2 * 8; }
  static __device__ __forceinline__ int key(int n, int i) { return n * 8 + spread(threadIdx.x % 4 * 2 + i % 2); }
  static __device__ __forceinline__ int channel(int n, int i) {
    return n / 4 * 32 + (threadIdx.x % 4 * 2 + i % 2) * 4 + n % 4;
  }
};

template <class T, int kDim>
struct MmaTraits {
  using Key = T;
  using Gemm = WarpGemm<T, kDim>;
  static constexpr int kMaxDim = kDim, kRows = 16 * Gemm::kWarps, kTileKeys = Gemm::kTileKeys;
  static constexpr int kThreads = 32 * Gemm::kWarps, kBlocksPerSm = Gemm::kBlocksPerSm;
  static constexpr size_t kSharedBytes = size_t{kRows + 2 * kTileKeys} * kDim * sizeof(T);
};

template <class Traits, Pass kPass>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    infonce_forward_mma(const __grid_constant__ InfoNCEParams params) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  using T = typename Traits::Key;
  using Gemm = typename Traits::Gemm;
  using Rows = typename Gemm::Rows;
  constexpr int kRows = Traits::kRows, kThreads = Traits::kThreads, kKeys = Traits::kTileKeys, kDim = Traits::kMaxDim;
  CU_DYN_SHARED(T, shared);
  T* const keys = shared + kRows * kDim;

  const int first_row = blockIdx.x * kRows, count = *params.valid_anchors, dim = static_cast<int>(params.layout.dim);
  if (first_row >= count) return;  // the whole block
  const int rows = min(kRows, count - first_row);
  const int2 tiles = tiles_of_split<kPass>(params, first_row, first_row + rows);
  KeyTiles<T> find(params, tiles.x);
  KeyTile<T> next{};
  Rows::template copy<kRows, kThreads>(shared, static_cast<const T*>(params.rows) + int64_t{first_row} * dim, rows,
                                       dim);
  const auto copy_next = [&](int tile) {
    if (tile < tiles.y) {
      next = find.at(tile);
      Rows::template copy<kKeys, kThreads>(keys + (tile - tiles.x) % 2 * kKeys * kDim, next.rows, next.valid, dim);
    }
    cu_cp_async_commit();
  };
  copy_next(tiles.x);

  const int warp_row = threadIdx.x / 32 * 16;
  AnchorRow<kPass, 4, kKeys / 4> row[2] = {{params, first_row + warp_row + Gemm::anchor(0), count},
                                           {params, first_row + warp_row + Gemm::anchor(2), count}};
  float sums[kDim / 8][4] = {};
  for (int tile = tiles.x; tile < tiles.y; ++tile) {
    cu_cp_async_wait<0>();
    __syncthreads();
    const T* const tile_keys = keys + (tile - tiles.x) % 2 * kKeys * kDim;
    const KeyTile<T> current = next;
    copy_next(tile + 1);
    if (!__any_sync(kAllLanes, row[0].needs(params, current) || row[1].needs(params, current))) continue;

    float z[kKeys / 8][4] = {};
    Gemm::gemm_qk(z, shared + warp_row * kDim, tile_keys);
    float rescale[2];
    CU_UNROLL for (int half = 0; half < 2; ++half) {
      rescale[half] = row[half].weigh(
          params, current, [&](int i) -> float& { return z[i / 2][2 * half + i % 2]; },
          [](int i) { return Gemm::key(i / 2, i); });
    }
    if (!params.gradient) continue;
    if (kPass == Pass::kNegatives && __any_sync(kAllLanes, rescale[0] != 1 || rescale[1] != 1)) {
      CU_UNROLL for (int n = 0; n < kDim / 8; ++n) {
        CU_UNROLL for (int i = 0; i < 4; ++i) sums[n][i] *= rescale[i / 2];
      }
    }
    Gemm::gemm_pv(sums, z, tile_keys);
  }
  cu_cp_async_wait<0>();

  CU_UNROLL for (int half = 0; half < 2; ++half) {
    row[half].store(params);
    float* const to = params.gradient ? row[half].key_sums(params) : nullptr;
    if (to == nullptr) continue;
    CU_UNROLL for (int n = 0; n < kDim / 8; ++n) {
      CU_UNROLL for (int i = 0; i < 2; ++i) {
        const int channel = Gemm::channel(n, i);
        if (channel < dim) to[channel] = sums[n][2 * half + i];
      }
    }
  }
#endif
}

}  // namespace pixcontrast::cuda
