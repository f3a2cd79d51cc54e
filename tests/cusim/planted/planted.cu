// Two kernels that are right as they stand, and wrong in one way for each Bug. The lines that a report should name
// mention the bug.
#include "common/cuda/device.cuh"

namespace {

enum Bug {
  none,
  no_barrier_after_start,
  no_barrier_before_read,
  no_barrier_before_reuse,
  no_barrier_after_read,
  static_shared_overrun,
  dynamic_shared_overrun,
  unwritten_shared_read,
  no_atomic_in_shared,
  no_atomic_in_global,
  no_atomic_read,
  no_fence,
  divergent_barrier,
  early_return,
  half_warp_shuffle,
  divergent_shuffle,
  exited_lanes,
  absent_source,
  deadlock,
  no_syncwarp,
  no_second_syncwarp,
  misaligned_vector,
  global_read_overrun,
  global_write_overrun,
  null_write,
  host_read,
  early_wait,
  no_wait,
  no_barrier_after_wait,
  no_barrier_before_copy,
  misaligned_matrix
};

constexpr int kThreads = 128, kTiles = 2, kClasses = 8, kLanes = 32;
constexpr unsigned kAll = 0xffffffffu;

// numbers [blocks * 2, 128]: sums[c] of columns c, c + 8, ...; sums[8] of everything. sums and done start at 0.
__global__ void sum_kernel(const float* numbers, float* partial, float* sums, unsigned* done, int bug) {
  CU_SHARED(float, tile, [kThreads]);
  CU_SHARED(float, class_sums, [kClasses]);
  CU_SHARED(bool, is_last, );
  CU_DYN_SHARED(float, warp_sums);
  const int thread = threadIdx.x, lane = thread % kLanes, warp = thread / kLanes;

  if (thread < kClasses && !(bug == unwritten_shared_read && thread == 3)) class_sums[thread] = 0;
  if (bug != no_barrier_after_start) __syncthreads();
  if (bug == early_return && thread == 40) return;

  float total = 0;
  for (int j = 0; j < kTiles; ++j) {
    const float* from = numbers + (blockIdx.x * kTiles + j) * kThreads;
    tile[thread] = from[thread];  // no_barrier_before_read, no_barrier_before_reuse
    if (bug == no_atomic_in_shared) {
      class_sums[thread % kClasses] += from[thread];  // no_atomic_in_shared
    } else {
      // no_barrier_after_start, unwritten_shared_read, no_atomic_read
      atomicAdd(&class_sums[thread % kClasses], from[thread]);
    }
    if (bug == static_shared_overrun && thread == 7) tile[kThreads + j] = 0;
    if (bug == global_read_overrun && blockIdx.x + 1 == gridDim.x) total += 0 * from[thread + 1];
    if (bug == no_atomic_read && thread == 0) total += 0 * class_sums[1];
    if (bug != no_barrier_before_read) __syncthreads();  // early_return
    total += tile[kThreads - 1 - thread];                // no_barrier_before_read, no_barrier_before_reuse
    if (bug == misaligned_vector && thread == 0) total += 0 * reinterpret_cast<const float4*>(tile + 1)->x;
    if (bug == divergent_barrier && warp == 1) __syncthreads();
    if (bug != no_barrier_before_reuse) __syncthreads();
  }

  if (bug == divergent_shuffle && lane < 16) total += 0 * __shfl_xor_sync(kAll, total, 1);
  if (bug != half_warp_shuffle || lane < 16) {
    for (int step = 16; step > 0; step /= 2)
      total += __shfl_xor_sync(kAll, total, step);  // half_warp_shuffle, divergent_shuffle
  }
  if (bug == absent_source && lane < 16) total += 0 * __shfl_sync(0xffff, total, 20);
  if (bug == deadlock && lane < 16) __syncwarp(0x1ffff);  // lane 16 goes on to the barrier: deadlock
  tile[thread] = total;                                   // no_syncwarp
  if (bug != no_syncwarp) __syncwarp();
  total = tile[thread ^ 1];  // no_syncwarp, no_second_syncwarp
  if (bug != no_second_syncwarp) __syncwarp();
  tile[thread] = 0;  // no_second_syncwarp
  if (bug == no_barrier_after_read) {
    __syncthreads();
    if (thread == 0) total += 0 * tile[40];  // no_barrier_after_read
    if (thread == 40) tile[40] = 0;          // no_barrier_after_read
  }
  if (lane == 0) warp_sums[warp] = total;
  if (bug == dynamic_shared_overrun && thread == 0) warp_sums[kThreads / kLanes] = 0;
  __syncthreads();
  if (thread == 0) {
    partial[blockIdx.x] = warp_sums[0] + warp_sums[1] + warp_sums[2] + warp_sums[3];
    if (bug != no_fence) __threadfence();
    is_last = atomicAdd(done, 1u) == gridDim.x - 1;
  }
  if (thread < kClasses) {
    if (bug == no_atomic_in_global) {
      sums[thread] += class_sums[thread];  // no_atomic_in_global
    } else {
      atomicAdd(sums + thread, class_sums[thread]);
    }
  }
  __syncthreads();
  if (is_last && thread == 0) {
    total = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) total += partial[i];  // no_fence
    sums[kClasses] = total;
    if (bug == global_write_overrun) sums[kClasses + 1] = 0;
    if (bug == null_write) *reinterpret_cast<volatile float*>(bug - null_write) = 0;
  }
  if (bug == exited_lanes && lane < 16) __syncwarp();
}

