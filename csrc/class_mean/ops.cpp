#include "class_mean/class_mean.h"
#include "common/tensor.h"

namespace pixcontrast {
namespace {

template <class T>
void run(const ClassMean<T>& args, const Cpu&) {
  args.grad_mean ? class_mean_backward_cpu(args) : class_mean_cpu(args);
}

#ifdef PIXCONTRAST_WITH_CUDA
template <class T>
void run(const ClassMean<T>& args, const Cuda& device) {
  if (args.grad_mean) {
    C10_CUDA_CHECK(class_mean_backward_cuda(args, device.stream));
    return;
  }
  const Tensor workspace = device.workspace(class_mean_cuda_workspace(args));
  C10_CUDA_CHECK(class_mean_cuda(args, workspace.mutable_data_ptr(), device.stream));
}
#endif

// queue [C, N, D], counts [C] int64, weight_logits [C, N]
struct Memory {
  Tensor queue, counts;
  optional<Tensor> weight_logits;

  Memory(const Tensor& queue_, const Tensor& counts_, const optional<Tensor>& weight_logits_) {
    TORCH_CHECK_VALUE(queue_.dim() == 3, "queue must be [C, N, D], got ", queue_.sizes());
    queue = queue_.contiguous();
    counts = checked(counts_, "counts", queue.sizes().slice(0, 1), at::kLong, queue.device());
    weight_logits =
        checked(weight_logits_, "weight_logits", queue.sizes().slice(0, 2), accumulation(queue), queue.device());
  }

  template <class T>
  ClassMean<T> arguments() const {
    return {
        queue.size(0), queue.size(1), queue.size(2), read<T>(queue), read<int64_t>(counts), read<Acc<T>>(weight_logits),
        nullptr,       nullptr,       nullptr};
  }
};

template <class Device>
Tensor class_mean(const Tensor& queue, const Tensor& counts, const optional<Tensor>& weight_logits) {
  const Memory memory(queue, counts, weight_logits);
  const auto mean = at::empty({queue.size(0), queue.size(2)}, queue.options().dtype(accumulation(queue)));
  Device::dispatch(queue, "class_mean", [&](auto element, const auto& device) {
    using T = decltype(element);
    auto args = memory.arguments<T>();
    args.mean = write<Acc<T>>(mean);
    run(args, device);
  });
  return mean;
}

template <class Device>
Tensor class_mean_backward(const Tensor& grad_mean_, const Tensor& queue, const Tensor& counts,
                           const Tensor& weight_logits) {
  const Memory memory(queue, counts, weight_logits);
  const auto grad_mean =
      checked(grad_mean_, "grad_mean", {queue.size(0), queue.size(2)}, accumulation(queue), queue.device());
  if (queue.numel() == 0) return at::zeros_like(weight_logits, at::MemoryFormat::Contiguous);
  const auto grad_weight_logits = at::empty(weight_logits.sizes(), weight_logits.options());
  Device::dispatch(queue, "class_mean_backward", [&](auto element, const auto& device) {
    using T = decltype(element);
    auto args = memory.arguments<T>();
    args.grad_mean = read<Acc<T>>(grad_mean);
    args.grad_weight_logits = write<Acc<T>>(grad_weight_logits);
    run(args, device);
  });
  return grad_weight_logits;
}

template <class Device>
void implement(torch::Library& library) {
  library.impl("class_mean", &class_mean<Device>);
  library.impl("class_mean_backward", &class_mean_backward<Device>);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pixcontrast, library) {
  library.def("class_mean(Tensor queue, Tensor counts, Tensor? weight_logits) -> Tensor");
  library.def("class_mean_backward(Tensor grad_mean, Tensor queue, Tensor counts, Tensor weight_logits) -> Tensor");
}

PIXCONTRAST_IMPLEMENT(implement)

}  // namespace pixcontrast
