// The class selectors as PyTorch sees them, on CPUs: elsewhere PyTorch computes them, see pixcontrast/heads.py.
#include "common/layer_ops.h"
#include "selector.h"

namespace pixcontrast {
namespace {

// Rows by class, those of one class in their order, then those of none; and how far each class goes.
std::tuple<Tensor, Tensor> sort_by_class(const Tensor& labels_, int64_t classes) {
  TORCH_CHECK_VALUE(labels_.dim() == 1 && classes > 0, "labels must be [N], got ", labels_.sizes());
  TORCH_CHECK_TYPE(labels_.scalar_type() == at::kLong, "labels must be int64, got ", labels_.scalar_type());
  const auto labels = labels_.contiguous();
  const auto order = at::empty_like(labels), ends = at::empty({classes}, labels.options());
  const auto* const label = read<int64_t>(labels);
  const auto place = [&](int64_t c) { return c >= 0 && c < classes ? c : classes; };
  std::vector<int64_t> next(classes + 2);  // where the next row of a class goes
  for (int64_t i = 0; i < labels.numel(); ++i) ++next[place(label[i]) + 1];
  for (int64_t c = 0; c < classes; ++c) write<int64_t>(ends)[c] = next[c + 1] += next[c];
  for (int64_t i = 0; i < labels.numel(); ++i) write<int64_t>(order)[next[place(label[i])]++] = i;
  return {order, ends};
}

// order [P] int64, places of different rows; ends [C] int64 that ascend from 0 to P
void check(const Tensor& rows, const Tensor& order, const Tensor& ends) {
  TORCH_CHECK_VALUE(rows.dim() == 2, "rows must be [N, D], got ", rows.sizes());
  for (const auto& [t, name] : {std::pair(order, "order"), std::pair(ends, "ends")}) {
    TORCH_CHECK_VALUE(t.dim() == 1 && t.is_contiguous(), name, " must be one contiguous row, got ", t.sizes());
    TORCH_CHECK_TYPE(t.scalar_type() == at::kLong, name, " must be int64, got ", t.scalar_type());
  }
  int64_t last = 0;
  for (int64_t c = 0; c < ends.numel(); ++c) {
    const int64_t end = read<int64_t>(ends)[c];
    TORCH_CHECK_VALUE(last <= end, "ends must ascend from 0, got ", end, " after ", last);
    last = end;
  }
  TORCH_CHECK_VALUE(last == order.size(0), "the last of ends must be P = ", order.size(0), ", got ", last);
  std::vector<bool> seen(rows.size(0));
  for (int64_t i = 0; i < order.numel(); ++i) {
    const int64_t row = read<int64_t>(order)[i];
    TORCH_CHECK_VALUE(row >= 0 && row < rows.size(0) && !seen[row], "order must name rows once, got ", row, " at ", i);
    seen[row] = true;
  }
}

SortedRows sorted(const Tensor& order, const Tensor& ends) {
  return {ends.numel(), read<int64_t>(order), read<int64_t>(ends)};
}

// rows [N, D] and first [C, E, D], checked.
std::pair<Tensor, Tensor> factors(const Tensor& rows, const Tensor& first, const Tensor& ends, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(first.dim() == 3 && first.size(0) == ends.numel() && first.size(2) == rows.size(1),
                    "first must be [C, E, D], got ", first.sizes());
  return {multipliable(rows, "rows", dtype), multipliable(first, "first", dtype)};
}

std::tuple<Tensor, Tensor, Tensor> hidden(const Tensor& rows_, const Tensor& order, const Tensor& ends,
                                          const Tensor& first_, at::ScalarType dtype) {
  check(rows_, order, ends);
  const auto [rows, first] = factors(rows_, first_, ends, dtype);
  // room for all rows: how many are of a class may vary from step to step, and other sizes are other blocks
  const auto room = empty_map({rows.size(0), first.size(1)}, rows.options().dtype(dtype));
  const auto made = room.narrow(0, 0, order.size(0));
  const auto mean = at::empty({ends.numel(), first.size(1)}, rows.options().dtype(accumulation(made)));
  const auto variance = at::empty_like(mean);
  dispatch_cpu(made, "selector_hidden", [&, &rows = rows, &first = first](auto number) {
    using T = decltype(number);
    selector_hidden_cpu(SelectorHidden<T>{sorted(order, ends), first.size(1), source<T>(rows), source<T>(first),
                                          write<T>(made), write<Acc<T>>(mean), write<Acc<T>>(variance)});
  });
  return {made, mean, variance};
}

// The inputs that forward and backward share, checked.
struct Inputs {
  Tensor hidden, order, ends, mean, rstd, norm_weight, norm_bias, weight;

