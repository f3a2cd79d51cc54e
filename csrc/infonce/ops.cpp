// The operator `infonce` as PyTorch sees it: schema, checks that keep memory accesses in bounds, allocation, dispatch.
#include "common/cpu/parallel.h"
#include "common/old_tensor.h"
#include "infonce/infonce.h"

#ifdef PIXCONTRAST_WITH_CUDA
#include "infonce/infonce_cuda.h"
#endif

namespace pixcontrast {
namespace {

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Copies between pixels `index` [R] (below 0: none) of features [P, D] or [B, D, H, W] and rows [R, D]. Each thread has
// channels of its own, so pixels that occur twice are added in order.
template <class Copy>
void for_pixels(const Tensor& features, const Tensor& index, const Copy& copy) {
  const FeatureLayout layout = layout_of(features);
  const int64_t dim = layout.dim, inside = layout.map_pixels, count = index.numel();
  const auto* pixel = read<int64_t>(index);
  cpu::Pieces(dim, 16, 16).run([&](int64_t, int64_t first, int64_t last) {
    for (int64_t r = 0; r < count; ++r) {
      if (pixel[r] < 0) continue;
      const int64_t start = inside == 0 ? pixel[r] * dim : pixel[r] / inside * dim * inside + pixel[r] % inside;
      const int64_t step = inside == 0 ? 1 : inside;
      for (int64_t d = first; d < last; ++d) copy(start + d * step, r * dim + d);
    }
  });
}

Result on_cpu(const Tensor& features, const Tensor& index, InfoNCE& args) {
  TORCH_CHECK_VALUE(index.numel() == 0 || index.max().item<int64_t>() < layout_of(features).pixels, "index beyond the ",
                    layout_of(features).pixels, " pixels");
  args.labels = at::where(index < 0, -1, args.labels).contiguous();
  args.feature_type = features.scalar_type();
  args.anchors =
      at::zeros({index.numel(), features.size(1)},
                features.options().dtype(accumulation(features)).memory_format(at::MemoryFormat::Contiguous));
  dispatch_cpu(features, "gather", [&](auto number) {
    using T = decltype(number);
    const T* const from = read<T>(features);
    auto* const to = write<Acc<T>>(args.anchors);
    for_pixels(features, index, [&](int64_t pixel, int64_t row) { to[row] = static_cast<Acc<T>>(from[pixel]); });
  });
  const auto result = infonce_cpu(args);
  Tensor grad;
  if (args.needs_grad) {
    grad = empty_like_features(features).zero_();
    dispatch_cpu(features, "scatter", [&](auto number) {
      using T = decltype(number);
      const auto* const from = read<Acc<T>>(result.grad);
      T* const to = write<T>(grad);
      for_pixels(features, index, [&](int64_t pixel, int64_t row) { to[pixel] += static_cast<T>(from[row]); });
    });
  }
  return {result.loss, result.anchor_loss, result.positives, made(grad, features)};
}

#ifdef PIXCONTRAST_WITH_CUDA
Storage storage(const Tensor& t) {
  return t.scalar_type() == at::kBFloat16 ? Storage::kBFloat16
         : t.scalar_type() == at::kHalf   ? Storage::kHalf
                                          : Storage::kFloat;
}

Result on_cuda(const Tensor& features, const Tensor& index, const InfoNCE& args) {
  const auto sums = features.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous);
  const auto loss = at::empty({}, sums), anchor_loss = at::empty({index.numel()}, sums);
  const auto positives = at::empty({index.numel()}, index.options());
  const auto labels = args.labels.contiguous();
  Tensor grad;
  if (args.needs_grad) grad = empty_like_features(features);
  TORCH_CHECK_VALUE(args.queues.size() <= kMaxQueues, "at most ", kMaxQueues, " queues, got ", args.queues.size());
  InfoNCECuda on_device{};
  on_device.layout = layout_of(features);
  on_device.count = index.numel();
  on_device.queues = static_cast<int>(args.queues.size());
  for (size_t q = 0; q < args.queues.size(); ++q) {
    const Tensor& queue = args.queues[q];
    TORCH_CHECK_TYPE(queue.scalar_type() == args.queues[0].scalar_type() && queue.scalar_type() != at::kDouble,
                     "on CUDA, queues must all be float32, all bfloat16 or all float16");
    on_device.queue[q] = {queue.const_data_ptr(), queue.size(1), read<int64_t>(args.counts[q])};
    on_device.classes = queue.size(0);
    on_device.queue_type = storage(queue);
  }
  on_device.feature_type = storage(features);
  on_device.temperature = args.temperature;
  on_device.base_temperature = args.base_temperature;
  on_device.loss_weight = args.loss_weight;
  on_device.allow_tf32 = allow_tf32();
  on_device.capability = 10 * attribute(features, cudaDevAttrComputeCapabilityMajor) +
                         attribute(features, cudaDevAttrComputeCapabilityMinor);
  on_device.shared_memory = attribute(features, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  on_device.features = features.const_data_ptr();
  on_device.index = read<int64_t>(index);
  on_device.labels = read<int64_t>(labels);
  on_device.excluded = read<int64_t>(args.excluded);
  on_device.loss = write<float>(loss);
  on_device.anchor_loss = write<float>(anchor_loss);
  on_device.positives = write<int64_t>(positives);
  on_device.grad_features = write<void>(grad);
  dispatch_cuda(features, "infonce", [&](auto, cudaStream_t stream) {
    const auto room = workspace(infonce_cuda_workspace(on_device, sm_count(features)), features);
    return infonce_cuda(on_device, room.mutable_data_ptr(), sm_count(features), stream);
  });
  return {loss, anchor_loss, positives, made(grad, features)};
}
#endif

Result infonce(const Tensor& features_, const Tensor& index_, const Tensor& labels_, at::TensorList queues,
               at::TensorList counts, const optional<Tensor>& excluded, double temperature, double base_temperature,
               double loss_weight, bool features_grad) {
  check_features(features_);
  const auto device = features_.device();
  TORCH_CHECK_VALUE(index_.dim() == 1 && labels_.sizes() == index_.sizes(), "index and labels must be [R]");
  TORCH_CHECK_TYPE(index_.scalar_type() == at::kLong && labels_.scalar_type() == at::kLong,
                   "index and labels must be int64");
  TORCH_CHECK_VALUE(index_.device() == device && labels_.device() == device, "index and labels must be on ", device);
  TORCH_CHECK_VALUE(queues.size() == counts.size(), "each queue needs counts");
  InfoNCE args;
  for (size_t q = 0; q < queues.size(); ++q) {
    TORCH_CHECK_VALUE(queues[q].dim() == 3 && queues[q].size(0) == queues[0].size(0) &&
                          queues[q].size(2) == features_.size(1) && queues[q].device() == device,
                      "queues must be [C, N, D] on ", device, ", got ", queues[q].sizes());
    TORCH_CHECK_VALUE(counts[q].sizes() == queues[q].sizes().slice(0, 1) && counts[q].device() == device,
                      "counts must be [C] on ", device, ", got ", counts[q].sizes());
    TORCH_CHECK_TYPE(counts[q].scalar_type() == at::kLong, "counts must be int64, got ", counts[q].scalar_type());
    args.queues.push_back(queues[q].contiguous());
    args.counts.push_back(counts[q].contiguous());
  }
  if (excluded.has_value()) {
    TORCH_CHECK_VALUE(excluded->sizes() == index_.sizes() && excluded->device() == device, "excluded must be [R]");
    TORCH_CHECK_TYPE(excluded->scalar_type() == at::kLong, "excluded must be int64");
    args.excluded = excluded->contiguous();
  }
  args.labels = labels_;
  args.temperature = temperature;
  args.base_temperature = base_temperature;
  args.loss_weight = loss_weight;
  args.needs_grad = features_grad;
  const auto features = features_.contiguous(format_of(features_));
  const auto index = index_.contiguous();
#ifdef PIXCONTRAST_WITH_CUDA
  if (features.is_cuda()) return on_cuda(features, index, args);
#endif
  return on_cpu(features, index, args);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pixcontrast, library) {
  library.def(
      "infonce(Tensor features, Tensor index, Tensor labels, Tensor[] queues, Tensor[] counts, Tensor? excluded, "
      "float temperature, float base_temperature, float loss_weight, bool features_grad) -> "
      "(Tensor loss, Tensor anchor_loss, Tensor positives, Tensor grad_features)");
}

TORCH_LIBRARY_IMPL(pixcontrast, CPU, library) { library.impl("infonce", &infonce); }
#ifdef PIXCONTRAST_WITH_CUDA
TORCH_LIBRARY_IMPL(pixcontrast, CUDA, library) { library.impl("infonce", &infonce); }
#endif

}  // namespace pixcontrast
