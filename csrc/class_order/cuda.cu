// Stable counting sort in three launches without atomics: count, scan, place.
//
// The rows are split over warps. Counting, a warp finds out how many rows of each class its split has; the counts
// [C + 1, splits] (class C: invalid), scanned in that order, say where the split's rows of a class go. Placing, the
// warp walks through its split once more, 32 rows at a time: __match_any_sync gives a row the lanes of the same class,
// and those below it are its rank. A warp's counters lie in shared memory, a tile of classes at a time; more classes
// take more blocks, which read the same labels.
//
// H100, 65536 labels of 19 classes: 0.5 MB read twice and 1 MB written, all in the L2 cache; 64 blocks of 8 warps, 128
// rows each, 41 KB of counts. Each launch is bound by latency, 2 to 3 us, about 8 us in all. With 32000 classes (of
// images), 4 MB of counts and 32 splits of 2048 rows, which 32 tiles of classes read: about 25 us.
#include <algorithm>

#include "class_order/class_order.h"
#include "common/cuda/warp.cuh"

namespace pixcontrast {
namespace cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;  // of the kernels that walk through labels
constexpr int kTileClasses = 1024;                     // whose counters a block keeps at a time
constexpr int kAtOnce = 4;                             // labels that a lane loads before it uses them
constexpr int64_t kLeastRows = 32 * kAtOnce;           // of a split
constexpr int64_t kMostCounts = 1 << 20;               // of all splits
constexpr int64_t kMostBlocks = 1024;                  // of kWarps splits
constexpr int kScanThreads = 1024;
constexpr int64_t kMostChunks = kThreads;  // of the scan; a thread each when their sums are added up

struct Plan {
  int64_t buckets;     // C + 1
  int64_t splits;      // S, a multiple of kWarps
  int64_t split_rows;  // of a split
  int64_t chunk;       // counts that a block scans
  int64_t chunks;
  int* counts;      // [C + 1, S] rows of a class in a split; after the scan, the sum of those before in the same chunk
  int* chunk_sums;  // [chunks]

  Plan(const ClassOrder& args, Workspace& workspace) : buckets(args.classes + 1) {
    const int64_t most = std::clamp<int64_t>(kMostCounts / (buckets * kWarps), 1, kMostBlocks);
    const int64_t blocks = (args.rows + kWarps * kLeastRows - 1) / (kWarps * kLeastRows);
    splits = std::clamp<int64_t>(blocks, 1, most) * kWarps;
    split_rows = (args.rows + splits - 1) / splits;
    const int64_t steps = (total() + kScanThreads - 1) / kScanThreads;
    chunk = (steps + kMostChunks - 1) / kMostChunks * kScanThreads;
    chunks = (total() + chunk - 1) / chunk;
    counts = workspace.take<int>(total());
    chunk_sums = workspace.take<int>(chunks);
  }

  PIXCONTRAST_HOST_DEVICE int64_t total() const { return buckets * splits; }
};

// The class tile of a block, and the counters of its warps.
struct Tile {
  int64_t first_class, first_split;
  int classes;
  int* counters;  // [classes, kWarps] in shared memory

  __device__ __forceinline__ Tile(const Plan& plan, int* counters)
      : first_class(int64_t{blockIdx.x} * kTileClasses),
        first_split(int64_t{blockIdx.y} * kWarps),
        classes(static_cast<int>(min(plan.buckets - first_class, int64_t{kTileClasses}))),
        counters(counters) {}

  // body(counter, where it lies in plan.counts) for all counters, neighbours for neighbouring threads.
  template <class Body>
  __device__ __forceinline__ void for_counters(const Plan& plan, const Body& body) const {
    for (int i = threadIdx.x; i < classes * kWarps; i += kThreads) {
      body(counters[i], (first_class + i / kWarps) * plan.splits + first_split + i % kWarps);
    }
  }

  // Adds each row of this warp's split to the counter of its class, and calls body(row, class, the counter before) for
  // rows of the tile's classes.
  template <class Body>
  __device__ __forceinline__ void walk(const ClassOrder& args, const Plan& plan, const Body& body) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t first = min((first_split + warp) * plan.split_rows, args.rows);
    const int64_t end = min(first + plan.split_rows, args.rows);
    for (int64_t base = first; base < end; base += 32 * kAtOnce) {
      int offset[kAtOnce];  // of the class in the tile, -1 for one of another tile
      CU_UNROLL for (int k = 0; k < kAtOnce; ++k) {
        const int64_t row = base + k * 32 + lane;
        offset[k] = -1;
        if (row >= end) continue;
        const int64_t label = __ldg(args.labels + row);
        const int64_t bucket = label >= 0 && label < args.classes ? label : args.classes;
        if (bucket >= first_class && bucket < first_class + classes) offset[k] = static_cast<int>(bucket - first_class);
      }
      CU_UNROLL for (int k = 0; k < kAtOnce; ++k) {
        const unsigned peers = __match_any_sync(kAllLanes, offset[k]);
        const int leader = __ffs(static_cast<int>(peers)) - 1;
        int before = 0;
        if (lane == leader && offset[k] >= 0) {
          int& counter = counters[offset[k] * kWarps + warp];
          before = counter;
          counter = before + __popc(peers);
        }
        before = __shfl_sync(kAllLanes, before, leader) + __popc(peers & ((1u << lane) - 1));
        __syncwarp();  // the next leader of the class may be another lane
        if (offset[k] >= 0) body(base + k * 32 + lane, first_class + offset[k], before);
      }
    }
  }
};

