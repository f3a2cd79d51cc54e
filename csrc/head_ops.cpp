// The heads behind their first product as PyTorch sees them, on CPUs: elsewhere PyTorch computes them, see
// pixcontrast/heads.py.
#include "head.h"
#include "layer_ops.h"

namespace pixcontrast {
namespace {

// hidden [P, E] and which of its rows take part, valid [P] bool; none: all of them.
struct Rows {
  Tensor hidden;
  std::vector<int64_t> order;

  Rows(const Tensor& hidden_, const optional<Tensor>& valid) : hidden(hidden_.contiguous()) {
    TORCH_CHECK_VALUE(hidden.dim() == 2, "hidden must be [P, E], got ", hidden.sizes());
    if (valid.has_value()) {
      TORCH_CHECK_VALUE(valid->sizes() == hidden.sizes().slice(0, 1), "valid must be [P], got ", valid->sizes());
      TORCH_CHECK_TYPE(valid->scalar_type() == at::kBool, "valid must be bool, got ", valid->scalar_type());
    }
    const auto mask = contiguous(valid);
    const auto* const some = read<bool>(mask);
    for (int64_t i = 0; i < hidden.size(0); ++i) {
      if (!some || some[i]) order.push_back(i);
    }
  }

  template <class T>
  HeadRows<T> arguments() const {
    return {read<T>(hidden), hidden.size(0), hidden.size(1), order.data(), static_cast<int64_t>(order.size())};
  }
};

std::tuple<Tensor, Tensor, Tensor> moments(const Tensor& hidden, const optional<Tensor>& valid) {
  const Rows rows(hidden, valid);
  const auto mean = at::empty({hidden.size(1)}, hidden.options().dtype(accumulation(hidden)));
  const auto variance = at::empty_like(mean);
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
};

Tensor head(const Tensor& hidden, const optional<Tensor>& valid, const Tensor& mean, const Tensor& rstd,
            const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& weight, const Tensor& bias_) {
  const Inputs inputs(hidden, valid, mean, rstd, norm_weight, norm_bias, weight);
  const auto bias = checked(bias_, "bias", weight.sizes().slice(0, 1), hidden);
  const auto out = empty_map({hidden.size(0), weight.size(0)}, hidden.options());
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
                                                            const Tensor& norm_bias, const Tensor& weight, bool own) {
  const Inputs inputs(hidden, valid, mean, rstd, norm_weight, norm_bias, weight);
  TORCH_CHECK_VALUE(grad_.sizes() == at::IntArrayRef({hidden.size(0), weight.size(0)}), "grad must be [P, O], got ",
                    grad_.sizes());
  TORCH_CHECK_TYPE(grad_.scalar_type() == hidden.scalar_type(), "grad must be ", hidden.scalar_type(), ", got ",
                   grad_.scalar_type());
  const auto grad = grad_.contiguous();
  const auto sums = inputs.mean.options();
  const auto grad_hidden = empty_map(hidden.sizes(), hidden.options());
  const auto grad_norm_weight = at::empty_like(inputs.mean), grad_norm_bias = at::empty_like(inputs.mean);
  const auto grad_weight = at::empty(weight.sizes(), sums), grad_bias = at::empty({weight.size(0)}, sums);
  dispatch_cpu(hidden, "head_backward", [&](auto number) {
    using T = decltype(number);
    auto args = inputs.arguments<T>();
    args.grad = read<T>(grad);
    args.own = own;
    args.grad_hidden = write<T>(grad_hidden);
    args.grad_norm_weight = write<Acc<T>>(grad_norm_weight);
    args.grad_norm_bias = write<Acc<T>>(grad_norm_bias);
    args.grad_weight = write<Acc<T>>(grad_weight);
    args.grad_bias = write<Acc<T>>(grad_bias);
    head_backward_cpu(args);
  });
  return {grad_hidden, grad_norm_weight, grad_norm_bias, grad_weight.to(weight.scalar_type()), grad_bias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pixcontrast, library) {
  library.def("head_moments(Tensor hidden, Tensor? valid) -> (Tensor mean, Tensor variance, Tensor count)");
  library.def(
      "head(Tensor hidden, Tensor? valid, Tensor mean, Tensor rstd, Tensor norm_weight, Tensor norm_bias, "
      "Tensor weight, Tensor bias) -> Tensor");
  library.def(
      "head_backward(Tensor grad, Tensor hidden, Tensor? valid, Tensor mean, Tensor rstd, Tensor norm_weight, "
      "Tensor norm_bias, Tensor weight, bool own) -> (Tensor grad_hidden, Tensor grad_norm_weight, "
      "Tensor grad_norm_bias, Tensor grad_weight, Tensor grad_bias)");
}

TORCH_LIBRARY_IMPL(pixcontrast, CPU, library) {
  library.impl("head_moments", &moments);
  library.impl("head", &head);
  library.impl("head_backward", &backward);
}

}  // namespace pixcontrast
