// The operators of the positive objective as PyTorch sees them: schemas, checks that keep memory accesses in bounds,
// allocation, dispatch. What is friendly to people (names, hints) is checked before in pixcontrast/functional.py.
#include "ops.h"
#include "positive.h"

#ifdef PIXCONTRAST_WITH_CUDA
#include "positive_cuda.h"
#endif

namespace pixcontrast {
namespace {

// queue [C, N, D], counts [C] int64, weights [C, N]
void check_memory(const Tensor& queue, const Tensor& counts, const optional<Tensor>& weights) {
  TORCH_CHECK_VALUE(queue.dim() == 3, "queue must be [C, N, D], got ", queue.sizes());
  TORCH_CHECK_VALUE(counts.sizes() == queue.sizes().slice(0, 1), "counts must be [C], got ", counts.sizes());
  TORCH_CHECK_TYPE(counts.scalar_type() == at::kLong, "counts must be int64, got ", counts.scalar_type());
  TORCH_CHECK_VALUE(counts.device() == queue.device(), "counts must be on ", queue.device());
  if (weights.has_value()) {
    TORCH_CHECK_VALUE(weights->sizes() == queue.sizes().slice(0, 2), "weights must be [C, N], got ", weights->sizes());
    TORCH_CHECK_TYPE(weights->scalar_type() == accumulation(queue), "weights must be ", accumulation(queue));
    TORCH_CHECK_VALUE(weights->device() == queue.device(), "weights must be on ", queue.device());
  }
}

Tensor memory_mean(const Tensor& queue_, const Tensor& counts_, const optional<Tensor>& weights_) {
  check_memory(queue_, counts_, weights_);
  const auto queue = queue_.contiguous(), counts = counts_.contiguous();
  const auto weights = contiguous(weights_);
  const auto mean = at::empty({queue.size(0), queue.size(2)}, queue.options().dtype(accumulation(queue)));
  const auto arguments = [&](auto number) {
    using T = decltype(number);
    return MemoryMean<T>{
        queue.size(0),         queue.size(1),       queue.size(2), read<T>(queue), read<int64_t>(counts),
        read<Acc<T>>(weights), write<Acc<T>>(mean), nullptr,       nullptr};
  };
#ifdef PIXCONTRAST_WITH_CUDA
  if (queue.is_cuda()) {
    dispatch_cuda(queue, "memory_mean", [&](auto number, cudaStream_t stream) {
      const auto args = arguments(number);
      const auto room = workspace(memory_mean_cuda_workspace(args), queue);
      return memory_mean_cuda(args, room.mutable_data_ptr(), stream);
    });
    return mean;
  }
#endif
  dispatch_cpu(queue, "memory_mean", [&](auto number) { memory_mean_cpu(arguments(number)); });
  return mean;
}

Tensor memory_mean_backward(const Tensor& grad_mean_, const Tensor& queue_, const Tensor& counts_,
                            const Tensor& weights_) {
  check_memory(queue_, counts_, weights_);
  TORCH_CHECK_VALUE(grad_mean_.sizes() == at::IntArrayRef({queue_.size(0), queue_.size(2)}),
                    "grad_mean must be [C, D], got ", grad_mean_.sizes());
  TORCH_CHECK_TYPE(grad_mean_.scalar_type() == accumulation(queue_), "grad_mean must be ", accumulation(queue_));
  TORCH_CHECK_VALUE(grad_mean_.device() == queue_.device(), "grad_mean must be on ", queue_.device());
  const auto queue = queue_.contiguous(), counts = counts_.contiguous(), weights = weights_.contiguous();
  const auto grad_mean = grad_mean_.contiguous();
  const auto grad_weights = at::empty(weights.sizes(), weights.options());
  const auto arguments = [&](auto number) {
    using T = decltype(number);
    return MemoryMean<T>{queue.size(0),  queue.size(1),           queue.size(2),
                         read<T>(queue), read<int64_t>(counts),   read<Acc<T>>(weights),
                         nullptr,        read<Acc<T>>(grad_mean), write<Acc<T>>(grad_weights)};
  };
#ifdef PIXCONTRAST_WITH_CUDA
  if (queue.is_cuda()) {
    dispatch_cuda(queue, "memory_mean_backward", [&](auto number, cudaStream_t stream) {
      return memory_mean_backward_cuda(arguments(number), stream);
    });
    return grad_weights;
  }
#endif
  dispatch_cpu(queue, "memory_mean_backward", [&](auto number) { memory_mean_backward_cpu(arguments(number)); });
  return grad_weights;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> positive(
    const Tensor& features_, const Tensor& labels_, const optional<Tensor>& weights_, const Tensor& mean_,
    const Tensor& memory_counts_, double loss_weight, int64_t ignore_index, bool features_grad, bool weights_grad,
    bool mean_grad) {
  const auto type = accumulation(features_);
  const auto device = features_.device();
  check_features(features_);
  const auto shape = features_.dim() == 4 ? at::DimVector({features_.size(0), features_.size(2), features_.size(3)})
                                          : at::DimVector({features_.size(0)});
  TORCH_CHECK_VALUE(labels_.sizes() == shape, "labels must be ", shape, ", got ", labels_.sizes());
  TORCH_CHECK_TYPE(labels_.scalar_type() == at::kLong, "labels must be int64, got ", labels_.scalar_type());
  TORCH_CHECK_VALUE(mean_.dim() == 2 && mean_.size(0) > 0 && mean_.size(1) == features_.size(1),
                    "mean must be [C, D], got ", mean_.sizes());
  TORCH_CHECK_TYPE(mean_.scalar_type() == type, "mean must be ", type, ", got ", mean_.scalar_type());
  TORCH_CHECK_VALUE(memory_counts_.sizes() == mean_.sizes().slice(0, 1), "memory_counts must be [C]");
  TORCH_CHECK_TYPE(memory_counts_.scalar_type() == at::kLong, "memory_counts must be int64");
  TORCH_CHECK_VALUE(labels_.device() == device && mean_.device() == device && memory_counts_.device() == device,
                    "labels, mean and memory_counts must be on ", device);
  TORCH_CHECK_VALUE(!weights_grad || weights_.has_value(), "weights_grad without weights");
  if (weights_.has_value()) {
    TORCH_CHECK_VALUE(weights_->sizes() == shape, "weights must be ", shape, ", got ", weights_->sizes());
    TORCH_CHECK_TYPE(weights_->scalar_type() == type, "weights must be ", type);
    TORCH_CHECK_VALUE(weights_->device() == device, "weights must be on ", device);
  }

  const auto features = features_.contiguous(format_of(features_)), labels = labels_.contiguous();
  const auto weights = contiguous(weights_);
  const auto mean = mean_.contiguous(), memory_counts = memory_counts_.contiguous();
  const int64_t classes = mean.size(0);
  const auto sums = features.options().dtype(type).memory_format(at::MemoryFormat::Contiguous);

  const auto loss = at::empty({}, sums), class_loss = at::empty({classes}, sums);
  const auto pixels = at::empty({classes}, labels.options()), unknown = at::empty({}, labels.options());
  Tensor grad_features, grad_weights, grad_mean;
  if (features_grad) grad_features = empty_like_features(features);
  if (weights_grad) grad_weights = at::empty(shape, sums);
  if (mean_grad) grad_mean = at::empty(mean.sizes(), sums);
  const auto arguments = [&](auto number) {
    using T = decltype(number);
    Positive<T> args{};
    args.layout = layout_of(features);
    args.classes = classes;
    args.ignore_index = ignore_index;
    args.loss_weight = loss_weight;
    args.features = read<T>(features);
    args.labels = read<int64_t>(labels);
    args.weights = read<Acc<T>>(weights);
    args.mean = read<Acc<T>>(mean);
    args.memory_counts = read<int64_t>(memory_counts);
    args.loss = write<Acc<T>>(loss);
    args.class_loss = write<Acc<T>>(class_loss);
    args.pixels = write<int64_t>(pixels);
    args.unknown = write<int64_t>(unknown);
    args.grad_features = write<T>(grad_features);
    args.grad_weights = write<Acc<T>>(grad_weights);
    args.grad_mean = write<Acc<T>>(grad_mean);
    return args;
  };
  const auto results = [&] {
    return std::make_tuple(loss, class_loss, pixels, unknown, made(grad_features, features), made(grad_weights, loss),
                           made(grad_mean, loss));
  };
#ifdef PIXCONTRAST_WITH_CUDA
  if (features.is_cuda()) {
    const int multiprocessors = sm_count(features);
    dispatch_cuda(features, "positive", [&](auto number, cudaStream_t stream) {
      const auto args = arguments(number);
      const auto room = workspace(positive_cuda_workspace(args, multiprocessors), features);
      return positive_cuda(args, multiprocessors, room.mutable_data_ptr(), stream);
    });
    return results();
  }
#endif
  dispatch_cpu(features, "positive", [&](auto number) { positive_cpu(arguments(number)); });
  return results();
}

void implement(torch::Library& library) {
  library.impl("memory_mean", &memory_mean);
  library.impl("memory_mean_backward", &memory_mean_backward);
  library.impl("positive", &positive);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pixcontrast, library) {
  library.def("memory_mean(Tensor queue, Tensor counts, Tensor? weights) -> Tensor");
  library.def("memory_mean_backward(Tensor grad_mean, Tensor queue, Tensor counts, Tensor weights) -> Tensor");
  library.def(
      "positive(Tensor features, Tensor labels, Tensor? weights, Tensor mean, Tensor memory_counts, float loss_weight, "
      "int ignore_index, bool features_grad, bool weights_grad, bool mean_grad) -> "
      "(Tensor loss, Tensor class_loss, Tensor pixels, Tensor unknown, Tensor grad_features, Tensor grad_weights, "
      "Tensor grad_mean)");
}

TORCH_LIBRARY_IMPL(pixcontrast, CPU, library) { implement(library); }
#ifdef PIXCONTRAST_WITH_CUDA
TORCH_LIBRARY_IMPL(pixcontrast, CUDA, library) { implement(library); }
#endif

}  // namespace pixcontrast