// Grid of this and of place_rows: (tiles of classes, kWarps splits each).
__global__ void __launch_bounds__(kThreads) count_rows(const ClassOrder args, const Plan plan) {
  CU_SHARED(int, counters, [kTileClasses * kWarps]);
  const Tile tile(plan, counters);
  tile.for_counters(plan, [](int& counter, int64_t) { counter = 0; });
  __syncthreads();
  tile.walk(args, plan, [](int64_t, int64_t, int) {});
  __syncthreads();
  tile.for_counters(plan, [&](int& counter, int64_t at) { plan.counts[at] = counter; });
}

// Grid: chunks.
__global__ void __launch_bounds__(kScanThreads) scan_chunks(const Plan plan) {
  CU_SHARED(int, warp_sums, [kScanThreads / 32]);
  const int64_t first = blockIdx.x * plan.chunk, end = min(first + plan.chunk, plan.total());
  int carry = 0;
  for (int64_t base = first; base < end; base += kScanThreads) {
    const int64_t i = base + threadIdx.x;
    const int count = i < end ? plan.counts[i] : 0;
    int sum;
    const int up_to_this = block_scan<kScanThreads / 32>(count, warp_sums, &sum);
    if (i < end) plan.counts[i] = carry + up_to_this - count;
    carry += sum;
  }
  if (threadIdx.x == 0) plan.chunk_sums[blockIdx.x] = carry;
}

__global__ void __launch_bounds__(kThreads) place_rows(const ClassOrder args, const Plan plan) {
  CU_SHARED(int, counters, [kTileClasses * kWarps]);
  CU_SHARED(int, chunk_start, [kMostChunks]);
  CU_SHARED(int, warp_sums, [kWarps]);
  const int of_chunk = threadIdx.x < plan.chunks ? plan.chunk_sums[threadIdx.x] : 0;
  chunk_start[threadIdx.x] = block_scan<kWarps>(of_chunk, warp_sums) - of_chunk;
  __syncthreads();
  const auto position = [&](int64_t at) { return plan.counts[at] + chunk_start[at / plan.chunk]; };
  const Tile tile(plan, counters);
  tile.for_counters(plan, [&](int& counter, int64_t at) { counter = position(at); });
  __syncthreads();
  tile.walk(args, plan, [&](int64_t row, int64_t c, int at) {
    args.order[at] = row;
    args.sorted_labels[at] = c < args.classes ? c : -1;
  });
  if (blockIdx.y > 0) return;
  for (int i = threadIdx.x; i < tile.classes; i += kThreads) {
    const int64_t c = tile.first_class + i, start = position(c * plan.splits);
    if (c == args.classes) {
      *args.total = start;
    } else {
      args.start[c] = start;
      args.count[c] = position((c + 1) * plan.splits) - start;
    }
  }
}

__global__ void __launch_bounds__(kThreads) pick_labels(const LabelsAt args) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, row = i / args.width;
  if (i >= args.batch * args.height * args.width) return;
  const int64_t y = row % args.height * args.full_height / args.height;
  const int64_t x = i % args.width * args.full_width / args.width;
  const int64_t label = args.labels[(row / args.height * args.full_height + y) * args.full_width + x];
  args.result[i] = label >= 0 && label < args.classes && label != args.ignore_index ? label : -1;
}

}  // namespace
}  // namespace cuda

cudaError_t labels_at_cuda(const LabelsAt& args, cudaStream_t stream) {
  using namespace cuda;
  const int64_t cells = args.batch * args.height * args.width;
  if (cells == 0) return cudaSuccess;
  return cu_launch(pick_labels, dim3(blocks_for(cells, kThreads)), dim3(kThreads), 0, stream, args);
}

size_t class_order_cuda_workspace(const ClassOrder& args) {
  cuda::Workspace workspace(nullptr);
  cuda::Plan(args, workspace);
  return workspace.bytes();
}

cudaError_t class_order_cuda(const ClassOrder& args, void* workspace, cudaStream_t stream) {
  using namespace cuda;
  Workspace arrays(workspace);
  const Plan plan(args, arrays);
  const dim3 grid(blocks_for(plan.buckets, kTileClasses), static_cast<unsigned>(plan.splits / kWarps));
  CU_TRY(cu_launch(count_rows, grid, dim3(kThreads), 0, stream, args, plan));
  CU_TRY(cu_launch(scan_chunks, dim3(static_cast<unsigned>(plan.chunks)), dim3(kScanThreads), 0, stream, plan));
  return cu_launch(place_rows, grid, dim3(kThreads), 0, stream, args, plan);
}

}  // namespace pixcontrast