constexpr int kRows = 16, kColumns = 16, kStep = 16;
using Tile = __nv_bfloat16[kRows][kStep];

// product [16, 16] = a [16, K] b [16, K]^T by two warps, K a multiple of 16, in steps of 16 with two buffers.
__global__ void product_kernel(const __nv_bfloat16* a, const __nv_bfloat16* b, float* product, int inner, int bug) {
  CU_SHARED(Tile, tiles, [2][2]);  // [buffer][a or b]
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const auto copy = [&](int step) {
    const int row = lane / 2, column = lane % 2 * 8;
    const __nv_bfloat16* from = (warp == 0 ? a : b) + row * inner + step * kStep + column;
    cu_cp_async16(&tiles[step % 2][warp][row][column], from);  // no_barrier_before_copy
    cu_cp_async_commit();
  };
  float sums[4] = {0, 0, 0, 0};
  const int steps = inner / kStep;
  copy(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      copy(step + 1);
      if (bug == early_wait) {
        cu_cp_async_wait<2>();
      } else {
        cu_cp_async_wait<1>();  // no_barrier_after_wait
      }
    } else if (bug != no_wait) {
      cu_cp_async_wait<0>();
    }
    if (bug != no_barrier_after_wait) __syncthreads();
    uint32_t left[4], right[2];
    const int shift = bug == misaligned_matrix ? 1 : 0;
    const auto& tile = tiles[step % 2];
    // early_wait, no_wait, misaligned_matrix, no_barrier_after_wait, no_barrier_before_copy
    cu_ldmatrix<4, false>(left, &tile[0][lane % 16][lane / 16 * 8] + shift);
    cu_ldmatrix<2, false>(right, &tile[1][warp * 8 + lane % 8][lane / 8 % 2 * 8]);
    cu_mma_bf16_16816(sums, left, right, sums);
    if (bug != no_barrier_before_copy) __syncthreads();
  }
  for (int i = 0; i < 4; ++i) {
    product[(lane / 4 + i / 2 * 8) * kColumns + warp * 8 + lane % 4 * 2 + i % 2] = sums[i];
  }
}

}  // namespace

extern "C" int64_t sum(const float* numbers, float* partial, float* sums, unsigned* done, int64_t blocks, int64_t bug) {
  if (bug == host_read && *done != 0) return cudaErrorInvalidValue;
  return cu_launch(sum_kernel, blocks, kThreads, kThreads / kLanes * sizeof(float), nullptr, numbers, partial, sums,
                   done, bug);
}

extern "C" int64_t product(const __nv_bfloat16* a, const __nv_bfloat16* b, float* product, int64_t inner, int64_t bug) {
  return cu_launch(product_kernel, 1, 2 * kLanes, 0, nullptr, a, b, product, inner, bug);
}
