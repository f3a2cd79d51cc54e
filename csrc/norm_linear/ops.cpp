#include "common/tensor.h"
#include "norm_linear/norm_linear.h"

namespace pixcontrast {
namespace {

template <class T>
void run(const NormStats<T>& args, const Cpu&) {
  norm_stats_cpu(args);
}
template <class T>
void run(const NormLinear<T>& args, const Cpu&) {
  args.grad_hidden ? norm_backward_cpu(args) : norm_forward_cpu(args);
}

#ifdef PIXCONTRAST_WITH_CUDA
template <class T>
void run(const NormStats<T>& args, const Cuda& device) {
  const Tensor workspace = device.workspace(norm_workspace(args.rows));
  C10_CUDA_CHECK(norm_stats_cuda(args, workspace.mutable_data_ptr(), device.stream));
}
template <class T>
void run(const NormLinear<T>& args, const Cuda& device) {
  if (!args.grad_hidden) {
    C10_CUDA_CHECK(norm_forward_cuda(args, device.stream));
    return;
  }
  const Tensor workspace = device.workspace(norm_workspace(args.rows));
  C10_CUDA_CHECK(norm_backward_cuda(args, workspace.mutable_data_ptr(), device.stream));
}
#endif

// hidden [P, E], order [P] int64, start [C] and count [C] int64
struct Rows {
  Tensor hidden;
  optional<Tensor> order;
  CheckedSegments segments;

  Rows(const Tensor& hidden_, const optional<Tensor>& order_, const optional<Tensor>& start, const Tensor& count)
      : hidden(hidden_.contiguous()), segments(start, count, hidden_.size(0), hidden_.device()) {
    TORCH_CHECK_VALUE(hidden.dim() == 2, "hidden must be [P, E], got ", hidden.sizes());
    order = checked(order_, "order", hidden.sizes().slice(0, 1), at::kLong, hidden.device());
    if (!order.has_value() || !hidden.is_cpu()) return;
    for (int64_t i = 0; i < hidden.size(0); ++i) {
      const int64_t row = read<int64_t>(order)[i];
      TORCH_CHECK_VALUE(row >= 0 && row < hidden.size(0), "order must be within 0..", hidden.size(0) - 1, ", got ",
                        row);
    }
  }

  // [C, E] in the dtype of sums; [E] where there is one segment
  Tensor parameter(const Tensor& t, const char* name) const {
    TORCH_CHECK_VALUE(t.numel() == segments.count.numel() * hidden.size(1), name, " must be [C, E], got ", t.sizes());
    return checked(t, name, t.sizes(), accumulation(hidden), hidden.device());
  }

  template <class T>
  SegmentRows<T> arguments() const {
    return {segments.get(), hidden.size(1), read<T>(hidden), read<int64_t>(order)};
  }
};

template <class Device>
std::tuple<Tensor, Tensor, Tensor> norm_stats(const Tensor& hidden, const optional<Tensor>& order,
                                              const optional<Tensor>& start, const Tensor& count,
                                              const Tensor& hidden_bias_, const Tensor& running_mean,
                                              const Tensor& running_var, const optional<Tensor>& batches, bool training,
                                              double momentum, double eps) {
  const Rows rows(hidden, order, start, count);
  for (const auto& [t, name] : {std::pair(running_mean, "running_mean"), std::pair(running_var, "running_var")}) {
    rows.parameter(t, name);
    TORCH_CHECK_VALUE(t.is_contiguous(), name, " must be contiguous");
  }
  checked(batches, "batches", {}, at::kLong, hidden.device());
  const Tensor hidden_bias = rows.parameter(hidden_bias_, "hidden_bias");
  const auto options = running_mean.options();
  const auto mean = at::empty({count.numel(), hidden.size(1)}, options), rstd = at::empty_like(mean);
  const auto share = at::empty({count.numel()}, options);
  Device::dispatch(hidden, "norm_stats", [&](auto element, const auto& device) {
    using T = decltype(element);
    using A = Acc<T>;
    run(NormStats<T>{rows.arguments<T>(), training, static_cast<A>(momentum), static_cast<A>(eps), read<A>(hidden_bias),
                     write<A>(running_mean), write<A>(running_var),
                     batches.has_value() ? write<int64_t>(*batches) : nullptr, write<A>(mean), write<A>(rstd),
                     write<A>(share)},
        device);
  });
  return {mean, rstd, share};
}

// The inputs that all four operators share, and the weight of one output a segment.
struct Inputs {
  Rows rows;
  Tensor mean, rstd, norm_weight, norm_bias, weight;
  double slope;

