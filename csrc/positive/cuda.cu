// Loss and all gradients of the positive objective on the device, in four launches:
//   weigh     labels and logits: pixels, largest logit and sum of scores of each class, by block
//   merge     the blocks' parts to one share for each class
//   contrast  the one pass over the features, by rows or by maps: similarities, dLoss/df, parts of dLoss/dm
//   finish    loss, dLoss/da, dLoss/dm
// The formulas are those of cpu.cpp.
#include <algorithm>

#include "positive/contrast.cuh"

namespace pixcontrast {
namespace cuda {

constexpr int kClassTile = 1024;                  // classes whose sums a block of weigh keeps in shared memory
constexpr int kScoreBits = 42;                    // scores are at most 1 ...
constexpr int64_t kMostChunk = int64_t{1} << 20;  // ... and a block adds up at most as many, so 62 bits hold the sum
constexpr int kFinishThreads = 1024;
constexpr int64_t kSharedRoom = 60 * 1024;  // dynamic shared memory that any device has

// Grid: (weigh_blocks, tiles of classes). Each block takes `chunk` pixels.
template <class T>
__global__ void weigh(const Positive<T> args, const PositiveWork work, const int64_t chunk) {
  CU_SHARED(int, pixels, [kClassTile]);
  CU_SHARED(int, largest, [kClassTile]);
  CU_SHARED(unsigned long long, total, [kClassTile]);
  CU_SHARED(int, unknown, [1]);
  const int first = blockIdx.y * kClassTile, lane = threadIdx.x % 32;
  const int classes = min(kClassTile, static_cast<int>(args.classes) - first);
  const int64_t begin = blockIdx.x * chunk, end = min(begin + chunk, args.layout.pixels);
  for (int c = threadIdx.x; c < classes; c += kThreads) {
    pixels[c] = 0;
    largest[c] = kLeastKey;
    total[c] = 0;
  }
  if (threadIdx.x == 0) unknown[0] = 0;
  __syncthreads();

  // body(pixel, its class in the tile or -1, whether its label is unknown), by whole warps
  const auto for_pixels = [&](const auto& body) {
    for (int64_t start = begin; start < end; start += kThreads) {
      const int64_t i = start + threadIdx.x;
      const int c = i < end ? class_of(args, args.labels[i]) : kIgnored;
      body(i, c >= first && c < first + classes ? c - first : -1, c == kUnknown);
    }
  };
  for_pixels([&](int64_t i, int own, bool wrong) {
    const unsigned all_wrong = __ballot_sync(kAllLanes, wrong);
    if (lane == 0 && all_wrong != 0) atomicAdd(unknown, __popc(all_wrong));
    const int key = args.weight_logits && own >= 0 ? order_key(args.weight_logits[i]) : kLeastKey;
    for_classes(own, [&](int c, unsigned members) {
      const int top = warp_max(own == c ? key : kLeastKey);
      if (lane != 0) return;
      atomicAdd(pixels + c, __popc(members));
      atomicMax(largest + c, top);
    });
  });
  __syncthreads();
  if (args.weight_logits) {
    for_pixels([&](int64_t i, int own, bool) {
      const float own_score = own < 0 ? 0.0f : score(args.weight_logits[i], shift_of(from_order_key(largest[own])));
      for_classes(own, [&](int c, unsigned) {
        const float sum = warp_sum(own == c ? own_score : 0.0f);
        if (lane == 0) add_fixed<kScoreBits>(total + c, sum);
      });
    });
    __syncthreads();
  }

  const int64_t to = blockIdx.x * args.classes + first;
  for (int c = threadIdx.x; c < classes; c += kThreads) {
    work.part_pixels[to + c] = pixels[c];
    work.part_largest[to + c] = from_order_key(largest[c]);
    work.part_total[to + c] = from_fixed<kScoreBits>(total[c]);
  }
  if (blockIdx.y == 0 && threadIdx.x == 0) work.part_unknown[blockIdx.x] = unknown[0];
}

// A warp for each class, and one more for the unknown labels.
template <class T>
__global__ void merge(const Positive<T> args, const PositiveWork work, const int parts) {
  const int lane = threadIdx.x % 32;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (c > args.classes) return;
  int64_t pixels = 0;
  if (c == args.classes) {
    for (int part = lane; part < parts; part += 32) pixels += work.part_unknown[part];
    pixels = warp_sum(pixels);
    if (lane == 0) *args.unknown = pixels;
    return;
  }
  int key = kLeastKey;
  for (int part = lane; part < parts; part += 32) {
    pixels += work.part_pixels[part * args.classes + c];
    key = max(key, order_key(work.part_largest[part * args.classes + c]));
  }
  pixels = warp_sum(pixels);
  const float largest = from_order_key(warp_max(key)), shift = shift_of(largest);
  double total = 0;
  for (int part = lane; part < parts; part += 32) {
    const int64_t at = part * args.classes + c;
    if (args.weight_logits && work.part_pixels[at] > 0) {
      total += work.part_total[at] * exp(static_cast<double>(shift_of(work.part_largest[at])) - shift);
    }
  }
  total = args.weight_logits ? warp_sum(total) : static_cast<double>(pixels);
  if (lane != 0) return;
  const bool active = pixels >= kMinRows && args.memory_counts[c] >= kMinRows;
  const float factor = largest != largest ? largest : static_cast<float>(1 / total);
  work.share[c] = {active ? factor : 0.0f, args.weight_logits ? shift : 0.0f};
  work.similarity[c] = 0;
  work.not_finite[c] = 0;
  args.counts[c] = pixels;
}

__device__ __forceinline__ float similarity(const PositiveWork& work, int64_t c) {
  return work.not_finite[c] ? NAN : from_fixed<kSimilarityBits>(work.similarity[c]);
}

// One block.
template <class T>
__device__ __forceinline__ void finish_loss(const Positive<T>& args, const PositiveWork& work, double* warp_sums) {
  double loss = 0;
  for (int64_t c = threadIdx.x; c < args.classes; c += kFinishThreads) {
    const float class_loss = work.share[c].factor != 0 ? 1 - similarity(work, c) : 0.0f;
    args.class_loss[c] = class_loss;
    loss += class_loss;
  }
  loss = block_sum<kFinishThreads / 32>(loss, warp_sums);
  if (threadIdx.x == 0) *args.loss = static_cast<float>(loss * args.loss_weight / static_cast<double>(args.classes));
}

// dLoss/da = s w (1 - sigma(a)) (S - cos); the pass over the features left the cosines where the gradient goes.
template <class T>
__device__ __forceinline__ void finish_weights(const Positive<T>& args, const PositiveWork& work, int64_t block,
                                               int64_t blocks) {
  for (int64_t i = block * kFinishThreads + threadIdx.x; i < args.layout.pixels; i += blocks * kFinishThreads) {
    const Pixel pixel = look_up(args, work.share, i);
    args.grad_weight_logits[i] = pixel.c < 0 ? 0.0f
                                             : loss_scale(args) * pixel.weight * score(-args.weight_logits[i], 0.0f) *
                                                   (similarity(work, pixel.c) - args.grad_weight_logits[i]);
  }
}

// 32 elements of dLoss/dm a block; 32 threads for each, which are many enough to wait for few loads in a row.
template <class T>
__device__ __forceinline__ void finish_mean(const Positive<T>& args, const PositiveWork& work, int64_t block, int parts,
                                            float (*sums)[33]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t elements = args.classes * args.layout.dim, first = block * 32;
  float sum = 0;
  if (first + lane < elements) {
    for (int part = warp; part < parts; part += 32) sum += work.mean_sum[part * elements + first + lane];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  sum = warp_sum(sums[lane][warp]);
  if (lane == 0 && first + warp < elements) args.grad_mean[first + warp] = -loss_scale(args) * sum;
}

// Grid: mean_blocks, then one for the loss, then the rest for dLoss/da.
template <class T>
__global__ void __launch_bounds__(kFinishThreads)
    finish(const Positive<T> args, const PositiveWork work, const int parts, const int64_t mean_blocks) {
  CU_SHARED(double, warp_sums, [32]);
  CU_SHARED(float, sums, [32][33]);
  const int64_t block = blockIdx.x;
  if (block < mean_blocks) {
    finish_mean(args, work, block, parts, sums);
  } else if (block == mean_blocks) {
    finish_loss(args, work, warp_sums);
  } else {
    finish_weights(args, work, block - mean_blocks - 1, gridDim.x - mean_blocks - 1);
  }
}

// Sizes of the launches, which depend on nothing but the problem and the device.
struct PositivePlan {
  int64_t weigh_chunk, weigh_blocks, blocks;

  template <class T>
  PositivePlan(const Positive<T>& args, int sm_count) {
    const int64_t pixels = std::max<int64_t>(args.layout.pixels, 1);
    weigh_blocks = std::clamp<int64_t>(pixels / kThreads, 1, 2 * sm_count);
    weigh_chunk = std::min((pixels + weigh_blocks - 1) / weigh_blocks, kMostChunk);
    weigh_blocks = (pixels + weigh_chunk - 1) / weigh_chunk;
    blocks = std::clamp<int64_t>(pixels / 16, 1, 4 * sm_count);
    // All blocks' sums for dLoss/dm together are at most a quarter of the features in float32.
    if (args.grad_mean) blocks = std::clamp<int64_t>(pixels / (4 * args.classes), 1, blocks);
  }
};

template <class T>
PositiveWork place_work(const Positive<T>& args, const PositivePlan& plan, Workspace& space) {
  const int64_t parts = plan.weigh_blocks * args.classes;
  PositiveWork work{};
  work.part_pixels = space.take<int>(parts);
  work.part_largest = space.take<float>(parts);
  work.part_total = space.take<float>(parts);
  work.part_unknown = space.take<int>(plan.weigh_blocks);
  work.share = space.take<ClassShare>(args.classes);
  work.similarity = space.take<unsigned long long>(args.classes);
  work.not_finite = space.take<int>(args.classes);
  if (args.grad_mean) work.mean_sum = space.take<float>(plan.blocks * args.classes * args.layout.dim);
  return work;
}

template <class T>
cudaError_t launch_contrast(const Positive<T>& args, PositiveWork work, int64_t blocks, cudaStream_t stream) {
  const FeatureLayout& layout = args.layout;
  const MapsTile tile = layout.map_pixels ? maps_tile<GradOf<T>>(layout.dim) : MapsTile();
  int64_t shared = BlockSums::similarity_bytes(args.classes);
  shared += tile.width > 0 ? tile.bytes : args.grad_mean ? kRowsTileBytes : 0;
  const int64_t mean_sum = BlockSums::mean_sum_bytes(args.classes * layout.dim);
  work.shared_mean_sum = args.grad_mean && shared + mean_sum <= kSharedRoom;
  if (work.shared_mean_sum) shared += mean_sum;
  const dim3 grid(static_cast<unsigned>(blocks));
  if (tile.width > 0) {
    return cu_launch(contrast_maps<T>, grid, dim3(kThreads), shared, stream, args, work, tile.width, tile.stride);
  }
  const RowPlace place = layout.map_pixels
                             ? RowPlace{layout.map_pixels, layout.dim * layout.map_pixels, 1, layout.map_pixels}
                             : RowPlace{0, 0, layout.dim, 1};
  const bool aligned = layout.map_pixels == 0 && layout.dim % kPack<T> == 0 && aligned16(args.features) &&
                       aligned16(args.mean) && aligned16(args.grad_features);
  return with_row_shape<T>(layout.dim, aligned, [&](auto shape) {
    return cu_launch(contrast_rows<T, decltype(shape)>, grid, dim3(kThreads), shared, stream, args, work, place);
  });
}

}  // namespace cuda

template <class T>
size_t positive_cuda_workspace(const Positive<T>& args, int sm_count) {
  cuda::Workspace space(nullptr);
  cuda::place_work(args, cuda::PositivePlan(args, sm_count), space);
  return space.bytes();
}

template <class T>
cudaError_t positive_cuda(const Positive<T>& args, int sm_count, void* workspace, cudaStream_t stream) {
  using namespace cuda;
  const PositivePlan plan(args, sm_count);
  Workspace space(workspace);
  const PositiveWork work = place_work(args, plan, space);

  const dim3 grid(static_cast<unsigned>(plan.weigh_blocks), blocks_for(args.classes, kClassTile));
  CU_TRY(cu_launch(weigh<T>, grid, dim3(kThreads), 0, stream, args, work, plan.weigh_chunk));
  const dim3 warps(blocks_for(args.classes + 1, kWarps));
  CU_TRY(cu_launch(merge<T>, warps, dim3(kThreads), 0, stream, args, work, plan.weigh_blocks));
  CU_TRY(launch_contrast(args, work, plan.blocks, stream));
  const unsigned mean_blocks = args.grad_mean ? blocks_for(args.classes * args.layout.dim, 32) : 0;
  const unsigned weight_blocks =
      args.grad_weight_logits ? std::min(blocks_for(args.layout.pixels, kFinishThreads), 2u * sm_count) : 0;
  return cu_launch(finish<T>, dim3(mean_blocks + 1 + weight_blocks), dim3(kFinishThreads), 0, stream, args, work,
                   plan.blocks, mean_blocks);
}

#define INSTANTIATE(T)                                              \
  template size_t positive_cuda_workspace(const Positive<T>&, int); \
  template cudaError_t positive_cuda(const Positive<T>&, int, void*, cudaStream_t);
CU_FOR_DTYPES(INSTANTIATE)

}  // namespace pixcontrast
