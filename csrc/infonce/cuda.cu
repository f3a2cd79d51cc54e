// InfoNCE on the device, each stage a launch or two. The passes over the keys (negatives, positives, pairs) are in
// forward.cuh in exact float32 and in forward_mma.cuh on tensor cores, the other stages in anchors.cuh.
//
//   sort, gather       anchors by class, and the list of key tiles
//   negatives, merge   row_max, sum e^(z - row_max) and sum e^(z - row_max) k; then lse
//   positives, merge   sums of the loss, of sigma(lse - z) and of sigma(lse - z) k
//   pairs              without queues: the gradient of both sides of every pair
//   mean, scatter      the loss, and the gradient at the pixels of the anchors
//
// A pass has as many splits of the keys as fill the device once and leave the workspace below kWorkspaceBytes.
#include <algorithm>

#include "infonce/anchors.cuh"
#include "infonce/forward_mma.cuh"

namespace pixcontrast {
namespace {

using namespace cuda;

constexpr int64_t kWorkspaceBytes = 16 << 20;  // unless the anchors and two splits need more

struct ForwardKernel {
  int rows, tile_keys, blocks_per_sm;  // anchors of a block, keys of a tile
  size_t shared_bytes;
  void (*kernel[3])(InfoNCEParams);  // by pass
  unsigned threads;
};

#define FORWARD_KERNEL(kernel, Traits)                                                                      \
  ForwardKernel {                                                                                           \
    Traits::kRows, Traits::kTileKeys, Traits::kBlocksPerSm, Traits::kSharedBytes,                           \
        {kernel<Traits, Pass::kNegatives>, kernel<Traits, Pass::kPositives>, kernel<Traits, Pass::kPairs>}, \
        Traits::kThreads                                                                                    \
  }

template <class T>
ForwardKernel mma_kernel(int64_t dim) {
  using Small = MmaTraits<T, 64>;
  using Medium = MmaTraits<T, 128>;
  using Large = MmaTraits<T, 256>;
  if (dim <= 64) return FORWARD_KERNEL(infonce_forward_mma, Small);
  if (dim <= 128) return FORWARD_KERNEL(infonce_forward_mma, Medium);
  return FORWARD_KERNEL(infonce_forward_mma, Large);
}

template <class T>
ForwardKernel float32_kernel() {
  return FORWARD_KERNEL(infonce_forward_float32, Float32Traits<T>);
}

// body(T()) with the type of the dtype
template <class Body>
auto with_dtype(Dtype dtype, const Body& body) {
  if (dtype == Dtype::kBFloat16) return body(__nv_bfloat16());
  if (dtype == Dtype::kHalf) return body(__half());
  return body(float());
}

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }

// Which kernel, and how many splits.
struct Plan {
  bool mma;  // on tensor cores: anchors are kept in the features' dtype; else in float
  ForwardKernel kernel;
  int64_t anchor_bytes;  // of an element
  int splits;            // of the keys in a pass
  int all_splits;        // rows of key sums

  Plan(const InfoNCE& args, const InfoNCEDevice& device) {
    const int64_t dim = args.layout.dim;
    bool aligned = true;
    for (int q = 0; q < args.queues; ++q) aligned &= reinterpret_cast<uintptr_t>(args.queue[q].rows) % 16 == 0;
    const Dtype key_dtype = args.queues > 0 ? args.queue[0].dtype : Dtype::kFloat;
    mma = device.capability >= 80 && aligned && (args.queues == 0 || key_dtype == args.dtype) && dim % 16 == 0 &&
          dim <= 256 && (args.dtype != Dtype::kFloat || device.allow_tf32);
    if (mma) {
      kernel = with_dtype(args.dtype, [&](auto element) { return mma_kernel<decltype(element)>(dim); });
      mma = static_cast<int64_t>(kernel.shared_bytes) <= device.shared_memory;
    }
    if (!mma) kernel = with_dtype(key_dtype, [](auto element) { return float32_kernel<decltype(element)>(); });
    anchor_bytes = mma ? bytes_of(args.dtype) : 4;

    const int64_t tiles = blocks_for(args.count, kernel.rows);
    const int64_t filling = std::max<int64_t>(1, int64_t{device.sm_count} * kernel.blocks_per_sm / tiles);
    const int64_t row = dim * (args.grad_features != nullptr ? sizeof(float) : 0) + sizeof(float2);
    const int64_t anchors = args.count * (dim * anchor_bytes + 64);
    const int64_t fitting = std::max<int64_t>(1, (kWorkspaceBytes - anchors) / (args.count * row));
    splits = static_cast<int>(std::min(filling, fitting));
    // With queues the first split's place keeps the negatives while the others take the positives.
    all_splits = std::max(splits, args.queues > 0 ? 2 : 1);
  }
};

InfoNCEParams place_params(const InfoNCE& args, const Plan& plan, Workspace& workspace) {
  InfoNCEParams params{};
  static_cast<InfoNCE&>(params) = args;
  const int64_t count = args.count, dim = args.layout.dim;
  params.each_other = args.queues == 0;
  params.scale = static_cast<float>(1 / args.temperature);
  params.segments = params.each_other ? 1 : static_cast<int>(args.classes) * args.queues;
  params.tile_keys = plan.kernel.tile_keys;
  params.rows = workspace.take<unsigned char>(count * dim * plan.anchor_bytes);
  params.valid_anchors = workspace.take<int>(1);
  params.row = workspace.take<int>(count);
  params.order = workspace.take<int>(count);
  params.same_pixel = workspace.take<SamePixel>(count);
  params.anchor_keys = workspace.take<AnchorKeys>(count);
  params.first_tile = workspace.take<int>(params.segments + 1);
  params.valid_keys = workspace.take<int>(params.segments);
  params.lse = workspace.take<float>(count);
  params.sigmoids = workspace.take<float>(count);
  params.grad_scale = workspace.take<float>(1);
  params.row_sums = workspace.take<float2>(plan.all_splits * count);
  if (args.grad_features) params.key_sums = workspace.take<float>(plan.all_splits * count * dim);
  if (params.each_other) {
    params.pairs = workspace.take<PairWeights>(count);
    params.queues = 1;
    params.queue[0] = {params.rows, nullptr, count, args.dtype};
  }
  return params;
}

bool fits(const InfoNCE& args) {
  int64_t keys = args.count;
  for (int q = 0; q < args.queues; ++q) keys += args.classes * (args.queue[q].capacity + 64);  // whole tiles
  return keys < INT_MAX / 2 && args.layout.dim < INT_MAX;
}

}  // namespace