  template <class T>
  NormLinear<T> arguments() const {
    NormLinear<T> args{};
    args.rows = rows.arguments<T>();
    args.slope = static_cast<Acc<T>>(slope);
    args.mean = read<Acc<T>>(mean);
    args.rstd = read<Acc<T>>(rstd);
    args.norm_weight = read<Acc<T>>(norm_weight);
    args.norm_bias = read<Acc<T>>(norm_bias);
    args.weight = read<Acc<T>>(weight);
    return args;
  }
};

// `Dense`: weight [O, E] in the dtype of hidden, for a layer of all segments. Else weight [C, E] in the dtype of sums,
// for one output a segment.
template <bool Dense>
Inputs checked_inputs(const Rows& rows, const Tensor& mean, const Tensor& rstd, const Tensor& norm_weight,
                      const Tensor& norm_bias, double slope, const Tensor& weight) {
  if (Dense) {
    TORCH_CHECK_VALUE(weight.dim() == 2, "weight must be [O, E], got ", weight.sizes());
    checked(weight, "weight", {weight.size(0), rows.hidden.size(1)}, rows.hidden.scalar_type(), rows.hidden.device());
  }
  return {rows,
          rows.parameter(mean, "mean"),
          rows.parameter(rstd, "rstd"),
          rows.parameter(norm_weight, "norm_weight"),
          rows.parameter(norm_bias, "norm_bias"),
          Dense ? Tensor() : rows.parameter(weight, "weight"),
          slope};
}

template <class Device>
Tensor activations(const Inputs& inputs) {
  const auto result = empty_map(inputs.rows.hidden.sizes(), inputs.rows.hidden.options());
  Device::dispatch(result, "norm_linear", [&](auto element, const auto& device) {
    using T = decltype(element);
    auto args = inputs.arguments<T>();
    args.activations = write<T>(result);
    run(args, device);
  });
  return result;
}

template <class Device, bool Dense>
Tensor forward(const Tensor& hidden, const optional<Tensor>& order, const optional<Tensor>& start, const Tensor& count,
               const Tensor& mean, const Tensor& rstd, const Tensor& norm_weight, const Tensor& norm_bias, double slope,
               const Tensor& weight, const Tensor& bias_) {
  const Inputs inputs =
      checked_inputs<Dense>({hidden, order, start, count}, mean, rstd, norm_weight, norm_bias, slope, weight);
  if (Dense) {
    checked(bias_, "bias", {weight.size(0)}, hidden.scalar_type(), hidden.device());
    const auto out = empty_map({hidden.size(0), weight.size(0)}, hidden.options());
    gemm<Device>(activations<Device>(inputs), weight.t(), bias_, out);
    return out;
  }
  const auto bias = checked(bias_, "bias", count.sizes(), accumulation(hidden), hidden.device());
  const auto out = at::empty({hidden.size(0)}, bias.options());
  Device::dispatch(hidden, "norm_dot", [&](auto element, const auto& device) {
    using T = decltype(element);
    auto args = inputs.arguments<T>();
    args.bias = read<Acc<T>>(bias);
    args.out = write<Acc<T>>(out);
    run(args, device);
  });
  return out;
}

template <class Device, bool Dense>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_out, const Tensor& hidden, const optional<Tensor>& order, const optional<Tensor>& start,
    const Tensor& count, const Tensor& mean, const Tensor& rstd, const Tensor& share_, const Tensor& norm_weight,
    const Tensor& norm_bias, double slope, const Tensor& weight) {
  const Inputs inputs =
      checked_inputs<Dense>({hidden, order, start, count}, mean, rstd, norm_weight, norm_bias, slope, weight);
  const auto share = checked(share_, "share", count.sizes(), accumulation(hidden), hidden.device());
  const auto grad_weight = at::empty(weight.sizes(), weight.options());
  Tensor grad, grad_activations, grad_bias;
  if (Dense) {
    grad = checked(grad_out, "grad_out", {hidden.size(0), weight.size(0)}, hidden.scalar_type(), hidden.device());
    grad_activations = empty_map(hidden.sizes(), inputs.rows.hidden.options());
    gemm<Device>(grad.t(), activations<Device>(inputs), {}, grad_weight);
    gemm<Device>(grad, weight, {}, grad_activations);
    grad_bias = grad.sum(0, false, grad.scalar_type());
  } else {
    grad = checked(grad_out, "grad_out", {hidden.size(0)}, accumulation(hidden), hidden.device());
    grad_bias = at::empty(count.sizes(), weight.options());
  }
  const auto grad_hidden = empty_map(hidden.sizes(), inputs.rows.hidden.options());
  const auto grad_norm_weight = at::empty_like(inputs.norm_weight), grad_norm_bias = at::empty_like(grad_norm_weight);
  const auto grad_hidden_bias = at::empty_like(grad_norm_weight);
  Device::dispatch(hidden, Dense ? "norm_linear_backward" : "norm_dot_backward", [&](auto element, const auto& device) {
    using T = decltype(element);
    auto args = inputs.arguments<T>();
    args.share = read<Acc<T>>(share);
    args.grad_activations = read<T>(grad_activations);
    args.grad_hidden = write<T>(grad_hidden);
    args.grad_norm_weight = write<Acc<T>>(grad_norm_weight);
    args.grad_norm_bias = write<Acc<T>>(grad_norm_bias);
    args.grad_hidden_bias = write<Acc<T>>(grad_hidden_bias);
    if (!Dense) {
      args.grad_out = read<Acc<T>>(grad);
      args.grad_weight = write<Acc<T>>(grad_weight);
      args.grad_bias = write<Acc<T>>(grad_bias);
    }
    run(args, device);
  });
  return {grad_hidden, grad_norm_weight, grad_norm_bias, grad_hidden_bias, grad_weight, grad_bias};
}

template <class Device>
void implement(torch::Library& library) {
  library.impl("norm_stats", &norm_stats<Device>);
  library.impl("norm_linear", &forward<Device, true>);
  library.impl("norm_linear_backward", &backward<Device, true>);
  library.impl("norm_dot", &forward<Device, false>);
  library.impl("norm_dot_backward", &backward<Device, false>);
}

}  // namespace

