// Operators as PyTorch sees them: schemas, checks that keep memory accesses in bounds, allocation, dispatch by dtype.
// What is friendly to people (names, hints) is checked before in pixcontrast/functional.py.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include "cpu/parallel.h"
#include "infonce.h"
#include "positive.h"

namespace pixcontrast {
namespace {

using at::Tensor;
using std::optional;

at::ScalarType accumulation(const Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

template <class A>
const A* data_or_null(const optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr<A>() : nullptr;
}

optional<Tensor> contiguous(const optional<Tensor>& t) {
  return t.has_value() ? optional<Tensor>(t->contiguous()) : optional<Tensor>();
}

// queue [C, N, D], counts [C] int64, weights [C, N]
void check_memory(const Tensor& queue, const Tensor& counts, const optional<Tensor>& weights) {
  TORCH_CHECK_VALUE(queue.dim() == 3, "queue must be [C, N, D], got ", queue.sizes());
  TORCH_CHECK_VALUE(counts.sizes() == at::IntArrayRef({queue.size(0)}), "counts must be [C], got ", counts.sizes());
  TORCH_CHECK_TYPE(counts.scalar_type() == at::kLong, "counts must be int64, got ", counts.scalar_type());
  if (weights.has_value()) {
    TORCH_CHECK_VALUE(weights->sizes() == queue.sizes().slice(0, 2), "weights must be [C, N], got ", weights->sizes());
    TORCH_CHECK_TYPE(weights->scalar_type() == accumulation(queue), "weights must be ", accumulation(queue));
  }
}

#define DISPATCH(tensor, name, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, (tensor).scalar_type(), name, __VA_ARGS__)

Tensor memory_mean(const Tensor& queue_, const Tensor& counts_, const optional<Tensor>& weights_) {
  check_memory(queue_, counts_, weights_);
  const auto queue = queue_.contiguous(), counts = counts_.contiguous();
  const auto weights = contiguous(weights_);
  auto mean = at::empty({queue.size(0), queue.size(2)}, queue.options().dtype(accumulation(queue)));
  DISPATCH(queue, "memory_mean", [&] {
    using A = Acc<scalar_t>;
    memory_mean_cpu<scalar_t>({queue.size(0), queue.size(1), queue.size(2), queue.const_data_ptr<scalar_t>(),
                               counts.const_data_ptr<int64_t>(), data_or_null<A>(weights), mean.data_ptr<A>(), nullptr,
                               nullptr});
  });
  return mean;
}

Tensor memory_mean_backward(const Tensor& grad_mean_, const Tensor& queue_, const Tensor& counts_,
                            const Tensor& weights_) {
  check_memory(queue_, counts_, weights_);
  TORCH_CHECK_VALUE(grad_mean_.sizes() == at::IntArrayRef({queue_.size(0), queue_.size(2)}),
                    "grad_mean must be [C, D], got ", grad_mean_.sizes());
  TORCH_CHECK_TYPE(grad_mean_.scalar_type() == accumulation(queue_), "grad_mean must be ", accumulation(queue_));
  const auto queue = queue_.contiguous(), counts = counts_.contiguous(), weights = weights_.contiguous();
  const auto grad_mean = grad_mean_.contiguous();
  auto grad_weights = at::empty(weights.sizes(), weights.options());
  DISPATCH(queue, "memory_mean_backward", [&] {
    using A = Acc<scalar_t>;
    memory_mean_backward_cpu<scalar_t>({queue.size(0), queue.size(1), queue.size(2), queue.const_data_ptr<scalar_t>(),
                                        counts.const_data_ptr<int64_t>(), weights.const_data_ptr<A>(), nullptr,
                                        grad_mean.const_data_ptr<A>(), grad_weights.data_ptr<A>()});
  });
  return grad_weights;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> positive(
    const Tensor& features_, const Tensor& labels_, const optional<Tensor>& weights_, const Tensor& mean_,
    const Tensor& memory_counts_, double loss_weight, int64_t ignore_index, bool features_grad, bool weights_grad,
    bool mean_grad) {
  const bool is_map = features_.dim() == 4;
  const auto type = accumulation(features_);
  TORCH_CHECK_VALUE(is_map || features_.dim() == 2, "features must be [P, D] or [B, D, H, W], got ", features_.sizes());
  const auto shape = is_map ? at::DimVector({features_.size(0), features_.size(2), features_.size(3)})
                            : at::DimVector({features_.size(0)});
  TORCH_CHECK_VALUE(labels_.sizes() == shape, "labels must be ", shape, ", got ", labels_.sizes());
  TORCH_CHECK_TYPE(labels_.scalar_type() == at::kLong, "labels must be int64, got ", labels_.scalar_type());
  TORCH_CHECK_VALUE(mean_.dim() == 2 && mean_.size(0) > 0 && mean_.size(1) == features_.size(1),
                    "mean must be [C, D], got ", mean_.sizes());
  TORCH_CHECK_TYPE(mean_.scalar_type() == type, "mean must be ", type, ", got ", mean_.scalar_type());
  TORCH_CHECK_VALUE(memory_counts_.sizes() == mean_.sizes().slice(0, 1), "memory_counts must be [C]");
  TORCH_CHECK_TYPE(memory_counts_.scalar_type() == at::kLong, "memory_counts must be int64");
  TORCH_CHECK_VALUE(!weights_grad || weights_.has_value(), "weights_grad without weights");
  if (weights_.has_value()) {
    TORCH_CHECK_VALUE(weights_->sizes() == shape, "weights must be ", shape, ", got ", weights_->sizes());
    TORCH_CHECK_TYPE(weights_->scalar_type() == type, "weights must be ", type);
  }

  const bool channels_last = is_map && features_.is_contiguous(at::MemoryFormat::ChannelsLast);
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const auto features = features_.contiguous(format), labels = labels_.contiguous();
  const auto weights = contiguous(weights_);
  const auto mean = mean_.contiguous(), memory_counts = memory_counts_.contiguous();
  const int64_t classes = mean.size(0);
  const auto sums = features.options().dtype(type).memory_format(at::MemoryFormat::Contiguous);

  auto loss = at::empty({}, sums), class_loss = at::empty({classes}, sums);
  auto pixels = at::empty({classes}, labels.options()), unknown = at::empty({}, labels.options());
  auto grad_features = features_grad ? at::empty_like(features, features.options().memory_format(format))
                                     : at::empty({0}, features.options());
  auto grad_weights = at::empty(weights_grad ? at::IntArrayRef(shape) : at::IntArrayRef({0}), sums);
  auto grad_mean = at::empty(mean_grad ? mean.sizes() : at::IntArrayRef({0}), sums);
  DISPATCH(features, "positive", [&] {
    using A = Acc<scalar_t>;
    Positive<scalar_t> args{};
    args.layout = {labels.numel(), features.size(1),
                   is_map && !channels_last ? features.size(2) * features.size(3) : 0};
    args.classes = classes;
    args.ignore_index = ignore_index;
    args.loss_weight = loss_weight;
    args.features = features.const_data_ptr<scalar_t>();
    args.labels = labels.const_data_ptr<int64_t>();
    args.weights = data_or_null<A>(weights);
    args.mean = mean.const_data_ptr<A>();
    args.memory_counts = memory_counts.const_data_ptr<int64_t>();
    args.loss = loss.data_ptr<A>();
    args.class_loss = class_loss.data_ptr<A>();
    args.pixels = pixels.data_ptr<int64_t>();
    args.unknown = unknown.data_ptr<int64_t>();
    args.grad_features = features_grad ? grad_features.data_ptr<scalar_t>() : nullptr;
    args.grad_weights = weights_grad ? grad_weights.data_ptr<A>() : nullptr;
    args.grad_mean = mean_grad ? grad_mean.data_ptr<A>() : nullptr;
    positive_cpu<scalar_t>(args);
  });
  return {loss, class_loss, pixels, unknown, grad_features, grad_weights, grad_mean};
}

// Copies between pixels `index` [R] (below 0: none) of features [P, D] or [B, D, H, W] and rows [R, D]. Each thread has
// channels of its own, so pixels that occur twice are added in order.
template <class Copy>
void for_pixels(const Tensor& features, const Tensor& index, const Copy& copy) {
  const bool is_map = features.dim() == 4;
  const int64_t dim = features.size(1), count = index.numel();
  const int64_t inside = is_map ? features.size(2) * features.size(3) : 1;
  const bool rows = !is_map || features.is_contiguous(at::MemoryFormat::ChannelsLast);
  const auto* pixel = index.const_data_ptr<int64_t>();
  cpu::Pieces(dim, 16, 16).run([&](int64_t, int64_t first, int64_t last) {
    for (int64_t r = 0; r < count; ++r) {
      if (pixel[r] < 0) continue;
      const int64_t start = rows ? pixel[r] * dim : pixel[r] / inside * dim * inside + pixel[r] % inside;
      for (int64_t d = first; d < last; ++d) copy(start + d * (rows ? 1 : inside), r * dim + d);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> infonce(const Tensor& features_, const Tensor& index_, const Tensor& labels_,
                                                   at::TensorList queues, at::TensorList counts,
                                                   const optional<Tensor>& excluded, double temperature,
                                                   double base_temperature, double loss_weight, bool features_grad) {
  TORCH_CHECK_VALUE(features_.dim() == 2 || features_.dim() == 4, "features must be [P, D] or [B, D, H, W], got ",
                    features_.sizes());
  TORCH_CHECK_VALUE(index_.dim() == 1 && labels_.sizes() == index_.sizes(), "index and labels must be [R]");
  TORCH_CHECK_TYPE(index_.scalar_type() == at::kLong && labels_.scalar_type() == at::kLong,
                   "index and labels must be int64");
  TORCH_CHECK_VALUE(queues.size() == counts.size(), "each queue needs counts");
  const int64_t pixels = features_.numel() / std::max<int64_t>(features_.size(1), 1);
  TORCH_CHECK_VALUE(index_.numel() == 0 || index_.max().item<int64_t>() < pixels, "index beyond the ", pixels,
                    " pixels");
  InfoNCE args;
  for (size_t q = 0; q < queues.size(); ++q) {
    check_memory(queues[q], counts[q], std::nullopt);
    TORCH_CHECK_VALUE(queues[q].size(0) == queues[0].size(0) && queues[q].size(2) == features_.size(1),
                      "queues must be [C, N, D], got ", queues[q].sizes());
    args.queues.push_back(queues[q].contiguous());
    args.counts.push_back(counts[q].contiguous());
  }
  if (excluded.has_value()) {
    TORCH_CHECK_VALUE(excluded->sizes() == index_.sizes(), "excluded must be [R]");
    TORCH_CHECK_TYPE(excluded->scalar_type() == at::kLong, "excluded must be int64");
    args.excluded = excluded->contiguous();
  }
  const bool channels_last = features_.dim() == 4 && features_.is_contiguous(at::MemoryFormat::ChannelsLast);
  const auto features =
      features_.contiguous(channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  const auto index = index_.contiguous();
  args.labels = at::where(index < 0, -1, labels_).contiguous();
  args.anchors =
      at::zeros({index.numel(), features.size(1)},
                features.options().dtype(accumulation(features)).memory_format(at::MemoryFormat::Contiguous));
  args.temperature = temperature;
  args.base_temperature = base_temperature;
  args.loss_weight = loss_weight;
  args.needs_grad = features_grad;
  DISPATCH(features, "gather", [&] {
    using A = Acc<scalar_t>;
    const auto* from = features.const_data_ptr<scalar_t>();
    auto* to = args.anchors.data_ptr<A>();
    for_pixels(features, index, [&](int64_t pixel, int64_t row) { to[row] = static_cast<A>(from[pixel]); });
  });
  const auto result = infonce_cpu(args);
  auto grad = features_grad ? at::zeros_like(features) : at::empty({0}, features.options());
  if (features_grad) {
    DISPATCH(features, "scatter", [&] {
      using A = Acc<scalar_t>;
      const auto* from = result.grad.const_data_ptr<A>();
      auto* to = grad.data_ptr<scalar_t>();
      for_pixels(features, index, [&](int64_t pixel, int64_t row) { to[pixel] += static_cast<scalar_t>(from[row]); });
    });
  }
  return {result.loss, result.anchor_loss, result.positives, grad};
}

}  // namespace

TORCH_LIBRARY(pixcontrast, library) {
  library.def("memory_mean(Tensor queue, Tensor counts, Tensor? weights) -> Tensor");
  library.def("memory_mean_backward(Tensor grad_mean, Tensor queue, Tensor counts, Tensor weights) -> Tensor");
  library.def(
      "positive(Tensor features, Tensor labels, Tensor? weights, Tensor mean, Tensor memory_counts, float loss_weight, "
      "int ignore_index, bool features_grad, bool weights_grad, bool mean_grad) -> "
      "(Tensor loss, Tensor class_loss, Tensor pixels, Tensor unknown, Tensor grad_features, Tensor grad_weights, "
      "Tensor grad_mean)");
  library.def(
      "infonce(Tensor features, Tensor index, Tensor labels, Tensor[] queues, Tensor[] counts, Tensor? excluded, "
      "float temperature, float base_temperature, float loss_weight, bool features_grad) -> "
      "(Tensor loss, Tensor anchor_loss, Tensor positives, Tensor grad_features)");
}

TORCH_LIBRARY_IMPL(pixcontrast, CPU, library) {
  library.impl("memory_mean", &memory_mean);
  library.impl("memory_mean_backward", &memory_mean_backward);
  library.impl("positive", &positive);
  library.impl("infonce", &infonce);
}

}  // namespace pixcontrast
