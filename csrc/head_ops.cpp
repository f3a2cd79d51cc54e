// The heads behind their first product as PyTorch sees them.
#include "common/layer_ops.h"
#include "head.h"

#ifdef PIXCONTRAST_WITH_CUDA
#include "head_cuda.h"
#endif

namespace pixcontrast {
namespace {

// hidden [P, E] and which of its rows take part, valid [P] bool; none: all of them.
struct Rows {
  Tensor hidden;
  optional<Tensor> valid;
  std::vector<int64_t> order;  // of those that take part, on CPUs

  Rows(const Tensor& hidden_, const optional<Tensor>& valid_)
      : hidden(hidden_.contiguous()), valid(contiguous(valid_)) {
    TORCH_CHECK_VALUE(hidden.dim() == 2, "hidden must be [P, E], got ", hidden.sizes());
    if (valid.has_value()) {
      TORCH_CHECK_VALUE(valid->sizes() == hidden.sizes().slice(0, 1), "valid must be [P], got ", valid->sizes());
      TORCH_CHECK_TYPE(valid->scalar_type() == at::kBool, "valid must be bool, got ", valid->scalar_type());
      TORCH_CHECK_VALUE(valid->device() == hidden.device(), "valid must be on ", hidden.device());
    }
    if (!hidden.is_cpu()) return;
    const auto* const some = read<bool>(valid);
    for (int64_t i = 0; i < hidden.size(0); ++i) {
      if (!some || some[i]) order.push_back(i);
    }
  }

  template <class T>
  HeadRows<T> arguments() const {
    return {read<T>(hidden), hidden.size(0), hidden.size(1), order.data(), static_cast<int64_t>(order.size())};
  }
#ifdef PIXCONTRAST_WITH_CUDA
  template <class T>
  HeadRowsCuda<T> cuda_arguments() const {
    return {read<T>(hidden), hidden.size(0), hidden.size(1), read<bool>(valid)};
  }
#endif
};

std::tuple<Tensor, Tensor, Tensor> moments(const Tensor& hidden, const optional<Tensor>& valid) {
  const Rows rows(hidden, valid);
  const auto mean = at::empty({hidden.size(1)}, hidden.options().dtype(accumulation(hidden)));
  const auto variance = at::empty_like(mean);
#ifdef PIXCONTRAST_WITH_CUDA
  if (hidden.is_cuda()) {
    const auto count = at::empty({}, hidden.options().dtype(at::kLong));
    dispatch_cuda(hidden, "head_moments", [&](auto number, cudaStream_t stream) {
      using T = decltype(number);
      const HeadMomentsCuda<T> args{rows.cuda_arguments<T>(), write<float>(mean), write<float>(variance),
                                    write<int64_t>(count)};
      const auto room = workspace(head_moments_cuda_workspace(args), hidden);
      return head_moments_cuda(args, room.mutable_data_ptr(), stream);
    });
    return {mean, variance, count};
  }
#endif
  dispatch_cpu(hidden, "head_moments", [&](auto number) {
    using T = decltype(number);
    head_moments_cpu(HeadMoments<T>{rows.arguments<T>(), write<Acc<T>>(mean), write<Acc<T>>(variance)});
  });
  return {mean, variance, at::scalar_tensor(static_cast<int64_t>(rows.order.size()), at::kLong)};
}

// The inputs that forward and backward share, checked.
struct Inputs {
  Rows rows;
  Tensor mean, rstd, norm_weight, norm_bias, weight;

  Inputs(const Tensor& hidden, const optional<Tensor>& valid, const Tensor& mean_, const Tensor& rstd_,
         const Tensor& norm_weight_, const Tensor& norm_bias_, const Tensor& weight_)
      : rows(hidden, valid) {
    const auto sizes = hidden.sizes().slice(1, 1);
    mean = checked(mean_, "mean", sizes, hidden);
    rstd = checked(rstd_, "rstd", sizes, hidden);
    norm_weight = checked(norm_weight_, "norm_weight", sizes, hidden);
    norm_bias = checked(norm_bias_, "norm_bias", sizes, hidden);
    TORCH_CHECK_VALUE(weight_.dim() == 2 && weight_.size(1) == hidden.size(1), "weight must be [O, E], got ",
                      weight_.sizes());
    TORCH_CHECK_VALUE(weight_.device() == hidden.device(), "weight must be on ", hidden.device());
    weight = multipliable(weight_, "weight", hidden.scalar_type());
  }