#define ROWS "Tensor hidden, Tensor? order, Tensor? start, Tensor count, "
#define FORWARD                                                                   \
  "(" ROWS                                                                        \
  "Tensor mean, Tensor rstd, Tensor norm_weight, Tensor norm_bias, float slope, " \
  "Tensor weight, Tensor bias) -> Tensor"
#define BACKWARD                                                                                    \
  "_backward(Tensor grad_out, " ROWS                                                                \
  "Tensor mean, Tensor rstd, Tensor share, Tensor norm_weight, "                                    \
  "Tensor norm_bias, float slope, Tensor weight) -> (Tensor grad_hidden, Tensor grad_norm_weight, " \
  "Tensor grad_norm_bias, Tensor grad_hidden_bias, Tensor grad_weight, Tensor grad_bias)"

TORCH_LIBRARY_FRAGMENT(pixcontrast, library) {
  library.def("norm_stats(" ROWS
              "Tensor hidden_bias, Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? batches, "
              "bool training, float momentum, float eps) -> (Tensor mean, Tensor rstd, Tensor share)");
  library.def("norm_linear" FORWARD);
  library.def("norm_linear" BACKWARD);
  library.def("norm_dot" FORWARD);
  library.def("norm_dot" BACKWARD);
}

PIXCONTRAST_IMPLEMENT(implement)

}  // namespace pixcontrast
