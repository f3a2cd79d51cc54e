// What a class memory does with new rows: choose the best of each segment, then write them into the rings.
//
// segment_topk: of the rows order[i], i in segment s, the k of the highest score, best first; of equal scores the lower
// row first. A score that is not finite is never chosen. A row stands once in a segment.
//
// memory_write: the entries of class c are rows of the source, best first. Those whose norm is finite, m of them, go as
// unit rows into the ring of class c:
//   row r of m -> slot (cursor_c + m - 1 - r) mod N, if r < N      so the best row is the newest and stays longest
//   count_c = min(count_c + m, N)    cursor_c = (cursor_c + m) mod N
//
// No torch header: raw pointers and sizes.
#pragma once

#include "common/layout.h"

namespace pixcontrast {

constexpr int64_t kMostRows = int64_t{1} << 32;  // that segment_topk chooses from: a row has 32 bits of a sort key

template <class T>
struct SegmentTopk {
  Segments segments;     // S segments of positions
  int64_t k, rows;       // rows outside [0, rows) are not chosen
  const T* scores;       // [rows], or null: all alike
  const int64_t* order;  // row at each position, or null: the position itself
  int64_t* index;        // [S, k] rows, -1 where there are fewer
  int64_t* rejected;     // [] += scores that are not finite; or null
};

template <class T, class Source>
struct MemoryWrite {
  int64_t classes, capacity, entries;  // C, N, K
  FeatureLayout layout;                // of the source: rows [Q, D] or maps
  const Source* source;
  const int64_t* index;  // [C, K] rows or pixels of the source; outside [0, Q): none
  T* rows;               // [C, N, D]
  int64_t* counts;       // [C]
  int64_t* cursors;      // [C] in [0, N)
  int64_t* rejected;     // [] += entries whose norm is not finite
};

#ifdef PIXCONTRAST_WITH_CUDA
// The workspace is [S, k] keys.
cudaError_t segment_topk_cuda(const SegmentTopk<float>& args, uint64_t* workspace, cudaStream_t stream);

// For all pairs of float, __nv_bfloat16 and __half. The workspace is [C, K] norms.
template <class T, class Source>
cudaError_t memory_write_cuda(const MemoryWrite<T, Source>& args, float* workspace, cudaStream_t stream);
#endif

}  // namespace pixcontrast