size_t infonce_cuda_workspace(const InfoNCE& args, const InfoNCEDevice& device) {
  if (args.count == 0 || !fits(args)) return 0;
  Workspace workspace(nullptr);
  place_params(args, Plan(args, device), workspace);
  return workspace.bytes();
}

cudaError_t infonce_cuda(const InfoNCE& args, const InfoNCEDevice& device, void* memory, cudaStream_t stream) {
  if (!fits(args)) return cudaErrorInvalidValue;
  const int64_t count = args.count, dim = args.layout.dim;
  if (args.grad_features) {
    CU_TRY(cudaMemsetAsync(args.grad_features, 0, args.layout.pixels * dim * (args.dtype == Dtype::kBFloat16 ? 2 : 4),
                           stream));
  }
  if (count == 0) return cudaMemsetAsync(args.loss, 0, sizeof(float), stream);

  const Plan plan(args, device);
  Workspace workspace(memory);
  InfoNCEParams params = place_params(args, plan, workspace);
  const dim3 warps(blocks_for(count, 8)), channels(static_cast<unsigned>(count), blocks_for(dim, 32));
  const auto forward = [&](Pass pass) {
    const dim3 grid(blocks_for(count, plan.kernel.rows), params.splits);
    return cu_launch(plan.kernel.kernel[static_cast<int>(pass)], grid, dim3(plan.kernel.threads),
                     plan.kernel.shared_bytes, stream, params);
  };
  CU_TRY(cu_launch(sort_anchors, dim3(1 + warps.x), dim3(256), 0, stream, params));
  CU_TRY(with_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    const auto gather = plan.mma ? gather_anchors<T, T> : gather_anchors<T, float>;
    return cu_launch(gather, warps, dim3(256), 0, stream, params, plan.mma);
  }));

  // With queues the gradient comes out of the passes that give the loss.
  params.gradient = args.grad_features != nullptr && !params.each_other;
  params.splits = plan.splits;
  CU_TRY(forward(Pass::kNegatives));
  CU_TRY(cu_launch(merge_negatives, dim3(channels.x, params.gradient ? channels.y : 1), dim3(32 * kMergeWarps), 0,
                   stream, params));
  float* const key_sums = params.key_sums;
  if (params.gradient) {
    params.key_sums += count * dim;
    params.splits = plan.all_splits - 1;
  }
  CU_TRY(forward(Pass::kPositives));
  CU_TRY(cu_launch(merge_positives, warps, dim3(256), 0, stream, params));
  CU_TRY(cu_launch(mean_loss, dim3(1), dim3(1024), 0, stream, params));
  if (!args.grad_features) return cudaSuccess;

  params.key_sums = key_sums;
  params.splits = params.each_other ? plan.splits : plan.all_splits;
  params.gradient = true;
  if (params.each_other) CU_TRY(forward(Pass::kPairs));
  return with_dtype(args.dtype, [&](auto element) {
    return cu_launch(scatter_gradient<decltype(element)>, channels, dim3(32 * kMergeWarps), 0, stream, params);
  });
}

}  // namespace pixcontrast