  template <class T>
  Head<T> arguments() const {
    Head<T> args{};
    args.rows = rows.arguments<T>();
    args.outputs = weight.size(0);
    args.mean = read<Acc<T>>(mean);
    args.rstd = read<Acc<T>>(rstd);
    args.norm_weight = read<Acc<T>>(norm_weight);
    args.norm_bias = read<Acc<T>>(norm_bias);
    args.weight = source<T>(weight);
    return args;
  }
#ifdef PIXCONTRAST_WITH_CUDA
  HeadNorm norm() const {
    return {read<float>(mean), read<float>(rstd), read<float>(norm_weight), read<float>(norm_bias)};
  }
#endif
};

Tensor head(const Tensor& hidden, const optional<Tensor>& valid, const Tensor& mean, const Tensor& rstd,
            const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& weight, const Tensor& bias_) {
  const Inputs inputs(hidden, valid, mean, rstd, norm_weight, norm_bias, weight);
  const auto bias = checked(bias_, "bias", weight.sizes().slice(0, 1), hidden);
  const auto out = empty_map({hidden.size(0), weight.size(0)}, hidden.options());
#ifdef PIXCONTRAST_WITH_CUDA
  if (hidden.is_cuda()) {
    const auto factors = inputs.weight.to(hidden.scalar_type());
    dispatch_cuda(hidden, "head", [&](auto number, cudaStream_t stream) {
      using T = decltype(number);
      const HeadCuda<T> args{inputs.rows.cuda_arguments<T>(),
                             inputs.norm(),
                             factors.size(0),
                             read<T>(factors),
                             read<float>(bias),
                             write<T>(out)};
      const auto room = workspace(head_cuda_workspace(args), hidden);
      return head_cuda(args, tensor_cores(hidden), room.mutable_data_ptr(), stream);
    });
    return out;
  }
#endif
  dispatch_cpu(hidden, "head", [&](auto number) {
    using T = decltype(number);
    auto args = inputs.arguments<T>();
    args.bias = read<Acc<T>>(bias);
    args.out = write<T>(out);
    head_cpu(args);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_, const Tensor& hidden,
                                                            const optional<Tensor>& valid, const Tensor& mean,
                                                            const Tensor& rstd, const Tensor& norm_weight,
                                                            const Tensor& norm_bias, const Tensor& weight,
                                                            const Tensor& share_) {
  const Inputs inputs(hidden, valid, mean, rstd, norm_weight, norm_bias, weight);
  TORCH_CHECK_VALUE(grad_.sizes() == at::IntArrayRef({hidden.size(0), weight.size(0)}), "grad must be [P, O], got ",
                    grad_.sizes());
  TORCH_CHECK_TYPE(grad_.scalar_type() == hidden.scalar_type(), "grad must be ", hidden.scalar_type(), ", got ",
                   grad_.scalar_type());
  TORCH_CHECK_VALUE(grad_.device() == hidden.device(), "grad must be on ", hidden.device());
  const auto grad = grad_.contiguous(), share = checked(share_, "share", {}, hidden);
  const auto sums = inputs.mean.options();
  const auto grad_hidden = empty_map(hidden.sizes(), hidden.options());
  const auto grad_norm_weight = at::empty_like(inputs.mean), grad_norm_bias = at::empty_like(inputs.mean);
  const auto grad_weight = at::empty(weight.sizes(), sums), grad_bias = at::empty({weight.size(0)}, sums);
  const auto results = [&] {
    return std::make_tuple(grad_hidden, grad_norm_weight, grad_norm_bias, grad_weight.to(weight.scalar_type()),
                           grad_bias);
  };
#ifdef PIXCONTRAST_WITH_CUDA
  if (hidden.is_cuda()) {
    const auto factors = inputs.weight.to(hidden.scalar_type());
    dispatch_cuda(hidden, "head_backward", [&](auto number, cudaStream_t stream) {
      using T = decltype(number);
      const HeadBackwardCuda<T> args{inputs.rows.cuda_arguments<T>(),
                                     inputs.norm(),
                                     factors.size(0),
                                     read<T>(factors),
                                     read<T>(grad),
                                     read<float>(share),
                                     write<T>(grad_hidden),
                                     write<float>(grad_norm_weight),
                                     write<float>(grad_norm_bias),
                                     write<float>(grad_weight),
                                     write<float>(grad_bias)};
      const auto room = workspace(head_backward_cuda_workspace(args), hidden);
      return head_backward_cuda(args, tensor_cores(hidden), room.mutable_data_ptr(), stream);
    });
    return results();
  }
#endif
  dispatch_cpu(hidden, "head_backward", [&](auto number) {
    using T = decltype(number);
    auto args = inputs.arguments<T>();
    args.grad = read<T>(grad);
    args.share = *read<Acc<T>>(share);
    args.grad_hidden = write<T>(grad_hidden);
    args.grad_norm_weight = write<Acc<T>>(grad_norm_weight);
    args.grad_norm_bias = write<Acc<T>>(grad_norm_bias);
    args.grad_weight = write<Acc<T>>(grad_weight);
    args.grad_bias = write<Acc<T>>(grad_bias);
    head_backward_cpu(args);
  });
  return results();
}

void implement(torch::Library& library) {
  library.impl("head_moments", &moments);
  library.impl("head", &head);
  library.impl("head_backward", &backward);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pixcontrast, library) {
  library.def("head_moments(Tensor hidden, Tensor? valid) -> (Tensor mean, Tensor variance, Tensor count)");
  library.def(
      "head(Tensor hidden, Tensor? valid, Tensor mean, Tensor rstd, Tensor norm_weight, Tensor norm_bias, "
      "Tensor weight, Tensor bias) -> Tensor");
  library.def(
      "head_backward(Tensor grad, Tensor hidden, Tensor? valid, Tensor mean, Tensor rstd, Tensor norm_weight, "
      "Tensor norm_bias, Tensor weight, Tensor share) -> (Tensor grad_hidden, Tensor grad_norm_weight, "
      "Tensor grad_norm_bias, Tensor grad_weight, Tensor grad_bias)");
}

TORCH_LIBRARY_IMPL(pixcontrast, CPU, library) { implement(library); }
#ifdef PIXCONTRAST_WITH_CUDA
TORCH_LIBRARY_IMPL(pixcontrast, CUDA, library) { implement(library); }
#endif

}  // namespace pixcontrast
