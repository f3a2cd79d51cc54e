// Sums over all rows: rows are split into parts, whose sums, in the workspace, are added in order.
#pragma once

#include "common/cuda/launch.h"
#include "common/cuda/numbers.cuh"

namespace pixcontrast::cuda {

// At most `most` parts of `rows` each, at least 256 unless there is only one. Numbers of parts must not depend on the
// device, or sums would.
struct Parts {
  static constexpr int64_t kLeastRows = 256;
  int64_t count, rows;

  Parts(int64_t total, int64_t most)
      : count(total / kLeastRows < 1      ? 1
              : total / kLeastRows < most ? total / kLeastRows
                                          : most),
        rows((total + count - 1) / count) {}
};

// to = sum over parts of sums [parts, numbers].
template <class T>
__global__ void add_parts(const float* sums, int64_t parts, int64_t numbers, T* to) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= numbers) return;
  float sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += sums[part * numbers + i];
  to[i] = from_float<T>(sum);
}

// ---- sums of columns: a block has 32 columns and 8 threads for each

constexpr int kSumColumns = 32, kSumThreads = 8;

inline dim3 sum_grid(int64_t columns, const Parts& parts) {
  return dim3(blocks_for(columns, kSumColumns), static_cast<unsigned>(parts.count));
}

// The rows of a block, whose part is blockIdx.y.
struct PartRows {
  int64_t first, end;

  __device__ __forceinline__ PartRows(int64_t part_rows, int64_t total)
      : first(blockIdx.y * part_rows), end(first + part_rows < total ? first + part_rows : total) {}
};

// N sums of the column of this thread; add(row, sums) adds what a row has. Those with threadIdx.y == 0 get the sums.
template <int N, class Add>
__device__ __forceinline__ void sum_rows(const PartRows& rows, float (&sums)[N], const Add& add) {
  CU_SHARED(float, part, [kSumThreads][N][kSumColumns]);
  CU_UNROLL for (int n = 0; n < N; ++n) sums[n] = 0;
  for (int64_t r = rows.first + threadIdx.y; r < rows.end; r += kSumThreads) add(r, sums);
  CU_UNROLL for (int n = 0; n < N; ++n) part[threadIdx.y][n][threadIdx.x] = sums[n];
  __syncthreads();
  if (threadIdx.y > 0) return;
  for (int i = 1; i < kSumThreads; ++i) {
    CU_UNROLL for (int n = 0; n < N; ++n) sums[n] += part[i][n][threadIdx.x];
  }
}

}  // namespace pixcontrast::cuda
