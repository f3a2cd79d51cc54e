// The operator `project` as PyTorch sees it: schemas, checks that keep memory accesses in bounds, allocation, dispatch.
// What is friendly to people (names, hints) is checked before in pixcontrast/functional.py.
#include "common/old_tensor.h"
#include "project.h"

#ifdef PIXCONTRAST_WITH_CUDA
#include "project_cuda.h"
#endif

namespace pixcontrast {
namespace {

void check(const Tensor& features, const Tensor& index, const Tensor& weight) {
  check_features(features);
  TORCH_CHECK_VALUE(index.dim() == 1, "index must be [R], got ", index.sizes());
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, "index must be int64, got ", index.scalar_type());
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == features.size(1), "weight must be [Dout, Din], got ",
                    weight.sizes());
  TORCH_CHECK_TYPE(weight.scalar_type() == features.scalar_type(), "weight must be ", features.scalar_type(), ", got ",
                   weight.scalar_type());
  TORCH_CHECK_VALUE(index.device() == features.device() && weight.device() == features.device(),
                    "index and weight must be on ", features.device());
  if (!index.is_cpu() || index.numel() == 0) return;
  const auto [lowest, highest] = at::aminmax(index);
  const int64_t first = lowest.item<int64_t>(), last = highest.item<int64_t>(), pixels = layout_of(features).pixels;
  TORCH_CHECK_VALUE(first >= -1 && last < pixels, "index must be within -1..", pixels - 1, ", got ", first, "..", last);
}

Tensor project(const Tensor& features_, const Tensor& index_, const Tensor& weight_, const optional<Tensor>& bias_) {
  check(features_, index_, weight_);
  if (bias_.has_value()) {
    TORCH_CHECK_VALUE(bias_->sizes() == weight_.sizes().slice(0, 1), "bias must be [Dout], got ", bias_->sizes());
    TORCH_CHECK_TYPE(bias_->scalar_type() == weight_.scalar_type(), "bias must be ", weight_.scalar_type());
    TORCH_CHECK_VALUE(bias_->device() == weight_.device(), "bias must be on ", weight_.device());
  }
  const auto features = features_.contiguous(format_of(features_));
  const auto index = index_.contiguous(), weight = weight_.contiguous();
  const auto bias = contiguous(bias_);
  const auto result = empty_map({index.numel(), weight.size(0)}, weight.options());
  const auto arguments = [&](auto number) {
    using T = decltype(number);
    return Project<T>{layout_of(features),  index.numel(),   weight.size(0), read<T>(features),
                      read<int64_t>(index), read<T>(weight), read<T>(bias),  write<T>(result)};
  };
#ifdef PIXCONTRAST_WITH_CUDA
  if (features.is_cuda()) {
    dispatch_cuda(features, "project", [&](auto number, cudaStream_t stream) {
      return project_cuda(arguments(number), tensor_cores(features), stream);
    });
    return result;
  }
#endif
  dispatch_cpu(features, "project", [&](auto number) { project_cpu(arguments(number)); });
  return result;
}

std::tuple<Tensor, Tensor, Tensor> project_backward(const Tensor& grad_, const Tensor& features_, const Tensor& index_,
                                                    const Tensor& weight_, bool features_grad, bool weight_grad,
                                                    bool bias_grad) {
  check(features_, index_, weight_);
  TORCH_CHECK_VALUE(grad_.sizes() == at::IntArrayRef({index_.numel(), weight_.size(0)}), "grad must be [R, Dout], got ",
                    grad_.sizes());
  TORCH_CHECK_TYPE(grad_.scalar_type() == features_.scalar_type(), "grad must be ", features_.scalar_type(), ", got ",
                   grad_.scalar_type());
  TORCH_CHECK_VALUE(grad_.device() == features_.device(), "grad must be on ", features_.device());
  const auto features = features_.contiguous(format_of(features_)), grad = grad_.contiguous();
  const auto index = index_.contiguous(), weight = weight_.contiguous();
  Tensor grad_features, grad_weight, grad_bias, order;
  if (features_grad) grad_features = empty_like_features(features);
  if (weight_grad) grad_weight = at::empty_like(weight);
  if (bias_grad) grad_bias = at::empty({weight.size(0)}, weight.options());
  const auto arguments = [&](auto number) {
    using T = decltype(number);
    return ProjectBackward<T>{layout_of(features),     index.numel(),         weight.size(0),     read<T>(features),
                              read<int64_t>(index),    read<int64_t>(order),  read<T>(weight),    read<T>(grad),
                              write<T>(grad_features), write<T>(grad_weight), write<T>(grad_bias)};
  };
  const auto results = [&] {
    return std::make_tuple(made(grad_features, weight), made(grad_weight, weight), made(grad_bias, weight));
  };
#ifdef PIXCONTRAST_WITH_CUDA
  if (features.is_cuda()) {
    if (features_grad) order = at::argsort(index, /*stable=*/true, /*dim=*/0, /*descending=*/false);
    dispatch_cuda(features, "project_backward", [&](auto number, cudaStream_t stream) {
      const auto args = arguments(number);
      const auto room = workspace(project_backward_cuda_workspace(args), features);
      return project_backward_cuda(args, tensor_cores(features), room.mutable_data_ptr(), stream);
    });
    return results();
  }
#endif
  dispatch_cpu(features, "project_backward", [&](auto number) { project_backward_cpu(arguments(number)); });
  return results();
}

void implement(torch::Library& library) {
  library.impl("project", &project);
  library.impl("project_backward", &project_backward);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pixcontrast, library) {
  library.def("project(Tensor features, Tensor index, Tensor weight, Tensor? bias) -> Tensor");
  library.def(
      "project_backward(Tensor grad, Tensor features, Tensor index, Tensor weight, bool features_grad, "
      "bool weight_grad, bool bias_grad) -> (Tensor grad_features, Tensor grad_weight, Tensor grad_bias)");
}

TORCH_LIBRARY_IMPL(pixcontrast, CPU, library) { implement(library); }
#ifdef PIXCONTRAST_WITH_CUDA
TORCH_LIBRARY_IMPL(pixcontrast, CUDA, library) { implement(library); }
#endif

}  // namespace pixcontrast
