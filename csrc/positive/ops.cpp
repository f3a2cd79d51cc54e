#include "common/tensor.h"
#include "positive/positive.h"

namespace pixcontrast {
namespace {

template <class T>
void run(const Positive<T>& args, const Cpu&) {
  positive_cpu(args);
}

#ifdef PIXCONTRAST_WITH_CUDA
template <class T>
void run(const Positive<T>& args, const Cuda& device) {
  const int sm_count = device.sm_count();
  const Tensor workspace = device.workspace(positive_cuda_workspace(args, sm_count));
  C10_CUDA_CHECK(positive_cuda(args, sm_count, workspace.mutable_data_ptr(), device.stream));
}
#endif

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> positive(
    const Tensor& features_, const Tensor& labels_, const optional<Tensor>& weight_logits_, const Tensor& mean_,
    const Tensor& memory_counts_, double loss_weight, int64_t ignore_index, bool features_grad, bool weight_logits_grad,
    bool mean_grad) {
  const auto features = checked_features(features_);
  const auto type = accumulation(features);
  const auto device = features.device();
  const auto shape = features.dim() == 4 ? at::DimVector({features.size(0), features.size(2), features.size(3)})
                                         : at::DimVector({features.size(0)});
  TORCH_CHECK_VALUE(mean_.dim() == 2 && mean_.size(0) > 0, "mean must be [C, D], got ", mean_.sizes());
  const int64_t classes = mean_.size(0);
  const auto labels = checked(labels_, "labels", shape, at::kLong, device);
  const auto weight_logits = checked(weight_logits_, "weight_logits", shape, type, device);
  const auto mean = checked(mean_, "mean", {classes, features.size(1)}, type, device);
  const auto memory_counts = checked(memory_counts_, "memory_counts", {classes}, at::kLong, device);
  TORCH_CHECK_VALUE(!weight_logits_grad || weight_logits.has_value(), "weight_logits_grad without weight_logits");

  const auto sums = features.options().dtype(type).memory_format(at::MemoryFormat::Contiguous);
  const auto loss = at::empty({}, sums), class_loss = at::empty({classes}, sums);
  const auto counts = at::empty({classes}, labels.options()), unknown = at::empty({}, labels.options());
  Tensor grad_features, grad_weight_logits, grad_mean;
  if (features_grad) grad_features = empty_like_features(features, unscaled_grad(features));
  if (weight_logits_grad) grad_weight_logits = at::empty(shape, sums);
  if (mean_grad) grad_mean = at::empty(mean.sizes(), sums);
  Device::dispatch(features, "positive", [&](auto element, const auto& on) {
    using T = decltype(element);
    Positive<T> args{};
    args.layout = layout_of(features);
    args.classes = classes;
    args.ignore_index = ignore_index;
    args.loss_weight = loss_weight;
    args.features = read<T>(features);
    args.labels = read<int64_t>(labels);
    args.weight_logits = read<Acc<T>>(weight_logits);
    args.mean = read<Acc<T>>(mean);
    args.memory_counts = read<int64_t>(memory_counts);
    args.loss = write<Acc<T>>(loss);
    args.class_loss = write<Acc<T>>(class_loss);
    args.counts = write<int64_t>(counts);
    args.unknown = write<int64_t>(unknown);
    args.grad_features = write<void>(grad_features);
    args.grad_weight_logits = write<Acc<T>>(grad_weight_logits);
    args.grad_mean = write<Acc<T>>(grad_mean);
    run(args, on);
  });
  return {loss,
          class_loss,
          counts,
          unknown,
          defined_or_empty(grad_features, features),
          defined_or_empty(grad_weight_logits, loss),
          defined_or_empty(grad_mean, loss)};
}

template <class Device>
void implement(torch::Library& library) {
  library.impl("positive", &positive<Device>);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pixcontrast, library) {
  library.def(
      "positive(Tensor features, Tensor labels, Tensor? weight_logits, Tensor mean, Tensor memory_counts, "
      "float loss_weight, int ignore_index, bool features_grad, bool weight_logits_grad, bool mean_grad) -> "
      "(Tensor loss, Tensor class_loss, Tensor counts, Tensor unknown, Tensor grad_features, "
      "Tensor grad_weight_logits, Tensor grad_mean)");
}

PIXCONTRAST_IMPLEMENT(implement)

}  // namespace pixcontrast
