#include <limits>

#include "common/tensor.h"
#include "infonce/infonce.h"

namespace pixcontrast {
namespace {

void run(const InfoNCE& args, const Cpu&) { infonce_cpu(args); }

#ifdef PIXCONTRAST_WITH_CUDA
void run(const InfoNCE& args, const Cuda& on) {
  for (int q = 0; q < args.queues; ++q) {
    TORCH_CHECK_TYPE(args.queue[q].dtype == args.queue[0].dtype && args.queue[q].dtype != Dtype::kDouble,
                     "on CUDA, queues must all be float32, all bfloat16 or all float16");
  }
  const int capability =
      10 * on.attribute(cudaDevAttrComputeCapabilityMajor) + on.attribute(cudaDevAttrComputeCapabilityMinor);
  const InfoNCEDevice device{on.sm_count(), capability, on.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                             Cuda::allow_tf32()};
  const Tensor workspace = on.workspace(infonce_cuda_workspace(args, device));
  C10_CUDA_CHECK(infonce_cuda(args, device, workspace.mutable_data_ptr(), on.stream));
}
#endif

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> infonce(const Tensor& features_, const Tensor& index_, const Tensor& labels_,
                                                   at::TensorList queues, at::TensorList counts,
                                                   const optional<Tensor>& excluded_, double temperature,
                                                   double base_temperature, double loss_weight, bool features_grad) {
  const auto features = checked_features(features_);
  const auto device = features.device();
  TORCH_CHECK_VALUE(index_.dim() == 1, "index must be [R], got ", index_.sizes());
  const auto index = checked(index_, "index", index_.sizes(), at::kLong, device);
  const auto labels = checked(labels_, "labels", index.sizes(), at::kLong, device);
  const auto excluded = checked(excluded_, "excluded", index.sizes(), at::kLong, device);
  TORCH_CHECK_VALUE(queues.size() <= kMaxQueues, "at most ", kMaxQueues, " queues, got ", queues.size());
  TORCH_CHECK_VALUE(queues.size() == counts.size(), "each queue needs counts");

  InfoNCE args{};
  args.layout = layout_of(features);
  args.count = index.numel();
  args.classes = queues.empty() ? std::numeric_limits<int64_t>::max() : queues[0].size(0);
  std::vector<Tensor> kept;  // what the pointers in args need
  for (size_t q = 0; q < queues.size(); ++q) {
    TORCH_CHECK_VALUE(queues[q].dim() == 3 && queues[q].size(0) == args.classes &&
                          queues[q].size(2) == args.layout.dim && queues[q].device() == device,
                      "queues must be [", args.classes, ", N, ", args.layout.dim, "] on ", device, ", got ",
                      queues[q].sizes(), " on ", queues[q].device());
    const Tensor& rows = kept.emplace_back(queues[q].contiguous());
    args.queue[args.queues] = {read<void>(rows), nullptr, rows.size(1), dtype_of(rows, "queues")};
    kept.push_back(checked(counts[q], "counts", {args.classes}, at::kLong, device));
    args.queue[args.queues++].counts = read<int64_t>(kept.back());
  }
  if constexpr (std::is_same_v<Device, Cpu>) {  // elsewhere, reading the index would wait for the device
    TORCH_CHECK_VALUE(args.count == 0 || index.max().template item<int64_t>() < args.layout.pixels, "index beyond the ",
                      args.layout.pixels, " pixels");
  }

  const auto sums = features.options().dtype(accumulation(features)).memory_format(at::MemoryFormat::Contiguous);
  const auto loss = at::empty({}, sums), anchor_loss = at::empty({args.count}, sums);
  const auto positives = at::empty({args.count}, index.options());
  Tensor grad_features;
  if (features_grad) grad_features = empty_like_features(features, unscaled_grad(features));
  args.temperature = temperature;
  args.base_temperature = base_temperature;
  args.loss_weight = loss_weight;
  args.dtype = dtype_of(features, "features");
  args.features = read<void>(features);
  args.index = read<int64_t>(index);
  args.labels = read<int64_t>(labels);
  args.excluded = read<int64_t>(excluded);
  args.loss = write<void>(loss);
  args.anchor_loss = write<void>(anchor_loss);
  args.positives = write<int64_t>(positives);
  args.grad_features = write<void>(grad_features);
  Device::dispatch(features, "infonce", [&](auto, const auto& on) { run(args, on); });
  return {loss, anchor_loss, positives, defined_or_empty(grad_features, features)};
}

template <class Device>
void implement(torch::Library& library) {
  library.impl("infonce", &infonce<Device>);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pixcontrast, library) {
  library.def(
      "infonce(Tensor features, Tensor index, Tensor labels, Tensor[] queues, Tensor[] counts, Tensor? excluded, "
      "float temperature, float base_temperature, float loss_weight, bool features_grad) -> "
      "(Tensor loss, Tensor anchor_loss, Tensor positives, Tensor grad_features)");
}

PIXCONTRAST_IMPLEMENT(implement)

}  // namespace pixcontrast