  Inputs(const Tensor& hidden_, const Tensor& order_, const Tensor& ends_, const Tensor& mean_, const Tensor& rstd_,
         const Tensor& norm_weight_, const Tensor& norm_bias_, const Tensor& weight_)
      : hidden(hidden_.contiguous()), order(order_), ends(ends_) {
    TORCH_CHECK_VALUE(hidden.dim() == 2 && hidden.size(0) == order.numel(), "hidden must be [P, E], got ",
                      hidden.sizes());
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
    args.sorted = sorted(order, ends);
    args.width = hidden.size(1);
    args.hidden = read<T>(hidden);
    args.mean = read<Acc<T>>(mean);
    args.rstd = read<Acc<T>>(rstd);
    args.norm_weight = read<Acc<T>>(norm_weight);
    args.norm_bias = read<Acc<T>>(norm_bias);
    args.weight = read<Acc<T>>(weight);
    return args;
  }
};

Tensor score(const Tensor& rows, const Tensor& order, const Tensor& ends, const Tensor& hidden, const Tensor& mean,
             const Tensor& rstd, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& weight,
             const Tensor& bias_) {
  check(rows, order, ends);
  const Inputs inputs(hidden, order, ends, mean, rstd, norm_weight, norm_bias, weight);
  const auto bias = checked(bias_, "bias", ends.sizes(), hidden);
  const auto made = at::zeros({rows.size(0)}, bias.options());
  dispatch_cpu(hidden, "selector", [&](auto number) {
    using T = decltype(number);
    auto args = inputs.arguments<T>();
    args.bias = read<Acc<T>>(bias);
    args.score = write<Acc<T>>(made);
    selector_cpu(args);
  });
  return made;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_, const Tensor& rows_, const Tensor& order, const Tensor& ends, const Tensor& first_,
    const Tensor& hidden, const Tensor& mean, const Tensor& rstd, const Tensor& norm_weight, const Tensor& norm_bias,
    const Tensor& weight, const Tensor& own_, bool rows_grad) {
  check(rows_, order, ends);
  const Inputs inputs(hidden, order, ends, mean, rstd, norm_weight, norm_bias, weight);
  const auto [rows, first] = factors(rows_, first_, ends, hidden.scalar_type());
  TORCH_CHECK_VALUE(first.size(1) == hidden.size(1), "first must be [C, E, D], got ", first.sizes());
  const auto grad = checked(grad_, "grad", rows.sizes().slice(0, 1), hidden);
  TORCH_CHECK_VALUE(own_.sizes() == ends.sizes(), "own must be [C], got ", own_.sizes());
  TORCH_CHECK_TYPE(own_.scalar_type() == at::kBool, "own must be bool, got ", own_.scalar_type());
  const auto own = own_.contiguous();
  const auto sums = inputs.mean.options();
  Tensor grad_rows;
  if (rows_grad) grad_rows = at::zeros(rows.sizes(), sums);
  const auto grad_first = at::empty(first.sizes(), sums);
  const auto grad_norm_weight = at::empty_like(inputs.mean), grad_norm_bias = at::empty_like(inputs.mean);
  const auto grad_weight = at::empty_like(inputs.mean), grad_bias = at::empty({ends.numel()}, sums);
  dispatch_cpu(hidden, "selector_backward", [&, &rows = rows, &first = first](auto number) {
    using T = decltype(number);
    auto args = inputs.arguments<T>();
    args.rows = source<T>(rows);
    args.first = source<T>(first);
    args.grad_score = read<Acc<T>>(grad);
    args.own = read<bool>(own);
    args.grad_rows = write<Acc<T>>(grad_rows);
    args.grad_first = write<Acc<T>>(grad_first);
    args.grad_norm_weight = write<Acc<T>>(grad_norm_weight);
    args.grad_norm_bias = write<Acc<T>>(grad_norm_bias);
    args.grad_weight = write<Acc<T>>(grad_weight);
    args.grad_bias = write<Acc<T>>(grad_bias);
    selector_backward_cpu(args);
  });
  return {made(rows_grad ? grad_rows.to(rows.scalar_type()) : grad_rows, rows),
          grad_first.to(first.scalar_type()),
          grad_norm_weight,
          grad_norm_bias,
          grad_weight,
          grad_bias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pixcontrast, library) {
  library.def("sort_by_class(Tensor labels, int classes) -> (Tensor order, Tensor ends)");
  library.def(
      "selector_hidden(Tensor rows, Tensor order, Tensor ends, Tensor first, ScalarType dtype) -> "
      "(Tensor hidden, Tensor mean, Tensor variance)");
  library.def(
      "selector(Tensor rows, Tensor order, Tensor ends, Tensor hidden, Tensor mean, Tensor rstd, Tensor norm_weight, "
      "Tensor norm_bias, Tensor weight, Tensor bias) -> Tensor");
  library.def(
      "selector_backward(Tensor grad, Tensor rows, Tensor order, Tensor ends, Tensor first, Tensor hidden, "
      "Tensor mean, Tensor rstd, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor own, bool rows_grad) -> "
      "(Tensor grad_rows, Tensor grad_first, Tensor grad_norm_weight, Tensor grad_norm_bias, Tensor grad_weight, "
      "Tensor grad_bias)");
}

TORCH_LIBRARY_IMPL(pixcontrast, CPU, library) {
  library.impl("sort_by_class", &sort_by_class);
  library.impl("selector_hidden", &hidden);
  library.impl("selector", &score);
  library.impl("selector_backward", &backward);
}

}  // namespace pixcontrast
