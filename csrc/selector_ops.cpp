// The class selectors behind their first product as PyTorch sees them, on CPUs: elsewhere PyTorch computes them, see
// pixcontrast/heads.py.
#include "ops.h"
#include "selector.h"

namespace pixcontrast {
namespace {

// hidden [P, E], ends [C] int64 that ascend from 0 to at most P
void check(const Tensor& hidden, const Tensor& ends) {
  TORCH_CHECK_VALUE(hidden.dim() == 2, "hidden must be [P, E], got ", hidden.sizes());
  TORCH_CHECK_VALUE(ends.dim() == 1, "ends must be [C], got ", ends.sizes());
  TORCH_CHECK_TYPE(ends.scalar_type() == at::kLong, "ends must be int64, got ", ends.scalar_type());
  TORCH_CHECK_VALUE(ends.is_contiguous(), "ends must be contiguous");
  int64_t last = 0;
  for (int64_t c = 0; c < ends.numel(); ++c) {
    const int64_t end = read<int64_t>(ends)[c];
    TORCH_CHECK_VALUE(last <= end, "ends must ascend from 0, got ", end, " after ", last);
    last = end;
  }
  TORCH_CHECK_VALUE(last == hidden.size(0), "the last of ends must be P = ", hidden.size(0), ", got ", last);
}

// Numbers of the classes: in the dtype of sums, and contiguous.
Tensor checked(const Tensor& t, const char* name, at::IntArrayRef sizes, const Tensor& hidden) {
  TORCH_CHECK_VALUE(t.sizes() == sizes, name, " must be ", sizes, ", got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == accumulation(hidden), name, " must be ", accumulation(hidden), ", got ",
                   t.scalar_type());
  return t.contiguous();
}

SortedRows rows_of(const Tensor& hidden, const Tensor& ends) {
  return {ends.numel(), hidden.size(1), read<int64_t>(ends)};
}

std::tuple<Tensor, Tensor> statistics(const Tensor& hidden_, const Tensor& ends) {
  check(hidden_, ends);
  const auto hidden = hidden_.contiguous();
  const auto mean = at::empty({ends.numel(), hidden.size(1)}, hidden.options().dtype(accumulation(hidden)));
  const auto variance = at::empty_like(mean);
  dispatch_cpu(hidden, "selector_statistics", [&](auto number) {
    using T = decltype(number);
    selector_statistics_cpu(
        SelectorStatistics<T>{rows_of(hidden, ends), read<T>(hidden), write<Acc<T>>(mean), write<Acc<T>>(variance)});
  });
  return {mean, variance};
}

// The inputs that forward and backward share, checked.
struct Inputs {
  Tensor hidden, ends, mean, rstd, norm_weight, norm_bias, weight;

  Inputs(const Tensor& hidden_, const Tensor& ends_, const Tensor& mean_, const Tensor& rstd_,
         const Tensor& norm_weight_, const Tensor& norm_bias_, const Tensor& weight_)
      : hidden(hidden_.contiguous()), ends(ends_) {
    check(hidden, ends);
    const at::DimVector sizes{ends.numel(), hidden.size(1)};
    mean = checked(mean_, "mean", sizes, hidden);
    rstd = checked(rstd_, "rstd", sizes, hidden);
    norm_weight = checked(norm_weight_, "norm_weight", sizes, hidden);
    norm_bias = checked(norm_bias_, "norm_bias", sizes, hidden);
    weight = checked(weight_, "weight", sizes, hidden);
  }

  template <class T>
  Selector<T> arguments() const {
    Selector<T> args{};
    args.rows = rows_of(hidden, ends);
    args.hidden = read<T>(hidden);
    args.mean = read<Acc<T>>(mean);
    args.rstd = read<Acc<T>>(rstd);
    args.norm_weight = read<Acc<T>>(norm_weight);
    args.norm_bias = read<Acc<T>>(norm_bias);
    args.weight = read<Acc<T>>(weight);
    return args;
  }
};

Tensor selector(const Tensor& hidden, const Tensor& ends, const Tensor& mean, const Tensor& rstd,
                const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& weight, const Tensor& bias_) {
  const Inputs inputs(hidden, ends, mean, rstd, norm_weight, norm_bias, weight);
  const auto bias = checked(bias_, "bias", ends.sizes(), hidden);
  const auto score = at::empty({hidden.size(0)}, bias.options());
  dispatch_cpu(hidden, "selector", [&](auto number) {
    using T = decltype(number);
    auto args = inputs.arguments<T>();
    args.bias = read<Acc<T>>(bias);
    args.score = write<Acc<T>>(score);
    selector_cpu(args);
  });
  return score;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_, const Tensor& hidden,
                                                            const Tensor& ends, const Tensor& mean, const Tensor& rstd,
                                                            const Tensor& norm_weight, const Tensor& norm_bias,
                                                            const Tensor& weight, const Tensor& own_) {
  const Inputs inputs(hidden, ends, mean, rstd, norm_weight, norm_bias, weight);
  const auto grad = checked(grad_, "grad", hidden.sizes().slice(0, 1), hidden);
  TORCH_CHECK_VALUE(own_.sizes() == ends.sizes(), "own must be [C], got ", own_.sizes());
  TORCH_CHECK_TYPE(own_.scalar_type() == at::kBool, "own must be bool, got ", own_.scalar_type());
  const auto own = own_.contiguous();
  const auto grad_hidden = at::empty_like(inputs.hidden);
  const auto grad_norm_weight = at::empty_like(inputs.mean), grad_norm_bias = at::empty_like(inputs.mean);
  const auto grad_weight = at::empty_like(inputs.mean), grad_bias = at::empty({ends.numel()}, inputs.mean.options());
  dispatch_cpu(hidden, "selector_backward", [&](auto number) {
    using T = decltype(number);
    auto args = inputs.arguments<T>();
    args.grad_score = read<Acc<T>>(grad);
    args.own = read<bool>(own);
    args.grad_hidden = write<T>(grad_hidden);
    args.grad_norm_weight = write<Acc<T>>(grad_norm_weight);
    args.grad_norm_bias = write<Acc<T>>(grad_norm_bias);
    args.grad_weight = write<Acc<T>>(grad_weight);
    args.grad_bias = write<Acc<T>>(grad_bias);
    selector_backward_cpu(args);
  });
  return {grad_hidden, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pixcontrast, library) {
  library.def("selector_statistics(Tensor hidden, Tensor ends) -> (Tensor mean, Tensor variance)");
  library.def(
      "selector(Tensor hidden, Tensor ends, Tensor mean, Tensor rstd, Tensor norm_weight, Tensor norm_bias, "
      "Tensor weight, Tensor bias) -> Tensor");
  library.def(
      "selector_backward(Tensor grad, Tensor hidden, Tensor ends, Tensor mean, Tensor rstd, Tensor norm_weight, "
      "Tensor norm_bias, Tensor weight, Tensor own) -> (Tensor grad_hidden, Tensor grad_norm_weight, "
      "Tensor grad_norm_bias, Tensor grad_weight, Tensor grad_bias)");
}

TORCH_LIBRARY_IMPL(pixcontrast, CPU, library) {
  library.impl("selector_statistics", &statistics);
  library.impl("selector", &selector);
  library.impl("selector_backward", &backward);
}

}  // namespace pixcontrast
