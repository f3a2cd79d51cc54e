// The best rows of each segment and their way into the rings: one launch each, one block for each segment or class.
//
// Selection: a score and its row make one 64-bit key, so that keys differ and their order is the whole rule. The block
// narrows the bits of the k-th key down by histograms of the next kDigit bits, from the first bit in which keys differ
// on: two or three histograms for most scores, seven at most. All counting is in integers, so results do not depend on
// the order of threads.
#include "common/cuda/warp.cuh"
#include "memory_push/memory_push.h"

namespace pixcontrast {
namespace cuda {

using Key = unsigned long long;
constexpr int kSelectThreads = 1024, kSelectWarps = kSelectThreads / 32;
constexpr int kDigit = 10;                // bits of a histogram: one bin for each thread
constexpr int kKeysAtOnce = 4;            // whose loads one thread has under way
constexpr Key kNone = 0, kNotFinite = 1;  // keys of rows that are not chosen; every other key is larger
static_assert(1 << kDigit == kSelectThreads, "a thread for each bin");

// Key of a finite score: larger for a higher score, and of equal scores for the lower row. Zeros of both signs are
// equal.
__device__ __forceinline__ Key key_at(const SegmentTopk<float>& args, int64_t position) {
  const int64_t row = args.order ? args.order[position] : position;
  if (row < 0 || row >= args.rows) return kNone;
  uint32_t ascending = 0x80000000u;  // of a zero
  if (args.scores) {
    const float score = args.scores[row];
    if (!(fabsf(score) < INFINITY)) return kNotFinite;
    const uint32_t bits = __float_as_uint(score == 0.0f ? 0.0f : score);
    ascending = bits >> 31 ? ~bits : bits | 0x80000000u;
  }
  return static_cast<Key>(ascending) << 32 | ~static_cast<uint32_t>(row);
}

// body(key) for every position of the block's segment.
template <class Body>
__device__ __forceinline__ void for_keys(const SegmentTopk<float>& args, int64_t begin, int64_t end, const Body& body) {
  for (int64_t first = begin + threadIdx.x; first < end; first += kKeysAtOnce * kSelectThreads) {
    Key key[kKeysAtOnce];
    CU_UNROLL for (int i = 0; i < kKeysAtOnce; ++i) {
      const int64_t position = first + i * kSelectThreads;
      key[i] = position < end ? key_at(args, position) : kNone;
    }
    CU_UNROLL for (int i = 0; i < kKeysAtOnce; ++i) body(key[i]);
  }
}

// Grid: segments. chosen [S, k] is workspace.
__global__ void __launch_bounds__(kSelectThreads) segment_topk(const SegmentTopk<float> args, Key* chosen) {
  CU_SHARED(Key, best, [1]);   // largest key
  CU_SHARED(Key, worst, [1]);  // complement of the smallest
  CU_SHARED(unsigned, eligible, [1]);
  CU_SHARED(unsigned, not_finite, [1]);
  CU_SHARED(unsigned, filled, [1]);
  CU_SHARED(unsigned, bins, [kSelectThreads]);
  CU_SHARED(unsigned, warp_sums, [kSelectWarps]);
  CU_SHARED(unsigned, found, [3]);  // digit of the k-th key, keys above that bin, keys in it
  const int thread = threadIdx.x;
  const int64_t s = blockIdx.x;
  const int64_t begin = max(args.segments.start[s], int64_t{0});
  const int64_t end = min(args.segments.start[s] + args.segments.count[s], args.segments.rows);
  if (thread == 0) {
    *best = *worst = 0;
    *eligible = *not_finite = *filled = 0;
  }
  __syncthreads();

  Key largest = 0, smallest = 0;  // the latter complemented
  unsigned valid = 0, invalid = 0;
  for_keys(args, begin, end, [&](Key key) {
    invalid += key == kNotFinite;
    if (key <= kNotFinite) return;
    ++valid;
    largest = max(largest, key);
    smallest = max(smallest, ~key);
  });
  largest = warp_max(largest), smallest = warp_max(smallest);
  valid = warp_sum(valid), invalid = warp_sum(invalid);
  if (thread % 32 == 0) {
    atomicMax(best, largest);
    atomicMax(worst, smallest);
    atomicAdd(eligible, valid);
    atomicAdd(not_finite, invalid);
  }
  __syncthreads();

  const auto take = static_cast<unsigned>(min(args.k, static_cast<int64_t>(*eligible)));
  Key least = ~*worst;  // of the chosen
  if (take < *eligible) {
    int open = 64 - __clzll(static_cast<long long>(*best ^ least));  // bits that are not known yet
    Key known = open == 64 ? 0 : *best >> open;                      // those above them
    unsigned left = take;                                            // how many of the keys that begin so are chosen
    do {
      const int digit_bits = min(kDigit, open), rest = open - digit_bits;
      bins[thread] = 0;
      __syncthreads();
      for_keys(args, begin, end, [&](Key key) {
        if (key <= kNotFinite || (open < 64 && key >> open != known)) return;
        atomicAdd(&bins[(key >> rest) & ((1u << digit_bits) - 1)], 1u);
      });
      __syncthreads();
      const unsigned digit = kSelectThreads - 1 - thread, count = bins[digit];  // the highest digit first
      const unsigned up_to_this = block_scan<kSelectWarps>(count, warp_sums);
      if (up_to_this - count < left && left <= up_to_this) {
        found[0] = digit, found[1] = up_to_this - count, found[2] = count;
      }
      __syncthreads();
      known = known << digit_bits | found[0];
      left -= found[1];
      open = rest;
    } while (open > 0 && left < found[2]);
    least = known << open;
  }

  Key* const mine = chosen + s * args.k;
  for_keys(args, begin, end, [&](Key key) {
    if (key <= kNotFinite || key < least) return;
    const unsigned slot = atomicAdd(filled, 1u);
    if (slot < take) mine[slot] = key;
  });
  __syncthreads();

  // The rank of a key is the number of larger ones. Keys are equal where a row is listed twice, which is wrong; the
  // result is rows all the same.
  for (int64_t i = thread; i < args.k; i += kSelectThreads) {
    if (i >= take) {
      args.index[s * args.k + i] = -1;
      continue;
    }
    const Key key = mine[i];
    unsigned rank = 0;
    for (unsigned j = 0; j < take; ++j) rank += mine[j] > key || (mine[j] == key && j < i);
    args.index[s * args.k + rank] = ~static_cast<uint32_t>(key);
  }
  if (thread == 0 && args.rejected && *not_finite > 0) {
    atomicAdd(reinterpret_cast<Key*>(args.rejected), static_cast<Key>(*not_finite));
  }
}

constexpr int kWriteThreads = 512, kWriteWarps = kWriteThreads / 32;

// Grid: classes; a warp takes an entry. norms [C, K] is workspace: the entries' norms, -1 for those that are not
// stored.
template <class T, class Source>
__global__ void __launch_bounds__(kWriteThreads) memory_write(const MemoryWrite<T, Source> args, float* norms_) {
  CU_SHARED(unsigned, kept, [1]);
  CU_SHARED(unsigned, not_finite, [1]);
  const int64_t c = blockIdx.x, dim = args.layout.dim, stride = args.layout.channel_stride();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t* const index = args.index + c * args.entries;
  float* const norms = norms_ + c * args.entries;
  const int64_t count = args.counts[c], cursor = args.cursors[c];
  if (threadIdx.x == 0) *kept = *not_finite = 0;
  __syncthreads();

  for (int64_t k = warp; k < args.entries; k += kWriteWarps) {
    float norm = -1;
    if (index[k] >= 0 && index[k] < args.layout.pixels) {
      const Source* const from = args.source + args.layout.offset(index[k]);
      float square = 0;
      for (int64_t d = lane; d < dim; d += 32) square += to_float(from[d * stride]) * to_float(from[d * stride]);
      norm = sqrtf(warp_sum(square));
      if (!(norm < INFINITY)) norm = -1;
      if (lane == 0) atomicAdd(norm < 0 ? not_finite : kept, 1u);
    }
    if (lane == 0) norms[k] = norm;
  }
  __syncthreads();

  const int64_t stored = *kept;
  for (int64_t k = warp; k < args.entries; k += kWriteWarps) {
    const float norm = norms[k];
    unsigned before = 0;
    for (int64_t j = lane; j < k; j += 32) before += norms[j] >= 0;
    before = warp_sum(before);
    if (norm < 0 || before >= args.capacity) continue;
    const Source* const from = args.source + args.layout.offset(index[k]);
    T* const to = args.rows + (c * args.capacity + (cursor + stored - 1 - before) % args.capacity) * dim;
    const bool zero = norm < static_cast<float>(kNormFloor);
    for (int64_t d = lane; d < dim; d += 32) to[d] = from_float<T>(zero ? 0.0f : to_float(from[d * stride]) / norm);
  }
  if (threadIdx.x == 0) {
    args.counts[c] = min(count + stored, args.capacity);
    args.cursors[c] = (cursor + stored) % args.capacity;
    if (*not_finite > 0) atomicAdd(reinterpret_cast<Key*>(args.rejected), static_cast<Key>(*not_finite));
  }
}

}  // namespace cuda

cudaError_t segment_topk_cuda(const SegmentTopk<float>& args, uint64_t* workspace, cudaStream_t stream) {
  using namespace cuda;
  if (args.segments.classes * args.k == 0) return cudaSuccess;
  return cu_launch(segment_topk, dim3(static_cast<unsigned>(args.segments.classes)), dim3(kSelectThreads), 0, stream,
                   args, reinterpret_cast<Key*>(workspace));
}

template <class T, class Source>
cudaError_t memory_write_cuda(const MemoryWrite<T, Source>& args, float* workspace, cudaStream_t stream) {
  using namespace cuda;
  if (args.classes * args.entries == 0) return cudaSuccess;
  return cu_launch(memory_write<T, Source>, dim3(static_cast<unsigned>(args.classes)), dim3(kWriteThreads), 0, stream,
                   args, workspace);
}

#define INSTANTIATE(T, Source) \
  template cudaError_t memory_write_cuda(const MemoryWrite<T, Source>&, float*, cudaStream_t);
#define INSTANTIATE_SOURCES(T)  \
  INSTANTIATE(T, float)         \
  INSTANTIATE(T, __nv_bfloat16) \
  INSTANTIATE(T, __half)
INSTANTIATE_SOURCES(float)
INSTANTIATE_SOURCES(__nv_bfloat16)
INSTANTIATE_SOURCES(__half)

}  // namespace pixcontrast
